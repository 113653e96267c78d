"""What a coroutine awaits while its event is made durable; `pillarbox.store._waiter` has the same compiled.

A future wakes its task by a callback of its own through the event loop, which costs more than the event. Of these, one callback
wakes all that belong to a loop, each in its context. They follow the protocol that `asyncio.Task` has for futures which are not
its own, so that it can do with them whatever it does with a future; what changes in them is touched on the loop's thread only.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from contextvars import copy_context
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextvars import Context
    from types import EllipsisType

    from pillarbox.outcome import Outcome

    Callback = Callable[["Waiter"], object]


class Entry(Protocol):
    """Somebody who waits for the outcome of whole lines with so many events: in a loop, or a thread, which has none."""

    @property
    def lines(self) -> bytes:
        """They are not changed."""

    @property
    def events(self) -> int:
        """One at least."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """None for a thread."""


E = TypeVar("E", bound=Entry)


class Waiter:
    """A future for one outcome; `lines` are whole, and hold `events` events."""

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_cancelled", "_message", "_outcome", "events", "lines", "loop")

    def __init__(self, lines: bytes, events: int, loop: asyncio.AbstractEventLoop) -> None:
        self.lines = lines
        self.events = events
        self.loop = loop
        self._asyncio_future_blocking = False
        self._callbacks: list[tuple[Callback, Context]] = []
        self._cancelled = False
        self._message: object = None
        self._outcome: Outcome | None = None

    def __await__(self) -> Generator[Waiter, None, Outcome]:
        while not self.done():
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def add_done_callback(self, callback: Callback, *, context: Context | None = None) -> None:
        """As a future has it."""
        context = context if context is not None else copy_context()
        if self.done():
            self.loop.call_soon(callback, self, context=context)
        else:
            self._callbacks.append((callback, context))

    def remove_done_callback(self, callback: Callback) -> int:
        """As a future has it."""
        before = len(self._callbacks)
        self._callbacks = [pair for pair in self._callbacks if pair[0] != callback]
        return before - len(self._callbacks)

    def cancel(self, msg: object = None) -> bool:
        """Wait no longer; False where it is done."""
        if self.done():
            return False
        self._cancelled, self._message = True, msg
        self._schedule_callbacks()
        return True

    def result(self) -> Outcome:
        """The outcome."""
        if self._cancelled:
            raise asyncio.CancelledError if self._message is None else asyncio.CancelledError(self._message)
        if self._outcome is None:
            raise asyncio.InvalidStateError("Result is not set.")
        return self._outcome

    def exception(self) -> None:
        """None: an outcome is never an error."""
        self.result()

    def done(self) -> bool:
        """Whether it has its outcome, or is cancelled."""
        return self._cancelled or self._outcome is not None

    def cancelled(self) -> bool:
        """Whether it is cancelled."""
        return self._cancelled

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on whose thread it waits."""
        return self.loop

    def _settle(self, outcome: Outcome) -> None:
        if self.done():
            return
        self._outcome = outcome
        if self._callbacks:
            callback, context = self._callbacks.pop(0)
            try:
                context.run(callback, self)
            finally:
                self._schedule_callbacks()

    def _schedule_callbacks(self) -> None:
        while self._callbacks:
            callback, context = self._callbacks.pop(0)
            self.loop.call_soon(callback, self, context=context)


def wake(waiters: list[Waiter], outcome: Outcome) -> None:
    """Answer all that wait, each in its context; those who were woken leave the list, also where one of them raises."""
    woken = 0
    try:
        for waiter in waiters:
            woken += 1
            waiter._settle(outcome)  # noqa: SLF001 - the same thing
    finally:
        del waiters[:woken]


def gather(
    queue: list[E], most: int, room_events: int, room_bytes: int
) -> tuple[list[E], bytes, int, asyncio.AbstractEventLoop | EllipsisType | None]:
    """The first `most` entries of a queue, as far as there is room, one at least; their lines, how many events, their loop.

    The loop is `...` where they are of several. The queue stays as it is.
    """
    entries = queue[: max(1, min(most, room_events))]  # each has an event at least
    events = [entry.events for entry in entries]
    lines = [entry.lines for entry in entries]
    count = len(entries)
    if sum(events) > room_events or sum(map(len, lines)) > room_bytes:
        by_events = bisect_right(list(accumulate(events)), room_events)
        by_bytes = bisect_right(list(accumulate(map(len, lines))), room_bytes)
        count = max(1, min(by_events, by_bytes))
    entries = entries[:count]
    loops = {entry.loop for entry in entries}
    return entries, b"".join(lines[:count]), sum(events[:count]), loops.pop() if len(loops) == 1 else ...
