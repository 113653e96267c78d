"""Threads of the system, and their locks, events and conditions.

They behave like the classes of the same names in `threading`, and stay threads of the system if gevent or eventlet patch the
standard library. A greenlet of the application that waits here lets other greenlets run, and polls whether it can continue.
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
else:
    Lock, RLock = originals.thread.allocate_lock, originals.thread.RLock

__all__ = ["Condition", "Empty", "Event", "Lock", "RLock", "SimpleQueue", "Thread", "caller_id", "pause"]

T = TypeVar("T")

_GREENLET_POLL_S: Final = 0.005  # between two polls of a greenlet that waits
_TIMEOUT_MAX_S: Final[float] = originals.thread.TIMEOUT_MAX

_thread_id: Callable[[], int] = originals.thread.get_ident
_clock: Final = SystemClock()
_own_threads: set[int] = set()


def forget_parent_threads() -> None:
    """Clear the ids of threads in a forked child, where the threads of the parent do not exist."""
    _own_threads.clear()


def is_own_thread() -> bool:
    """Whether the caller runs on a thread of Pillarbox."""
    return _thread_id() in _own_threads


def start_greenlet(function: Callable[[], object], name: str) -> None:
    """Run a function in a greenlet: if `threading` is patched, it starts one."""
    threading.Thread(target=function, name=name, daemon=True).start()


def caller_id() -> int:
    """The id of the caller's thread, or of its greenlet."""
    return threading.get_ident()


def pause(seconds: float) -> None:
    """Wait, while other threads and greenlets run."""
    if _is_greenlet() and let_greenlets_run(seconds):
        return
    originals.time.sleep(max(0.0, seconds))


def _is_greenlet() -> bool:
    """Whether the caller may be a greenlet of the application. If it blocks, the other greenlets of its thread do not run."""
    return originals.are_threads_replaced() and not is_own_thread()


def let_greenlets_run(seconds: float) -> bool:
    """Wait in the greenlet loop. Returns False where that is not possible, as in a signal handler."""
    try:
        sys.modules["time"].sleep(max(0.0, seconds))
    except AssertionError:  # the greenlet loop itself was interrupted by a signal, and cannot wait for itself
        return False
    return True


def _acquire(lock: Lock, timeout: float | None) -> bool:
    """Acquire a lock that another thread or greenlet releases. Returns False after `timeout` seconds."""
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
    """`threading.Event`, except that a signal handler may call `set` in the middle of `set`."""

    def __init__(self) -> None:
        self._is_set = False
        self._lock = RLock()
        self._waiting: list[Lock] = []

    def is_set(self) -> bool:
        """Whether the event is set."""
        return self._is_set

    def set(self) -> None:
        """Set the event, and wake all waiters."""
        with self._lock:
            self._is_set = True
            while self._waiting:
                self._waiting.pop().release()

    def clear(self) -> None:
        """Reset the event."""
        with self._lock:
            self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set. Returns False if it is not set after `timeout` seconds."""
        if self._is_set:
            return True
        wake_up = Lock()
        wake_up.acquire()
        with self._lock:
            self._waiting.append(wake_up)
            if self.is_set():
                wake_up.release()
        try:
            return _acquire(wake_up, timeout) or self.is_set()
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(wake_up)


class Condition:
    """`threading.Condition` with a lock of its own. Callers use `with condition.lock`.

    The lock is acquired by the interpreter itself: a signal could interrupt a method of ours after it has acquired the lock.
    """

    def __init__(self) -> None:
        self.lock: Any = RLock()
        self._waiting: list[Lock] = []

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
        """Wake all waiters. The caller must hold the lock."""
        while self._waiting:
            self._waiting.pop().release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until notified. Returns False after `timeout` seconds. The caller must hold the lock."""
        wake_up = Lock()
        wake_up.acquire()
        self._waiting.append(wake_up)
        state = self.lock._release_save()
        try:
            return _acquire(wake_up, timeout)
        finally:
            self.lock._acquire_restore(state)
            with contextlib.suppress(ValueError):
                self._waiting.remove(wake_up)


class Thread:
    """A daemon thread of the system."""

    def __init__(self, target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self._call = (target, args)
        self._ended = Event()
        self._thread: threading.Thread | None = None  # None if `threading` is patched
        self._is_started = False

    def start(self) -> None:
        """Start the thread. Raises `RuntimeError` if the system cannot start another one."""
        if originals.are_threads_replaced():
            originals.thread.start_new_thread(self._run_unregistered, ())
        else:
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            thread.start()
            self._thread = thread
        self._is_started = True

    def join(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds until the thread has ended. Raises `RuntimeError` if it was not started."""
        if not self._is_started:
            raise RuntimeError("cannot join thread before it is started")
        if self._ended.wait(timeout) and self._thread is not None and not originals.are_threads_replaced():
            self._thread.join(timeout)  # it has nothing left to do but to end

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._is_started and not self._ended.is_set()

    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
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

    def _run_unregistered(self) -> None:
        """Run in a thread that `threading` did not start, because it would start a greenlet."""
        key = threading.get_ident()
        with contextlib.suppress(Exception):  # only for its name in log records
            registered: Any = threading.Thread(name=self.name, daemon=True)
            registered._ident = key
            registered._started.set()
            threading._active[key] = registered  # type: ignore[attr-defined]
        try:
            self._run()
        finally:
            threading._active.pop(key, None)  # type: ignore[attr-defined]
