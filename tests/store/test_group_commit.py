"""Group commit on a real directory: which sync a caller waits for, and what a failed sync, an interrupt or a fork leaves."""

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


class Watched(OsFilesystem):
    """Counts syncs, fails as many of them as it is told to, and calls back in the middle of one."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0
        self.directory_syncs = 0
        self.failures: list[OSError] = []
        self.during: list[object] = []  # called one a sync

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


class Desk:
    """A writer, its committer and its sealer, the latter without its thread."""

    def __init__(self, path: Path, *, batch_size: int = 500, max_bytes: int = 2**29) -> None:
        self.filesystem = Watched()
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
        """All payloads on disk; there is nothing else in the files."""
        found: list[bytes] = []
        for name in sorted(os.listdir(self.outbox_dir.path)):
            contents = reader.read_lines(Path(self.outbox_dir.path_of(name)).read_bytes(), lambda: None)
            assert not contents.damaged
            found += contents.payloads
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "outbox")


def numbered(number: int) -> bytes:
    return record.line(b'{"n":%d}' % number)


def test_one_caller_causes_one_sync_of_the_segment_and_the_first_one_of_the_directory(desk: Desk) -> None:
    """The directory is synced once, before the first durable answer that needs it."""
    before = desk.filesystem.directory_syncs
    assert [desk.committer.commit(LINE, 1) for _ in range(3)] == [ENQUEUED_POWER] * 3
    assert desk.filesystem.syncs == 3
    assert desk.filesystem.directory_syncs == before + 1


def test_a_thread_that_sees_its_outcome_before_it_is_woken_still_wakes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the threads behind it would wait for the periodic check."""
    monkeypatch.setattr(group_commit, "_LEADER_CHECK_S", 600.0)
    desk = Desk(tmp_path / "outbox", batch_size=4)
    threads = [threading.Thread(target=desk.committer.commit, args=(numbered(number), 1), daemon=True) for number in range(8)]
    answered: list[Any] = []

    def others_come() -> None:
        desk.sealer.step()  # opens a spare file
        for thread in threads[1:]:
            thread.start()
        while len(desk.committer._queue) < len(threads) - 1:
            # wait: the pause between two polls of a thread's state
            threading.Event().wait(0.001)

    def note_the_first_file() -> None:
        assert len({chunk.segment for chunk in desk.committer._appended}) == 2
        answered.extend(desk.committer._appended[0].group.entries)

    def one_of_them_looks() -> None:
        waiting = sum(thread.is_alive() for thread in threads)
        answered[1].lock.release()  # as patience does, or a lead that somebody else took meanwhile
        while sum(thread.is_alive() for thread in threads) == waiting:
            # wait: the pause between two polls of a thread's state
            threading.Event().wait(0.001)

    desk.filesystem.during = [one_of_them_looks, note_the_first_file, others_come]
    threads[0].start()
    for thread in threads:
        while thread.ident is None:
            # wait: the pause between two polls of a thread's state
            threading.Event().wait(0.001)
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(desk.lines()) == len(threads)


def test_the_sealer_syncs_the_names_of_spares_so_that_callers_need_not(tmp_path: Path) -> None:
    """It syncs the directory after it has created them."""
    desk = Desk(tmp_path / "outbox", batch_size=2)
    desk.committer.commit(LINE, 1)
    desk.sealer.step()
    before = desk.filesystem.directory_syncs
    assert [desk.committer.commit(LINE, 1) for _ in range(2)] == [ENQUEUED_POWER] * 2
    assert len(desk.writer.retired) == 1  # the second of these went to a spare
    assert desk.filesystem.directory_syncs == before


def test_commit_returns_none_before_the_start_and_drops_after_the_end(desk: Desk) -> None:
    """As `Writer.append` does."""
    fresh = Writer(desk.outbox_dir, WriterLimits(1, 1, 1), lambda: None)
    assert GroupCommitter(desk.outbox_dir, fresh).commit(LINE, 1) is None
    desk.sealer.seal_remaining()
    assert desk.committer.commit(LINE, 1) == DROPPED["closed"]


def test_threads_share_syncs(desk: Desk) -> None:
    """64 threads need far fewer syncs than events, and every event is stored once."""
    outcomes: list[object] = []

    def run(thread: int) -> None:
        outcomes.extend(desk.committer.commit(numbered(100 * thread + number), 1) for number in range(20))

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [ENQUEUED_POWER] * 1280
    assert desk.filesystem.syncs < 640
    assert len(set(desk.lines())) == len(desk.lines()) == 1280


def test_a_caller_that_comes_during_a_sync_waits_for_the_next_one(desk: Desk) -> None:
    """A sync that began before the write returned does not cover it."""
    late = threading.Thread(target=lambda: desk.committer.commit(numbered(2), 1))
    served = [0]

    def come_late() -> None:
        late.start()
        while not desk.committer._queue:
            pass
        served[0] = desk.filesystem.syncs

    desk.filesystem.during = [come_late]
    assert desk.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    late.join(60)
    assert not late.is_alive()
    assert (served[0], desk.filesystem.syncs) == (1, 2)


def test_the_lock_is_free_during_a_sync(desk: Desk) -> None:
    """Another thread appends meanwhile."""
    outcomes: list[object] = []

    def append() -> None:
        other = threading.Thread(target=lambda: outcomes.append(desk.writer.append(numbered(2), 1)))
        other.start()
        other.join(60)

    desk.filesystem.during = [append]
    assert desk.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    assert outcomes
    assert outcomes[0]


def test_a_group_is_split_where_a_segment_is_full(tmp_path: Path) -> None:
    """Segments hold `batch_size` events even when a thousand coroutines come at once."""
    desk = Desk(tmp_path / "outbox", batch_size=10)
    desk.writer.append(LINE, 1)
    desk.sealer.step()

    async def main() -> list[object]:
        answers = [desk.committer.start_commit(numbered(number), 1) for number in range(25)]
        return list(await asyncio.gather(*answers))  # type: ignore[arg-type]

    assert asyncio.run(main()) == [ENQUEUED_POWER] * 25
    desk.sealer.step()
    sizes = [Path(desk.outbox_dir.path_of(name)).read_bytes().count(b"\n") for name in desk.outbox_dir.batch_names()]
    assert sizes[0] == 10
    assert len(desk.lines()) == 26


def test_where_a_group_does_not_fit_each_commit_is_tried_alone(tmp_path: Path) -> None:
    """One that is too long for the room left does not drop its whole group."""
    desk = Desk(tmp_path / "outbox", max_bytes=3 * len(LINE))
    long = record.line(b'{"n":"%s"}' % (b"x" * 500))

    async def main() -> list[object]:
        answers = [desk.committer.start_commit(lines, 1) for lines in (LINE, long, LINE)]
        return list(await asyncio.gather(*answers))  # type: ignore[arg-type]

    assert asyncio.run(main()) == [ENQUEUED_POWER, DROPPED["max_bytes"], ENQUEUED_POWER]
    assert desk.writer.dropped["max_bytes"] == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_is_not_repeated_on_the_same_file(desk: Desk, code: int, caplog: pytest.LogCaptureFixture) -> None:
    """The lines are rewritten from memory, and nothing more is appended to the file."""
    desk.committer.commit(numbered(1), 1)
    name, before = desk.writer._file.locked_file.name, desk.writer._file.fd
    inode = os.fstat(before).st_ino
    desk.filesystem.failures = [OSError(code, os.strerror(code))]
    with caplog.at_level(logging.ERROR):
        assert desk.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert "file rewritten" in caplog.text
    assert os.stat(desk.outbox_dir.path_of(name)).st_ino != inode
    assert desk.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    assert desk.writer._file.locked_file.name != name
    desk.sealer.step()
    assert sorted(desk.lines()) == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
    assert [layout.kind_of(found) for found in sorted(os.listdir(desk.outbox_dir.path))].count(layout.Kind.TEMPORARY) == 0


def test_a_rewritten_file_has_the_lines_that_are_in_memory(desk: Desk) -> None:
    """A failed sync may leave old or NUL bytes where a page was dropped."""
    desk.committer.commit(numbered(1), 1)
    fd = desk.writer._file.fd

    original = desk.filesystem.sync_data

    def lose_or_sync(synced: int) -> None:
        if synced != fd:
            original(synced)
            return
        with open(desk.outbox_dir.path_of(desk.writer._file.locked_file.name), "r+b") as file:
            file.seek(len(numbered(1)))
            file.write(b"\0" * len(numbered(2)))
        raise OSError(errno.EIO, "lost")

    desk.filesystem.sync_data = lose_or_sync  # type: ignore[method-assign,assignment]
    assert desk.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert sorted(desk.lines()) == [b'{"n":1}', b'{"n":2}']


def test_where_nothing_can_be_written_the_event_is_dropped(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """No false acknowledgement, and it continues once the disk works."""
    error = OSError(errno.EIO, "broken")
    desk.filesystem.failures = [error, error]
    with caplog.at_level(logging.ERROR):
        assert desk.committer.commit(numbered(1), 1) == DROPPED["io_error"]
    assert "not made durable" in caplog.text
    assert desk.writer.dropped["io_error"] == 1
    assert desk.committer.commit(numbered(2), 1) == ENQUEUED_POWER


def test_an_event_in_a_deleted_segment_is_not_acknowledged_as_durable(desk: Desk) -> None:
    """The sync of a file without a name succeeds, and means nothing."""
    desk.committer.commit(numbered(1), 1)
    os.unlink(desk.outbox_dir.path_of(desk.writer._file.locked_file.name))
    assert desk.committer.commit(numbered(2), 1) == DROPPED["io_error"]
    assert desk.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    desk.sealer.step()
    assert sorted(desk.lines()) == [b'{"n":1}', b'{"n":2}', b'{"n":3}']  # the sealer wrote it anew


def test_a_signal_handler_that_interrupts_a_sync_may_append_and_not_commit(desk: Desk) -> None:
    """It would wait for what it interrupts."""
    outcomes: list[object] = []

    def handle() -> None:
        outcomes.append(desk.committer.commit(numbered(2), 1))
        outcomes.append(desk.writer.append(numbered(3), 1))

    desk.filesystem.during = [handle]
    assert desk.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    assert outcomes[0] == DROPPED["would_block"]
    assert outcomes[1]


def test_an_interrupted_leader_leaves_no_thread_waiting(desk: Desk) -> None:
    """The others get their sync from another leader."""
    outcomes: list[object] = []
    followers = [threading.Thread(target=lambda n=n: outcomes.append(desk.committer.commit(numbered(n), 1))) for n in (2, 3)]

    def interrupt() -> None:
        for follower in followers:
            follower.start()
        while len(desk.committer._queue) < 2:
            pass
        raise KeyboardInterrupt

    desk.filesystem.during = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        desk.committer.commit(numbered(1), 1)
    for follower in followers:
        follower.join(60)
    assert outcomes == [ENQUEUED_POWER] * 2
    assert desk.committer.commit(numbered(4), 1) == ENQUEUED_POWER
    assert sorted(desk.lines()) == [b'{"n":%d}' % n for n in (1, 2, 3, 4)]


def test_an_interrupted_leader_leaves_no_coroutine_waiting_for_another_caller(desk: Desk) -> None:
    """None may come, so the helper thread leads."""
    answered: list[object] = []
    queued = threading.Event()

    async def one() -> None:
        answer = desk.committer.start_commit(numbered(2), 1)
        queued.set()
        assert isinstance(answer, CommitFuture)
        answered.append(await answer)

    coroutine = threading.Thread(target=lambda: asyncio.run(one()), daemon=True)

    def interrupt() -> None:
        coroutine.start()
        queued.wait(60)
        raise KeyboardInterrupt

    desk.filesystem.during = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        desk.committer.commit(numbered(1), 1)
    coroutine.join(60)
    assert answered == [ENQUEUED_POWER]


def test_leadership_is_not_passed_to_an_interrupted_follower(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who queue behind it would wait forever."""
    answered: list[object] = []
    taken = group_commit._acquired_lock

    async def one() -> None:
        answer = desk.committer.start_commit(numbered(3), 1)
        assert isinstance(answer, CommitFuture)
        answered.append(await answer)

    class Interrupting:
        """The lock of a turn, to wait for which is interrupted."""

        def acquire(self, timeout: float) -> bool:
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    def is_interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            desk.committer.commit(numbered(2), 1)

    coroutine = threading.Thread(target=lambda: asyncio.run(one()), daemon=True)

    def others_come() -> None:
        monkeypatch.setattr(group_commit, "_acquired_lock", Interrupting)
        follower = threading.Thread(target=is_interrupted)
        follower.start()
        follower.join(60)
        monkeypatch.setattr(group_commit, "_acquired_lock", taken)
        coroutine.start()
        while len(desk.committer._queue) < 2:
            # wait: the pause between two polls of a thread's state
            threading.Event().wait(0.001)

    desk.filesystem.during = [others_come]
    assert desk.committer.commit(numbered(1), 1) == ENQUEUED_POWER
    coroutine.join(60)
    assert answered == [ENQUEUED_POWER]


def test_an_interrupted_sync_is_treated_as_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next leader would sync the same file and see no error, so the file is rewritten."""
    conclude = SegmentSyncer._finish_sync

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    desk.committer.commit(numbered(1), 1)
    before = os.stat(desk.outbox_dir.path_of(desk.writer._file.locked_file.name)).st_ino
    desk.filesystem.failures = [OSError(errno.EIO, "broken")]
    monkeypatch.setattr(SegmentSyncer, "_finish_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        desk.committer.commit(numbered(2), 1)
    monkeypatch.setattr(SegmentSyncer, "_finish_sync", conclude)
    name = desk.writer._file.locked_file.name
    assert desk.committer.commit(numbered(3), 1) == ENQUEUED_POWER
    assert os.stat(desk.outbox_dir.path_of(name)).st_ino != before
    assert sorted(desk.lines()) == [b'{"n":%d}' % n for n in (1, 2, 3)]


def test_many_commits_that_do_not_fit_are_dropped_in_linear_time(tmp_path: Path) -> None:
    """The remaining lines are not joined again for each."""
    desk = Desk(tmp_path / "outbox", batch_size=10**5, max_bytes=2000)
    joined: list[int] = []
    party = group_commit._append_group_of

    def counting(entries: list[group_commit._PendingCommit]) -> group_commit._AppendGroup:
        joined.append(len(entries))
        return party(entries)

    async def all_of_them() -> list[object]:
        waiters = [desk.committer.start_commit(numbered(number), 1) for number in range(500)]
        return [await waiter if isinstance(waiter, CommitFuture) else waiter for waiter in waiters]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_commit, "_append_group_of", counting)
        outcomes = asyncio.run(all_of_them())
    assert {type(outcome) for outcome in outcomes} == {Enqueued, Dropped}
    assert sum(joined) <= 2 * len(outcomes)


def test_a_cancelled_coroutine_does_not_withdraw_its_event(desk: Desk) -> None:
    """It does not cancel the others of its round either."""

    async def one(number: int) -> object:
        answer = desk.committer.start_commit(numbered(number), 1)
        assert isinstance(answer, CommitFuture)
        return await answer

    async def main() -> object:
        first, second = asyncio.create_task(one(1)), asyncio.create_task(one(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()) == ENQUEUED_POWER
    assert sorted(desk.lines()) == [b'{"n":1}', b'{"n":2}']


def test_a_task_that_ends_the_loop_when_woken_does_not_prevent_waking_the_others(desk: Desk) -> None:
    """They are woken when the loop runs again."""

    async def one(number: int, *, ends: bool = False) -> object:
        answer = desk.committer.start_commit(numbered(number), 1)
        assert isinstance(answer, CommitFuture)
        outcome = await answer
        if ends:
            raise SystemExit
        return outcome

    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(one(number, ends=number == 1)) for number in range(3)]
    with pytest.raises(SystemExit):
        loop.run_until_complete(asyncio.wait(tasks))
    assert list(loop.run_until_complete(asyncio.gather(tasks[0], tasks[2]))) == [ENQUEUED_POWER] * 2
    assert isinstance(tasks[1].exception(), SystemExit)
    loop.close()


def test_threads_and_several_event_loops_share_rounds(desk: Desk) -> None:
    """Everyone gets an answer, and every event is stored once."""
    outcomes: list[object] = []

    def with_a_loop(first: int) -> None:
        async def one(number: int) -> None:
            for step in range(10):
                answer = desk.committer.start_commit(numbered(number + step), 1)
                assert isinstance(answer, CommitFuture)
                outcomes.append(await answer)

        async def main() -> None:
            await asyncio.gather(*[one(first + 10 * number) for number in range(20)])

        asyncio.run(main())

    def without(first: int) -> None:
        outcomes.extend(desk.committer.commit(numbered(first + step), 1) for step in range(50))

    threads = [threading.Thread(target=with_a_loop, args=(1000 * number,)) for number in range(3)]
    threads += [threading.Thread(target=without, args=(1000 * number,)) for number in range(3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [ENQUEUED_POWER] * 850
    assert len(set(desk.lines())) == len(desk.lines()) == 850


def test_a_closed_event_loop_harms_no_other_caller(desk: Desk) -> None:
    """Its events are stored, and the next caller is served."""

    async def leave() -> None:
        desk.committer.start_commit(numbered(1), 1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert desk.committer.commit(numbered(2), 1) == ENQUEUED_POWER
    assert sorted(desk.lines()) == [b'{"n":1}', b'{"n":2}']


def test_the_memory_for_queued_lines_is_bounded(desk: Desk) -> None:
    """Above the bound an event is dropped."""
    desk.committer._queued_bytes = QUEUED_BYTES_MAX
    assert desk.committer.commit(LINE, 1) == DROPPED["would_block"]
    assert desk.committer.start_commit(LINE, 1) == DROPPED["would_block"]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(str(tmp_path / "outbox"), durability="power") as outbox:
        yield outbox


def test_an_outbox_answers_with_the_durability_reached(outbox: Outbox) -> None:
    """By default, per call, for many, and from a coroutine."""
    assert outbox.enqueue(event(1)) == Enqueued("power")
    assert outbox.enqueue(event(2), durability="process") == Enqueued("process")
    assert outbox.enqueue_many([event(3), event(4)]) == [Enqueued("power")] * 2
    assert outbox.enqueue_many([event(5)], durability="process") == [Enqueued("process")]
    assert asyncio.run(outbox.enqueue_async(event(6))) == Enqueued("power")
    assert outbox.stats().durability == "power"
    assert outbox.stats().accepted == 6


def test_one_call_may_ask_for_more_durability_than_the_outbox_has_by_default(tmp_path: Path) -> None:
    """Audit events beside clicks; the first call may be the one that starts the outbox."""
    outbox = Outbox(str(tmp_path / "outbox"))
    assert asyncio.run(outbox.enqueue_async(event(1), durability="power")) == Enqueued("power")
    assert outbox.enqueue(event(2)) == Enqueued("process")
    outbox.close()
    assert asyncio.run(outbox.enqueue_async(event(3), durability="power")) == Dropped("closed")
    assert outbox.enqueue(event(4), durability="power") == Dropped("closed")


def test_a_forked_child_commits_for_itself(outbox: Outbox) -> None:
    """Whatever the parent's threads were waiting for."""
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
