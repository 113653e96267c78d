"""`CommitFuture`, which a coroutine awaits with `durability="power"`, works with asyncio like a future, in C and in Python."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import pytest

from pillarbox._native import (
    COMPILED,
    CommitFuture,
    PyCommitFuture,
    gather_group,
    py_gather_group,
    py_resolve_futures,
    resolve_futures,
)
from pillarbox.outcome import DROPPED, ENQUEUED_POWER


class Implementation(NamedTuple):
    """The functions of one implementation."""

    future: Any
    resolve: Any
    gather: Any


IMPLEMENTATIONS = [Implementation(PyCommitFuture, py_resolve_futures, py_gather_group)]
if COMPILED:
    IMPLEMENTATIONS.append(Implementation(CommitFuture, resolve_futures, gather_group))


@pytest.fixture(params=IMPLEMENTATIONS, ids=["Python", "C"][: len(IMPLEMENTATIONS)])
def implementation(request: pytest.FixtureRequest) -> Any:
    return request.param


class FutureGroup:
    """The futures that coroutines of one loop wait for."""

    def __init__(self, implementation: Any) -> None:
        self.implementation = implementation
        self.futures: list[Any] = []

    async def wait(self) -> Any:
        """Wait for a new future."""
        future = self.implementation.future(b"x\n", 1, asyncio.get_running_loop())
        self.futures.append(future)
        return await future

    def resolve(self, outcome: Any = ENQUEUED_POWER) -> None:
        """Resolve all futures now."""
        self.implementation.resolve(self.futures, outcome)

    def resolve_soon(self, outcome: Any = ENQUEUED_POWER) -> None:
        """Resolve all futures by one callback of the loop, as the group committer does."""
        asyncio.get_running_loop().call_soon(self.resolve, outcome)


def run(main: Callable[[], Coroutine[Any, Any, Any]], *, debug: bool = False) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 60), debug=debug)


@pytest.mark.parametrize("debug", [False, True])
def test_one_callback_wakes_all_coroutines(implementation: Any, *, debug: bool) -> None:
    """In the order in which they began to wait. The list is empty afterwards."""
    group, order = FutureGroup(implementation), []

    async def wait_and_note(number: int) -> Any:
        outcome = await group.wait()
        order.append(number)
        return outcome

    async def main() -> Any:
        tasks = [asyncio.create_task(wait_and_note(number)) for number in range(10)]
        await asyncio.sleep(0)
        group.resolve_soon()
        return await asyncio.gather(*tasks)

    assert run(main, debug=debug) == [ENQUEUED_POWER] * 10
    assert order == list(range(10))
    assert group.futures == []


def test_a_cancelled_coroutine_ends_at_once_and_the_others_keep_waiting(implementation: Any) -> None:
    """The exception has the message. A later outcome of the cancelled future is ignored."""
    group = FutureGroup(implementation)

    async def main() -> Any:
        first, second = asyncio.create_task(group.wait()), asyncio.create_task(group.wait())
        await asyncio.sleep(0)
        assert first.cancel("stop waiting")
        with pytest.raises(asyncio.CancelledError, match="stop waiting"):
            await first
        assert group.futures[0].cancelled()
        assert not second.done()
        group.resolve_soon(DROPPED["io_error"])
        return await second

    assert run(main) == DROPPED["io_error"]


def test_timeouts_shield_gather_and_wait_work_as_with_a_future(implementation: Any) -> None:
    """Each of them is applied to a pending future."""
    group = FutureGroup(implementation)

    async def main() -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group.wait(), 0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await group.wait()
        shielded = asyncio.ensure_future(group.wait())
        outer = asyncio.shield(shielded)
        await asyncio.sleep(0)
        outer.cancel()
        await asyncio.sleep(0)
        assert not shielded.done()
        bare = implementation.future(b"x\n", 1, asyncio.get_running_loop())
        gathered = asyncio.gather(bare, bare, group.wait())
        waited = asyncio.create_task(asyncio.wait([bare]))
        await asyncio.sleep(0)
        group.futures.append(bare)
        group.resolve_soon()
        await waited
        return [await shielded, *await gathered, await bare, bare.result(), bare.exception()]

    assert run(main) == [ENQUEUED_POWER] * 6 + [None]


def test_a_task_can_cancel_another_task_whose_future_is_resolved(implementation: Any) -> None:
    """As with futures that are done, the task is cancelled although its outcome exists."""
    group = FutureGroup(implementation)
    tasks: list[asyncio.Task[Any]] = []

    async def first() -> None:
        await group.wait()
        tasks[1].cancel()

    async def main() -> None:
        tasks.extend([asyncio.create_task(first()), asyncio.create_task(group.wait())])
        await asyncio.sleep(0)
        group.resolve_soon()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]

    run(main)


def test_each_coroutine_is_woken_in_its_own_context(implementation: Any) -> None:
    """It sees its own values of context variables, not those of other coroutines."""
    group = FutureGroup(implementation)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def wait_in_context(number: int) -> bool:
        variable.set(number)
        await group.wait()
        return variable.get() == number

    async def main() -> Any:
        tasks = [asyncio.create_task(wait_in_context(number)) for number in range(3)]
        await asyncio.sleep(0)
        group.resolve_soon()
        return await asyncio.gather(*tasks)

    assert run(main) == [True] * 3


def test_a_callback_that_ends_the_loop_leaves_the_other_futures_in_the_list(implementation: Any) -> None:
    """They can still be resolved afterwards."""
    group = FutureGroup(implementation)

    async def exit_when_woken() -> None:
        await group.wait()
        raise SystemExit

    loop = asyncio.new_event_loop()
    try:
        tasks = [loop.create_task(exit_when_woken()), loop.create_task(group.wait())]
        loop.run_until_complete(asyncio.sleep(0))
        with pytest.raises(SystemExit):
            group.resolve()
        assert len(group.futures) == 1
        group.resolve()
        assert loop.run_until_complete(tasks[1]) == ENQUEUED_POWER
        assert isinstance(tasks[0].exception(), SystemExit)
    finally:
        loop.close()


def test_a_future_that_is_resolved_before_it_is_awaited_does_not_wait(implementation: Any) -> None:
    """A callback that is added afterwards is called too."""

    async def main() -> Any:
        future, called = implementation.future(b"x\n", 1, asyncio.get_running_loop()), asyncio.Event()
        with pytest.raises(asyncio.InvalidStateError):
            future.result()
        implementation.resolve([future], ENQUEUED_POWER)
        future.add_done_callback(lambda _: called.set())
        await called.wait()
        assert not future.cancel()
        return await future

    assert run(main) == ENQUEUED_POWER


def test_callbacks_can_be_removed(implementation: Any) -> None:
    """All equal ones are removed. The others stay, in order."""

    async def main() -> Any:
        future, seen = implementation.future(b"x\n", 1, asyncio.get_running_loop()), list[int]()
        callbacks = [lambda _, n=n: seen.append(n) for n in range(3)]
        for callback in (callbacks[0], callbacks[1], callbacks[0], callbacks[2]):
            future.add_done_callback(callback)
        assert future.remove_done_callback(callbacks[0]) == 2
        assert future.remove_done_callback(callbacks[0]) == 0
        implementation.resolve([future], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [1, 2]


def test_a_coroutine_without_a_loop_of_asyncio_can_be_driven_and_closed(implementation: Any) -> None:
    """`send` drives it, as a task does."""
    future = implementation.future(b"x\n", 1, asyncio.new_event_loop())

    async def wait() -> Any:
        return await future

    driven, closed = wait(), wait()
    assert closed.send(None) is future
    closed.close()
    assert driven.send(None) is future
    assert future._asyncio_future_blocking is True
    implementation.resolve([future], ENQUEUED_POWER)
    with pytest.raises(StopIteration) as stopped:
        driven.send(None)
    assert stopped.value.value == ENQUEUED_POWER
    future.get_loop().close()


def test_a_future_that_is_never_resolved_is_collected(implementation: Any) -> None:
    """A task and its future refer to each other."""
    group = FutureGroup(implementation)

    class LocalValue:
        pass

    async def wait_with_local(value: LocalValue) -> None:
        await group.wait()
        del value

    loop = asyncio.new_event_loop()
    value = LocalValue()
    reference = weakref.ref(value)
    task = loop.create_task(wait_with_local(value))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del value
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    group.futures.clear()
    del task, loop
    gc.collect()
    assert reference() is None


def test_loops_in_several_threads_resolve_their_own_futures(implementation: Any) -> None:
    """A future knows its loop."""
    results: list[bool] = []

    def run_loop() -> None:
        group = FutureGroup(implementation)

        async def main() -> None:
            task = asyncio.create_task(group.wait())
            await asyncio.sleep(0)
            results.append(group.futures[0].get_loop() is asyncio.get_running_loop() is group.futures[0].loop)
            group.resolve_soon()
            results.append(await task == ENQUEUED_POWER)

        run(main)

    threads = [threading.Thread(target=run_loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 8


class WaitingThread:
    """A waiting thread, with the attributes that `gather_group` reads."""

    loop = None

    def __init__(self, lines: bytes, events: int) -> None:
        self.lines = lines
        self.events = events


@pytest.mark.parametrize(
    ("most", "room_events", "room_bytes", "count"),
    [(9, 9, 99, 4), (2, 9, 99, 2), (9, 3, 99, 2), (9, 9, 5, 2), (9, 0, 0, 1), (0, 9, 99, 1), (9, 4, 99, 3)],
)
def test_a_group_has_as_many_entries_as_fit(
    implementation: Any, most: int, room_events: int, room_bytes: int, count: int
) -> None:
    """It has at least one. The queue is not changed."""
    loop = object()
    queue: list[Any] = [
        implementation.future(b"a\n", 1, loop),
        WaitingThread(b"bb\n", 2),
        implementation.future(b"c\n", 1, loop),
        implementation.future(b"d\n", 1, loop),
    ]
    entries, lines, events, common_loop = implementation.gather(queue, most, room_events, room_bytes)
    assert entries == queue[:count]
    assert lines == b"".join(entry.lines for entry in entries)
    assert events == sum(entry.events for entry in entries)
    assert common_loop is (loop if count == 1 else ...)
    assert len(queue) == 4


def test_a_group_has_the_common_loop_of_its_entries(implementation: Any) -> None:
    """Ellipsis if their loops differ, None for threads."""
    first, second = object(), object()
    queues = [[implementation.future(b"a\n", 1, loop) for loop in loops] for loops in ((first, first), (first, second))]
    assert [implementation.gather(queue, 2, 9, 99)[3] for queue in queues] == [first, ...]
    assert implementation.gather([WaitingThread(b"a\n", 1), WaitingThread(b"b\n", 1)], 2, 9, 99)[3] is None


@pytest.mark.parametrize("arguments", [(), (b"x\n", 1), ("x\n", 1, None), (b"x\n", "1", None)])
def test_wrong_arguments_raise(arguments: tuple[Any, ...]) -> None:
    """They are not read as futures or entries."""
    if not COMPILED:
        pytest.skip("needs the C extension")
    with pytest.raises(TypeError):
        CommitFuture(*arguments)
    with pytest.raises(TypeError):
        resolve_futures([None], ENQUEUED_POWER)  # type: ignore[list-item]
    with pytest.raises((TypeError, AttributeError)):
        gather_group([WaitingThread("text", 1)], 1, 1, 1)  # type: ignore[arg-type]


class GrowingEntry:
    """An entry whose lines are longer each time they are read."""

    events = 1
    loop = None

    def __init__(self, queue: list[Any]) -> None:
        self.queue = queue
        self.reads = 0

    @property
    def lines(self) -> bytes:
        self.reads += 1
        self.queue.clear()
        return b"A" * (10 if self.reads % 2 else 5_000_000)


def test_each_attribute_of_an_entry_is_read_once(implementation: Any) -> None:
    """The lines of the first read are joined, because a second read could return more than fits."""
    queue: list[Any] = []
    queue += [GrowingEntry(queue), GrowingEntry(queue)]
    entries, lines, events, _ = implementation.gather(queue, 5, 100, 10**9)
    assert [entry.reads for entry in entries] == [1, 1]
    assert (lines, events) == (b"A" * 20, 2)


def test_an_entry_that_would_overflow_the_sum_does_not_fit(implementation: Any) -> None:
    """The number of events would exceed a 64-bit integer."""
    queue = [WaitingThread(b"a\n", 2**63 - 1), WaitingThread(b"b\n", 2**63 - 1)]
    entries, lines, events, _ = implementation.gather(queue, 2, 2**63 - 1, 99)
    assert (entries, lines, events) == (queue[:1], b"a\n", 2**63 - 1)


class ComparedCallback:
    """A callback whose comparison calls a given function."""

    def __init__(self, seen: list[int], number: int, compare: Callable[[], object]) -> None:
        self.seen, self.number, self.compare = seen, number, compare

    def __eq__(self, other: object) -> bool:
        return bool(self.compare())

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, _future: object) -> None:
        self.seen.append(self.number)


def test_a_comparison_that_raises_removes_no_callback(implementation: Any) -> None:
    """All callbacks are still called, in order."""

    async def main() -> Any:
        future, seen = implementation.future(b"x\n", 1, asyncio.get_running_loop()), list[int]()

        def raises() -> object:
            raise ValueError

        for number, compare in enumerate([lambda: True, raises, lambda: False]):
            future.add_done_callback(ComparedCallback(seen, number, compare))
        with pytest.raises(ValueError):
            future.remove_done_callback(print)
        implementation.resolve([future], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [0, 1, 2]


def test_a_callback_that_a_comparison_adds_stays(implementation: Any) -> None:
    """Only the equal callbacks that existed before are removed."""

    async def main() -> Any:
        future, seen = implementation.future(b"x\n", 1, asyncio.get_running_loop()), list[int]()

        def adds() -> object:
            future.add_done_callback(lambda _: seen.append(9))
            return True

        future.add_done_callback(ComparedCallback(seen, 0, lambda: False))
        future.add_done_callback(ComparedCallback(seen, 1, adds))
        assert future.remove_done_callback(print) == 1
        implementation.resolve([future], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [0, 9]


def test_a_callback_may_be_added_after_all_were_removed(implementation: Any) -> None:
    """It is called once."""

    async def main() -> Any:
        future, seen = implementation.future(b"x\n", 1, asyncio.get_running_loop()), list[int]()
        future.add_done_callback(seen.append)
        future.add_done_callback(print)
        assert future.remove_done_callback(seen.append) == future.remove_done_callback(print) == 1
        future.add_done_callback(lambda _: seen.append(1))
        future.add_done_callback(lambda _: seen.append(2))
        implementation.resolve([future], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [1, 2]
