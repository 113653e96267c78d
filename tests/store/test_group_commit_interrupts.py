"""Interrupts at every opcode of group commit: no caller waits forever, and no outcome is false."""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox._native import CommitFuture
from pillarbox.outcome import DROPPED, ENQUEUED_POWER, Dropped, Outcome
from pillarbox.store import group_commit, reader, record
from pillarbox.store.directory import Directory
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from tests.conftest import wait_until
from tests.store.test_interrupts import RecordingHandler, interrupt_at_next, run_and_interrupt, strides
from tests.store.writer_scenarios import WriteFaultFilesystem

TRACED = {group_commit.__file__}
EVENTS_MAX = 3  # of a segment


def numbered(number: int) -> bytes:
    return record.line(b'{"n":%d}' % number)


class FakeLoop:
    """Runs scheduled callbacks on request, in place of an event loop on another thread."""

    def __init__(self) -> None:
        self.callbacks: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self.callbacks.append((callback, args))

    def run(self) -> None:
        """Run the scheduled callbacks, one after another."""
        while self.callbacks:
            callback, args = self.callbacks.popleft()
            callback(*args)


class CommitterSetup:
    """A group committer with waiting coroutines of two loops; the main thread becomes the leader."""

    def __init__(self, folder: Path, max_bytes: int = 2**20) -> None:
        outbox_dir = Directory(str(folder), WriteFaultFilesystem(), ManualClock())
        outbox_dir.ensure_usable()
        self.folder = folder
        inbox = SealerInbox()
        self.writer = Writer(outbox_dir, WriterLimits(EVENTS_MAX, 10**6, max_bytes), inbox.wake)
        self.committer = GroupCommitter(outbox_dir, self.writer)
        self.sealer = Sealer(
            outbox_dir,
            self.writer,
            inbox,
            ManualClock(),
            1.0,
            lambda: None,
            min_free_bytes=0,
            committer=self.committer,
            syncs_spare_names=True,
        )
        self.writer.start(0, 0)
        self.loops = [FakeLoop(), FakeLoop()]
        self.futures: list[CommitFuture] = []
        self.outcomes: list[Outcome | None] = []

    def wait(self, *loops: int) -> None:
        """Add a waiting coroutine with its own event to each of these loops."""
        for loop in loops:
            future = CommitFuture(numbered(len(self.futures)), 1, self.loops[loop])  # type: ignore[arg-type]
            self.futures.append(future)
            self.committer._queued_bytes += len(future.lines)
            self.committer._queue.append(future)

    def lead(self, number: int = 1000) -> None:
        """Commit in this thread, which becomes the leader."""
        self.outcomes.append(self.committer.commit(numbered(number), 1))

    def all_are_resolved(self) -> bool:
        for loop in self.loops:
            loop.run()
        return all(future.done() for future in self.futures)

    def check(self) -> int:
        """Check that the next commit works, all futures are resolved, and every promised event is stored exactly once.

        Returns the number of events whose outcome is `io_error`, and so unknown.
        """
        self.lead(2000)
        assert self.outcomes[-1] == ENQUEUED_POWER or self.writer.dropped["max_bytes"]
        wait_until(self.all_are_resolved)
        outcomes = [future.result() for future in self.futures]
        assert {outcome for outcome in outcomes if isinstance(outcome, Dropped)} <= {DROPPED["io_error"], DROPPED["max_bytes"]}
        counts = Counter(
            payload
            for path in self.folder.iterdir()
            for contents in [reader.read_lines(path.read_bytes(), lambda: None)]
            for payload in [*contents.payloads, *[b"damaged"] * len(contents.damaged)]
        )
        promised = {b'{"n":%d}' % number for number, outcome in enumerate(outcomes) if outcome == ENQUEUED_POWER}
        dropped = {b'{"n":%d}' % number for number, outcome in enumerate(outcomes) if outcome == DROPPED["max_bytes"]}
        assert promised <= set(counts)
        assert not dropped & set(counts)
        assert set(counts.values()) == {1}
        assert b"damaged" not in counts
        assert self.writer.pending_counts()[2] == len(counts)
        return outcomes.count(DROPPED["io_error"])


def one_round(setup: CommitterSetup) -> Callable[[], object]:
    setup.wait(0, 1)
    return setup.lead


def round_of_several_segments(setup: CommitterSetup) -> Callable[[], object]:
    setup.wait(*[0] * (2 * EVENTS_MAX))
    return setup.lead


def round_without_room(setup: CommitterSetup) -> Callable[[], object]:
    setup.writer.start(2**20 - 50, 1)
    setup.wait(0, 0, 1)
    return setup.lead


def round_after_an_interrupted_one(setup: CommitterSetup) -> Callable[[], object]:
    setup.wait(0, 1)
    setup.writer._filesystem.interrupted = 7  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        setup.committer._run_round()
    setup.wait(0)
    return setup.lead


FEW_UNKNOWN_SCENARIOS = [one_round, round_of_several_segments]
SCENARIOS = [*FEW_UNKNOWN_SCENARIOS, round_without_room, round_after_an_interrupted_one]


def setups(
    folder: Path, scenario: Callable[[CommitterSetup], Callable[[], object]], stride: int
) -> Iterator[tuple[int, CommitterSetup, Callable[[], object]]]:
    """A fresh setup for every opcode of the scenario, or for one in `stride`."""
    setup = CommitterSetup(folder / "count")
    count = run_and_interrupt(10**9, interrupt_at_next, scenario(setup), TRACED)
    setup.check()
    for number in range(1, count + 1, stride):
        outbox_dir = folder / str(number)
        setup = CommitterSetup(outbox_dir)
        yield number, setup, scenario(setup)
        setup.writer._directory.filesystem.close_inherited()
        shutil.rmtree(outbox_dir)


@strides
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_of_a_leader_at_any_opcode_leaves_no_caller_waiting(
    tmp_path: Path, scenario: Callable[[CommitterSetup], Callable[[], object]], stride: int
) -> None:
    """The next leader resolves the futures with true outcomes."""
    interrupted = unknown = total = 0
    problems: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    for number, setup, action in setups(tmp_path, scenario, stride):
        handler = RecordingHandler(interrupt)
        with handler.installed():
            try:
                run_and_interrupt(number, interrupt_at_next, action, TRACED)
            except KeyboardInterrupt:
                interrupted += 1
        try:
            unknown += setup.check() > 0
        except AssertionError as error:
            problems.append(f"opcode {number}, at {handler.where}: {error}")
            break  # each further failure would take the whole timeout of `wait_until`
        total += 1
    assert not problems, "\n".join(problems)
    assert interrupted > 100 / stride
    assert unknown < total / 3 or scenario not in FEW_UNKNOWN_SCENARIOS


@strides
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_handler_that_commits_at_any_opcode_of_a_round_is_dropped_or_served(
    tmp_path: Path, scenario: Callable[[CommitterSetup], Callable[[], object]], stride: int
) -> None:
    """Inside a round, it would wait for the round that it interrupts."""
    problems: list[str] = []
    dropped = 0
    for number, setup, action in setups(tmp_path, scenario, stride):
        handler = RecordingHandler(lambda setup=setup: setup.lead(3000))  # type: ignore[misc]
        with handler.installed():
            run_and_interrupt(number, interrupt_at_next, action, TRACED)
        dropped += DROPPED["would_block"] in setup.outcomes
        try:
            setup.check()
        except AssertionError as error:
            problems.append(f"opcode {number}, at {handler.where}: {error}")
    assert not problems, "\n".join(problems)
    assert dropped > 100 / stride
