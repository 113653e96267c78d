"""`pillarbox tail`, while real processes write, seal, deliver and are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox import Outbox
from pillarbox.store import record
from tests.cli.running_processes import DELIVER, file_contents, run_read_only, running_process, writer_command
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.conftest import event, wait_until

FIRST = "sealed-0.ndjson"


class Tail:
    """A running `pillarbox tail --follow --json`."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out = out
        self._err = err

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def ids(self) -> list[str]:
        return [line["event"]["event_id"] for line in self.lines() if line["file"] != FIRST]

    def missed(self) -> int:
        return sum(int(number) for number in re.findall(r"not seen: (\d+) event", self._err.read_text()))

    def wait_for(self, count: int) -> None:
        """Wait until so many events were shown or counted as missed."""
        wait_until(lambda: len(self.ids()) + self.missed() >= count)


@contextmanager
def tailing(folder: Path, *arguments: str) -> Iterator[Tail]:
    """Follow `box`; the block starts once `tail` has shown the first event."""
    (folder / "box").mkdir(mode=0o700, exist_ok=True)
    (folder / "box" / FIRST).write_bytes(record.line(msgspec.json.encode(event(event_id="first"))))
    out, err = folder / "out", folder / "err"
    command = [*PILLARBOX, "tail", "-d", "box", "-f", "--json", "--interval", "0.05", *arguments]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=CLEAN, stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: bool(out.read_bytes()))
        yield Tail(process, out, err)
    finally:
        process.kill()
        process.wait(60)


def test_each_accepted_event_is_shown_once_while_files_are_sealed_and_deleted(tmp_path: Path) -> None:
    """Three writers, one of which starts later, and a delivery worker. Events that came and went between two polls are counted.

    On a slow machine, `tail` may miss most events; the test then writes more.
    """
    writers, count = "abc", 5000
    with tailing(tmp_path) as tail, running_process(*DELIVER, folder=tmp_path) as deliverer:
        with (
            running_process(*writer_command("a", 2000, 0.01), folder=tmp_path) as first,
            running_process(*writer_command("b", 2000, 0.01), folder=tmp_path),
        ):
            tail.wait_for(500)
            with running_process(*writer_command("c", 1000, 0.005), folder=tmp_path) as third:
                assert third.wait(60) == 0
            assert first.wait(60) == 0
            tail.wait_for(count)
        while len(tail.ids()) <= 2000:
            writers, count = writers + chr(ord(writers[-1]) + 1), count + 1000
            assert writers[-1] <= "z", "tail saw almost no events"
            with running_process(*writer_command(writers[-1], 1000, 0.005), folder=tmp_path) as further:
                assert further.wait(60) == 0
            tail.wait_for(count)
        assert deliverer.poll() is None
        seen = Counter(tail.ids())
        assert max(seen.values()) == 1
        assert len(seen) + tail.missed() == count
        for name in writers:
            own = [event_id for event_id in tail.ids() if event_id.startswith(name)]
            assert own == sorted(own)


def test_without_follow_the_newest_events_are_shown_in_order(tmp_path: Path) -> None:
    """From batches and from a segment."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        for number in range(25):
            outbox.enqueue(event(number))
            if number % 10 == 9:
                assert outbox._sealer.seal_now("manual", 60)
        shown = [json.loads(line) for line in run("tail", "-d", "box", "--json", "-n", "12", cwd=tmp_path).stdout.splitlines()]
        assert [line["event"]["event_id"] for line in shown] == [f"e-{number:06d}" for number in range(13, 25)]
        assert [line["batch"] is None for line in shown] == [False] * 7 + [True] * 5
        for line in shown:
            data = (tmp_path / "box" / line["file"]).read_bytes()
            line_on_disk = data[line["offset"] : data.index(b"\n", line["offset"])]
            assert json.loads(record.payload(line_on_disk)) == line["event"]
        assert len(run("tail", "-d", "box", cwd=tmp_path).stdout.splitlines()) == 10
        assert run("tail", "-d", "box", "-n", "0", cwd=tmp_path).stdout == b""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--event-key", "buy"], [1, 3]),
        (["--event-key", "buy", "--event-key", "sell"], [1, 2, 3]),
        (["--event-id", "e-000002"], [2]),
        (["--scope", "User"], [2, 3]),
        (["--scope", "User:u-3"], [3]),
        (["--user", "u-3"], [3]),
        (["--contains", "péage"], [1]),
        (["--where", "metadata_json.page=1"], [1]),
        (["--where", "metadata_json.tags.1=b"], [2]),
        (["--where", "user_id=null"], [0, 1, 2]),
        (["--event-key", "buy", "--where", "scope_kind=User"], [3]),
        (["--since", "1970-01-01T00:00:00.000002", "--until", "1970-01-01T00:00:00.000003"], [2]),
        (["--since", "1970-01-01"], [0, 1, 2, 3]),
    ],
)
def test_filters(tmp_path: Path, options: list[str], expected: list[int]) -> None:
    """By key, id, scope, user, text, field and time."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(0))
        outbox.enqueue(event(1, event_key="buy", metadata_json='{"page":1,"name":"péage"}'))
        outbox.enqueue(event(2, event_key="sell", scope_kind="User", metadata_json='{"tags":["a","b"]}'))
        outbox.enqueue(event(3, event_key="buy", scope_kind="User", scope_id="u-3", user_id="u-3"))
    shown = run("tail", "-d", "box", "--json", *options, cwd=tmp_path)
    assert [json.loads(line)["event"]["occurred_at_micros"] for line in shown.stdout.splitlines()] == expected
    assert shown.returncode == 0


def test_a_line_is_shown_once_it_is_complete(tmp_path: Path) -> None:
    """A writer may have written only a part of it."""
    (tmp_path / "box").mkdir()
    line = record.line(b'{"event_id":"e-1"}')
    with tailing(tmp_path) as tail, (tmp_path / "box" / "active-w-1.ndjson").open("ab", buffering=0) as file:
        file.write(line + line[:20])
        wait_until(lambda: tail.ids() == ["e-1"])
        file.write(line[20:-1])
        before = tail.ids()
        file.write(b"\n")
        wait_until(lambda: tail.ids() == ["e-1", "e-1"])
        assert before == ["e-1"]


def test_the_text_has_no_colours_and_no_cursor_movements(tmp_path: Path) -> None:
    """Whatever an event contains."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1, event_key="\x1b[31mred\nline", user_id="u-1"))
    output = run("tail", "-d", "box", cwd=tmp_path).stdout
    assert output == b"1970-01-01T00:00:00Z  \\x1b[31mred line  Site:site  u-1  e-000001\n"


def test_damaged_bytes_are_reported_and_skipped(tmp_path: Path) -> None:
    """The exit code is 1."""
    (tmp_path / "box").mkdir()
    lines = record.line(b'{"event_id":"e-1"}') + b"nonsense\n" + record.line(b'{"event_id":"e-2"}')
    (tmp_path / "box" / "sealed-1.ndjson").write_bytes(lines)
    completed = run("tail", "-d", "box", "--json", cwd=tmp_path)
    assert [json.loads(line)["event"]["event_id"] for line in completed.stdout.splitlines()] == ["e-1", "e-2"]
    assert completed.returncode == 1
    assert b"sealed-1.ndjson: damaged at offset 46: bad_json" in completed.stderr


def test_sigint_ends_tail_without_output(tmp_path: Path) -> None:
    """It leaves no files."""
    with tailing(tmp_path) as tail:
        tail.process.send_signal(signal.SIGINT)
        assert tail.process.wait(60) == 130
        assert (tmp_path / "err").read_bytes() == b""
    assert file_contents(tmp_path / "box").keys() == {FIRST}


def test_a_closed_pipe_ends_tail(tmp_path: Path) -> None:
    """Also if there are no new events. The exit code is 0."""
    (tmp_path / "box").mkdir()
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen([*PILLARBOX, "tail", "-d", "box", "-f"], cwd=tmp_path, env=CLEAN, stdout=write_fd)
    os.close(write_fd)
    os.close(read_fd)
    assert process.wait(60) == 0


def test_tail_changes_nothing(tmp_path: Path) -> None:
    """Also while a writer has its segments open."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        for number in range(30):
            outbox.enqueue(event(number))
        assert outbox._sealer.seal_now("manual", 60)
        outbox.enqueue(event(30))
        before = file_contents(tmp_path / "box")
        assert len(run_read_only("tail", "-d", "box", "-n", "31", folder=tmp_path).stdout.splitlines()) == 31
        assert file_contents(tmp_path / "box") == before


def test_a_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    """It is not created."""
    completed = run("tail", "-d", "box", "-f", cwd=tmp_path)
    assert completed.returncode == 2
    assert b"box: cannot be listed" in completed.stderr
    assert not (tmp_path / "box").exists()
