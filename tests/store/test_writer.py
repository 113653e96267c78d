"""Appending and rotating on a real directory. The tests call the steps of the sealer."""

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


class SealingWriter:
    """A writer and its sealer on a directory, without the thread of the sealer."""

    def __init__(self, outbox_dir: Directory, clock: ManualClock, **limits: int) -> None:
        all_limits = {"batch_size": 500, "batch_bytes": 10**6, "max_bytes": 2**29} | limits
        self.outbox_dir = outbox_dir
        self.sealed: list[None] = []
        inbox = SealerInbox()
        self.writer = Writer(outbox_dir, WriterLimits(**all_limits), inbox.wake)
        self.sealer = Sealer(outbox_dir, self.writer, inbox, clock, 1.0, lambda: self.sealed.append(None))
        account = outbox_dir.disk_usage()
        self.writer.start(account.pending_bytes, account.pending_files)

    def append(self, count: int = 1, line: bytes = LINE) -> list[object]:
        return [self.writer.append(line, 1) for _ in range(count)]

    def lines(self) -> dict[str, int]:
        """The number of lines, by kind of file. Empty files are left out."""
        counts: dict[str, int] = {}
        for name in sorted(os.listdir(self.outbox_dir.path)):
            data = Path(self.outbox_dir.path_of(name)).read_bytes()
            if data:
                assert data.endswith(b"\n")
                kind = layout.kind_of(name).value
                counts[kind] = counts.get(kind, 0) + data.count(b"\n")
        return counts


@pytest.fixture
def pipeline(outbox_dir: Directory, clock: ManualClock) -> SealingWriter:
    return SealingWriter(outbox_dir, clock)


def test_nothing_is_accepted_before_start_and_after_close(outbox_dir: Directory, clock: ManualClock) -> None:
    """Before the start it returns None, so that the outbox starts; after the end, `Dropped("closed")`."""
    pipeline = SealingWriter(outbox_dir, clock)
    new_writer = Writer(outbox_dir, WriterLimits(1, 1, 1), lambda: None)
    assert new_writer.append(LINE, 1) is None
    pipeline.sealer.seal_remaining()
    assert pipeline.append() == [DROPPED["closed"]]
    assert os.listdir(outbox_dir.path) == []


def test_an_appended_line_is_in_the_active_segment_at_once(pipeline: SealingWriter) -> None:
    """It survives a crash of the process."""
    assert pipeline.append(3) == [ENQUEUED] * 3
    assert pipeline.lines() == {"active": 3}


def test_a_full_segment_is_replaced_by_the_spare_and_sealed(outbox_dir: Directory, clock: ManualClock) -> None:
    """The caller replaces the segment; the sealer syncs and renames it."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=3)
    pipeline.append(1)
    pipeline.sealer.step()  # creates the spare
    pipeline.append(3)
    assert pipeline.lines() == {"active": 4}
    pipeline.sealer.step()
    assert pipeline.lines() == {"active": 1, "sealed": 3}
    assert pipeline.sealer.sealed["batch_size"] == 1
    assert pipeline.sealed == [None]


def test_without_a_spare_the_segment_grows_to_batch_bytes_first(outbox_dir: Directory, clock: ManualClock) -> None:
    """The disk is too slow, and the caller must not wait."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2, batch_bytes=5 * len(LINE))
    pipeline.append(5)
    assert not pipeline.writer.retired
    pipeline.append(1)
    assert [segment.events for segment in pipeline.writer.retired] == [5]
    pipeline.sealer.step()
    assert pipeline.lines() == {"active": 1, "sealed": 5}
    assert pipeline.sealer.sealed["batch_bytes"] == 1


def test_the_number_of_retired_segments_is_bounded(outbox_dir: Directory, clock: ManualClock) -> None:
    """Above the limit, the active segment grows."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=1, batch_bytes=1)
    pipeline.append(RETIRED_MAX + 20)
    assert len(pipeline.writer.retired) == RETIRED_MAX
    pipeline.sealer.step()
    assert pipeline.lines() == {"active": 20, "sealed": RETIRED_MAX}


def test_a_line_longer_than_batch_bytes_has_a_segment_of_its_own(outbox_dir: Directory, clock: ManualClock) -> None:
    """`batch_bytes` does not limit the size of an event."""
    pipeline = SealingWriter(outbox_dir, clock, batch_bytes=10)
    assert pipeline.append(2) == [ENQUEUED] * 2
    pipeline.sealer.step()
    assert pipeline.lines() == {"active": 1, "sealed": 1}


def test_above_max_bytes_events_are_dropped_and_no_segment_is_created(outbox_dir: Directory, clock: ManualClock) -> None:
    """When a file is delivered, there is room again."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE * 10)
    pipeline = SealingWriter(outbox_dir, clock, max_bytes=10 * len(LINE) + 5)
    assert pipeline.append(2) == [DROPPED["max_bytes"]] * 2
    assert os.listdir(outbox_dir.path) == ["sealed-a.ndjson"]
    assert pipeline.writer.dropped["max_bytes"] == 2
    pipeline.writer.release_bytes(10 * len(LINE))
    assert pipeline.append(11)[9:] == [ENQUEUED, DROPPED["max_bytes"]]


def test_the_sealer_counts_deliveries_of_other_processes(outbox_dir: Directory, clock: ManualClock) -> None:
    """It lists the directory, because the counts of this process would never decrease."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE * 10)
    pipeline = SealingWriter(outbox_dir, clock, max_bytes=10 * len(LINE))
    pipeline.sealer.step()
    assert pipeline.append() == [DROPPED["max_bytes"]]
    os.unlink(outbox_dir.path_of("sealed-a.ndjson"))
    clock.advance(10)
    pipeline.sealer.step()
    assert pipeline.append() == [ENQUEUED]
    assert pipeline.writer.pending_counts() == (len(LINE), 1, 1)


def test_a_segment_is_sealed_by_age(pipeline: SealingWriter, clock: ManualClock) -> None:
    """It is sealed `flush_interval` after its first event."""
    pipeline.append()
    pipeline.sealer.step()
    clock.advance(0.9)
    assert pipeline.sealer.step() == pytest.approx(0.1)
    assert pipeline.lines() == {"active": 1}
    clock.advance(0.2)
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 1}
    assert pipeline.sealer.sealed["flush_interval"] == 1


@pytest.mark.parametrize(
    ("interval", "waiting_files", "seconds"), [(1, 0, 1), (1, 1, 2), (1, 3, 8), (1, 10**6, 60), (90, 5, 90)]
)
def test_the_flush_interval_is_stretched_while_files_wait(interval: float, waiting_files: int, seconds: float) -> None:
    """A long outage of the destination must not leave millions of tiny files."""
    assert stretched_flush_interval(interval, waiting_files) == seconds


def test_closing_seals_the_segment_and_removes_empty_ones(pipeline: SealingWriter) -> None:
    """Only batch files remain."""
    pipeline.append()
    pipeline.sealer.step()
    pipeline.sealer.seal_remaining()
    assert pipeline.lines() == {"sealed": 1}
    assert len(os.listdir(pipeline.outbox_dir.path)) == 1
    assert pipeline.sealer.sealed["shutdown"] == 1


def test_recovered_segments_are_counted_by_kind(pipeline: SealingWriter) -> None:
    """`startup` for the file of the older system, `adopted` for one of another writer."""
    Path(pipeline.outbox_dir.path_of("active.ndjson")).write_bytes(LINE)
    Path(pipeline.outbox_dir.path_of("active-w-1.ndjson")).write_bytes(LINE)
    pipeline.sealer.adopt_segments()
    assert (pipeline.sealer.sealed["startup"], pipeline.sealer.sealed["adopted"]) == (1, 1)
    assert pipeline.lines() == {"sealed": 2}


def test_the_segment_of_a_living_writer_is_not_recovered(pipeline: SealingWriter) -> None:
    """Its lock is held."""
    pipeline.append()
    assert recover(pipeline.outbox_dir) == []
    assert pipeline.lines() == {"active": 1}


class _FullDiskFilesystem(OsFilesystem):
    """Writes `budget` bytes, including a part of the last write, and then reports a full disk."""

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
    """A short write is undone. Appends succeed again, without a restart, when there is room."""
    filesystem = _FullDiskFilesystem(3 * len(LINE) + spare_bytes)
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    assert pipeline.append(5) == [ENQUEUED] * 3 + [DROPPED["disk_full"]] * 2
    assert pipeline.lines() == {"active": 3}
    filesystem.budget = 10**6
    assert pipeline.append() == [ENQUEUED]
    assert pipeline.lines() == {"active": 4}
    assert pipeline.writer.dropped["disk_full"] == 2


def test_many_lines_are_appended_all_or_none(tmp_path: Path, clock: ManualClock) -> None:
    """Even if the disk has room for some of the lines."""
    filesystem = _FullDiskFilesystem(4 * len(LINE))
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    pipeline.append(2)
    assert pipeline.writer.append(LINE * 3, 3) == DROPPED["disk_full"]
    assert pipeline.lines() == {"active": 2}


class _UncuttableFilesystem(_FullDiskFilesystem):
    """Cannot cut anything off."""

    def truncate(self, fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_that_cannot_be_cut_off_are_an_io_error(tmp_path: Path, clock: ManualClock) -> None:
    """A whole line may be left of a failed write, and is delivered then: no other reason may be given."""
    filesystem = _UncuttableFilesystem(2 * len(LINE))
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    assert pipeline.writer.append(LINE * 3, 3) == DROPPED["io_error"]
    assert pipeline.lines() == {"active": 2}


def test_a_file_size_limit_counts_as_a_full_disk(outbox_dir: Directory, clock: ManualClock) -> None:
    """RLIMIT_FSIZE is set in a child process."""
    child = os.fork()
    if child == 0:
        pipeline = SealingWriter(outbox_dir, clock)
        pipeline.append()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(LINE) + 3, resource.RLIM_INFINITY))
        is_correct = pipeline.append(3) == [ENQUEUED, DROPPED["disk_full"], DROPPED["disk_full"]]
        os._exit(0 if is_correct and pipeline.lines() == {"active": 2} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class _InterruptedFilesystem(OsFilesystem):
    """Raises KeyboardInterrupt in the middle of the next write, after `bytes_before_interrupt` bytes."""

    bytes_before_interrupt: int | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        if self.bytes_before_interrupt is None:
            return os.write(fd, data)
        os.write(fd, data[: self.bytes_before_interrupt])
        self.bytes_before_interrupt = None
        raise KeyboardInterrupt


@pytest.mark.parametrize("written", [0, 1, len(LINE) - 1, len(LINE)])
def test_the_next_append_repairs_the_segment_after_an_interrupt(tmp_path: Path, clock: ManualClock, written: int) -> None:
    """A torn line is cut off; a whole line stays."""
    filesystem = _InterruptedFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    pipeline.append()
    filesystem.bytes_before_interrupt = written
    with pytest.raises(KeyboardInterrupt):
        pipeline.append()
    assert pipeline.append() == [ENQUEUED]
    assert pipeline.lines() == {"active": 3 if written == len(LINE) else 2}


class _ReentrantFilesystem(OsFilesystem):
    """Calls the writer again in the middle of a write, as a signal handler may."""

    handler: Callable[[], None] | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        handler, self.handler = self.handler, None
        if handler is not None:
            handler()
        return os.write(fd, data)


def test_an_append_in_a_handler_that_interrupts_an_append_only_appends(tmp_path: Path, clock: ManualClock) -> None:
    """There is no deadlock, and the interrupted append keeps its segment."""
    filesystem = _ReentrantFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock, batch_size=2)
    pipeline.append()
    pipeline.sealer.step()
    nested_outcomes: list[object] = []
    filesystem.handler = lambda: nested_outcomes.extend(pipeline.append())
    assert pipeline.append() == [ENQUEUED]
    assert nested_outcomes == [ENQUEUED]
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 3}


class _ReentrantShortWriteFilesystem(OsFilesystem):
    """Writes only a part of the next write, and calls the writer again before it returns."""

    handler: Callable[[], None] | None = None

    def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
        handler, self.handler = self.handler, None
        if handler is None:
            return os.write(fd, data)
        written = os.write(fd, data[:3])
        handler()
        return written


def test_an_append_in_a_handler_after_a_torn_line_has_a_segment_of_its_own(tmp_path: Path, clock: ManualClock) -> None:
    """Otherwise its line would be a part of the torn line."""
    filesystem = _ReentrantShortWriteFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    pipeline.append()
    nested_outcomes: list[object] = []
    filesystem.handler = lambda: nested_outcomes.extend(pipeline.append(2))
    assert pipeline.append() == [ENQUEUED]
    pipeline.sealer.step()
    assert pipeline.lines() == {"active": 2, "sealed": 2}
    assert pipeline.writer.pending_counts() == (4 * len(LINE), 3, 4)


def test_threads_lose_no_event_and_tear_no_line(outbox_dir: Directory, clock: ManualClock) -> None:
    """Four threads append, and segments are rotated meanwhile."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=100)

    def work(number: int) -> None:
        for count in range(500):
            assert pipeline.writer.append(record.line(b'{"t":%d,"n":%d}' % (number, count)), 1) == ENQUEUED
            if count % 50 == 0:
                pipeline.sealer.step() if number == 0 else None

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipeline.sealer.seal_remaining()
    assert pipeline.lines() == {"sealed": 2000}
    order: dict[bytes, list[int]] = {}
    for name in outbox_dir.batch_names():
        for text in Path(outbox_dir.path_of(name)).read_bytes().splitlines():
            thread_number, _, count = record.payload(text).strip(b"{}").partition(b',"n":')
            order.setdefault(thread_number, []).append(int(count))
    assert all(counts == list(range(500)) for counts in order.values())


class _FileLimitFilesystem(OsFilesystem):
    """Can create `files_left` more files."""

    files_left = 100

    def create(self, path: str) -> int:
        if not self.files_left:
            raise OSError(errno.EMFILE, "Too many open files")
        self.files_left -= 1
        return super().create(path)


def test_if_no_file_can_be_created_sealing_continues_and_no_descriptor_leaks(tmp_path: Path, clock: ManualClock) -> None:
    """Sealed batches are delivered, and this makes room."""
    filesystem = _FileLimitFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock, batch_size=2)
    pipeline.append()
    pipeline.sealer.step()
    pipeline.append(3)
    filesystem.files_left = 1
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pipeline.sealer.step()
    assert pipeline.lines() == {"active": 2, "sealed": 2} or pipeline.lines() == {"sealed": 4}
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1


def test_a_deleted_segment_is_recreated(outbox_dir: Directory, clock: ManualClock) -> None:
    """The open file still has the accepted events. The segments after it are sealed too."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=1, batch_bytes=1)
    pipeline.append(3)
    (name, *_) = sorted(entry.name for entry in outbox_dir.filesystem.list_files(outbox_dir.path) if entry.size)
    os.unlink(outbox_dir.path_of(name))
    pipeline.sealer.step()
    pipeline.sealer.seal_remaining()
    assert pipeline.lines() == {"sealed": 3}


def test_a_segment_can_be_rotated_directly_after_an_interrupt(tmp_path: Path, clock: ManualClock) -> None:
    """For example by `flush` after Ctrl-C."""
    filesystem = _InterruptedFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    filesystem.bytes_before_interrupt = None
    pipeline.append()
    filesystem.bytes_before_interrupt = len(LINE)
    with pytest.raises(KeyboardInterrupt):
        pipeline.append()
    assert pipeline.writer.rotate("manual")
    assert [(file.events, file.bytes) for file in pipeline.writer.retired] == [(2, 2 * len(LINE))]


def test_at_max_files_no_segment_is_created_and_the_active_one_fills_up(outbox_dir: Directory, clock: ManualClock) -> None:
    """The active one grows to `batch_bytes`. When a file is delivered, the next segment is created."""
    for number in range(2):
        Path(outbox_dir.path_of(f"sealed-{number}.ndjson")).write_bytes(LINE)
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2, batch_bytes=4 * len(LINE), max_files=3)
    pipeline.append()
    pipeline.sealer.step()
    assert pipeline.append(5) == [ENQUEUED] * 3 + [DROPPED["max_files"]] * 2
    assert pipeline.lines() == {"active": 4, "sealed": 2}
    assert pipeline.writer.dropped["max_files"] == 2
    pipeline.writer.release_bytes(len(LINE))
    assert pipeline.append() == [ENQUEUED]


def test_at_max_files_the_first_segment_is_not_created_either(outbox_dir: Directory, clock: ManualClock) -> None:
    """The directory stays unchanged."""
    Path(outbox_dir.path_of("sealed-a.ndjson")).write_bytes(LINE)
    pipeline = SealingWriter(outbox_dir, clock, max_files=1)
    assert pipeline.append() == [DROPPED["max_files"]]
    assert os.listdir(outbox_dir.path) == ["sealed-a.ndjson"]


class _FreeSpaceFilesystem(OsFilesystem):
    """A volume of 1,000 bytes with `free` free bytes."""

    free = 1000

    def disk_space(self, path: str) -> DiskSpace:
        return DiskSpace(self.free, 1000)


@pytest.mark.parametrize(("least", "free"), [(None, 49), (300, 299)])
def test_below_min_free_bytes_nothing_is_accepted(tmp_path: Path, clock: ManualClock, least: int | None, free: int) -> None:
    """The default is 5 % of the volume. Appends succeed again, without a restart, when there is room."""
    filesystem = _FreeSpaceFilesystem()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock)
    pipeline.sealer.quota._min_free_bytes = least
    pipeline.sealer.step()
    assert pipeline.append() == [ENQUEUED]
    for free_bytes, outcome in ((free, DROPPED["disk_low"]), (free + 1, ENQUEUED)):
        filesystem.free = free_bytes
        clock.advance(5)
        pipeline.sealer.step()
        assert pipeline.append(2) == [outcome] * 2
    assert pipeline.writer.dropped["disk_low"] == 2


def test_a_deleted_directory_is_recreated_with_the_accepted_events(pipeline: SealingWriter, clock: ManualClock) -> None:
    """The open files still have the events, and are sealed as usual."""
    pipeline.append(3)
    pipeline.sealer.step()
    shutil.rmtree(pipeline.outbox_dir.path)
    clock.advance(10)
    pipeline.sealer.step()
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 3}
    assert pipeline.append() == [ENQUEUED]
    pipeline.sealer.seal_remaining()
    assert sum(pipeline.lines().values()) == 4


class _FailingDirectorySync(OsFilesystem):
    """Fails the next `failures` syncs of directories."""

    failures = 0
    synced = 0

    def sync_directory(self, path: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        self.synced += 1
        super().sync_directory(path)


def test_a_failed_sync_of_the_directory_after_sealing_is_repeated(tmp_path: Path, clock: ManualClock) -> None:
    """Delivery is notified of the batches only after a sync succeeds."""
    filesystem = _FailingDirectorySync()
    pipeline = SealingWriter(Directory(str(tmp_path), filesystem, clock), clock, batch_size=1)
    pipeline.append()
    filesystem.failures = 2
    pipeline.sealer.step()
    pipeline.sealer.step()
    assert (pipeline.lines(), pipeline.sealed, filesystem.synced) == ({"sealed": 1}, [], 0)
    pipeline.sealer.step()
    assert (pipeline.sealed, filesystem.synced) == ([None], 1)
    pipeline.sealer.step()
    assert filesystem.synced == 1


def test_segments_that_closing_could_not_seal_are_recovered_by_the_next_start(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """Their locks must be released, or the next start in the same process could not recover them."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append(2)

    def fail(_sources: Sequence[str], _targets: Sequence[str]) -> tuple[int, OSError]:
        return 0, OSError(errno.EDQUOT, "over quota")

    outbox_dir.filesystem.rename_each = fail  # type: ignore[method-assign,assignment]
    pipeline.sealer.seal_remaining()
    del outbox_dir.filesystem.rename_each
    assert len(recover(outbox_dir)) == 1
    assert pipeline.lines() == {"sealed": 2}
