"""A reader of the log or of a command's output that stops reading delays neither delivery nor the end of the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.cli.streams import QueuedStream
from tests.conftest import event, wait_until
from tests.sinks.http_server import CannedResponse, Request, Server

ROOT = Path(__file__).parents[1]
PILLARBOX = (sys.executable, "-m", "pillarbox")
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}
SLACK_S = 6.0  # for a busy machine


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a full pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 512)
    os.set_blocking(writer, True)
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(fd)


def failing_at_first(failures: int) -> Server:
    """A server that answers the first requests with errors of different texts, so that each is logged."""
    count = 0

    def respond(_request: Request) -> CannedResponse:
        nonlocal count
        count += 1
        return CannedResponse(503, f"problem {count}".encode(), {"Retry-After": "0"}) if count <= failures else CannedResponse()

    return Server(respond)


def read_all(reader: int) -> str:
    with os.fdopen(os.dup(reader), errors="replace") as stream:
        return stream.read()


@pytest.mark.parametrize("both", [False, True], ids=["log", "log-and-output"])
def test_deliver_goes_on_and_ends_although_nobody_reads_its_log(both: bool, tmp_path: Path) -> None:
    """Also if standard output leads to the same pipe."""
    with Outbox(tmp_path / "box") as outbox:
        assert outbox.enqueue(event(1))
    with failing_at_first(3) as server, full_pipe() as (_, writer):
        command = [*PILLARBOX, "deliver", "-d", "box", "--sink", server.url()]
        output = writer if both else subprocess.DEVNULL
        with subprocess.Popen(command, cwd=tmp_path, env=ENVIRON, stdout=output, stderr=writer) as process:
            try:
                wait_until(lambda: not list((tmp_path / "box").glob("sealed-*")))
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert time.monotonic() - began < 4 + SLACK_S
            finally:
                process.kill()


PROGRAM = """
import logging, os, sys, time
from pillarbox import Outbox
from tests.conftest import event
writer, url, deliver = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stream = sys.stderr if sys.argv[4] == "stderr" else os.fdopen(writer, "w")
logging.basicConfig(stream=stream, level=getattr(logging, sys.argv[5]))
outbox = Outbox("box", sink=url, flush_interval=0.01, deliver=deliver)
assert outbox.enqueue(event(1))
assert outbox.flush(60), outbox.stats()
began = time.monotonic()
outbox.close()
print(time.monotonic() - began, flush=True)
"""


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
@pytest.mark.parametrize("stream", ["pipe", "stderr"])
@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_a_program_goes_on_and_ends_although_its_log_handler_blocks(
    deliver: str, stream: str, level: str, tmp_path: Path
) -> None:
    """This holds for delivery in a thread and for the supervisor of the delivery process; at DEBUG the transport logs too."""
    with failing_at_first(3) as server, full_pipe() as (_, writer):
        command = [sys.executable, "-c", PROGRAM, str(writer), server.url(), deliver, stream, level]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=ENVIRON,
            stdout=subprocess.PIPE,
            stderr=writer if stream == "stderr" else None,
            pass_fds=[writer],
        ) as process:
            try:
                assert process.stdout is not None
                assert float(process.stdout.readline() or "nan") < 5 + SLACK_S
                began = time.monotonic()
                assert process.wait(20) == 0
                assert time.monotonic() - began < 4 + SLACK_S
            finally:
                process.kill()


def test_a_terminal_that_is_stopped_does_not_hold_up_the_end_of_a_command(tmp_path: Path) -> None:
    """Ctrl-S stops the display of `status --watch` and the progress of `deliver --once`."""
    with Outbox(tmp_path / "box") as outbox:
        assert outbox.enqueue(event(1))
    for arguments in (["status", "--watch", "--interval", "0.1"], ["deliver", "--once", "--sink", "http://127.0.0.1:9/"]):
        terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")
        command = [*PILLARBOX, *arguments, "-d", "box"]
        with subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRON | {"TERM": "xterm"}, stdin=end, stdout=end, stderr=end
        ) as process:
            try:
                assert os.read(terminal, 1)
                termios.tcflow(end, termios.TCOOFF)
                # wait: until the display would have been drawn again
                time.sleep(1.0)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) in (0, 1)
                assert time.monotonic() - began < 4 + SLACK_S
            finally:
                process.kill()
                termios.tcflow(end, termios.TCOON)
                os.close(terminal)
                os.close(end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_whose_output_nobody_reads_can_be_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """`tail --follow` waits for its reader until a signal ends it."""
    with Outbox(tmp_path / "box") as outbox:
        for index in range(200):
            assert outbox.enqueue(event(index))
    with full_pipe() as (_, writer):
        command = [*PILLARBOX, "tail", "--follow", "-n", "200", "-d", "box"]
        with subprocess.Popen(command, cwd=tmp_path, env=ENVIRON, stdout=writer) as process:
            try:
                wait_until(lambda: "pipe" in Path(f"/proc/{process.pid}/wchan").read_text())
                process.send_signal(number)
                assert process.wait(SLACK_S) in (130, -signal.SIGTERM)
            finally:
                process.kill()


def test_lost_lines_are_counted_where_they_are_missing() -> None:
    """A reader that continues sees how many lines were lost."""
    with full_pipe() as (reader, writer):
        with os.fdopen(writer, "w", closefd=False) as original:
            stream = QueuedStream(original)
            for number in range(3000):
                stream.write(f"{number:06d}{'x' * 500}\n")
            assert not stream.drain(0)
            os.set_blocking(reader, False)
            text = b""
            while not stream.drain(0):
                with contextlib.suppress(BlockingIOError):
                    text += os.read(reader, 65536)
            stream.write("last\n")
            assert stream.drain(60)
        os.close(writer)
        lines = (text.decode() + read_all(reader)).lstrip(".").split("\n")
    (loss,) = [line for line in lines if "lost" in line]
    whole = sum(line.endswith("x" * 500) for line in lines)
    assert loss == f"WARNING {3000 - whole:,} lines were lost here: nobody read them"
    assert lines[-3:-1] == [loss, "last"]


def test_a_reader_that_stands_still_is_waited_for_once() -> None:
    """A line on standard output waits briefly for earlier lines on standard error; the next lines do not wait again."""
    with full_pipe() as (_, writer), os.fdopen(writer, "w", closefd=False) as original:
        stream = QueuedStream(original)
        stream.write("text\n")
        began = time.monotonic()
        for _ in range(1000):
            stream.wait_for_reader(0.1)
        assert time.monotonic() - began < SLACK_S
