"""What `when_full="block"` and `"raise"` do when there is no room for an event; "drop_oldest" is in `store/quota.py`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from pillarbox.errors import OutboxFullError
from pillarbox.outcome import Dropped, Outcome
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import msgspec

    from pillarbox.clock import Clock
    from pillarbox.outcome import Durability
    from pillarbox.store.append_hooks import EnqueueFunction
    from pillarbox.store.writer import Writer

FULL_REASONS: Final = frozenset({"max_bytes", "max_files", "disk_full", "disk_low", "disk_slow"})
_RETRY_INTERVAL_S: Final = 0.01  # nothing wakes the waiting caller: a worker in another process makes room too


class RaiseWhenFull:
    """Raises `OutboxFullError`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def on_full(self, _append: Callable[[], Outcome], outcome: Outcome, _events: int) -> Outcome:
        """Raise if `outcome` is a drop for lack of room; return it otherwise."""
        if isinstance(outcome, Dropped) and outcome.reason in FULL_REASONS:
            raise OutboxFullError(self._path, outcome.reason)
        return outcome

    async def on_full_async(self, _append: Callable[[], Awaitable[Outcome]], outcome: Outcome, events: int) -> Outcome:
        """`on_full`, for a coroutine."""
        return self.on_full(lambda: outcome, outcome, events)


class BlockWhenFull:
    """Waits up to `timeout_s` seconds for room, but never on the thread of an event loop. Only the last drop is counted."""

    def __init__(self, writer: Writer, clock: Clock, timeout_s: float, is_in_hook: Callable[[], bool]) -> None:
        self._writer = writer
        self._clock = clock
        self._timeout_s = timeout_s
        self._is_in_hook = is_in_hook  # a hook may run on the thread that makes room, and would wait for itself

    def on_full(self, append: Callable[[], Outcome], outcome: Outcome, events: int) -> Outcome:
        """Append again until there is room; returns the last outcome, or a drop for "timeout" or "would_block"."""
        deadline = self._clock.monotonic() + self._timeout_s
        while isinstance(outcome, Dropped) and outcome.reason in FULL_REASONS:
            self._writer.uncount_drop(outcome.reason, events)
            # The caller may be a signal handler that interrupted the thread which would make room, or block an event loop.
            if self._writer.is_locked_by_this_thread() or self._is_in_hook() or _is_on_event_loop():
                return self._writer.drop("would_block", events)
            if self._clock.monotonic() >= deadline:
                return self._writer.drop("timeout", events)
            threads.pause(_RETRY_INTERVAL_S)
            outcome = append()
        return outcome

    async def on_full_async(self, append: Callable[[], Awaitable[Outcome]], outcome: Outcome, events: int) -> Outcome:
        """`on_full`, for a coroutine: the event loop runs meanwhile."""
        deadline = self._clock.monotonic() + self._timeout_s
        while isinstance(outcome, Dropped) and outcome.reason in FULL_REASONS:
            self._writer.uncount_drop(outcome.reason, events)
            if self._clock.monotonic() >= deadline:
                return self._writer.drop("timeout", events)
            await asyncio.sleep(_RETRY_INTERVAL_S)
            outcome = await append()
        return outcome


def check_event_loop() -> None:
    """Raise `RuntimeError` with a remedy if the caller does not run on a loop of asyncio's, as under trio."""
    if not _is_on_event_loop():
        text = "enqueue_async waits on asyncio's loop only; on another one, call enqueue in a thread: trio.to_thread.run_sync"
        raise RuntimeError(text)


def with_when_full(append: EnqueueFunction, when_full: RaiseWhenFull | BlockWhenFull) -> EnqueueFunction:
    """`append`, and what `when_full` does if it drops the event."""

    def enqueue(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event; if there is no room, wait or raise."""
        outcome = append(event, durability=durability)
        return outcome or when_full.on_full(lambda: append(event, durability=durability), outcome, 1)

    return enqueue


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
