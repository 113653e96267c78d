"""Child processes of the system."""

from __future__ import annotations

import os
import posix
import signal
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from pillarbox.clock import SystemClock
from pillarbox.system import originals
from pillarbox.system.sockets import selectors
from pillarbox.system.threads import Lock, pause

if TYPE_CHECKING:
    from collections.abc import Sequence

INHERITED_FD: Final = 3  # of a child process: what it gets from its parent
_POLL_S: Final = 0.01  # between two looks whether a process has ended
_RESET_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # which Python ignores


class SystemProcess:
    """A process in a session of its own, which gets one file of this process and no standard input.

    `subprocess` learns through a pipe that a program runs. A process that C code forks meanwhile keeps that pipe open, and
    `subprocess` waits for it. This waits for nothing but the new process.
    """

    def __init__(self, command: Sequence[str], fd: int) -> None:
        """Start a program. Raises `OSError` if that is impossible."""
        # A copy has another number, so that it stays open in the child.
        actions: list[Any] = [
            (os.POSIX_SPAWN_DUP2, fd, INHERITED_FD + 1),
            (os.POSIX_SPAWN_DUP2, INHERITED_FD + 1, INHERITED_FD),
        ]
        actions.append((os.POSIX_SPAWN_CLOSE, INHERITED_FD + 1))
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        self.returncode: int | None = None
        self.pid: int = posix.posix_spawn(
            command[0], list(command), os.environ, file_actions=actions, setsid=True, setsigdef=_RESET_SIGNALS
        )

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = posix.waitpid(self.pid, posix.WNOHANG)
            except ChildProcessError:  # other code of this process has taken the exit code
                self.returncode = 0
            else:
                if pid:
                    self.returncode = posix.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended, for at most `timeout` seconds. Returns whether it has."""
        clock = SystemClock()
        deadline = clock.monotonic() + timeout
        while self.poll() is None:
            if clock.monotonic() >= deadline:
                return False
            pause(_POLL_S)
        return True

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        if self.poll() is None:
            posix.kill(self.pid, signal.SIGKILL)


@cache
def original_subprocess() -> Any:
    """A copy of the module `subprocess` that waits for processes, and for nothing but the system."""
    return originals.copy_python_module(
        "subprocess",
        os=originals.original_os(),
        select=originals.select,
        selectors=selectors,
        threading=SimpleNamespace(Lock=Lock),
        time=originals.time,
    )
