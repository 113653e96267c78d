"""All outboxes of the process: their handling at a fork, at the exit of the program, and when their class is patched."""

from __future__ import annotations

import atexit
import contextlib
import warnings
from abc import ABCMeta
from typing import Any, Final, Protocol
from weakref import WeakSet

from pillarbox.clock import SystemClock
from pillarbox.forks import after_fork_in_child
from pillarbox.log_records import abandon_blocked_handlers
from pillarbox.system import threads

DROPPED_TIMEOUT_S: Final = 5.0  # for the last deliveries of an outbox that was dropped without `close`
EXIT_TIMEOUT_S: Final = 2.0  # time for the last deliveries of all outboxes together when the program exits


class ManagedOutbox(Protocol):
    """The part of an `Outbox` that this module uses."""

    @property
    def _background(self) -> ManagedBackground:
        """Its threads."""

    def _begin_close(self) -> bool:
        """Stop accepting events, and start to seal. Returns False if there is nothing to close."""

    def _finish_close(self, timeout: float) -> None:
        """Seal the segments, and deliver what needs no waiting."""

    def _reset_after_fork(self) -> None:
        """In a forked child: drop what belongs to the parent."""

    def _shadow_enqueue(self) -> None:
        """Give the instance a faster `enqueue`, unless that of its class was replaced."""


class ManagedBackground(Protocol):
    """The threads of an outbox, as far as this module uses them."""

    name: str

    def is_of_this_process(self) -> bool:
        """Whether the threads run in this process."""

    def request_end(self) -> None:
        """Request that the threads end."""

    def end(self, timeout: float) -> None:
        """End the threads within `timeout` seconds."""

    def record_last_drops(self) -> None:
        """Record the drops while no thread runs."""


class OutboxMeta(ABCMeta):
    """Keeps `Outbox.enqueue` replaceable although each instance holds a faster one.

    Instances shadow the method, so `unittest.mock.patch.object(Outbox, "enqueue")` would not reach them. The base is `ABCMeta`
    so that subclasses may also inherit from abstract classes.
    """

    def __setattr__(cls, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "enqueue":
            _shadow_all_enqueues()

    def __delattr__(cls, name: str) -> None:
        super().__delattr__(name)
        if name == "enqueue":
            _shadow_all_enqueues()


def add_outbox(outbox: ManagedOutbox) -> None:
    """Add an outbox, for as long as something else refers to it."""
    _outboxes.add(outbox)


def end_dropped(background: ManagedBackground) -> None:
    """End the threads of an outbox that is garbage collected without having been closed, and warn of it."""
    if not background.is_of_this_process():
        return
    background.request_end()
    thread = threads.Thread(target=background.end, name="pillarbox-close", args=(DROPPED_TIMEOUT_S,))
    with contextlib.suppress(RuntimeError):  # the system cannot start another thread; what is sealed waits for the next start
        thread.start()
        _ending[:] = [earlier for earlier in _ending if earlier.is_alive()] + [thread]
    text = f"{background.name}: the outbox was dropped without close; use it in a `with` block, or call close"
    warnings.warn(text, ResourceWarning, stacklevel=3)


def keep_from_parent(*objects: object) -> None:
    """In a forked child: keep the parent's objects alive, so that the child never closes or releases anything of theirs."""
    _kept_from_parent.append(objects)


_outboxes: WeakSet[ManagedOutbox] = WeakSet()
_ending: list[threads.Thread] = []  # threads that close dropped outboxes
_kept_from_parent: list[Any] = []


def _shadow_all_enqueues() -> None:
    for outbox in list(_outboxes):
        outbox._shadow_enqueue()  # noqa: SLF001 - the methods of `ManagedOutbox` are not for applications


def _after_fork() -> None:
    _ending.clear()
    for outbox in list(_outboxes):
        outbox._reset_after_fork()  # noqa: SLF001


def _at_exit() -> None:
    clock = SystemClock()
    deadline = clock.monotonic() + EXIT_TIMEOUT_S
    outboxes = list(_outboxes)
    closing = [outbox for outbox in outboxes if outbox._begin_close()]  # noqa: SLF001
    for outbox in closing:
        outbox._finish_close(max(0.0, deadline - clock.monotonic()))  # noqa: SLF001
    for outbox in outboxes:  # events may be dropped after `close`
        outbox._background.record_last_drops()  # noqa: SLF001
    for thread in _ending:
        thread.join(max(0.0, deadline - clock.monotonic()))
    abandon_blocked_handlers()


after_fork_in_child(_after_fork, last=True)
atexit.register(_at_exit)
