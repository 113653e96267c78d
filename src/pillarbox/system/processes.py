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

INHERITED_FD: Final = 3  # the number, in a child process, of the file that its parent passes to it
_POLL_S: Final = 0.01  # between two checks whether a process has ended
_RESET_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # which Python ignores


class SystemProcess:
    """A child process in its own session, which inherits one file and has no standard input.

    `subprocess` waits until a pipe is closed, which shows that the program runs. A process that C code forks at this moment
    keeps the pipe open, and `subprocess` waits for that process too. This class waits for the new process only.
    """

    def __init__(self, command: Sequence[str], fd: int) -> None:
        """Start a program. Raises `OSError` if it cannot be started."""
        # A copy onto its own number would stay close-on-exec, so the file is copied to another number first.
        actions: list[Any] = [
            (os.POSIX_SPAWN_DUP2, fd, INHERITED_FD + 1),
            (os.POSIX_SPAWN_DUP2, INHERITED_FD + 1, INHERITED_FD),
            (os.POSIX_SPAWN_CLOSE, INHERITED_FD + 1),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ]
        self.returncode: int | None = None
        self.pid: int = posix.posix_spawn(
            command[0], list(command), os.environ, file_actions=actions, setsid=True, setsigdef=_RESET_SIGNALS
        )

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that ended the process; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = posix.waitpid(self.pid, posix.WNOHANG)
            except ChildProcessError:  # other code in this process has collected the exit code
                self.returncode = 0
            else:
                if pid:
                    self.returncode = posix.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds until the process has ended. Returns whether it has."""
        clock = SystemClock()
        deadline = clock.monotonic() + timeout
        while self.poll() is None:
            if clock.monotonic() >= deadline:
                return False
            pause(_POLL_S)
        return True

    def kill(self) -> None:
        """Kill the process unless it has ended."""
        if self.poll() is None:
            posix.kill(self.pid, signal.SIGKILL)


@cache
def original_subprocess() -> Any:
    """A copy of the module `subprocess` that uses the unpatched modules."""
    return originals.copy_python_module(
        "subprocess",
        os=originals.original_os(),
        select=originals.select,
        selectors=selectors,
        threading=SimpleNamespace(Lock=Lock),
        time=originals.time,
    )
