"""Runs commands of `pillarbox` in processes that are forked from one that has imported Python's and other libraries already.

A command takes half a second of processor time to start, most of it to import libraries and the package, and the tests run
thousands. Each still runs in a process of its own, with its own arguments, environment, folder and standard streams, and ends
as the interpreter ends. Tests of how a command starts, of terminals or of signals start it with `subprocess`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from pillarbox.cli.main import app

_REQUEST_BYTES_MAX = 2**20
# Variables that the interpreter reads when it starts, or a module when it is imported.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "PILLARBOX_PURE_PYTHON", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR")


def depends_on_start(environ: dict[str, str]) -> bool:
    """Whether a command with these variables must be started from the beginning."""
    return any(name.startswith(_READ_AT_START) and os.environ.get(name) != value for name, value in environ.items())


class CommandServer:
    """A process that forks commands. It ends with the process that started it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commands-")
        self._address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen(16)
            command = [sys.executable, "-m", "tests.command_server", str(listener.fileno())]
            self._process = subprocess.Popen(
                command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
            )

    def run(
        self, arguments: list[str], cwd: Path, stdin: bytes, environ: dict[str, str], seconds: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one command to its end, as `subprocess.run` does. Raises `subprocess.TimeoutExpired`; it is killed then."""
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environ": environ}).encode()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            tempfile.TemporaryFile() as stdin_file,
            tempfile.TemporaryFile() as stdout_file,
            tempfile.TemporaryFile() as stderr_file,
        ):
            stdin_file.write(stdin)
            stdin_file.seek(0)
            connection.connect(self._address)
            socket.send_fds(connection, [request], [stdin_file.fileno(), stdout_file.fileno(), stderr_file.fileno()])
            pid = int(connection.recv(100))
            connection.settimeout(seconds)
            try:
                status = int(connection.recv(100))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(arguments, seconds, _content(stdout_file), _content(stderr_file)) from None
            code = os.waitstatus_to_exitcode(status)
            return subprocess.CompletedProcess(arguments, code, _content(stdout_file), _content(stderr_file))


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


class _Forker:
    """The server's side: forks, and reports how each command ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connections: dict[int, socket.socket] = {}  # by the pid of the command
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup, self._wakeup_writer):
            end.setblocking(False)  # noqa: FBT003 - the socket module's own signature
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """Serve until standard input ends; then return None. In a forked child return the request."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self._wakeup:
                    self._wakeup.recv(1000)
                    self._report_ended()
                elif (request := self._accept()) is not None:
                    return request

    def _report_ended(self) -> None:
        while self._connections:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._connections.pop(pid) as connection, contextlib.suppress(OSError):  # the test has given up
                connection.send(b"%d" % status)

    def _accept(self) -> dict[str, Any] | None:
        connection, _ = self._listener.accept()
        data, fds, _, _ = socket.recv_fds(connection, _REQUEST_BYTES_MAX, 3)
        pid = os.fork()
        if pid:
            self._connections[pid] = connection
            for fd in fds:
                os.close(fd)
            connection.send(b"%d" % pid)
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for inherited in (connection, self._listener, self._wakeup, self._wakeup_writer, *self._connections.values()):
            inherited.close()
        self._selector.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        request: dict[str, Any] = json.loads(data)
        return request


def main() -> None:
    """Serve on the socket whose descriptor is the argument."""
    with contextlib.redirect_stdout(io.StringIO()):
        app(["--version"], standalone_mode=False)  # imports what is imported at the first use
    request = _Forker(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is None:
        return
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.argv = ["pillarbox", *request["arguments"]]
    runpy.run_module("pillarbox", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
