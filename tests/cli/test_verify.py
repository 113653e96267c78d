"""`pillarbox verify`, on directories that real processes filled, delivered from, were killed in, or that the test damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import layout, record
from pillarbox.store.ledger_entries import AdoptedEntry, SealedEntry, parse_ledger
from pillarbox.testing import RecordingSink
from tests.cli.test_commands import event_line, run
from tests.conftest import event, wait_until

WRITE_FOR_EVER = """
import sys
from pillarbox import Outbox
from tests.conftest import event
with Outbox(sys.argv[1], batch_size=50, flush_interval=0.02, max_bytes=2_000_000) as outbox:
    number = 0
    while True:
        number += bool(outbox.enqueue(event(number)))
"""
DELIVER_FOR_EVER = [sys.executable, "-m", "pillarbox", "deliver", "-d", "box", "--sink", "sqlite:///events.db", "-q"]


def verify_json(folder: Path) -> dict[str, Any]:
    """The JSON output of `verify` for `box`, after a check of the exit code."""
    completed = run("verify", "-d", "box", "--json", cwd=folder)
    answer: dict[str, Any] = json.loads(completed.stdout)
    assert completed.returncode == int(not answer["balances"]), completed
    reconciliation: dict[str, Any] = answer["reconciliation"]
    return answer | reconciliation


def verify_text(folder: Path) -> str:
    """The text output of `verify`."""
    return run("verify", "-d", "box", cwd=folder).stdout.decode()


def start_process(*command: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that the test kills later."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill_process(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL, as the kernel does if memory runs out."""
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def batch_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "box").glob("sealed-*.ndjson"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder whose `box` has five batches of ten events, by one writer that has ended."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        for number in range(50):
            assert outbox.enqueue(event(number))
            if number % 10 == 9:
                assert outbox._sealer.seal_now("manual", 60)
    assert len(batch_files(tmp_path)) == 5
    return tmp_path


def test_the_result_is_one_line(filled: Path) -> None:
    """Before and after delivery; --writers adds a table."""
    assert verify_text(filled) == "balanced: accepted 50 = delivered 0 + pending 50 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert verify_text(filled) == "balanced: accepted 50 = delivered 50 + pending 0 + dead 0 + quarantined 0 + evicted 0\n"
    table = run("verify", "-d", "box", "--writers", cwd=filled).stdout.decode().splitlines()
    assert table[1].split()[:2] == ["writer", "accepted"]
    assert [line.split()[1:4] for line in table[2:]] == [["50", "0", "50"], ["50", "0", "50"]]


def test_verify_creates_and_changes_nothing(filled: Path) -> None:
    """Not even in an empty directory. A missing directory is a usage error."""

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (filled / "box").iterdir()}

    before = content()
    assert verify_json(filled)["balances"]
    assert content() == before
    (filled / "empty").mkdir()
    assert run("verify", "-d", "empty", cwd=filled).returncode == 0
    assert not list((filled / "empty").iterdir())
    assert run("verify", "-d", "nowhere", cwd=filled).returncode == 2


def test_the_ledger_balances_while_writers_and_a_worker_run_and_are_killed(tmp_path: Path) -> None:
    """At every moment."""
    box = str(tmp_path / "box")
    (tmp_path / "box").mkdir()
    for _ in range(2):
        writers = [start_process(sys.executable, "-c", WRITE_FOR_EVER, box, folder=tmp_path) for _ in range(2)]
        deliverer = start_process(*DELIVER_FOR_EVER, folder=tmp_path)
        delivered = verify_json(tmp_path)["total"]["delivered"]
        wait_until(lambda least=delivered: verify_json(tmp_path)["total"]["delivered"] > least)  # type: ignore[misc]
        for process in (writers[0], deliverer, writers[1]):
            kill_process(process)
            answer = verify_json(tmp_path)
            assert answer["balances"], answer
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    total = verify_json(tmp_path)["total"]
    assert total["pending"] == 0
    assert total["accepted"] == total["delivered"] > 100


def test_a_missing_batch_is_reported(filled: Path) -> None:
    """With its writer and its number of events."""
    victim = batch_files(filled)[2]
    victim.unlink()
    answer = verify_json(filled)
    assert [(discrepancy["batch"], discrepancy["events"]) for discrepancy in answer["discrepancies"]] == [(victim.stem, 10)]
    assert answer["discrepancies"][0]["writer"] == answer["writers"][0]["writer"]
    text = verify_text(filled)
    assert text.startswith("does not balance: accepted 50 <> delivered 0 + pending 40 + dead 0")
    assert f"{victim.stem} of writer {answer['writers'][0]['writer']}: 10 events missing" in text


@pytest.mark.parametrize(("doubled", "events"), [(False, 1), (True, -1)])
def test_a_deleted_or_duplicated_line_is_reported(filled: Path, events: int, *, doubled: bool) -> None:
    """Before and after delivery, because the destination has what was in the file."""
    victim = batch_files(filled)[1]
    lines = victim.read_bytes().splitlines(keepends=True)
    victim.write_bytes(b"".join([*lines, lines[0]] if doubled else lines[1:]))
    assert [(discrepancy["batch"], discrepancy["events"]) for discrepancy in verify_json(filled)["discrepancies"]] == [
        (victim.stem, events)
    ]
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert [(discrepancy["batch"], discrepancy["events"]) for discrepancy in verify_json(filled)["discrepancies"]] == [
        (victim.stem, events)
    ]


def test_a_damaged_line_counts_as_one_quarantined_event(filled: Path) -> None:
    """The writer's count shows that it was one event."""
    victim = batch_files(filled)[0]
    victim.write_bytes(victim.read_bytes().replace(b"click", b"clack", 1))
    assert verify_json(filled)["balances"]
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert verify_text(filled) == "balanced: accepted 50 = delivered 49 + pending 0 + dead 0 + quarantined 1 + evicted 0\n"


def test_the_count_of_a_recovered_segment_with_damage_is_a_range(tmp_path: Path) -> None:
    """The segment belonged to a dead writer and ends with a torn line."""
    (tmp_path / "box").mkdir()
    lines = b"".join(record.line(event_line(number)[:-1]) for number in range(3))
    (tmp_path / "box" / layout.active_name("w", 1)).write_bytes(lines + b'{"event":{"torn')
    assert verify_text(tmp_path) == "balanced: accepted 3 = delivered 0 + pending 3 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    assert (
        verify_text(tmp_path) == "balanced: accepted 3..4 = delivered 3 + pending 0 + dead 0 + quarantined 0..1 + evicted 0\n"
    )


def test_after_the_ledger_is_deleted_the_counts_start_from_the_files_on_disk(filled: Path) -> None:
    """Only the history is lost."""
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled)
    (filled / "box" / layout.LEDGER).unlink()
    assert verify_text(filled) == "balanced: accepted 0 = delivered 0 + pending 0 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("enqueue", "-d", "box", cwd=filled, stdin=event_line(1)).returncode == 0
    assert verify_text(filled) == "balanced: accepted 1 = delivered 0 + pending 1 + dead 0 + quarantined 0 + evicted 0\n"


def test_unreadable_ledger_lines_are_skipped_and_reported(filled: Path) -> None:
    """A torn last line and an entry of a later version. The next entry starts on a new line."""
    with (filled / "box" / layout.LEDGER).open("ab") as ledger:
        ledger.write(record.line(b'{"entry":"moved","at_micros":1,"batch":"x"}') + b'{"event":{"entry":"sea')
    assert "2 ledger lines not read: damaged, or written by a later version" in verify_text(filled)
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    answer = verify_json(filled)
    assert (answer["balances"], answer["unread_entries"], answer["total"]["delivered"]) == (True, 2, 50)


def test_missing_dead_letters_are_reported_unless_they_were_purged(tmp_path: Path) -> None:
    """Purged dead letters are counted separately."""
    (tmp_path / "box").mkdir()
    rejected = b'{"event_id":"odd","event_key":"k","scope_kind":"Nowhere","scope_id":1}'
    lines = b"".join(record.line(payload) for payload in (event_line(1)[:-1], rejected, rejected.replace(b"odd", b"even")))
    (tmp_path / "box" / layout.sealed_name(1, "x")).write_bytes(lines)
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode in (0, 1)
    answer = verify_json(tmp_path)
    assert (answer["balances"], answer["total"]["dead"], answer["dead_on_disk"]) == (True, 2, 2)
    dead = tmp_path / "box" / layout.dead_name(layout.batch_id(layout.sealed_name(1, "x")))
    content = dead.read_bytes()
    dead.unlink()
    assert (verify_json(tmp_path)["balances"], verify_json(tmp_path)["dead_missing"]) == (False, 2)
    dead.write_bytes(content)
    assert run("dead", "purge", "-d", "box", "--event-id", "odd", "--yes", cwd=tmp_path).returncode == 0
    answer = verify_json(tmp_path)
    assert (answer["balances"], answer["dead_on_disk"], answer["purged_dead"]) == (True, 1, 1)
    assert verify_text(tmp_path).endswith("(purged 1)\n")


def test_each_batch_has_the_count_of_its_writer(filled: Path) -> None:
    """A recovered segment has none."""
    (filled / "box" / layout.active_name("w", 1)).write_bytes(record.line(event_line(1)[:-1]))
    with Outbox(str(filled / "box"), RecordingSink()) as outbox:
        assert outbox.flush(60)
    entries, unread = parse_ledger((filled / "box" / layout.LEDGER).read_bytes())
    assert unread == 0
    assert [entry.events for entry in entries if isinstance(entry, SealedEntry)] == [10] * 5
    assert [entry.writer for entry in entries if isinstance(entry, AdoptedEntry)] == ["w"]
    assert verify_json(filled)["total"]["delivered"] == 51
