"""`pillarbox export`, also while processes write and deliver."""

from __future__ import annotations

import csv
import io
import json
import signal
import stat
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from pillarbox import Outbox
from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, seal_batch
from tests.cli.running_processes import DELIVER, file_contents, run_read_only, running_process, writer_command
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.conftest import event


def exported_events(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The events that `export` prints."""
    return [json.loads(line) for line in run("export", "-d", "box", *arguments, cwd=folder).stdout.splitlines()]


def ids(events: list[dict[str, Any]]) -> list[str]:
    return [event["event_id"] for event in events]


def fill_outbox(folder: Path) -> None:
    """Create a dead letter, a quarantined record, a delivered file and a pending batch."""
    box = folder / "box"
    whole = record.line(event_json(3))
    seal_batch(box, record.line(event_json(1)), record.line(event_json(2, 17)), whole[:-4] + b'0"}\n', good=1)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=folder)
    (box / "delivered-0000000000000002-0000000000000001-u.ndjson").write_bytes(record.line(event_json(4)))
    seal_batch(box, record.line(event_json(5)), good=1, first=9)


def test_each_kind_of_record_is_exported_unchanged(tmp_path: Path) -> None:
    """Byte for byte; without --what, the pending events."""
    fill_outbox(tmp_path)
    pending = run("export", "-d", "box", cwd=tmp_path).stdout.splitlines()
    assert (pending[0][:24], pending[1:]) == (b'{"event_id":"e-000009","', [event_json(5)])
    assert run("export", "-d", "box", "--what", "delivered", cwd=tmp_path).stdout == event_json(4) + b"\n"
    assert run("export", "-d", "box", "--what", "dead", cwd=tmp_path).stdout == event_json(2, 17) + b"\n"
    assert run("export", "-d", "box", "--what", "quarantine", cwd=tmp_path).stdout == event_json(3) + b"\n"
    everything = run("export", "-d", "box", "--what", "all", cwd=tmp_path).stdout.splitlines()
    assert sorted(everything) == sorted([event_json(2, 17), event_json(3), event_json(4), *pending])
    chosen = run("export", "-d", "box", "--what", "all", "--event-id", "w-000004", "--event-id", "w-000002", cwd=tmp_path)
    assert chosen.stdout.splitlines() == [event_json(4), event_json(2, 17)]


def test_every_event_that_stays_pending_is_exported_once(tmp_path: Path) -> None:
    """While two writers run, and later a delivery worker. The output counts the events, even those delivered meanwhile."""
    with running_process(*writer_command("a", 300), folder=tmp_path) as first:
        assert first.wait(60) == 0
    before = ids(exported_events(tmp_path))
    assert before == [f"a-{number:06d}" for number in range(300)]
    with (
        running_process(*writer_command("b", 3000, 0.005), folder=tmp_path),
        running_process(*writer_command("c", 3000, 0.005), folder=tmp_path),
    ):
        for _ in range(5):
            counts = Counter(ids(exported_events(tmp_path)))
            assert set(before) <= counts.keys()
            assert max(counts.values()) == 1
            before = list(counts)
        with running_process(*DELIVER, folder=tmp_path):
            completed = run("export", "-d", "box", "--json", cwd=tmp_path)
            summary = json.loads(completed.stderr)
            assert summary["events"] == len(completed.stdout.splitlines())
            assert max(Counter(json.loads(line)["event_id"] for line in completed.stdout.splitlines()).values(), default=1) == 1


def test_an_export_file_is_created_whole_and_private(tmp_path: Path) -> None:
    """Mode 600; an existing file is overwritten only with --force."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1))
    completed = run("export", "-d", "box", "-o", "out.ndjson", "--json", cwd=tmp_path)
    assert json.loads(completed.stdout)["events"] == 1
    assert stat.S_IMODE((tmp_path / "out.ndjson").stat().st_mode) == 0o600
    second = run("export", "-d", "box", "-o", "out.ndjson", cwd=tmp_path)
    assert (second.returncode, b"--force" in second.stderr) == (2, True)
    assert run("export", "-d", "box", "-o", "out.ndjson", "--force", "--event-id", "none", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.ndjson").read_bytes() == b""
    assert run("export", "-d", "box", "-o", "no/such/out", cwd=tmp_path).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "out.ndjson"]


def test_csv_has_a_column_for_each_field(tmp_path: Path) -> None:
    """Text is unchanged, null is empty and numbers are JSON. Fields without a column are reported."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1, event_key='a "b", c\nd', metadata_json='{"x":1}'))
        outbox.enqueue_json(
            [b'{"event_id":"e-2","event_key":"k","scope_kind":"S","scope_id":"s","occurred_at_micros":2,"more":3}']
        )
    completed = run("export", "-d", "box", "--format", "csv", cwd=tmp_path)
    first, second = csv.DictReader(io.StringIO(completed.stdout.decode(), newline=""))
    assert (first["event_key"], first["metadata_json"], first["user_id"]) == ('a "b", c\nd', '{"x":1}', "")
    assert (second["occurred_at_micros"], second["metadata_json"]) == ("2", "")
    assert completed.returncode == 1
    assert b"1 event with fields that have no column" in completed.stderr


def test_damaged_records_are_reported(tmp_path: Path) -> None:
    """The exit code is 1, and the other events are exported."""
    seal_batch(tmp_path / "box", record.line(event_json(1)), b"nonsense\n", record.line(event_json(2)), good=1)
    completed = run("export", "-d", "box", "--event-key", "buy", cwd=tmp_path)
    assert completed.stdout == event_json(1) + b"\n" + event_json(2) + b"\n"
    assert completed.returncode == 1
    assert b"damaged at" in completed.stderr


def test_export_changes_nothing(tmp_path: Path) -> None:
    """Whatever is exported."""
    fill_outbox(tmp_path)
    before = file_contents(tmp_path / "box")
    assert run_read_only("export", "-d", "box", "--what", "all", folder=tmp_path).stdout.count(b"\n") == 5
    assert file_contents(tmp_path / "box") == before


# Blocks after half of the events, so that SIGINT arrives in the middle of the export.
HALFWAY = """
import threading
from itertools import islice
from pillarbox.cli import start
from pillarbox.admin.export import EventExporter
whole = EventExporter.events
def half(self, what):
    yield from islice(whole(self, what), 50_000)
    print("halted", flush=True)
    threading.Event().wait()
EventExporter.events = half
start()
"""


def test_sigint_leaves_no_partial_export_file(tmp_path: Path) -> None:
    """And no temporary file."""
    with Outbox(str(tmp_path / "box"), min_free_bytes=0) as outbox:
        for start in range(0, 100_000, 5000):
            outbox.enqueue_many([event(number) for number in range(start, start + 5000)])
    command = [PILLARBOX[0], "-c", HALFWAY, "export", "-d", "box", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, env=CLEAN, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halted\n"
        (temporary,) = tmp_path.glob("out*")
        assert temporary.stat().st_size > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["box"]
