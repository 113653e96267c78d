"""A sink that blocks, for example in name resolution, delays neither `flush`, `close`, SIGTERM nor the end of a program."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.sinks.event_loop import DaemonExecutor, SinkEventLoop, run_on_sink_loop
from tests.conftest import event
from tests.silent_resolver import run_with_silent_resolver

PILLARBOX = (sys.executable, "-m", "pillarbox")
HTTP = "http://destination.example/events"
SPACETIMEDB = "spacetimedb://destination.example:3000/events?function=add"
SLACK_S = 6.0  # for a busy machine; the system's resolver would take a minute and more

PROGRAM = """
import asyncio, sys, threading, time
from pillarbox import Outbox
from pillarbox.sinks.base import SinkCapabilities
from tests.conftest import event

class ForeignSink:
    capabilities = SinkCapabilities(deduplicates_by="nothing", survives="process")
    async def open(self): pass
    def prepare(self, batch): pass
    async def deliver(self, batch):
        print("delivering", flush=True)
        match sys.argv[1]:
            case "resolves": await asyncio.open_connection("destination.example", 80)
            case "threads": await asyncio.to_thread(threading.Event().wait)
            case "blocks": threading.Event().wait()
    async def confirm(self, batches): return len(batches)
    async def check(self): return []
    async def close(self): pass

outbox = Outbox("box", sink=sys.argv[1] if ":" in sys.argv[1] else ForeignSink(), flush_interval=0.01, deliver=sys.argv[2])
assert outbox.enqueue(event(1))
began = time.monotonic()
assert not outbox.flush(1)
print("flush", time.monotonic() - began, flush=True)
began = time.monotonic()
outbox.close(1)
print("close", time.monotonic() - began, flush=True)
print("end", time.monotonic(), flush=True)
"""


@pytest.mark.parametrize(
    ("sink", "deliver"),
    [
        (HTTP, "thread"),
        (HTTP, "process"),
        (SPACETIMEDB, "thread"),
        ("resolves", "thread"),
        ("threads", "thread"),
        ("blocks", "thread"),
    ],
)
def test_no_call_and_no_end_of_a_program_waits_for_a_sink_that_blocks(sink: str, deliver: str, tmp_path: Path) -> None:
    """This holds for the system's resolver and for code of another package."""
    command = (sys.executable, "-c", PROGRAM, sink, deliver)
    with run_with_silent_resolver(*command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=60)
        ended = time.monotonic()
    assert process.returncode == 0
    times = {name: float(seconds) for name, _, seconds in map(str.partition, output.splitlines(), " " * 9) if seconds}
    assert times["flush"] < 1 + SLACK_S
    assert times["close"] < 2.5 + SLACK_S
    assert ended - times["end"] < SLACK_S


@pytest.mark.parametrize("sink", [HTTP, SPACETIMEDB])
def test_sigterm_ends_a_delivery_that_waits_for_a_name_server(sink: str, tmp_path: Path) -> None:
    """The state says what is missing."""
    with Outbox(tmp_path / "box") as outbox:
        assert outbox.enqueue(event(1))
    command = (*PILLARBOX, "deliver", "-d", "box", "--sink", sink)
    with run_with_silent_resolver(*command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        assert any("no name server has resolved destination.example within 8 s" in line for line in process.stderr)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - began < 11 + SLACK_S


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("check", HTTP), 1),
        (("check", SPACETIMEDB), 1),
        (("deliver", "-d", "box", "--sink", "sqlite:///e.db", "--metrics", "a.example:7000"), 2),
    ],
)
def test_a_command_does_not_wait_for_a_name_server(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """It ends with a message."""
    with run_with_silent_resolver(
        *PILLARBOX, *arguments, cwd=tmp_path, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
    ) as process:
        output, _ = process.communicate(timeout=11 + 4 * SLACK_S)
    assert process.returncode == code
    assert "no name server has resolved" in output


def test_one_name_is_resolved_by_one_thread_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an attempt times out, its thread continues, and the next attempt waits for the same answer."""
    asked, answer = [], threading.Event()

    def slow(*query: object) -> list[object]:
        asked.append(query)
        answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    monkeypatch.setattr("pillarbox.sinks.event_loop.RESOLVE_TIMEOUT_S", 0.01)
    monkeypatch.setattr("pillarbox.sinks.event_loop.getaddrinfo", slow)

    async def ask() -> object:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            with pytest.raises(socket.gaierror, match=r"no name server has resolved destination\.example within 0\.01 s"):
                await loop.getaddrinfo("destination.example", 80)
        monkeypatch.setattr("pillarbox.sinks.event_loop.RESOLVE_TIMEOUT_S", 60.0)
        answer.set()
        return await loop.getaddrinfo("destination.example", 80)

    assert run_on_sink_loop(ask()) == [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
    assert len(asked) == 1


def test_a_loop_that_is_closed_while_a_name_is_resolved_reports_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The thread ends when it gets its answer, and reports to no loop."""
    answer, started = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        answer.wait(60)

    async def give_up() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SinkEventLoop)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await loop._look_up(slow)
        await asyncio.to_thread(started.wait, 60)

    before = set(threading.enumerate())
    run_on_sink_loop(give_up())
    answer.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert not caplog.records


def test_more_calls_than_threads_wait_for_their_turn() -> None:
    """A call that raises does not end its thread."""
    executor = DaemonExecutor("pillarbox-test", 2)
    gate = threading.Event()
    futures = [executor.submit(lambda number: gate.wait(60) and 1 // number, number) for number in range(8)]
    gate.set()
    assert isinstance(futures[0].exception(60), ZeroDivisionError)
    assert [future.result(60) for future in futures[1:]] == [1, 0, 0, 0, 0, 0, 0]


def test_without_a_thread_a_call_that_blocks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call does not stay in the queue, because no thread would make it."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    executor = DaemonExecutor("pillarbox-test", 2)
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            executor.submit(int)
    assert executor.submit(int).result(60) == 0
