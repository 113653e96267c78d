"""Calls the hooks of an application. If one raises, the exception is logged and counted, and no event is lost.

`before_send` runs on the caller's thread, `on_drop` on a thread of its own (on the caller's while no sealer runs), and
`on_dead_letter` on the thread that delivers. While a hook runs, its thread calls no hook: an event that the hook enqueues is
stored without `before_send`.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import msgspec

    from pillarbox.outcome import Durability, Outcome
    from pillarbox.store.append_hooks import EnqueueFunction

log = logging.getLogger("pillarbox")

# Name of each hook: what happens when it raises.
HOOK_FAILURE_EFFECTS: Final = {
    "before_send": "the event is stored unchanged",
    "on_drop": "the drops are counted nevertheless",
    "on_dead_letter": "the dead letter is stored nevertheless",
}
# `before_send` runs on the application's thread, which it may end by SystemExit; it must not end one of Pillarbox's threads.
_CAUGHT_EXCEPTIONS: Final[dict[str, tuple[type[BaseException], ...]]] = {
    "before_send": (Exception,),
    "on_drop": (Exception, SystemExit),
    "on_dead_letter": (Exception, SystemExit),
}


class _HookCall:
    """A call of a hook that is running or has ended."""

    __slots__ = ("of",)

    def __init__(self, of: Hooks) -> None:
        self.of: Hooks | None = of  # None once it has ended: a task that the hook has started has a copy of the context


# Calls of hooks in this thread or greenlet.
_calls: ContextVar[tuple[_HookCall, ...]] = ContextVar("pillarbox_hook_calls", default=())


class Hooks:
    """The hooks of one outbox in one process. Safe to share between threads.

    Attributes:
        failures: How often each hook raised. The first time is logged, with its traceback.
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
        self._lock = threads.RLock()  # re-entrant: a signal handler may enqueue, and so come here, at any point
        self._reported_drops: dict[str, int] = {}  # by reason
        self.failures: dict[str, int] = dict.fromkeys(HOOK_FAILURE_EFFECTS, 0)

    @property
    def has_before_send(self) -> bool:
        """Whether there is a `before_send`."""
        return self._before_send is not None

    @property
    def has_on_drop(self) -> bool:
        """Whether there is an `on_drop`."""
        return self._on_drop is not None

    def is_in_hook(self) -> bool:
        """Whether this thread or greenlet is running a hook."""
        return any(call.of is self for call in _calls.get())

    def before_send(self, event: Any) -> Any:
        """Call `before_send`: the event to store, or None to store nothing. If it raises, the event unchanged."""
        if self._before_send is None or self.is_in_hook():
            return event
        return self._call_hook("before_send", self._before_send, event, result_on_failure=event)

    def report_drops(self, totals: Mapping[str, int]) -> None:
        """Call `on_drop` with the drops since the last call.

        Args:
            totals: Drops by reason since this process opened the outbox.
        """
        if self._on_drop is None or self.is_in_hook():
            return
        for reason, count in self._take_unreported_drops(totals):
            self._call_hook("on_drop", self._on_drop, reason, count)

    def _take_unreported_drops(self, totals: Mapping[str, int]) -> list[tuple[str, int]]:
        with self._in_hook(), self._lock:  # a signal handler whose event is dropped here would report the same drops
            new = [(reason, total - self._reported_drops.get(reason, 0)) for reason, total in totals.items()]
            # Another thread may have reported newer totals already; then there is nothing new in these.
            new = [(reason, count) for reason, count in new if count > 0]
            self._reported_drops |= {reason: totals[reason] for reason, _ in new}
            return new

    def report_dead_letter(self, letter: Any) -> None:
        """Call `on_dead_letter` for a dead letter that is on disk."""
        if self._on_dead_letter is not None:
            self._call_hook("on_dead_letter", self._on_dead_letter, letter)

    def add_dead_letter_failures(self, count: int) -> None:
        """Count failures of `on_dead_letter` in the child process that delivers; it has logged them."""
        with self._lock:
            self.failures["on_dead_letter"] += count

    def _call_hook(self, name: str, hook: Callable[..., Any], *arguments: Any, result_on_failure: Any = None) -> Any:
        with self._in_hook():
            try:
                return hook(*arguments)
            except _CAUGHT_EXCEPTIONS[name]:
                if self._is_first_failure(name):
                    # Still in the hook: a log handler that enqueues must not call the hook that fails.
                    effect = HOOK_FAILURE_EFFECTS[name]
                    log.exception("%s: %s raised; %s. Further failures are only counted", self._name, name, effect)
                return result_on_failure

    @contextmanager
    def _in_hook(self) -> Iterator[None]:
        call = _HookCall(self)
        token = _calls.set((*_calls.get(), call))
        try:
            yield
        finally:
            call.of = None
            _calls.reset(token)

    def _is_first_failure(self, name: str) -> bool:
        with self._lock:
            self.failures[name] += 1
            return self.failures[name] == 1


def with_drop_reports(enqueue: EnqueueFunction, report_drops: Callable[[], None]) -> EnqueueFunction:
    """`enqueue`, and `report_drops` called after it."""

    def enqueue_and_report(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event, and report it if it is dropped."""
        try:
            return enqueue(event, durability=durability)
        finally:
            report_drops()

    return enqueue_and_report
