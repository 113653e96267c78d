"""Threads of the system, and what they wait with.

They do what their namesakes in `threading` do, which are greenlets and wait for greenlets after gevent or eventlet have patched
the standard library. A greenlet of the application that waits here lets the others run: it looks now and then whether it can
go on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from _queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pillarbox.clock import SystemClock
from pillarbox.system import originals

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Lock, RLock
    from types import TracebackType
    from typing import Self
else:
    Lock, RLock = originals.thread.allocate_lock, originals.thread.RLock

__all__ = ["Condition", "Empty", "Event", "Lock", "RLock", "SimpleQueue", "Thread", "caller_id", "pause"]

T = TypeVar("T")

_GREENLET_POLL_S: Final = 0.005  # between two looks of a greenlet that waits
_TIMEOUT_MAX_S: Final[float] = originals.thread.TIMEOUT_MAX

_thread_id: Callable[[], int] = originals.thread.get_ident
_clock: Final = SystemClock()
_own_threads: set[int] = set()


def forget_parent_threads() -> None:
    """In a forked child: the threads of the parent do not exist here."""
    _own_threads.clear()


def is_own_thread() -> bool:
    """Whether the caller runs on a thread of Pillarbox."""
    return _thread_id() in _own_threads


def start_greenlet(function: Callable[[], object], name: str) -> None:
    """Run a function as the application runs its threads, which are greenlets by now."""
    threading.Thread(target=function, name=name, daemon=True).start()


def caller_id() -> int:
    """The id of the caller's thread, or of its greenlet."""
    return threading.get_ident()


def pause(seconds: float) -> None:
    """Wait; other threads and greenlets run on."""
    if _is_greenlet() and let_greenlets_run(seconds):
        return
    originals.time.sleep(max(0.0, seconds))


def _is_greenlet() -> bool:
    """Whether the caller may be a greenlet of the application, and others of its thread wait while it does."""
    return originals.are_threads_replaced() and not is_own_thread()


def let_greenlets_run(seconds: float) -> bool:
    """Wait as the application would. False where that is not allowed, as in a signal handler."""
    try:
        sys.modules["time"].sleep(max(0.0, seconds))
    except AssertionError:  # the loop of greenlets itself was interrupted, and must not wait for itself
        return False
    return True


def _acquire(lock: Lock, timeout: float | None) -> bool:
    """Acquire a lock that another thread or greenlet releases, within so many seconds."""
    if not _is_greenlet():
        return lock.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), _TIMEOUT_MAX_S))
    deadline = None if timeout is None else _clock.monotonic() + timeout
    while not lock.acquire(blocking=False):
        left = _GREENLET_POLL_S if deadline is None else min(_GREENLET_POLL_S, deadline - _clock.monotonic())
        if left <= 0:
            return False
        if not let_greenlets_run(left):
            return lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - _clock.monotonic()))
    return True


class Event:
    """`threading.Event`, whose `set` may also interrupt itself, as a signal handler does."""

    def __init__(self) -> None:
        self._is_set = False
        self._lock = RLock()
        self._waiting: list[Lock] = []

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake all who wait."""
        with self._lock:
            self._is_set = True
            while self._waiting:
                self._waiting.pop().release()

    def clear(self) -> None:
        """Unset it."""
        with self._lock:
            self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set. False if it is not set after `timeout` seconds."""
        if self._is_set:
            return True
        turn = Lock()
        turn.acquire()
        with self._lock:
            self._waiting.append(turn)
            if self.is_set():
                turn.release()
        try:
            return _acquire(turn, timeout) or self.is_set()
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(turn)


class Condition:
    """`threading.Condition` with a lock of its own."""

    def __init__(self) -> None:
        self._lock: Any = RLock()
        self._waiting: list[Lock] = []

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until a predicate is true, for at most `timeout` seconds. Returns its last value."""
        deadline = None if timeout is None else _clock.monotonic() + timeout
        while not (result := predicate()):
            left = None if deadline is None else deadline - _clock.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify_all(self) -> None:
        """Wake all who wait. With the lock held."""
        while self._waiting:
            self._waiting.pop().release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until notified. False if it is not after `timeout` seconds. With the lock held."""
        turn = Lock()
        turn.acquire()
        self._waiting.append(turn)
        state = self._lock._release_save()
        try:
            return _acquire(turn, timeout)
        finally:
            self._lock._acquire_restore(state)
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)


class Thread:
    """A daemon thread of the system."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self._call = (target, args)
        self._ended = Event()
        self._thread: threading.Thread | None = None  # what `threading` knows of it, while it is not patched
        self._is_started = False

    def start(self) -> None:
        """Start it. Raises `RuntimeError` if the system has no thread to give."""
        if originals.are_threads_replaced():
            originals.thread.start_new_thread(self._run_unknown, ())
        else:
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            thread.start()
            self._thread = thread
        self._is_started = True

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for at most `timeout` seconds. Raises `RuntimeError` if it was not started."""
        if not self._is_started:
            raise RuntimeError("cannot join thread before it is started")
        if self._ended.wait(timeout) and self._thread is not None and not originals.are_threads_replaced():
            self._thread.join(timeout)  # what is left of it ends at once

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._is_started and not self._ended.is_set()

    def is_current(self) -> bool:
        """Whether the caller runs on it."""
        return self._id == _thread_id()

    _id = 0

    def _run(self) -> None:
        self._id = _thread_id()
        _own_threads.add(self._id)
        try:
            target, args = self._call
            target(*args)
        finally:
            _own_threads.discard(self._id)
            self._ended.set()

    def _run_unknown(self) -> None:
        """Run without the help of `threading`, which would take the thread for a greenlet."""
        key = threading.get_ident()
        with contextlib.suppress(Exception):  # only for its name in log records
            known: Any = threading.Thread(name=self.name, daemon=True)
            known._ident = key
            known._started.set()
            threading._active[key] = known  # type: ignore[attr-defined]
        try:
            self._run()
        finally:
            threading._active.pop(key, None)  # type: ignore[attr-defined]
