"""`pillarbox status` and `--watch`, as a user types them: on a terminal, in a pipe, beside writers and deliverers."""

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
from tests.cli.test_commands import CLEAN, PILLARBOX, bare, run
from tests.conftest import event, wait_until

LINE = record.line(b'{"event_id":"e"}')


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An empty outbox directory."""
    (tmp_path / "box").mkdir(mode=0o700)
    return tmp_path / "box"


def beat(folder: Path, clock: ManualClock, state: State, delivered: int, error: str = "", sink: str = "sqlite:///x.db") -> None:
    """What a deliverer writes down."""
    lease = Lease(Directory(str(folder), OsFilesystem(), clock), sink, clock)
    assert lease.acquire()
    lease.write_heartbeat(state, delivered, error, now=True)
    lease.release()


def queue(box: Path, name: str, files: int, clock: ManualClock) -> Path:
    """A destination's own, with files that wait."""
    made = box / layout.queue_name(name)
    made.mkdir(mode=0o700)
    for number in range(files):
        (made / layout.sealed_name(clock.micros() - 5_000_000 + number, "x")).write_bytes(LINE)
    return made


def sealed_events(outbox_dir: Directory) -> int:
    """How many the ledger has."""
    entries, _ = parse_ledger(outbox_dir.read_small_file(layout.LEDGER))
    return sum(entry.events or 0 for entry in entries if isinstance(entry, SealedEntry))


def on_terminal(folder: Path, *arguments: str, columns: int = 80, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """What a terminal of so many columns gets to see, with Ctrl-C typed after the first screen."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [*PILLARBOX, *arguments], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        env=CLEAN | {"TERM": "xterm-256color"} | (environ or {}), start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen, interrupted = b"", False
    try:
        with contextlib.suppress(OSError):  # what a terminal answers whose other side has ended
            while part := os.read(ours, 65536):
                seen += part
                if b"no delivery worker yet" in seen and not interrupted:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
        return process.wait(timeout=60), seen.decode()
    finally:
        process.kill()
        os.close(ours)


def plain(text: str) -> str:
    """Without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_screen_fits_into_80_columns_and_ends_with_ctrl_c(box: Path) -> None:
    """Exit code 0; the last look stays, and the cursor is there again."""
    (box / layout.sealed_name(1_700_000_000_000_000, "x")).write_bytes(LINE * 1000)
    code, seen = on_terminal(box.parent, "status", "-d", "box", "--watch", "--interval", "0.2")
    assert code == 0
    assert "Traceback" not in seen
    assert max(map(len, plain(seen).split("\r\n"))) <= 80
    for word in ("pending", "dead letters", "quarantine", "empty in", "no delivery worker yet"):
        assert word in plain(seen)
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_no_color_is_obeyed_on_a_terminal(box: Path) -> None:
    """Bold and the cursor are no colours."""
    _, seen = on_terminal(box.parent, "status", "-d", "box", "--watch", environ={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])m", seen)


def test_in_a_pipe_each_look_is_a_line_of_printable_text(box: Path) -> None:
    """Nor does what a destination says move anybody's cursor."""
    clock = ManualClock()
    beat(box, clock, State("waiting", "said \x1b[31mred\x07\nand went"), 5)
    done = run("status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1", cwd=box.parent)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2
    assert all(text.isprintable() for text in lines)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ in ", text) for text in lines)


def test_as_json_each_look_is_an_object_on_a_line(box: Path) -> None:
    """In the shape that is documented; a plain look is the same without rates."""
    done = run("status", "-d", "box", "--watch", "--json", "--samples", "2", "--interval", "0.1", cwd=box.parent)
    first, second = map(json.loads, done.stdout.splitlines())
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


def test_rates_are_those_of_what_happened_between_two_looks(box: Path) -> None:
    """In from the ledger and the active files, out from the heartbeats, and how long the rest takes."""
    clock = ManualClock()
    outbox_dir = Directory(str(box), OsFilesystem(), clock)
    ledger = LedgerWriter(outbox_dir, clock)
    old = [box / layout.sealed_name(clock.micros() + number, "x") for number in range(5)]
    for file in old:
        file.write_bytes(b"x" * 1000)
    active = box / "active-w-1.ndjson"
    active.write_bytes(b"x" * 100)
    beat(box, clock, State("draining"), 1000)
    watcher = StatusWatcher(outbox_dir, clock, "process")
    assert watcher.sample().rates.in_bytes_per_s is None
    clock.advance(10)
    ledger.add(SealedEntry(clock.micros(), "sealed-a", "w", 20, 2000))  # sealed and delivered between the two looks
    assert ledger.write(sync=False)
    active.write_bytes(b"x" * 1100)
    old[0].unlink()
    old[1].unlink()
    beat(box, clock, State("draining"), 1500)
    rates = watcher.sample().rates
    assert rates.in_bytes_per_s == pytest.approx(300)
    assert rates.in_events_per_s == pytest.approx(3)
    assert rates.sinks[""].out_events_per_s == pytest.approx(50)
    assert rates.sinks[""].empty_in_s == pytest.approx(10 * 4100 / 1000)


def test_another_deliverer_and_a_ledger_that_was_summed_up_give_no_false_rate(box: Path) -> None:
    """It is not known, rather than negative or enormous."""
    clock = ManualClock()
    outbox_dir = Directory(str(box), OsFilesystem(), clock)
    (box / layout.LEDGER).write_bytes(b"x" * 5000)
    beat(box, clock, State("draining"), 1000)
    watcher = StatusWatcher(outbox_dir, clock, "process")
    watcher.sample()
    clock.advance(1)
    (box / layout.LEDGER).write_bytes(b"x" * 50)
    beat(box, clock, State("draining"), 10)
    rates = watcher.sample().rates
    assert (rates.in_bytes_per_s, rates.sinks[""].out_events_per_s) == (None, None)


def test_of_several_destinations_each_has_a_row(box: Path) -> None:
    """With its own backlog, state, error and time of the next try; what is in no queue yet waits for all."""
    clock = ManualClock()
    shared = box / layout.sealed_name(clock.micros(), "new")
    shared.write_bytes(LINE)
    live = queue(box, "live", 3, clock)
    warehouse = queue(box, "warehouse", 0, clock)
    os.link(shared, warehouse / shared.name)
    (box / "sink-Not a name!").mkdir()
    (live / "dead-x.ndjson").write_bytes(LINE)
    beat(live, clock, State("waiting", "503", clock.micros() + 7_000_000), 5, "503", "https://live/")
    beat(warehouse, clock, State("idle"), 9, "it was gone", "sqlite:///warehouse.db")
    found = StatusWatcher(Directory(str(box), OsFilesystem(), clock), clock, "process").sample()
    assert [(sink.name, sink.backlog_files, sink.dead_files) for sink in found.status.sinks] == [
        ("live", 4, 1),
        ("warehouse", 1, 0),
    ]
    assert "live: 4 files pending, oldest 5 s" in sample_line(found)
    assert "waiting: 503, next try in 7 s" in sample_line(found)
    text = run("status", "-d", "box", cwd=box.parent).stdout.decode()
    assert re.search(r"sink live +4 files, [\d,]+ bytes pending; process \d+, sink https://live/", text)
    assert "\x1b" not in text
    _, seen = on_terminal(box.parent, "status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1")
    assert "last error: it was gone" in plain(seen)
    assert max(map(len, plain(seen).split("\r\n"))) <= 80


def test_status_changes_nothing(box: Path) -> None:
    """Nor makes a queue, a lock or a request."""
    run("enqueue", "-d", "box", cwd=box.parent, stdin=b"".join(map(bare, range(10))))
    before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in box.iterdir()}
    run("status", "-d", "box", cwd=box.parent)
    run("status", "-d", "box", "--watch", "--samples", "3", "--interval", "0.1", cwd=box.parent)
    assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()) for file in box.iterdir()} == before


def test_a_watch_beside_a_writer_counts_what_comes_in(tmp_path: Path) -> None:
    """As the ledger has it, once all is sealed."""
    with Outbox(str(tmp_path / "box"), flush_interval=0.05) as outbox:
        outbox_dir = Directory(str(tmp_path / "box"), OsFilesystem(), clock := ManualClock())
        watcher = StatusWatcher(outbox_dir, clock, "process")
        watcher.sample()
        for number in range(50):
            assert outbox.enqueue(event(number))
        wait_until(lambda: sealed_events(outbox_dir) == 50)
        clock.advance(10)
        assert watcher.sample().rates.in_events_per_s == pytest.approx(5, rel=0.01)


def test_a_reader_that_has_seen_enough_ends_it(box: Path) -> None:
    """A closed pipe is no failure."""
    command = " ".join(PILLARBOX)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} status -d box --watch --interval 0.1 | head -n 1"],
        cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 1)


def test_a_directory_that_goes_away_ends_the_watch_with_a_word(tmp_path: Path) -> None:
    """Exit code 2, and nothing is made."""
    done = run("status", "-d", "missing", "--watch", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"cannot be listed" in done.stderr
    assert list(tmp_path.iterdir()) == []
