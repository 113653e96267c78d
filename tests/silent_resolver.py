"""Runs a command with a name server that never answers (`run_with_silent_resolver`), without an effect on other processes.

The command gets a mount namespace with an /etc/resolv.conf of its own, and a network namespace in whose loopback device this
module holds the name server's port without ever reading from it. Asked for a name, the system's resolver waits for minutes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNSHARE = ("unshare", "--net", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")))
# Of 60 s each: longer than any bound of Pillarbox.
RESOLV_CONF = "nameserver 127.0.0.1\noptions timeout:30 attempts:2\n"
NSSWITCH_CONF = "hosts: files dns\n"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


@contextmanager
def run_with_silent_resolver(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a command for which no name can be resolved. The pid of the returned process is that of the command."""
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare, and the right to use it")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    full = [*UNSHARE, sys.executable, "-m", "tests.silent_resolver", *command]
    process = subprocess.Popen(full, env=environment, text=True, **options)  # type: ignore[call-overload]  # as they are passed
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def start_loopback() -> None:
    """Enable the loopback device, which is down in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def main(command: list[str]) -> None:
    """Redirect name resolution to a silent server, then execute the command."""
    for path, content in (("/etc/resolv.conf", RESOLV_CONF), ("/etc/nsswitch.conf", NSSWITCH_CONF)):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(content)
            file.flush()
            subprocess.run(["mount", "--bind", file.name, path], check=True)
    start_loopback()
    name_server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    name_server.bind(("127.0.0.1", 53))
    name_server.set_inheritable(True)
    os.execvp(command[0], command)  # noqa: S606 - the test's own


if __name__ == "__main__":
    main(sys.argv[1:])
