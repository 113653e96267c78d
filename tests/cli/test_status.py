"""`pillarbox status` and `--watch`, run as a user runs them: on a terminal, in a pipe, beside writers and delivery workers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.cli.watch import StatusWatcher, sample_line
from pillarbox.delivery.lease import Lease
from pillarbox.stats import State
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SealedEntry, parse_ledger
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock
from tests.cli.test_commands import CLEAN, PILLARBOX, event_line, run
from tests.conftest import event, wait_until

LINE = record.line(b'{"event_id":"e"}')


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An empty outbox directory."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path / "box"


def write_heartbeat(
    folder: Path, clock: ManualClock, state: State, delivered: int, error: str = "", sink: str = "sqlite:///x.db"
) -> None:
    """Write a heartbeat as a delivery worker does."""
    lease = Lease(Directory(str(folder), OsFilesystem(), clock), sink, clock)
    assert lease.acquire()
    lease.write_heartbeat(state, delivered, error, now=True)
    lease.release()


def create_queue(box: Path, name: str, files: int, clock: ManualClock) -> Path:
    """Create the queue of a sink, with pending files."""
    directory = box / layout.queue_name(name)
    directory.mkdir(mode=0o700)
    for number in range(files):
        (directory / layout.sealed_name(clock.micros() - 5_000_000 + number, "x")).write_bytes(LINE)
    return directory


def sealed_events(outbox_dir: Directory) -> int:
    """The number of events in the ledger's entries for sealed batches."""
    entries, _ = parse_ledger(outbox_dir.read_small_file(layout.LEDGER))
    return sum(entry.events or 0 for entry in entries if isinstance(entry, SealedEntry))


def output_on_terminal(
    folder: Path, *arguments: str, columns: int = 80, environ: dict[str, str] | None = None
) -> tuple[int, str]:
    """The exit code and the output of a command on a terminal of so many columns; SIGINT is sent after the first screen."""
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [*PILLARBOX, *arguments], cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal,
        env=CLEAN | {"TERM": "xterm-256color"} | (environ or {}), start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    output, interrupted = b"", False
    try:
        with contextlib.suppress(OSError):  # reading fails once the process has closed the terminal
            while chunk := os.read(controller, 65536):
                output += chunk
                if b"no delivery worker yet" in output and not interrupted:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
        return process.wait(timeout=60), output.decode()
    finally:
        process.kill()
        os.close(controller)


def without_escape_codes(text: str) -> str:
    """The text without cursor movements and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_screen_fits_into_80_columns_and_sigint_ends_it(box: Path) -> None:
    """The exit code is 0; the last screen stays, and the cursor is visible again."""
    (box / layout.sealed_name(1_700_000_000_000_000, "x")).write_bytes(LINE * 1000)
    code, screen = output_on_terminal(box.parent, "status", "-d", "box", "--watch", "--interval", "0.2")
    assert code == 0
    assert "Traceback" not in screen
    assert max(map(len, without_escape_codes(screen).split("\r\n"))) <= 80
    for word in ("pending", "dead letters", "quarantine", "empty in", "no delivery worker yet"):
        assert word in without_escape_codes(screen)
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")


def test_no_color_is_obeyed_on_a_terminal(box: Path) -> None:
    """Bold text and cursor movements are not colours."""
    _, screen = output_on_terminal(box.parent, "status", "-d", "box", "--watch", environ={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])m", screen)


def test_in_a_pipe_each_sample_is_a_line_of_printable_text(box: Path) -> None:
    """Although the message of a destination has escape codes."""
    clock = ManualClock()
    write_heartbeat(box, clock, State("waiting", "said \x1b[31mred\x07\nand went"), 5)
    completed = run("status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1", cwd=box.parent)
    assert (completed.returncode, completed.stderr) == (0, b"")
    lines = completed.stdout.decode().splitlines()
    assert len(lines) == 2
    assert all(text.isprintable() for text in lines)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ in ", text) for text in lines)


def test_as_json_each_sample_is_an_object_on_a_line(box: Path) -> None:
    """In the documented format; `status --json` prints the same without the rates."""
    completed = run("status", "-d", "box", "--watch", "--json", "--samples", "2", "--interval", "0.1", cwd=box.parent)
    first, second = map(json.loads, completed.stdout.splitlines())
    assert set(first) == {"at_micros", "status", "rates"}
    assert first["rates"] == {
        "in_events_per_s": None,
        "in_bytes_per_s": None,
        "sinks": {"": {"out_events_per_s": None, "empty_in_s": 0.0}},
    }
    assert second["rates"]["in_bytes_per_s"] == 0.0
    alone = json.loads(run("status", "-d", "box", "--json", cwd=box.parent).stdout)
    assert set(alone) == set(first["status"])
    assert alone["sinks"] == []


def test_rates_are_computed_between_two_samples(box: Path) -> None:
    """Incoming from the ledger and the segments, outgoing from the heartbeats, and the time until the backlog is empty."""
    clock = ManualClock()
    outbox_dir = Directory(str(box), OsFilesystem(), clock)
    ledger = LedgerWriter(outbox_dir, clock)
    old = [box / layout.sealed_name(clock.micros() + number, "x") for number in range(5)]
    for file in old:
        file.write_bytes(b"x" * 1000)
    active = box / "active-w-1.ndjson"
    active.write_bytes(b"x" * 100)
    write_heartbeat(box, clock, State("draining"), 1000)
    watcher = StatusWatcher(outbox_dir, clock, "process")
    assert watcher.sample().rates.in_bytes_per_s is None
    clock.advance(10)
    ledger.add(SealedEntry(clock.micros(), "sealed-a", "w", 20, 2000))  # sealed and delivered between the two samples
    assert ledger.write(sync=False)
    active.write_bytes(b"x" * 1100)
    old[0].unlink()
    old[1].unlink()
    write_heartbeat(box, clock, State("draining"), 1500)
    rates = watcher.sample().rates
    assert rates.in_bytes_per_s == pytest.approx(300)
    assert rates.in_events_per_s == pytest.approx(3)
    assert rates.sinks[""].out_events_per_s == pytest.approx(50)
    assert rates.sinks[""].empty_in_s == pytest.approx(10 * 4100 / 1000)


def test_after_a_new_worker_or_a_compacted_ledger_the_rate_is_unknown(box: Path) -> None:
    """Otherwise it would be negative or far too high."""
    clock = ManualClock()
    outbox_dir = Directory(str(box), OsFilesystem(), clock)
    (box / layout.LEDGER).write_bytes(b"x" * 5000)
    write_heartbeat(box, clock, State("draining"), 1000)
    watcher = StatusWatcher(outbox_dir, clock, "process")
    watcher.sample()
    clock.advance(1)
    (box / layout.LEDGER).write_bytes(b"x" * 50)
    write_heartbeat(box, clock, State("draining"), 10)
    rates = watcher.sample().rates
    assert (rates.in_bytes_per_s, rates.sinks[""].out_events_per_s) == (None, None)


def test_each_of_several_sinks_has_a_row(box: Path) -> None:
    """With its backlog, state, error and the time of the next attempt. A batch that is not in the queues yet is pending for all."""
    clock = ManualClock()
    shared = box / layout.sealed_name(clock.micros(), "new")
    shared.write_bytes(LINE)
    live = create_queue(box, "live", 3, clock)
    warehouse = create_queue(box, "warehouse", 0, clock)
    os.link(shared, warehouse / shared.name)
    (box / "sink-Not a name!").mkdir()
    (live / "dead-x.ndjson").write_bytes(LINE)
    write_heartbeat(live, clock, State("waiting", "503", clock.micros() + 7_000_000), 5, "503", "https://live/")
    write_heartbeat(warehouse, clock, State("idle"), 9, "it was gone", "sqlite:///warehouse.db")
    sample = StatusWatcher(Directory(str(box), OsFilesystem(), clock), clock, "process").sample()
    assert [(sink.name, sink.backlog_files, sink.dead_files) for sink in sample.status.sinks] == [
        ("live", 4, 1),
        ("warehouse", 1, 0),
    ]
    assert "live: 4 files pending, oldest 5 s" in sample_line(sample)
    assert "waiting: 503, next try in 7 s" in sample_line(sample)
    text = run("status", "-d", "box", cwd=box.parent).stdout.decode()
    assert re.search(r"sink live +4 files, [\d,]+ bytes pending; process \d+, sink https://live/", text)
    assert "\x1b" not in text
    _, screen = output_on_terminal(box.parent, "status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1")
    assert "last error: it was gone" in without_escape_codes(screen)
    assert max(map(len, without_escape_codes(screen).split("\r\n"))) <= 80


def test_status_changes_nothing(box: Path) -> None:
    """It does not create a queue, a lock or a request either."""
    run("enqueue", "-d", "box", cwd=box.parent, stdin=b"".join(map(event_line, range(10))))
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in box.iterdir()}
    run("status", "-d", "box", cwd=box.parent)
    run("status", "-d", "box", "--watch", "--samples", "3", "--interval", "0.1", cwd=box.parent)
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in box.iterdir()} == before


def test_a_watch_beside_a_writer_shows_the_incoming_rate(tmp_path: Path) -> None:
    """The ledger has the number of events once all are sealed."""
    with Outbox(str(tmp_path / "box"), flush_interval=0.05) as outbox:
        outbox_dir = Directory(str(tmp_path / "box"), OsFilesystem(), clock := ManualClock())
        watcher = StatusWatcher(outbox_dir, clock, "process")
        watcher.sample()
        for number in range(50):
            assert outbox.enqueue(event(number))
        wait_until(lambda: sealed_events(outbox_dir) == 50)
        clock.advance(10)
        assert watcher.sample().rates.in_events_per_s == pytest.approx(5, rel=0.01)


def test_a_closed_pipe_ends_a_watch_without_an_error(box: Path) -> None:
    """As in `pillarbox status --watch | head -n 1`."""
    command = " ".join(PILLARBOX)
    completed = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} status -d box --watch --interval 0.1 | head -n 1"],
        cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (completed.returncode, completed.stderr, completed.stdout.count(b"\n")) == (0, b"", 1)


def test_a_watch_of_a_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    """The exit code is 2, and nothing is created."""
    completed = run("status", "-d", "missing", "--watch", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (2, b"")
    assert b"cannot be listed" in completed.stderr
    assert list(tmp_path.iterdir()) == []
