"""Append and rotation on a real directory; the tests call the sealer's rounds."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pillarbox.outcome import DROPPED, ENQUEUED
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import DiskSpace
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.recovery import recover
from pillarbox.store.sealer import Sealer, SealerInbox, stretched_flush_interval
from pillarbox.store.writer import RETIRED_MAX, Writer, WriterLimits
from pillarbox.testing import ManualClock

LINE = record.line(b'{"n":1}')


class Line:
    """A writer and its sealer on a directory, without the sealer's thread."""

    def __init__(self, outbox_dir: Directory, clock: ManualClock, **limits: int) -> None:
        chosen = {"batch_size": 500, "batch_bytes": 10**6, "max_bytes": 2**29} | limits
        self.outbox_dir = outbox_dir
        self.sealed: list[None] = []
        inbox = SealerInbox()
        self.writer = Writer(outbox_dir, WriterLimits(**chosen), inbox.wake)
        self.sealer = Sealer(outbox_dir, self.writer, inbox, clock, 1.0, lambda: self.sealed.append(None))
        account = outbox_dir.disk_usage()
        self.writer.start(account.pending_bytes, account.pending_files)

    def append(self, count: int = 1, line: bytes = LINE) -> list[object]:
        return [self.writer.append(line, 1) for _ in range(count)]

    def lines(self) -> dict[str, int]:
        """Number of lines by kind of file, spares left out."""
        found: dict[str, int] = {}
        for name in sorted(os.listdir(self.outbox_dir.path)):
            data = Path(self.outbox_dir.path_of(name)).read_bytes()
            if data:
                assert data.endswith(b"\n")
                kind = layout.kind_of(name).value
                found[kind] = found.get(kind, 0) + data.count(b"\n")
        return found


@pytest.fixture
def line(outbox_dir: Directory, clock: ManualClock) -> Line:
    return Line(outbox_dir, clock)


def test_nothing_is_accepted_before_start_and_after_close(outbox_dir: Directory, clock: ManualClock) -> None:
    """Before: None, so that the outbox starts. After: `Dropped("closed")`."""
    line = Line(outbox_dir, clock)
    fresh = Writer(outbox_dir, WriterLimits(1, 1, 1), lambda: None)
    assert fresh.append(LINE, 1) is None
    line.sealer.seal_remaining()
    assert line.append() == [DROPPED["closed"]]
    assert os.listdir(outbox_dir.path) == []


def test_an_appended_line_is_in_the_active_segment_at_once(line: Line) -> None:
    """It survives the death of the process."""
    assert line.append(3) == [ENQUEUED] * 3
    assert line.lines() == {"active": 3}


def test_a_full_segment_is_replaced_by_the_spare_and_sealed(outbox_dir: Directory, clock: ManualClock) -> None:
    """The caller replaces it; the sealer syncs and renames it."""
    line = Line(outbox_dir, clock, batch_size=3)
    line.append(1)
    line.sealer.step()  # opens the spare
    line.append(3)
    assert line.lines() == {"active": 4}
    line.sealer.step()
    assert line.lines() == {"active": 1, "sealed": 3}
    assert line.sealer.sealed["batch_size"] == 1
    assert line.sealed == [None]


def test_without_a_spare_the_segment_grows_to_batch_bytes_first(outbox_dir: Directory, clock: ManualClock) -> None:
    """The disk is too slow, and the caller waits for nothing."""
    line = Line(outbox_dir, clock, batch_size=2, batch_bytes=5 * len(LINE))
    line.append(5)
    assert not line.writer.retired
    line.append(1)
    assert [done.events for done in line.writer.retired] == [5]
    line.sealer.step()
    assert line.lines() == {"active": 1, "sealed": 5}
    assert line.sealer.sealed["batch_bytes"] == 1


def test_the_number_of_retired_segments_is_bounded(outbox_dir: Directory, clock: ManualClock) -> None:
    """Beyond it the active segment grows."""
    line = Line(outbox_dir, clock, batch_size=1, batch_bytes=1)
    line.append(RETIRED_MAX + 20)
    assert len(line.writer.retired) == RETIRED_MAX
    line.sealer.step()
    assert line.lines() == {"active": 20, "sealed": RETIRED_MAX}


def test_a_line_longer_than_batch_bytes_has_a_segment_of_its_own(outbox_dir: Directory, clock: ManualClock) -> None:
    """`batch_bytes` does not limit an event."""
    line = Line(outbox_dir, clock, batch_bytes=10)
    assert line.append(2) == [ENQUEUED] * 2
    line.sealer.step()
    assert line.lines() == {"active": 1, "sealed": 1}


def test_above_max_bytes_events_are_dropped_and_no_segment_is_created(outbox_dir: Directory, clock: ManualClock) -> None:
    """There is room again once a file is delivered."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE * 10)
    line = Line(outbox_dir, clock, max_bytes=10 * len(LINE) + 5)
    assert line.append(2) == [DROPPED["max_bytes"]] * 2
    assert os.listdir(outbox_dir.path) == ["sealed-a.ndjson"]
    assert line.writer.dropped["max_bytes"] == 2
    line.writer.release_bytes(10 * len(LINE))
    assert line.append(11)[9:] == [ENQUEUED, DROPPED["max_bytes"]]


def test_the_sealer_learns_what_other_processes_delivered(outbox_dir: Directory, clock: ManualClock) -> None:
    """By a listing: the count of this process alone would never fall."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE * 10)
    line = Line(outbox_dir, clock, max_bytes=10 * len(LINE))
    line.sealer.step()
    assert line.append() == [DROPPED["max_bytes"]]
    os.unlink(outbox_dir.path_of("sealed-a.ndjson"))
    clock.advance(10)
    line.sealer.step()
    assert line.append() == [ENQUEUED]
    assert line.writer.pending_counts() == (len(LINE), 1, 1)


def test_a_segment_is_sealed_by_age(line: Line, clock: ManualClock) -> None:
    """`flush_interval` after its first event."""
    line.append()
    line.sealer.step()
    clock.advance(0.9)
    assert line.sealer.step() == pytest.approx(0.1)
    assert line.lines() == {"active": 1}
    clock.advance(0.2)
    line.sealer.step()
    assert line.lines() == {"sealed": 1}
    assert line.sealer.sealed["flush_interval"] == 1


@pytest.mark.parametrize(("interval", "waiting", "seconds"), [(1, 0, 1), (1, 1, 2), (1, 3, 8), (1, 10**6, 60), (90, 5, 90)])
def test_the_flush_interval_is_stretched_while_files_wait(interval: float, waiting: int, seconds: float) -> None:
    """A long outage of the destination must not leave millions of tiny files."""
    assert stretched_flush_interval(interval, waiting) == seconds


def test_closing_seals_the_segment_and_removes_empty_ones(line: Line) -> None:
    """Only batches are left."""
    line.append()
    line.sealer.step()
    line.sealer.seal_remaining()
    assert line.lines() == {"sealed": 1}
    assert len(os.listdir(line.outbox_dir.path)) == 1
    assert line.sealer.sealed["shutdown"] == 1


def test_recovered_segments_are_counted_by_kind(line: Line) -> None:
    """`startup` for the file of the older system, `adopted` for one of another writer."""
    Path(line.outbox_dir.path_of("active.ndjson")).write_bytes(LINE)
    Path(line.outbox_dir.path_of("active-w-1.ndjson")).write_bytes(LINE)
    line.sealer.adopt_segments()
    assert (line.sealer.sealed["startup"], line.sealer.sealed["adopted"]) == (1, 1)
    assert line.lines() == {"sealed": 2}


def test_the_segment_of_a_living_writer_is_not_recovered(line: Line) -> None:
    """Its lock is held."""
    line.append()
    assert recover(line.outbox_dir) == []
    assert line.lines() == {"active": 1}


class _Failing(OsFilesystem):
    """A disk that takes `budget` bytes, a part of the last write included, and then says it is full."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        if not self.budget:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(fd, data[: self.budget])
        self.budget -= written
        return written


@pytest.mark.parametrize("spare_bytes", [0, 1, len(LINE) - 1])
def test_a_full_disk_leaves_whole_lines_and_recovers(tmp_path: Path, clock: ManualClock, spare_bytes: int) -> None:
    """A short write is undone; appends continue without a restart when there is room."""
    filesystem = _Failing(3 * len(LINE) + spare_bytes)
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    assert line.append(5) == [ENQUEUED] * 3 + [DROPPED["disk_full"]] * 2
    assert line.lines() == {"active": 3}
    filesystem.budget = 10**6
    assert line.append() == [ENQUEUED]
    assert line.lines() == {"active": 4}
    assert line.writer.dropped["disk_full"] == 2


def test_many_lines_are_appended_all_or_none(tmp_path: Path, clock: ManualClock) -> None:
    """Also where the disk takes some whole lines of the call."""
    filesystem = _Failing(4 * len(LINE))
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    line.append(2)
    assert line.writer.append(LINE * 3, 3) == DROPPED["disk_full"]
    assert line.lines() == {"active": 2}


def test_a_file_size_limit_counts_as_a_full_disk(line: Line) -> None:
    """A real RLIMIT_FSIZE, in a child."""
    line.append()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(LINE) + 3, resource.RLIM_INFINITY))
        good = line.append(3) == [ENQUEUED, DROPPED["disk_full"], DROPPED["disk_full"]]
        os._exit(0 if good and line.lines() == {"active": 2} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class _Interrupted(OsFilesystem):
    """Raises KeyboardInterrupt in the middle of the next write, after `taken` bytes."""

    taken: int | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        if self.taken is None:
            return os.write(fd, data)
        os.write(fd, data[: self.taken])
        self.taken = None
        raise KeyboardInterrupt


@pytest.mark.parametrize("taken", [0, 1, len(LINE) - 1, len(LINE)])
def test_the_next_append_repairs_what_an_interrupt_left(tmp_path: Path, clock: ManualClock, taken: int) -> None:
    """A torn line is cut off, a whole one stays."""
    filesystem = _Interrupted()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    line.append()
    filesystem.taken = taken
    with pytest.raises(KeyboardInterrupt):
        line.append()
    assert line.append() == [ENQUEUED]
    assert line.lines() == {"active": 3 if taken == len(LINE) else 2}


class _Reentrant(OsFilesystem):
    """Calls the writer again in the middle of a write, as a signal handler may."""

    handler: Callable[[], None] | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        handler, self.handler = self.handler, None
        if handler is not None:
            handler()
        return os.write(fd, data)


def test_an_append_in_a_handler_that_interrupts_an_append_only_appends(tmp_path: Path, clock: ManualClock) -> None:
    """No deadlock, and no rotation under the interrupted one."""
    filesystem = _Reentrant()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock, batch_size=2)
    line.append()
    line.sealer.step()
    inner: list[object] = []
    filesystem.handler = lambda: inner.extend(line.append())
    assert line.append() == [ENQUEUED]
    assert inner == [ENQUEUED]
    line.sealer.step()
    assert line.lines() == {"sealed": 3}


class _TornAndReentrant(OsFilesystem):
    """Takes a part of the next write only, and calls the writer again before the caller hears of it."""

    handler: Callable[[], None] | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        handler, self.handler = self.handler, None
        if handler is None:
            return os.write(fd, data)
        written = os.write(fd, data[:3])
        handler()
        return written


def test_an_append_in_a_handler_after_a_torn_line_has_a_segment_of_its_own(tmp_path: Path, clock: ManualClock) -> None:
    """Otherwise it would be part of the torn line."""
    filesystem = _TornAndReentrant()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    line.append()
    inner: list[object] = []
    filesystem.handler = lambda: inner.extend(line.append(2))
    assert line.append() == [ENQUEUED]
    line.sealer.step()
    assert line.lines() == {"active": 2, "sealed": 2}
    assert line.writer.pending_counts() == (4 * len(LINE), 3, 4)


def test_threads_lose_no_event_and_tear_no_line(outbox_dir: Directory, clock: ManualClock) -> None:
    """Four threads, with rotations."""
    line = Line(outbox_dir, clock, batch_size=100)

    def work(number: int) -> None:
        for count in range(500):
            assert line.writer.append(record.line(b'{"t":%d,"n":%d}' % (number, count)), 1) == ENQUEUED
            if count % 50 == 0:
                line.sealer.step() if number == 0 else None

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line.sealer.seal_remaining()
    assert line.lines() == {"sealed": 2000}
    order: dict[bytes, list[int]] = {}
    for name in outbox_dir.batch_names():
        for text in Path(outbox_dir.path_of(name)).read_bytes().splitlines():
            thread_number, _, count = record.payload(text).strip(b"{}").partition(b',"n":')
            order.setdefault(thread_number, []).append(int(count))
    assert all(counts == list(range(500)) for counts in order.values())


class _NoMoreFiles(OsFilesystem):
    """Creates so many files and no more."""

    left = 100

    def create(self, path: str) -> int:
        if not self.left:
            raise OSError(errno.EMFILE, "Too many open files")
        self.left -= 1
        return super().create(path)


def test_where_no_file_can_be_created_sealing_continues_and_no_descriptor_leaks(tmp_path: Path, clock: ManualClock) -> None:
    """Sealing is what makes room in the end."""
    filesystem = _NoMoreFiles()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock, batch_size=2)
    line.append()
    line.sealer.step()
    line.append(3)
    filesystem.left = 1
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        line.sealer.step()
    assert line.lines() == {"active": 2, "sealed": 2} or line.lines() == {"sealed": 4}
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_deleted_segment_is_recreated(outbox_dir: Directory, clock: ManualClock) -> None:
    """The open file still has the acknowledged events; the segments after it are sealed too."""
    line = Line(outbox_dir, clock, batch_size=1, batch_bytes=1)
    line.append(3)
    (name, *_) = sorted(entry.name for entry in outbox_dir.filesystem.list_files(outbox_dir.path) if entry.size)
    os.unlink(outbox_dir.path_of(name))
    line.sealer.step()
    line.sealer.seal_remaining()
    assert line.lines() == {"sealed": 3}


def test_a_segment_can_be_rotated_directly_after_an_interrupt(tmp_path: Path, clock: ManualClock) -> None:
    """`flush` after Ctrl-C."""
    filesystem = _Interrupted()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    filesystem.taken = None
    line.append()
    filesystem.taken = len(LINE)
    with pytest.raises(KeyboardInterrupt):
        line.append()
    assert line.writer.rotate("manual")
    assert [(file.events, file.bytes) for file in line.writer.retired] == [(2, 2 * len(LINE))]


def test_at_max_files_no_segment_is_created_and_the_active_one_fills_up(outbox_dir: Directory, clock: ManualClock) -> None:
    """It grows to `batch_bytes`; when a file is delivered, the next one is created."""
    for number in range(2):
        Path(outbox_dir.path_of(f"sealed-{number}.ndjson")).write_bytes(LINE)
    line = Line(outbox_dir, clock, batch_size=2, batch_bytes=4 * len(LINE), max_files=3)
    line.append()
    line.sealer.step()
    assert line.append(5) == [ENQUEUED] * 3 + [DROPPED["max_files"]] * 2
    assert line.lines() == {"active": 4, "sealed": 2}
    assert line.writer.dropped["max_files"] == 2
    line.writer.release_bytes(len(LINE))
    assert line.append() == [ENQUEUED]


def test_at_max_files_not_even_a_first_segment_is_created(outbox_dir: Directory, clock: ManualClock) -> None:
    """None appears in the directory."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE)
    line = Line(outbox_dir, clock, max_files=1)
    assert line.append() == [DROPPED["max_files"]]
    assert os.listdir(outbox_dir.path) == ["sealed-a.ndjson"]


class _Filling(OsFilesystem):
    """A volume of 1,000 bytes of which `free` are left."""

    free = 1000

    def disk_space(self, path: str) -> DiskSpace:
        return DiskSpace(self.free, 1000)


@pytest.mark.parametrize(("least", "free"), [(None, 49), (300, 299)])
def test_below_min_free_bytes_nothing_is_accepted(tmp_path: Path, clock: ManualClock, least: int | None, free: int) -> None:
    """5 % of the volume by default; appends continue without a restart when there is room."""
    filesystem = _Filling()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock)
    line.sealer.quota._min_free_bytes = least
    line.sealer.step()
    assert line.append() == [ENQUEUED]
    for free_bytes, outcome in ((free, DROPPED["disk_low"]), (free + 1, ENQUEUED)):
        filesystem.free = free_bytes
        clock.advance(5)
        line.sealer.step()
        assert line.append(2) == [outcome] * 2
    assert line.writer.dropped["disk_low"] == 2


def test_a_deleted_directory_is_recreated_with_the_acknowledged_events(line: Line, clock: ManualClock) -> None:
    """The open files still have them; they are sealed as usual."""
    line.append(3)
    line.sealer.step()
    shutil.rmtree(line.outbox_dir.path)
    clock.advance(10)
    line.sealer.step()
    line.sealer.step()
    assert line.lines() == {"sealed": 3}
    assert line.append() == [ENQUEUED]
    line.sealer.seal_remaining()
    assert sum(line.lines().values()) == 4


class _FailingDirectorySync(OsFilesystem):
    """Syncs no directory, so many times."""

    failures = 0
    synced = 0

    def sync_directory(self, path: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        self.synced += 1
        super().sync_directory(path)


def test_a_failed_sync_of_the_directory_after_sealing_is_repeated(tmp_path: Path, clock: ManualClock) -> None:
    """Delivery is told of the batches only after it succeeds."""
    filesystem = _FailingDirectorySync()
    line = Line(Directory(str(tmp_path), filesystem, clock), clock, batch_size=1)
    line.append()
    line.sealer.step()
    line.append()
    filesystem.failures = 2
    line.sealer.step()
    line.sealer.step()
    assert (line.lines(), line.sealed, filesystem.synced) == ({"sealed": 2}, [], 0)
    line.sealer.step()
    assert (line.sealed, filesystem.synced) == ([None], 1)
    line.sealer.step()
    assert filesystem.synced == 1


def test_what_closing_could_not_seal_the_next_start_in_the_process_recovers(outbox_dir: Directory, clock: ManualClock) -> None:
    """A lock that stays held would prevent it."""
    line = Line(outbox_dir, clock)
    line.append(2)

    def refuse(_sources: Sequence[str], _targets: Sequence[str]) -> tuple[int, OSError]:
        return 0, OSError(errno.EDQUOT, "over quota")

    outbox_dir.filesystem.rename_each = refuse  # type: ignore[method-assign,assignment]
    line.sealer.seal_remaining()
    del outbox_dir.filesystem.rename_each
    assert len(recover(outbox_dir)) == 1
    assert line.lines() == {"sealed": 2}
