"""`pillarbox export`, from directories in which everything is at work."""

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
from tests.cli.running_processes import DELIVER, at_work, names, only_looks, writer
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.conftest import event


def exported(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The events that it writes."""
    return [json.loads(line) for line in run("export", "-d", "box", *arguments, cwd=folder).stdout.splitlines()]


def ids(events: list[dict[str, Any]]) -> list[str]:
    return [event["event_id"] for event in events]


def filled(folder: Path) -> None:
    """One of each kind: a dead letter, damaged bytes, a delivered file, and what waits."""
    box = folder / "box"
    whole = record.line(event_json(3))
    seal_batch(box, record.line(event_json(1)), record.line(event_json(2, 17)), whole[:-4] + b'0"}\n', good=1)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=folder)
    (box / "delivered-0000000000000002-0000000000000001-u.ndjson").write_bytes(record.line(event_json(4)))
    seal_batch(box, record.line(event_json(5)), good=1, first=9)


def test_each_kind_is_written_as_it_stands(tmp_path: Path) -> None:
    """Byte for byte; what waits where nothing else is asked for."""
    filled(tmp_path)
    waiting = run("export", "-d", "box", cwd=tmp_path).stdout.splitlines()
    assert (waiting[0][:24], waiting[1:]) == (b'{"event_id":"e-000009","', [event_json(5)])
    assert run("export", "-d", "box", "--what", "delivered", cwd=tmp_path).stdout == event_json(4) + b"\n"
    assert run("export", "-d", "box", "--what", "dead", cwd=tmp_path).stdout == event_json(2, 17) + b"\n"
    assert run("export", "-d", "box", "--what", "quarantine", cwd=tmp_path).stdout == event_json(3) + b"\n"
    everything = run("export", "-d", "box", "--what", "all", cwd=tmp_path).stdout.splitlines()
    assert sorted(everything) == sorted([event_json(2, 17), event_json(3), event_json(4), *waiting])
    chosen = run("export", "-d", "box", "--what", "all", "--event-id", "w-000004", "--event-id", "w-000002", cwd=tmp_path)
    assert chosen.stdout.splitlines() == [event_json(4), event_json(2, 17)]


def test_every_event_that_waits_all_the_while_is_written_once(tmp_path: Path) -> None:
    """Beside two writers, and a deliverer that comes later: what came and went is counted."""
    with at_work(*writer("a", 300), folder=tmp_path) as first:
        assert first.wait(60) == 0
    before = ids(exported(tmp_path))
    assert before == [f"a-{number:06d}" for number in range(300)]
    with at_work(*writer("b", 3000, 0.005), folder=tmp_path), at_work(*writer("c", 3000, 0.005), folder=tmp_path):
        for _ in range(5):
            found = Counter(ids(exported(tmp_path)))
            assert set(before) <= found.keys()
            assert max(found.values()) == 1
            before = list(found)
        with at_work(*DELIVER, folder=tmp_path):
            done = run("export", "-d", "box", "--json", cwd=tmp_path)
            said = json.loads(done.stderr)
            assert said["events"] == len(done.stdout.splitlines())
            assert max(Counter(json.loads(line)["event_id"] for line in done.stdout.splitlines()).values(), default=1) == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """For its owner only, and over another one only when told to."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1))
    done = run("export", "-d", "box", "-o", "out.ndjson", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["events"] == 1
    assert stat.S_IMODE((tmp_path / "out.ndjson").stat().st_mode) == 0o600
    again = run("export", "-d", "box", "-o", "out.ndjson", cwd=tmp_path)
    assert (again.returncode, b"--force" in again.stderr) == (2, True)
    assert run("export", "-d", "box", "-o", "out.ndjson", "--force", "--event-id", "none", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.ndjson").read_bytes() == b""
    assert run("export", "-d", "box", "-o", "no/such/out", cwd=tmp_path).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "out.ndjson"]


def test_csv_has_a_column_for_each_member(tmp_path: Path) -> None:
    """Text as it is, null as nothing, numbers as JSON; what fits into no column is said."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1, event_key='a "b", c\nd', metadata_json='{"x":1}'))
        outbox.enqueue_json(
            [b'{"event_id":"e-2","event_key":"k","scope_kind":"S","scope_id":"s","occurred_at_micros":2,"more":3}']
        )
    done = run("export", "-d", "box", "--format", "csv", cwd=tmp_path)
    first, second = csv.DictReader(io.StringIO(done.stdout.decode(), newline=""))
    assert (first["event_key"], first["metadata_json"], first["user_id"]) == ('a "b", c\nd', '{"x":1}', "")
    assert (second["occurred_at_micros"], second["metadata_json"]) == ("2", "")
    assert done.returncode == 1
    assert b"1 event with fields that have no column" in done.stderr


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    """With exit code 1, and the rest is written."""
    seal_batch(tmp_path / "box", record.line(event_json(1)), b"nonsense\n", record.line(event_json(2)), good=1)
    done = run("export", "-d", "box", "--event-key", "buy", cwd=tmp_path)
    assert done.stdout == event_json(1) + b"\n" + event_json(2) + b"\n"
    assert done.returncode == 1
    assert b"damaged at" in done.stderr


def test_it_only_looks(tmp_path: Path) -> None:
    """At whatever it is asked for."""
    filled(tmp_path)
    before = names(tmp_path / "box")
    assert only_looks("export", "-d", "box", "--what", "all", folder=tmp_path).stdout.count(b"\n") == 5
    assert names(tmp_path / "box") == before


# Waits for ever once it has read half of the events, so that Ctrl-C finds it there.
HALFWAY = """
import threading
from itertools import islice
from pillarbox.cli import main
from pillarbox.admin.export import EventExporter
whole = EventExporter.events
def half(self, what):
    yield from islice(whole(self, what), 50_000)
    print("there", flush=True)
    threading.Event().wait()
EventExporter.events = half
main()
"""


def test_ctrl_c_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    """Nor anything else."""
    with Outbox(str(tmp_path / "box"), min_free_bytes=0) as outbox:
        for start in range(0, 100_000, 5000):
            outbox.enqueue_many([event(number) for number in range(start, start + 5000)])
    command = [PILLARBOX[0], "-c", HALFWAY, "export", "-d", "box", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, env=CLEAN, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        (aside,) = tmp_path.glob("out*")
        assert aside.stat().st_size > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["box"]
