"""What `when_full` makes of an event for which there is no room: wait, or raise; to evict is the sealer's business."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.errors import OutboxFullError
from pillarbox.outcome import Dropped, Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pillarbox.clock import Clock
    from pillarbox.store.writer import Writer

FULL_REASONS: Final = frozenset({"max_bytes", "max_files", "disk_full", "disk_low"})
_RETRY_INTERVAL_S: Final = 0.01  # between two attempts: a deliverer in another process makes room too, and tells nobody


class RaiseWhenFull:
    """Raises `OutboxFullError`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def on_full(self, _attempt: Callable[[], Outcome], refused: Outcome, _events: int) -> Outcome:
        """What becomes of an event, or events, that were refused."""
        if isinstance(refused, Dropped) and refused.reason in FULL_REASONS:
            raise OutboxFullError(self._path, refused.reason)
        return refused

    async def on_full_async(self, _attempt: Callable[[], Awaitable[Outcome]], refused: Outcome, events: int) -> Outcome:
        """The same, for a coroutine."""
        return self.on_full(lambda: refused, refused, events)


class BlockWhenFull:
    """Waits until there is room, up to `timeout_s` seconds; never on an event loop's thread. Attempts are not counted."""

    def __init__(self, writer: Writer, clock: Clock, timeout_s: float, is_in_hook: Callable[[], bool]) -> None:
        self._writer = writer
        self._clock = clock
        self._timeout_s = timeout_s
        self._is_in_hook = is_in_hook  # a hook: on a thread of ours, it would wait for what that thread is to do

    def on_full(self, attempt: Callable[[], Outcome], refused: Outcome, events: int) -> Outcome:
        """Try again until it is no longer refused for want of room."""
        outcome, deadline = refused, self._clock.monotonic() + self._timeout_s
        while isinstance(outcome, Dropped) and outcome.reason in FULL_REASONS:
            self._writer.uncount_drop(outcome.reason, events)
            # A signal handler may have interrupted the one who would make room; a loop would stand still.
            if self._writer.is_locked_by_this_thread() or self._is_in_hook() or _is_on_event_loop():
                return self._writer.drop("would_block", events)
            if self._clock.monotonic() >= deadline:
                return self._writer.drop("timeout", events)
            threading.Event().wait(_RETRY_INTERVAL_S)
            outcome = attempt()
        return outcome

    async def on_full_async(self, attempt: Callable[[], Awaitable[Outcome]], refused: Outcome, events: int) -> Outcome:
        """The same, for a coroutine: others go on meanwhile."""
        outcome, deadline = refused, self._clock.monotonic() + self._timeout_s
        while isinstance(outcome, Dropped) and outcome.reason in FULL_REASONS:
            self._writer.uncount_drop(outcome.reason, events)
            if self._clock.monotonic() >= deadline:
                return self._writer.drop("timeout", events)
            await asyncio.sleep(_RETRY_INTERVAL_S)
            outcome = await attempt()
        return outcome


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
