"""Prepares a forked child: callbacks create new locks and random numbers, and close the parent's files.

A fork by Python calls hooks. A fork by C code, as in uWSGI, calls none, and is detected by the next `check_fork`. That is fast,
and every function that an application calls begins with it.
"""

from __future__ import annotations

import ctypes
from os import getpid, register_at_fork
from typing import TYPE_CHECKING, Final

from pillarbox._native import COMPILED, speedups
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable

_THREADS: Final = b"/proc/self/task"
_ENTRIES_OF_ONE_THREAD: Final = 3  # its own, ".", and ".."
_first: list[Callable[[], object]] = []
_last: list[Callable[[], object]] = []
_pid = getpid()
_hook_ran = False


class ForkLock:
    """A lock that the process holds while it forks, and that is free in the child.

    Callers use `with fork_lock.lock`. A method of ours that acquires it could be interrupted by a signal after it has.
    """

    def __init__(self) -> None:
        self.lock = threads.RLock()

    def renew(self) -> None:
        """Replace the lock in a forked child, where the thread that held it may not exist."""
        self.lock = threads.RLock()


# Held while a descriptor is opened or closed, while a process is started, and while this process forks, so that a child knows
# every descriptor that it inherits.
fork_lock: Final = ForkLock()


def after_fork_in_child(callback: Callable[[], object], *, last: bool = False) -> None:
    """Call `callback` in each forked child; `last` is for callbacks that use locks which other callbacks renew."""
    (_last if last else _first).append(callback)


def process_id() -> int:
    """The id of this process."""
    return getpid()


def was_forked_in_c() -> bool:
    """In a callback: whether no hook ran before the fork, so that other threads may have been in the middle of an operation."""
    return not _hook_ran


def _before_fork() -> None:
    global _hook_ran  # noqa: PLW0603 - state of this process
    fork_lock.lock.acquire()
    _hook_ran = True


def _after_fork_in_parent() -> None:
    global _hook_ran  # noqa: PLW0603 - state of this process
    _hook_ran = False
    fork_lock.lock.release()


def _handle_fork() -> None:
    global _pid, _hook_ran  # noqa: PLW0603 - state of this process
    _pid = getpid()
    if COMPILED:
        speedups.mark_fork_handled()
    fork_lock.renew()
    threads.forget_parent_threads()
    for callback in (*_first, *_last):
        callback()
    _hook_ran = False


def _handle_c_fork() -> None:
    """Handle a fork that called no hook.

    A thread that does not exist here may hold the interpreter's own locks. So the interpreter is reset as after a fork by
    Python, which also calls the hooks. The interpreter must not be reset while other threads run; if they run, it need not be.
    """
    if _is_only_thread():
        speedups.reset_interpreter() if COMPILED else ctypes.pythonapi.PyOS_AfterFork_Child()
    if _pid != getpid():
        _handle_fork()


def _is_only_thread() -> bool:
    """Whether this process has one thread, found without giving up the GIL.

    Who gives it up waits for the threads of the parent that waited for it. `os` gives it up for each call, `PyDLL` does not.
    """
    library = ctypes.PyDLL(None)
    library.opendir.restype = ctypes.c_void_p
    library.readdir.restype = ctypes.c_void_p
    entries = ctypes.c_void_p(library.opendir(_THREADS))
    if not entries:  # not on Linux
        return False
    count = 0
    while library.readdir(entries):
        count += 1
    library.closedir(entries)
    return count == _ENTRIES_OF_ONE_THREAD


def _compare_pids() -> None:
    if getpid() != _pid:
        _handle_c_fork()


register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_handle_fork)
if COMPILED:
    speedups.set_fork_handler(_handle_c_fork)
    check_fork: Callable[[], None] = speedups.check_fork
else:
    check_fork = _compare_pids
