"""Group commit on a real directory: the sync that a caller waits for, failed syncs, interrupts and forks."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Dropped, Enqueued, Outbox
from pillarbox._native import CommitFuture
from pillarbox.outcome import DROPPED, ENQUEUED_POWER
from pillarbox.store import group_commit, layout, reader, record
from pillarbox.store.directory import Directory
from pillarbox.store.group_commit import QUEUED_BYTES_MAX, GroupCommitter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.segment import SegmentSyncer
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from tests.conftest import event

LINE = record.line(b'{"n":1}')


class SyncHookFilesystem(OsFilesystem):
    """Counts syncs, fails some of them, and calls functions during syncs."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0
        self.directory_syncs = 0
        self.failures: list[OSError] = []
        self.during: list[object] = []  # each sync calls the last one, and removes it

    def sync_data(self, fd: int) -> None:
        self.syncs += 1
        if self.failures:
            raise self.failures.pop()
        super().sync_data(fd)
        if self.during:
            self.during.pop()()  # type: ignore[operator]

    def sync_directory(self, path: str) -> None:
        self.directory_syncs += 1
        super().sync_directory(path)


class CommitSetup:
    """A writer, its group committer, and its sealer without a thread."""

    def __init__(self, path: Path, *, batch_size: int = 500, max_bytes: int = 2**29) -> None:
        self.filesystem = SyncHookFilesystem()
        self.outbox_dir = Directory(str(path), self.filesystem, ManualClock())
        self.outbox_dir.ensure_usable()
        inbox = SealerInbox()
        self.writer = Writer(self.outbox_dir, WriterLimits(batch_size, 10**6, max_bytes), inbox.wake)
        self.committer = GroupCommitter(self.outbox_dir, self.writer)
        self.sealer = Sealer(
            self.outbox_dir,
            self.writer,
            inbox,
            ManualClock(),
            1.0,
            lambda: None,
            committer=self.committer,
            syncs_spare_names=True,
        )
        self.writer.start(0, 0)

    def lines(self) -> list[bytes]:
        """All payloads on disk. The files must have no damaged lines."""
        payloads: list[bytes] = []
        for name in sorted(os.listdir(self.outbox_dir.path)):
            contents = reader.read_lines(Path(self.outbox_dir.path_of(name)).read_bytes(), lambda: None)
            assert not contents.damaged
            payloads += contents.payloads
        return payloads


@pytest.fixture
def setup(tmp_path: Path) -> CommitSetup:
    return CommitSetup(tmp_path / "outbox")


def numbered(number: int) -> bytes:
    return record.line(b'{"n":%d}' % number)


def test_one_caller_causes_one_sync_of_the_segment_and_the_first_one_of_the_directory(setup: CommitSetup) -> None:
    """The directory is synced once, before the first commit that needs it is confirmed."""
    syncs_before = setup.filesystem.directory_syncs
    assert [setup.committer.commit(LINE, 1) for _ in range(3)] == [ENQUEUED_POWER] * 3
    assert setup.filesystem.syncs == 3
    assert setup.filesystem.directory_syncs == syncs_before + 1


def test_a_thread_that_sees_its_outcome_before_it_is_woken_still_wakes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the threads after it would wait for the periodic check."""
    monkeypatch.setattr(group_commit, "_LEADER_CHECK_S", 600.0)
    setup = CommitSetup(tmp_path / "outbox", batch_size=4)
    threads = [threading.Thread(target=setup.committer.commit, args=(numbered(number), 1), daemon=True) for number in range(8)]
    first_group: list[Any] = []

    def start_other_threads() -> None:
        setup.sealer.step()  # creates a spare
        for thread in threads[1:]:
            thread.start()
        while len(setup.committer._queue) < len(threads) - 1:
            # wait: polls the state of a thread
            threading.Event().wait(0.001)

    def note_the_first_group() -> None:
        assert len({chunk.segment for chunk in setup.committer._appended}) == 2
        first_group.extend(setup.committer._appended[0].group.entries)

    def wake_one_early() -> None:
        waiting = sum(thread.is_alive() for thread in threads)
        first_group[1].lock.release()  # as the periodic check does, or a leader that another thread replaced
        while sum(thread.is_alive() for thread in threads) == waiting:
            # wait: polls the state of a thread
            threading.Event().wait(0.001)

    setup.filesystem.during = [wake_one_early, note_the_first_group, start_other_threads]
    threads[0].start()
    for thread in threads:
        while thread.ident is None:
            # wait: polls the state of a thread
            threading.Event().wait(0.001)
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(setup.lines()) == len(threads)


def test_the_sealer_makes_the_names_of_spares_durable(tmp_path: Path) -> None:
    """It syncs the directory after it has created them, so that callers need not."""
    setup = CommitSetup(tmp_path / "outbox", batch_size=2)
    setup.committer.commit(LINE, 1)
    setup.sealer.step()
    syncs_before = setup.filesystem.directory_syncs
    assert [setup.committer.commit(LINE, 1) for _ in range(2)] == [ENQUEUED_POWER] * 2
    assert len(setup.writer.retired) == 1  # the second commit used a spare
    assert setup.filesystem.directory_syncs == syncs_before


def test_commit_returns_none_before_the_start_and_drops_after_the_end(setup: CommitSetup) -> None:
    """So does `Writer.append`."""
    new_writer = Writer(setup.outbox_dir, WriterLimits(1, 1, 1), lambda: None)
    assert GroupCommitter(setup.outbox_dir, new_writer).commit(LINE, 1) is None
    setup.sealer.seal_remaining()
    assert setup.committer.commit(LINE, 1) == DROPPED["closed"]


def test_threads_share_syncs(setup: CommitSetup) -> None:
    """64 threads need far fewer syncs than events, and every event is stored once."""
    outcomes: list[object] = []

    def run(thread: int) -> None:
        outcomes.extend(setup.committer.commit(numbered(100 * thread + number), 1) for number in range(20))

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [ENQUEUED_POWER] * 1280
    assert setup.filesystem.syncs < 640
    assert len(set(setup.lines())) == len(setup.lines()) == 1280


def test_a_commit_during_a_sync_waits_for_the_next_sync(setup: CommitSetup) -> None:
    """A sync that began before the write returned does not cover it."""
    late = threading.Thread(target=lambda: setup.committer.commit(numbered(2), 1))
    syncs_so_far = [0]

    def start_late_commit() -> None:
        late.start()
        while not setup.committer._queue:
            pass
        syncs_so_far[0] = setup.filesystem.syncs

    setup.filesystem.during = [start_late_commit]
    assert setup.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    late.join(60)
    assert not late.is_alive()
    assert (syncs_so_far[0], setup.filesystem.syncs) == (1, 2)


def test_the_lock_is_free_during_a_sync(setup: CommitSetup) -> None:
    """Another thread can append meanwhile."""
    outcomes: list[object] = []

    def append() -> None:
        thread = threading.Thread(target=lambda: outcomes.append(setup.writer.append(numbered(2), 1)))
        thread.start()
        thread.join(60)

    setup.filesystem.during = [append]
    assert setup.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    assert outcomes
    assert outcomes[0]


def test_a_group_is_split_when_a_segment_is_full(tmp_path: Path) -> None:
    """Segments hold `batch_size` events even if many coroutines commit at once."""
    setup = CommitSetup(tmp_path / "outbox", batch_size=10)
    setup.writer.append(LINE, 1)
    setup.sealer.step()

    async def main() -> list[object]:
        futures = [setup.committer.start_commit(numbered(number), 1) for number in range(25)]
        return list(await asyncio.gather(*futures))  # type: ignore[arg-type]

    assert asyncio.run(main()) == [ENQUEUED_POWER] * 25
    setup.sealer.step()
    sizes = [Path(setup.outbox_dir.path_of(name)).read_bytes().count(b"\n") for name in setup.outbox_dir.batch_names()]
    assert sizes[0] == 10
    assert len(setup.lines()) == 26


def test_if_a_group_does_not_fit_each_commit_is_tried_alone(tmp_path: Path) -> None:
    """A line that is too long for the remaining room does not cause the whole group to be dropped."""
    setup = CommitSetup(tmp_path / "outbox", max_bytes=3 * len(LINE))
    long_line = record.line(b'{"n":"%s"}' % (b"x" * 500))

    async def main() -> list[object]:
        futures = [setup.committer.start_commit(lines, 1) for lines in (LINE, long_line, LINE)]
        return list(await asyncio.gather(*futures))  # type: ignore[arg-type]

    assert asyncio.run(main()) == [ENQUEUED_POWER, DROPPED["max_bytes"], ENQUEUED_POWER]
    assert setup.writer.dropped["max_bytes"] == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_is_not_repeated_on_the_same_file(
    setup: CommitSetup, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The lines are rewritten from memory, and nothing more is appended to the file."""
    setup.committer.commit(numbered(1), 1)
    name, fd = setup.writer._file.locked_file.name, setup.writer._file.fd
    inode = os.fstat(fd).st_ino
    setup.filesystem.failures = [OSError(code, os.strerror(code))]
    with caplog.at_level(logging.ERROR):
        assert setup.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert "file rewritten" in caplog.text
    assert os.stat(setup.outbox_dir.path_of(name)).st_ino != inode
    assert setup.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    assert setup.writer._file.locked_file.name != name
    setup.sealer.step()
    assert sorted(setup.lines()) == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
    assert [layout.kind_of(file_name) for file_name in sorted(os.listdir(setup.outbox_dir.path))].count(
        layout.Kind.TEMPORARY
    ) == 0


def test_a_rewritten_file_has_the_lines_that_are_in_memory(setup: CommitSetup) -> None:
    """A failed sync may leave old bytes or NUL bytes where the kernel dropped a page."""
    setup.committer.commit(numbered(1), 1)
    fd = setup.writer._file.fd

    sync_data = setup.filesystem.sync_data

    def lose_or_sync(synced_fd: int) -> None:
        if synced_fd != fd:
            sync_data(synced_fd)
            return
        with open(setup.outbox_dir.path_of(setup.writer._file.locked_file.name), "r+b") as file:
            file.seek(len(numbered(1)))
            file.write(b"\0" * len(numbered(2)))
        raise OSError(errno.EIO, "lost")

    setup.filesystem.sync_data = lose_or_sync  # type: ignore[method-assign,assignment]
    assert setup.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert sorted(setup.lines()) == [b'{"n":1}', b'{"n":2}']


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_event_is_dropped_for_an_io_error_if_its_file_cannot_be_rewritten_either(
    setup: CommitSetup, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit is not confirmed, and the next one succeeds once the disk works.

    The event is written, so it may be delivered: the reason is not that the disk is full, for which a caller would try again.
    """
    error = OSError(code, os.strerror(code))
    setup.filesystem.failures = [error, error]
    with caplog.at_level(logging.ERROR):
        assert setup.committer.commit(numbered(1), 1) == DROPPED["io_error"]
    assert "not made durable" in caplog.text
    assert setup.writer.dropped["io_error"] == 1
    assert setup.committer.commit(numbered(2), 1) == ENQUEUED_POWER


def test_a_commit_to_a_deleted_segment_is_not_confirmed(setup: CommitSetup) -> None:
    """The sync of a file without a name succeeds, but the event would be lost in a crash."""
    setup.committer.commit(numbered(1), 1)
    os.unlink(setup.outbox_dir.path_of(setup.writer._file.locked_file.name))
    assert setup.committer.commit(numbered(2), 1) == DROPPED["io_error"]
    assert setup.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    setup.sealer.step()
    assert sorted(setup.lines()) == [b'{"n":1}', b'{"n":2}', b'{"n":3}']  # the sealer recreated the file


def test_a_signal_handler_that_interrupts_a_sync_may_append_and_not_commit(setup: CommitSetup) -> None:
    """A commit in the handler would wait for the sync that it interrupts."""
    outcomes: list[object] = []

    def handle() -> None:
        outcomes.append(setup.committer.commit(numbered(2), 1))
        outcomes.append(setup.writer.append(numbered(3), 1))

    setup.filesystem.during = [handle]
    assert setup.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    assert outcomes[0] == DROPPED["would_block"]
    assert outcomes[1]


def test_an_interrupted_leader_leaves_no_thread_waiting(setup: CommitSetup) -> None:
    """Another thread becomes the leader and syncs for them."""
    outcomes: list[object] = []
    followers = [threading.Thread(target=lambda n=n: outcomes.append(setup.committer.commit(numbered(n), 1))) for n in (2, 3)]

    def interrupt() -> None:
        for follower in followers:
            follower.start()
        while len(setup.committer._queue) < 2:
            pass
        raise KeyboardInterrupt

    setup.filesystem.during = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        setup.committer.commit(numbered(1), 1)
    for follower in followers:
        follower.join(60)
    assert outcomes == [ENQUEUED_POWER] * 2
    assert setup.committer.commit(numbered(4), 1) == ENQUEUED_POWER
    assert sorted(setup.lines()) == [b'{"n":%d}' % n for n in (1, 2, 3, 4)]


def test_an_interrupted_leader_leaves_no_coroutine_waiting_for_another_caller(setup: CommitSetup) -> None:
    """There may be no other caller, so the helper thread becomes the leader."""
    outcomes: list[object] = []
    queued = threading.Event()

    async def commit_in_loop() -> None:
        future = setup.committer.start_commit(numbered(2), 1)
        queued.set()
        assert isinstance(future, CommitFuture)
        outcomes.append(await future)

    coroutine = threading.Thread(target=lambda: asyncio.run(commit_in_loop()), daemon=True)

    def interrupt() -> None:
        coroutine.start()
        queued.wait(60)
        raise KeyboardInterrupt

    setup.filesystem.during = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        setup.committer.commit(numbered(1), 1)
    coroutine.join(60)
    assert outcomes == [ENQUEUED_POWER]


def test_leadership_is_not_passed_to_an_interrupted_follower(setup: CommitSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callers after it would wait forever."""
    outcomes: list[object] = []
    acquired_lock = group_commit._acquired_lock

    async def commit_in_loop() -> None:
        future = setup.committer.start_commit(numbered(3), 1)
        assert isinstance(future, CommitFuture)
        outcomes.append(await future)

    class InterruptedLock:
        """A lock whose `acquire` is interrupted."""

        def acquire(self, timeout: float) -> bool:
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    def commit_and_be_interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            setup.committer.commit(numbered(2), 1)

    coroutine = threading.Thread(target=lambda: asyncio.run(commit_in_loop()), daemon=True)

    def start_other_threads() -> None:
        monkeypatch.setattr(group_commit, "_acquired_lock", InterruptedLock)
        follower = threading.Thread(target=commit_and_be_interrupted)
        follower.start()
        follower.join(60)
        monkeypatch.setattr(group_commit, "_acquired_lock", acquired_lock)
        coroutine.start()
        while len(setup.committer._queue) < 2:
            # wait: polls the state of a thread
            threading.Event().wait(0.001)

    setup.filesystem.during = [start_other_threads]
    assert setup.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    coroutine.join(60)
    assert outcomes == [ENQUEUED_POWER]


def test_an_interrupted_sync_is_treated_as_failed(setup: CommitSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sync of the same file would report no error, so the file is rewritten."""
    finish_sync = SegmentSyncer._finish_sync

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    setup.committer.commit(numbered(1), 1)
    inode = os.stat(setup.outbox_dir.path_of(setup.writer._file.locked_file.name)).st_ino
    setup.filesystem.failures = [OSError(errno.EIO, os.strerror(errno.EIO))]
    monkeypatch.setattr(SegmentSyncer, "_finish_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.committer.commit(numbered(2), 1)
    monkeypatch.setattr(SegmentSyncer, "_finish_sync", finish_sync)
    name = setup.writer._file.locked_file.name
    assert setup.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    assert os.stat(setup.outbox_dir.path_of(name)).st_ino != inode
    assert sorted(setup.lines()) == [b'{"n":%d}' % n for n in (1, 2, 3)]


def test_many_commits_that_do_not_fit_are_dropped_in_linear_time(tmp_path: Path) -> None:
    """The remaining lines are not joined again for each dropped commit."""
    setup = CommitSetup(tmp_path / "outbox", batch_size=10**5, max_bytes=2000)
    joined_counts: list[int] = []
    append_group_of = group_commit._append_group_of

    def counting(entries: list[group_commit._PendingCommit]) -> group_commit._AppendGroup:
        joined_counts.append(len(entries))
        return append_group_of(entries)

    async def commit_all() -> list[object]:
        futures = [setup.committer.start_commit(numbered(number), 1) for number in range(500)]
        return [await future if isinstance(future, CommitFuture) else future for future in futures]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_commit, "_append_group_of", counting)
        outcomes = asyncio.run(commit_all())
    assert {type(outcome) for outcome in outcomes} == {Enqueued, Dropped}
    assert sum(joined_counts) <= 2 * len(outcomes)


def test_the_event_of_a_cancelled_coroutine_is_stored(setup: CommitSetup) -> None:
    """The other coroutines of its group are not cancelled either."""

    async def commit(number: int) -> object:
        future = setup.committer.start_commit(numbered(number), 1)
        assert isinstance(future, CommitFuture)
        return await future

    async def main() -> object:
        first, second = asyncio.create_task(commit(1)), asyncio.create_task(commit(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()) == ENQUEUED_POWER
    assert sorted(setup.lines()) == [b'{"n":1}', b'{"n":2}']


def test_a_task_that_ends_the_loop_when_woken_does_not_prevent_waking_the_others(setup: CommitSetup) -> None:
    """They continue when the loop runs again."""

    async def commit(number: int, *, ends: bool = False) -> object:
        future = setup.committer.start_commit(numbered(number), 1)
        assert isinstance(future, CommitFuture)
        outcome = await future
        if ends:
            raise SystemExit
        return outcome

    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(commit(number, ends=number == 1)) for number in range(3)]
    with pytest.raises(SystemExit):
        loop.run_until_complete(asyncio.wait(tasks))
    assert list(loop.run_until_complete(asyncio.gather(tasks[0], tasks[2]))) == [ENQUEUED_POWER] * 2
    assert isinstance(tasks[1].exception(), SystemExit)
    loop.close()


def test_threads_and_several_event_loops_share_groups(setup: CommitSetup) -> None:
    """Each commit has its outcome, and every event is stored once."""
    outcomes: list[object] = []

    def commit_in_coroutines(first: int) -> None:
        async def commit_ten(number: int) -> None:
            for step in range(10):
                future = setup.committer.start_commit(numbered(number + step), 1)
                assert isinstance(future, CommitFuture)
                outcomes.append(await future)

        async def main() -> None:
            await asyncio.gather(*[commit_ten(first + 10 * number) for number in range(20)])

        asyncio.run(main())

    def commit_in_thread(first: int) -> None:
        outcomes.extend(setup.committer.commit(numbered(first + step), 1) for step in range(50))

    threads = [threading.Thread(target=commit_in_coroutines, args=(1000 * number,)) for number in range(3)]
    threads += [threading.Thread(target=commit_in_thread, args=(1000 * number,)) for number in range(3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [ENQUEUED_POWER] * 850
    assert len(set(setup.lines())) == len(setup.lines()) == 850


def test_a_closed_event_loop_does_not_affect_other_callers(setup: CommitSetup) -> None:
    """Its events are stored, and the next caller is served."""

    async def start_and_leave() -> None:
        setup.committer.start_commit(numbered(1), 1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start_and_leave())
    loop.close()
    assert setup.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert sorted(setup.lines()) == [b'{"n":1}', b'{"n":2}']


def test_the_memory_for_queued_lines_is_bounded(setup: CommitSetup) -> None:
    """Above the limit, an event is dropped."""
    setup.committer._queued_bytes = QUEUED_BYTES_MAX
    assert setup.committer.commit(LINE, 1) == DROPPED["would_block"]
    assert setup.committer.start_commit(LINE, 1) == DROPPED["would_block"]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(str(tmp_path / "outbox"), durability="power") as outbox:
        yield outbox


def test_outcomes_have_the_durability_that_was_reached(outbox: Outbox) -> None:
    """By default, per call, for several events, and in a coroutine."""
    assert outbox.enqueue(event(1)) == Enqueued("power")
    assert outbox.enqueue(event(2), durability="process") == Enqueued("process")
    assert outbox.enqueue_many([event(3), event(4)]) == [Enqueued("power")] * 2
    assert outbox.enqueue_many([event(5)], durability="process") == [Enqueued("process")]
    assert asyncio.run(outbox.enqueue_async(event(6))) == Enqueued("power")
    assert outbox.stats().durability == "power"
    assert outbox.stats().accepted == 6


def test_a_call_may_request_more_durability_than_the_default(tmp_path: Path) -> None:
    """For example for audit events. The call may also be the one that starts the outbox."""
    outbox = Outbox(str(tmp_path / "outbox"))
    assert asyncio.run(outbox.enqueue_async(event(1), durability="power")) == Enqueued("power")
    assert outbox.enqueue(event(2)) == Enqueued("process")
    outbox.close()
    assert asyncio.run(outbox.enqueue_async(event(3), durability="power")) == Dropped("closed")
    assert outbox.enqueue(event(4), durability="power") == Dropped("closed")


def test_a_forked_child_commits_for_itself(outbox: Outbox) -> None:
    """Threads of the parent may wait for a commit at the time of the fork."""
    stop = threading.Event()
    counts = [0] * 4

    def run(thread: int) -> None:
        while not stop.is_set():
            assert outbox.enqueue(event(10_000 * (thread + 1) + counts[thread]))
            counts[thread] += 1

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for number in range(10):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang is a failure
            os._exit(0 if outbox.enqueue(event(number)) and asyncio.run(outbox.enqueue_async(event(100 + number))) else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join(60)
    assert outbox.stats().accepted == sum(counts)
