"""What a coroutine awaits under `durability="power"`, compiled and in Python: whatever asyncio does with a future, it bears."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

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

WAYS = [(PyCommitFuture, py_resolve_futures, py_gather_group)] + [(CommitFuture, resolve_futures, gather_group)] * COMPILED


@pytest.fixture(params=WAYS, ids=["Python", "C"][: len(WAYS)])
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


class Desk:
    """Coroutines that wait, of this loop."""

    def __init__(self, way: Any) -> None:
        self.make, self.wake, _ = way
        self.waiters: list[Any] = []

    async def wait(self) -> Any:
        """Until woken."""
        made = self.make(b"x\n", 1, asyncio.get_running_loop())
        self.waiters.append(made)
        return await made

    def wake_soon(self, outcome: Any = ENQUEUED_POWER) -> None:
        """As the committer does: by one callback."""
        asyncio.get_running_loop().call_soon(self.wake, self.waiters, outcome)


def run(main: Callable[[], Coroutine[Any, Any, Any]], *, debug: bool = False) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 60), debug=debug)


@pytest.mark.parametrize("debug", [False, True])
def test_all_that_wait_are_woken_by_one_callback(way: Any, *, debug: bool) -> None:
    """In the order in which they came; nothing is left in the list."""
    desk, order = Desk(way), []

    async def one(number: int) -> Any:
        outcome = await desk.wait()
        order.append(number)
        return outcome

    async def main() -> Any:
        tasks = [asyncio.create_task(one(number)) for number in range(10)]
        await asyncio.sleep(0)
        desk.wake_soon()
        return await asyncio.gather(*tasks)

    assert run(main, debug=debug) == [ENQUEUED_POWER] * 10
    assert order == list(range(10))
    assert desk.waiters == []


def test_who_is_cancelled_is_told_so_at_once_and_the_others_wait_on(way: Any) -> None:
    """With its message; what comes later for it is of no consequence."""
    desk = Desk(way)

    async def main() -> Any:
        first, second = asyncio.create_task(desk.wait()), asyncio.create_task(desk.wait())
        await asyncio.sleep(0)
        assert first.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await first
        assert desk.waiters[0].cancelled()
        assert not second.done()
        desk.wake_soon(DROPPED["io_error"])
        return await second

    assert run(main) == DROPPED["io_error"]


def test_timeouts_shields_and_gatherings_do_as_with_a_future(way: Any) -> None:
    """Each of them over one that waits."""
    desk = Desk(way)

    async def main() -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.wait(), 0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await desk.wait()
        shielded = asyncio.ensure_future(desk.wait())
        outer = asyncio.shield(shielded)
        await asyncio.sleep(0)
        outer.cancel()
        await asyncio.sleep(0)
        assert not shielded.done()
        bare = way[0](b"x\n", 1, asyncio.get_running_loop())
        gathered = asyncio.gather(bare, bare, desk.wait())
        waited = asyncio.create_task(asyncio.wait([bare]))
        await asyncio.sleep(0)
        desk.waiters.append(bare)
        desk.wake_soon()
        await waited
        return [await shielded, *await gathered, await bare, bare.result(), bare.exception()]

    assert run(main) == [ENQUEUED_POWER] * 6 + [None]


def test_a_task_that_cancels_its_neighbour_of_the_same_group_cancels_it(way: Any) -> None:
    """Though the answer is there: as with futures that are done."""
    desk = Desk(way)
    tasks: list[asyncio.Task[Any]] = []

    async def first() -> None:
        await desk.wait()
        tasks[1].cancel()

    async def main() -> None:
        tasks.extend([asyncio.create_task(first()), asyncio.create_task(desk.wait())])
        await asyncio.sleep(0)
        desk.wake_soon()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]

    run(main)


def test_each_is_woken_in_its_own_context(way: Any) -> None:
    """What it has set is there, and what others have is not."""
    desk = Desk(way)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def one(number: int) -> bool:
        variable.set(number)
        await desk.wait()
        return variable.get() == number

    async def main() -> Any:
        tasks = [asyncio.create_task(one(number)) for number in range(3)]
        await asyncio.sleep(0)
        desk.wake_soon()
        return await asyncio.gather(*tasks)

    assert run(main) == [True] * 3


def test_who_raises_what_ends_the_loop_leaves_the_others_in_the_list(way: Any) -> None:
    """So that they can be woken yet."""
    desk = Desk(way)

    async def ends() -> None:
        await desk.wait()
        raise SystemExit

    loop = asyncio.new_event_loop()
    try:
        tasks = [loop.create_task(ends()), loop.create_task(desk.wait())]
        loop.run_until_complete(asyncio.sleep(0))
        with pytest.raises(SystemExit):
            desk.wake(desk.waiters, ENQUEUED_POWER)
        assert len(desk.waiters) == 1
        desk.wake(desk.waiters, ENQUEUED_POWER)
        assert loop.run_until_complete(tasks[1]) == ENQUEUED_POWER
        assert isinstance(tasks[0].exception(), SystemExit)
    finally:
        loop.close()


def test_one_that_is_answered_before_it_is_awaited_has_its_answer(way: Any) -> None:
    """It does not wait, nor does whoever asks for a callback then wait for good."""

    async def main() -> Any:
        made, called = way[0](b"x\n", 1, asyncio.get_running_loop()), asyncio.Event()
        with pytest.raises(asyncio.InvalidStateError):
            made.result()
        way[1]([made], ENQUEUED_POWER)
        made.add_done_callback(lambda _: called.set())
        await called.wait()
        assert not made.cancel()
        return await made

    assert run(main) == ENQUEUED_POWER


def test_callbacks_can_be_taken_back(way: Any) -> None:
    """All that are equal; the others stay, in order."""

    async def main() -> Any:
        made, seen = way[0](b"x\n", 1, asyncio.get_running_loop()), list[int]()
        calls = [lambda _, n=n: seen.append(n) for n in range(3)]
        for call in (calls[0], calls[1], calls[0], calls[2]):
            made.add_done_callback(call)
        assert made.remove_done_callback(calls[0]) == 2
        assert made.remove_done_callback(calls[0]) == 0
        way[1]([made], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [1, 2]


def test_a_coroutine_without_a_loop_of_asyncio_can_be_driven_and_closed(way: Any) -> None:
    """By `send`, as a task does."""
    made = way[0](b"x\n", 1, asyncio.new_event_loop())

    async def wait() -> Any:
        return await made

    driven, closed = wait(), wait()
    assert closed.send(None) is made
    closed.close()
    assert driven.send(None) is made
    assert made._asyncio_future_blocking is True
    way[1]([made], ENQUEUED_POWER)
    with pytest.raises(StopIteration) as stopped:
        driven.send(None)
    assert stopped.value.value == ENQUEUED_POWER
    made.get_loop().close()


def test_what_nobody_wakes_is_collected(way: Any) -> None:
    """A task and what it waits for hold each other."""
    desk = Desk(way)

    class Held:
        pass

    async def one(held: Held) -> None:
        await desk.wait()
        del held

    loop = asyncio.new_event_loop()
    held = Held()
    seen = weakref.ref(held)
    task = loop.create_task(one(held))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del held
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    desk.waiters.clear()
    del task, loop
    gc.collect()
    assert seen() is None


def test_loops_in_several_threads_each_wake_their_own(way: Any) -> None:
    """A waiter tells whose it is."""
    found: list[bool] = []

    def one_loop() -> None:
        desk = Desk(way)

        async def main() -> None:
            task = asyncio.create_task(desk.wait())
            await asyncio.sleep(0)
            found.append(desk.waiters[0].get_loop() is asyncio.get_running_loop() is desk.waiters[0].loop)
            desk.wake_soon()
            found.append(await task == ENQUEUED_POWER)

        run(main)

    threads = [threading.Thread(target=one_loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 8


class Thread:
    """One that waits, as far as it is looked at here."""

    loop = None

    def __init__(self, lines: bytes, events: int) -> None:
        self.lines = lines
        self.events = events


@pytest.mark.parametrize(
    ("most", "room_events", "room_bytes", "count"),
    [(9, 9, 99, 4), (2, 9, 99, 2), (9, 3, 99, 2), (9, 9, 5, 2), (9, 0, 0, 1), (0, 9, 99, 1), (9, 4, 99, 3)],
)
def test_as_many_are_gathered_as_there_is_room_for(way: Any, most: int, room_events: int, room_bytes: int, count: int) -> None:
    """One at least; the queue stays as it is."""
    loop = object()
    queue: list[Any] = [way[0](b"a\n", 1, loop), Thread(b"bb\n", 2), way[0](b"c\n", 1, loop), way[0](b"d\n", 1, loop)]
    entries, lines, events, of_all = way[2](queue, most, room_events, room_bytes)
    assert entries == queue[:count]
    assert lines == b"".join(entry.lines for entry in entries)
    assert events == sum(entry.events for entry in entries)
    assert of_all is (loop if count == 1 else ...)
    assert len(queue) == 4


def test_the_loop_of_all_is_named_and_of_threads_none(way: Any) -> None:
    """What differs is of no one loop."""
    first, second = object(), object()
    of = [[way[0](b"a\n", 1, loop) for loop in loops] for loops in ((first, first), (first, second))]
    assert [way[2](queue, 2, 9, 99)[3] for queue in of] == [first, ...]
    assert way[2]([Thread(b"a\n", 1), Thread(b"b\n", 1)], 2, 9, 99)[3] is None


@pytest.mark.parametrize("arguments", [(), (b"x\n", 1), ("x\n", 1, None), (b"x\n", "1", None)])
def test_what_is_no_waiter_is_refused(arguments: tuple[Any, ...]) -> None:
    """Rather than read as if it were one."""
    if not COMPILED:
        pytest.skip("not compiled here")
    with pytest.raises(TypeError):
        CommitFuture(*arguments)
    with pytest.raises(TypeError):
        resolve_futures([None], ENQUEUED_POWER)  # type: ignore[list-item]
    with pytest.raises((TypeError, AttributeError)):
        gather_group([Thread("text", 1)], 1, 1, 1)  # type: ignore[arg-type]


class Growing:
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


def test_each_attribute_of_an_entry_is_read_once(way: Any) -> None:
    """The lines of the first read are joined: a second read could return more than there is room for."""
    queue: list[Any] = []
    queue += [Growing(queue), Growing(queue)]
    entries, lines, events, _ = way[2](queue, 5, 100, 10**9)
    assert [entry.reads for entry in entries] == [1, 1]
    assert (lines, events) == (b"A" * 20, 2)


def test_sums_that_overflow_leave_no_room_for_more(way: Any) -> None:
    """More events than a machine word counts."""
    queue = [Thread(b"a\n", 2**63 - 1), Thread(b"b\n", 2**63 - 1)]
    entries, lines, events, _ = way[2](queue, 2, 2**63 - 1, 99)
    assert (entries, lines, events) == (queue[:1], b"a\n", 2**63 - 1)


class Odd:
    """A callback whose comparison does what it is told to."""

    def __init__(self, seen: list[int], number: int, compare: Callable[[], object]) -> None:
        self.seen, self.number, self.compare = seen, number, compare

    def __eq__(self, other: object) -> bool:
        return bool(self.compare())

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, _future: object) -> None:
        self.seen.append(self.number)


def test_a_comparison_that_raises_removes_no_callback(way: Any) -> None:
    """All of them are still called, in order."""

    async def main() -> Any:
        made, seen = way[0](b"x\n", 1, asyncio.get_running_loop()), list[int]()

        def raises() -> object:
            raise ValueError

        for number, compare in enumerate([lambda: True, raises, lambda: False]):
            made.add_done_callback(Odd(seen, number, compare))
        with pytest.raises(ValueError):
            made.remove_done_callback(print)
        way[1]([made], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [0, 1, 2]


def test_a_callback_that_a_comparison_adds_stays(way: Any) -> None:
    """Only those that are equal are removed."""

    async def main() -> Any:
        made, seen = way[0](b"x\n", 1, asyncio.get_running_loop()), list[int]()

        def adds() -> object:
            made.add_done_callback(lambda _: seen.append(9))
            return True

        made.add_done_callback(Odd(seen, 0, lambda: False))
        made.add_done_callback(Odd(seen, 1, adds))
        assert made.remove_done_callback(print) == 1
        way[1]([made], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [0, 9]


def test_a_callback_may_be_added_after_all_were_removed(way: Any) -> None:
    """It is called once."""

    async def main() -> Any:
        made, seen = way[0](b"x\n", 1, asyncio.get_running_loop()), list[int]()
        made.add_done_callback(seen.append)
        made.add_done_callback(print)
        assert made.remove_done_callback(seen.append) == made.remove_done_callback(print) == 1
        made.add_done_callback(lambda _: seen.append(1))
        made.add_done_callback(lambda _: seen.append(2))
        way[1]([made], ENQUEUED_POWER)
        await asyncio.sleep(0)
        return seen

    assert run(main) == [1, 2]
