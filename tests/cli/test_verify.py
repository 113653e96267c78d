"""`pillarbox verify`, on directories that real processes filled, delivered, were killed in, and that somebody meddled with."""

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
from tests.cli.test_commands import bare, run
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


def verified(folder: Path) -> dict[str, Any]:
    """What it says of `box`; its exit code fits."""
    done = run("verify", "-d", "box", "--json", cwd=folder)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == int(not answer["balances"]), done
    account: dict[str, Any] = answer["reconciliation"]
    return answer | account


def said(folder: Path) -> str:
    """What it prints."""
    return run("verify", "-d", "box", cwd=folder).stdout.decode()


def start(*command: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that is killed later."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes]) -> None:
    """As the kernel does when memory is out."""
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def sealed_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((folder / "box").glob("sealed-*.ndjson"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder whose `box` has five sealed files of ten events, of one writer that has ended."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        for number in range(50):
            assert outbox.enqueue(event(number))
            if number % 10 == 9:
                assert outbox._sealer.seal_now("manual", 60)
    assert len(sealed_files(tmp_path)) == 5
    return tmp_path


def test_it_is_one_line(filled: Path) -> None:
    """Before and after the delivery; the writers in a table, where that is asked for."""
    assert said(filled) == "balanced: accepted 50 = delivered 0 + pending 50 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert said(filled) == "balanced: accepted 50 = delivered 50 + pending 0 + dead 0 + quarantined 0 + evicted 0\n"
    table = run("verify", "-d", "box", "--writers", cwd=filled).stdout.decode().splitlines()
    assert table[1].split()[:2] == ["writer", "accepted"]
    assert [line.split()[1:4] for line in table[2:]] == [["50", "0", "50"], ["50", "0", "50"]]


def test_it_creates_and_changes_nothing(filled: Path) -> None:
    """Not even in a directory that holds nothing; one that is not there is an error of who asks."""

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (filled / "box").iterdir()}

    before = content()
    assert verified(filled)["balances"]
    assert content() == before
    (filled / "empty").mkdir()
    assert run("verify", "-d", "empty", cwd=filled).returncode == 0
    assert not list((filled / "empty").iterdir())
    assert run("verify", "-d", "nowhere", cwd=filled).returncode == 2


def test_it_balances_while_writers_and_a_deliverer_run_and_are_killed(tmp_path: Path) -> None:
    """Each time that it looks."""
    box = str(tmp_path / "box")
    (tmp_path / "box").mkdir()
    for _ in range(2):
        writers = [start(sys.executable, "-c", WRITE_FOR_EVER, box, folder=tmp_path) for _ in range(2)]
        deliverer = start(*DELIVER_FOR_EVER, folder=tmp_path)
        delivered = verified(tmp_path)["total"]["delivered"]
        wait_until(lambda least=delivered: verified(tmp_path)["total"]["delivered"] > least)  # type: ignore[misc]
        for process in (writers[0], deliverer, writers[1]):
            kill(process)
            answer = verified(tmp_path)
            assert answer["balances"], answer
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    total = verified(tmp_path)["total"]
    assert total["pending"] == 0
    assert total["accepted"] == total["delivered"] > 100


def test_a_sealed_file_that_is_gone_is_named(filled: Path) -> None:
    """With its writer, and how many events it held."""
    victim = sealed_files(filled)[2]
    victim.unlink()
    answer = verified(filled)
    assert [(one["batch"], one["events"]) for one in answer["discrepancies"]] == [(victim.stem, 10)]
    assert answer["discrepancies"][0]["writer"] == answer["writers"][0]["writer"]
    text = said(filled)
    assert text.startswith("does not balance: accepted 50 <> delivered 0 + pending 40 + dead 0")
    assert f"{victim.stem} of writer {answer['writers'][0]['writer']}: 10 events missing" in text


@pytest.mark.parametrize(("doubled", "events"), [(False, 1), (True, -1)])
def test_a_line_that_is_cut_out_or_doubled_is_named(filled: Path, events: int, *, doubled: bool) -> None:
    """Before the delivery, and after it, for the destination has what was there."""
    victim = sealed_files(filled)[1]
    lines = victim.read_bytes().splitlines(keepends=True)
    victim.write_bytes(b"".join([*lines, lines[0]] if doubled else lines[1:]))
    assert [(one["batch"], one["events"]) for one in verified(filled)["discrepancies"]] == [(victim.stem, events)]
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert [(one["batch"], one["events"]) for one in verified(filled)["discrepancies"]] == [(victim.stem, events)]


def test_a_damaged_line_is_what_is_missing_and_it_balances(filled: Path) -> None:
    """The writer's count says that it was one event."""
    victim = sealed_files(filled)[0]
    victim.write_bytes(victim.read_bytes().replace(b"click", b"clack", 1))
    assert verified(filled)["balances"]
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    assert said(filled) == "balanced: accepted 50 = delivered 49 + pending 0 + dead 0 + quarantined 1 + evicted 0\n"


def test_what_nobody_counted_is_a_range_where_it_is_damaged(tmp_path: Path) -> None:
    """An active file of a dead writer, adopted, with a torn line."""
    (tmp_path / "box").mkdir()
    lines = b"".join(record.line(bare(number)[:-1]) for number in range(3))
    (tmp_path / "box" / layout.active_name("w", 1)).write_bytes(lines + b'{"event":{"torn')
    assert said(tmp_path) == "balanced: accepted 3 = delivered 0 + pending 3 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    assert said(tmp_path) == "balanced: accepted 3..4 = delivered 3 + pending 0 + dead 0 + quarantined 0..1 + evicted 0\n"


def test_without_a_ledger_only_history_is_gone(filled: Path) -> None:
    """The account begins anew, with what is on disk."""
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled)
    (filled / "box" / layout.LEDGER).unlink()
    assert said(filled) == "balanced: accepted 0 = delivered 0 + pending 0 + dead 0 + quarantined 0 + evicted 0\n"
    assert run("enqueue", "-d", "box", cwd=filled, stdin=bare(1)).returncode == 0
    assert said(filled) == "balanced: accepted 1 = delivered 0 + pending 1 + dead 0 + quarantined 0 + evicted 0\n"


def test_a_torn_last_line_and_a_later_versions_entry_are_stepped_over_and_named(filled: Path) -> None:
    """Who appends next begins a line of its own."""
    with (filled / "box" / layout.LEDGER).open("ab") as ledger:
        ledger.write(record.line(b'{"entry":"moved","at_micros":1,"batch":"x"}') + b'{"event":{"entry":"sea')
    assert "2 ledger lines not read: damaged, or written by a later version" in said(filled)
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=filled).returncode == 0
    answer = verified(filled)
    assert (answer["balances"], answer["unread_entries"], answer["total"]["delivered"]) == (True, 2, 50)


def test_dead_letters_that_are_gone_are_missed_unless_they_were_purged(tmp_path: Path) -> None:
    """Purged ones are figures of their own."""
    (tmp_path / "box").mkdir()
    odd = b'{"event_id":"odd","event_key":"k","scope_kind":"Nowhere","scope_id":1}'
    lines = b"".join(record.line(payload) for payload in (bare(1)[:-1], odd, odd.replace(b"odd", b"even")))
    (tmp_path / "box" / layout.sealed_name(1, "x")).write_bytes(lines)
    assert run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode in (0, 1)
    answer = verified(tmp_path)
    assert (answer["balances"], answer["total"]["dead"], answer["dead_on_disk"]) == (True, 2, 2)
    dead = tmp_path / "box" / layout.dead_name(layout.batch_id(layout.sealed_name(1, "x")))
    kept = dead.read_bytes()
    dead.unlink()
    assert (verified(tmp_path)["balances"], verified(tmp_path)["dead_missing"]) == (False, 2)
    dead.write_bytes(kept)
    assert run("dead", "purge", "-d", "box", "--event-id", "odd", "--yes", cwd=tmp_path).returncode == 0
    answer = verified(tmp_path)
    assert (answer["balances"], answer["dead_on_disk"], answer["purged_dead"]) == (True, 1, 1)
    assert said(tmp_path).endswith("(purged 1)\n")


def test_each_sealed_file_has_its_writers_count(filled: Path) -> None:
    """And an adopted one has none."""
    (filled / "box" / layout.active_name("w", 1)).write_bytes(record.line(bare(1)[:-1]))
    with Outbox(str(filled / "box"), RecordingSink()) as outbox:
        assert outbox.flush(60)
    entries, unread = parse_ledger((filled / "box" / layout.LEDGER).read_bytes())
    assert unread == 0
    assert [entry.events for entry in entries if isinstance(entry, SealedEntry)] == [10] * 5
    assert [entry.writer for entry in entries if isinstance(entry, AdoptedEntry)] == ["w"]
    assert verified(filled)["total"]["delivered"] == 51
