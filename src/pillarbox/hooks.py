"""The functions that an application hands over, each called so that what it raises is its own trouble and loses nothing.

`before_send` runs on the caller's thread, `on_drop` on the thread that seals (on the caller's where none runs), and
`on_dead_letter` on the one that delivers. What a function does with the outbox meanwhile, on the same thread, it does
without hooks: an event that it stores does not come back to it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger("pillarbox")

# What each may be called, and what becomes of its event, or its news, where it raises.
HOOK_FAILURE_EFFECTS: Final = {
    "before_send": "events for which it raises are stored as they were given",
    "on_drop": "what it was told of is counted all the same",
    "on_dead_letter": "the dead letter is kept all the same",
}
# A program may end itself from a function on its own thread; a thread of ours must not be ended.
_CAUGHT_EXCEPTIONS: Final[dict[str, tuple[type[BaseException], ...]]] = {
    "before_send": (Exception,),
    "on_drop": (Exception, SystemExit),
    "on_dead_letter": (Exception, SystemExit),
}


class _ThreadState(threading.local):
    in_hook = False


class Hooks:
    """The hooks of one outbox in one process; safe to share between threads.

    `failures` counts by hook how often it raised. The first time is logged, with the traceback.
    """

    def __init__(
        self,
        name: str,
        before_send: Callable[[Any], Any] | None = None,
        on_drop: Callable[[str, int], object] | None = None,
        on_dead_letter: Callable[[Any], object] | None = None,
    ) -> None:
        self._name = name
        self._before_send = before_send
        self._on_drop = on_drop
        self._on_dead_letter = on_dead_letter
        self._thread_state = _ThreadState()
        self._lock = threading.RLock()  # a signal handler may enqueue, and so come here, anywhere
        self._reported_drops: dict[str, int] = {}  # drops by reason
        self.failures: dict[str, int] = dict.fromkeys(HOOK_FAILURE_EFFECTS, 0)

    @property
    def has_before_send(self) -> bool:
        """Whether events are to be shown to `before_send`."""
        return self._before_send is not None

    @property
    def has_on_drop(self) -> bool:
        """Whether there is an `on_drop`."""
        return self._on_drop is not None

    def is_in_hook(self) -> bool:
        """Whether this thread is in one of the functions."""
        return self._thread_state.in_hook

    def before_send(self, event: Any) -> Any:
        """What is to be stored instead of an event; None: nothing. Where the function raises, the event itself."""
        if self._before_send is None or self._thread_state.in_hook:
            return event
        return self._call_hook("before_send", self._before_send, event, otherwise=event)

    def report_drops(self, totals: Mapping[str, int]) -> None:
        """Report what has been refused since the last time: `totals` by reason, of this process since it began."""
        if self._on_drop is None or self._thread_state.in_hook:
            return
        for reason, count in self._take_unreported_drops(totals):
            self._call_hook("on_drop", self._on_drop, reason, count)

    def _take_unreported_drops(self, totals: Mapping[str, int]) -> list[tuple[str, int]]:
        try:
            self._thread_state.in_hook = True  # a signal handler that is refused something in here would find the same again
            with self._lock:
                new = [(reason, total - self._reported_drops.get(reason, 0)) for reason, total in totals.items()]
                new = [(reason, count) for reason, count in new if count > 0]
                # An older copy of the totals may come later, from another thread; it has nothing new.
                self._reported_drops |= {reason: totals[reason] for reason, _ in new}
                return new
        finally:
            self._thread_state.in_hook = False

    def report_dead_letter(self, record: Any) -> None:
        """Report a dead letter, once it is durable."""
        if self._on_dead_letter is not None:
            self._call_hook("on_dead_letter", self._on_dead_letter, record)

    def add_dead_letter_failures(self, count: int) -> None:
        """`on_dead_letter` has raised so often in another process, which has logged it."""
        with self._lock:
            self.failures["on_dead_letter"] += count

    def _call_hook(self, name: str, hook: Callable[..., Any], *arguments: Any, otherwise: Any = None) -> Any:
        here = self._thread_state
        try:
            here.in_hook = True
            return hook(*arguments)
        except _CAUGHT_EXCEPTIONS[name]:
            if self._is_first_failure(name):
                # Still marked as within: a log handler that stores events must not come back to the hook that fails.
                log.exception(
                    "%s: %s raised, and is counted silently from now on; %s", self._name, name, HOOK_FAILURE_EFFECTS[name]
                )
            return otherwise
        finally:
            here.in_hook = False

    def _is_first_failure(self, name: str) -> bool:
        with self._lock:
            self.failures[name] += 1
            return self.failures[name] == 1
