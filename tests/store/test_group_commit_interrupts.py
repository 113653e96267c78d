"""Interrupts at every opcode of group commit: nobody waits forever, and no answer is false."""

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
from tests.store.test_interrupts import Struck, interrupt_at_next, run_and_strike, strides
from tests.store.writer_scenarios import WriteFaultFilesystem

TRACED = {group_commit.__file__}
ROOM = 3  # events of a file


def numbered(number: int) -> bytes:
    return record.line(b'{"n":%d}' % number)


class Round:
    """Runs what is called soon when it is told to; stands for an event loop on another thread."""

    def __init__(self) -> None:
        self.soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self.soon.append((callback, args))

    def run(self) -> None:
        """One after another."""
        while self.soon:
            callback, args = self.soon.popleft()
            callback(*args)


class Crowd:
    """Coroutines of two loops that wait, and the main thread, which leads."""

    def __init__(self, folder: Path, max_bytes: int = 2**20) -> None:
        outbox_dir = Directory(str(folder), WriteFaultFilesystem(), ManualClock())
        outbox_dir.ensure_usable()
        self.folder = folder
        inbox = SealerInbox()
        self.writer = Writer(outbox_dir, WriterLimits(ROOM, 10**6, max_bytes), inbox.wake)
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
        self.loops = [Round(), Round()]
        self.waiters: list[CommitFuture] = []
        self.answers: list[Outcome | None] = []

    def wait(self, *loops: int) -> None:
        """Have a coroutine of each of these loops wait for an event of its own."""
        for loop in loops:
            waiter = CommitFuture(numbered(len(self.waiters)), 1, self.loops[loop])  # type: ignore[arg-type]
            self.waiters.append(waiter)
            self.committer._queued_bytes += len(waiter.lines)
            self.committer._queue.append(waiter)

    def lead(self, number: int = 1000) -> None:
        """Commit in this thread, which leads."""
        self.answers.append(self.committer.commit(numbered(number), 1))

    def all_are_answered(self) -> bool:
        for loop in self.loops:
            loop.run()
        return all(waiter.done() for waiter in self.waiters)

    def check(self) -> int:
        """The next caller works, all are answered, and what was promised is there once; returns how many were told nothing."""
        self.lead(2000)
        assert self.answers[-1] == ENQUEUED_POWER or self.writer.dropped["max_bytes"]
        wait_until(self.all_are_answered)
        outcomes = [waiter.result() for waiter in self.waiters]
        assert {outcome for outcome in outcomes if isinstance(outcome, Dropped)} <= {DROPPED["io_error"], DROPPED["max_bytes"]}
        counts = Counter(
            payload
            for path in self.folder.iterdir()
            for contents in [reader.read_lines(path.read_bytes(), lambda: None)]
            for payload in [*contents.payloads, *[b"damaged"] * len(contents.damaged)]
        )
        promised = {b'{"n":%d}' % number for number, outcome in enumerate(outcomes) if outcome == ENQUEUED_POWER}
        refused = {b'{"n":%d}' % number for number, outcome in enumerate(outcomes) if outcome == DROPPED["max_bytes"]}
        assert promised <= set(counts)
        assert not refused & set(counts)
        assert set(counts.values()) == {1}
        assert b"damaged" not in counts
        assert self.writer.pending_counts()[2] == len(counts)
        return outcomes.count(DROPPED["io_error"])


def one_round(crowd: Crowd) -> Callable[[], object]:
    crowd.wait(0, 1)
    return crowd.lead


def round_of_several_files(crowd: Crowd) -> Callable[[], object]:
    crowd.wait(*[0] * (2 * ROOM))
    return crowd.lead


def round_for_which_there_is_no_room(crowd: Crowd) -> Callable[[], object]:
    crowd.writer.start(2**20 - 50, 1)
    crowd.wait(0, 0, 1)
    return crowd.lead


def round_after_one_that_was_cut_short(crowd: Crowd) -> Callable[[], object]:
    crowd.wait(0, 1)
    crowd.writer._filesystem.interrupted = 7  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        crowd.committer._run_round()
    crowd.wait(0)
    return crowd.lead


WHERE_FEW_ARE_UNKNOWN = [one_round, round_of_several_files]
SCENARIOS = [*WHERE_FEW_ARE_UNKNOWN, round_for_which_there_is_no_room, round_after_one_that_was_cut_short]


def crowds(
    folder: Path, scenario: Callable[[Crowd], Callable[[], object]], stride: int
) -> Iterator[tuple[int, Crowd, Callable[[], object]]]:
    """A fresh crowd for every opcode of the scenario, or for one in `stride`."""
    crowd = Crowd(folder / "count")
    count = run_and_strike(10**9, interrupt_at_next, scenario(crowd), TRACED)
    crowd.check()
    for number in range(1, count + 1, stride):
        outbox_dir = folder / str(number)
        crowd = Crowd(outbox_dir)
        yield number, crowd, scenario(crowd)
        crowd.writer._directory.filesystem.close_inherited()
        shutil.rmtree(outbox_dir)


@strides
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_of_a_leader_at_any_opcode_leaves_nobody_waiting(
    tmp_path: Path, scenario: Callable[[Crowd], Callable[[], object]], stride: int
) -> None:
    """The next leader answers the coroutines truthfully."""
    interrupted = unknown = total = 0
    trouble: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    for number, crowd, action in crowds(tmp_path, scenario, stride):
        struck = Struck(interrupt)
        with struck.installed():
            try:
                run_and_strike(number, interrupt_at_next, action, TRACED)
            except KeyboardInterrupt:
                interrupted += 1
        try:
            unknown += crowd.check() > 0
        except AssertionError as error:
            trouble.append(f"opcode {number}, at {struck.where}: {error}")
            break  # one waits until the patience of the test is at its end
        total += 1
    assert not trouble, "\n".join(trouble)
    assert interrupted > 100 / stride
    assert unknown < total / 3 or scenario not in WHERE_FEW_ARE_UNKNOWN


@strides
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_handler_that_commits_at_any_opcode_of_a_round_is_dropped_or_served(
    tmp_path: Path, scenario: Callable[[Crowd], Callable[[], object]], stride: int
) -> None:
    """Inside a round it would wait for what it interrupts."""
    trouble: list[str] = []
    refused = 0
    for number, crowd, action in crowds(tmp_path, scenario, stride):
        struck = Struck(lambda crowd=crowd: crowd.lead(3000))  # type: ignore[misc]
        with struck.installed():
            run_and_strike(number, interrupt_at_next, action, TRACED)
        refused += DROPPED["would_block"] in crowd.answers
        try:
            crowd.check()
        except AssertionError as error:
            trouble.append(f"opcode {number}, at {struck.where}: {error}")
    assert not trouble, "\n".join(trouble)
    assert refused > 100 / stride
