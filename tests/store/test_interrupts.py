"""Signals and garbage collection at every point of an append, a rotation and a step of the sealer.

A scenario runs with every opcode of `writer.py` and `directory.py` traced (`sys.settrace` with `f_trace_opcodes`). It then runs
again for each opcode, and before that opcode a signal becomes pending, or the garbage collector is enabled. CPython decides
when the handler runs, so the points are the real ones: 3.11 checks for signals at `RESUME`, at backward jumps, and after the
return of a C function that was called by `CALL` or `CALL_FUNCTION_EX`, with the exception raised as if at that `CALL`. It
collects garbage where a container is allocated, which may be at other opcodes too.

The signal must become pending without running Python code, which would handle it. So one event earlier, the trace function is
replaced by a function of the interpreter (`PyErr_SetInterrupt`), which accepts the arguments of a trace function and ignores
them.

The last tests use real signals, real garbage and real log handlers at random moments.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from pillarbox._native import COMPILED
from pillarbox.clock import SystemClock
from pillarbox.outcome import ENQUEUED
from pillarbox.store import directory as directory_module
from pillarbox.store import reader
from pillarbox.store import writer as writer_module
from pillarbox.store.writer import RETIRED_MAX
from tests.conftest import wait_until
from tests.store import gc_control
from tests.store.writer_scenarios import (
    CALLERS,
    INNER,
    THREADS,
    Scenario,
    WriterSetup,
)

TRACED = {writer_module.__file__, directory_module.__file__}
REAL_SIGNALS_S = 2.0

Interrupter = Callable[[FrameType, object], Any]  # gets the frame and its trace function; returns the next one

# The hot path in Python and in C. The one in C has opcodes only where it calls a method of the writer.
both_implementations = pytest.mark.parametrize(
    "compiled", [False, True] if COMPILED else [False], ids=lambda compiled: "C" * compiled or "Python"
)

# All opcodes, or some. The stride is a prime, so that each pass of a loop is interrupted at other opcodes.
strides = pytest.mark.parametrize("stride", [pytest.param(1, id="all", marks=pytest.mark.proof), pytest.param(17, id="some")])

SET_INTERRUPT = ctypes.pythonapi.PyErr_SetInterrupt
SET_INTERRUPT.argtypes, SET_INTERRUPT.restype = (ctypes.py_object,) * 3, None


def run_and_interrupt(number: int, interrupter: Interrupter, action: Callable[[], object], traced: set[str] = TRACED) -> int:
    """Run `action`, and call `interrupter` before the `number`-th traced opcode. Returns the number of opcodes."""
    seen = 0

    def local(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal seen
        if event == "opcode":
            seen += 1
            if seen == number:
                return interrupter(frame, local)
        return local

    def every(frame: FrameType, _event: str, _arg: object) -> Any:
        if frame.f_code.co_filename not in traced:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return local if seen < number else SET_INTERRUPT

    previous_trace, was_enabled = sys.gettrace(), gc.isenabled()
    gc.disable()  # hypothesis times collections by a callback, in which an interrupt would be lost
    sys.settrace(every)
    try:
        action()
    finally:
        sys.settrace(previous_trace)
        if was_enabled:
            gc.enable()
    return seen


def interrupt_at_next(frame: FrameType, local: object) -> Any:
    """Make a signal pending from the next opcode on, in any frame."""
    back = frame.f_back
    while back is not None:
        back.f_trace = SET_INTERRUPT if back.f_trace is local else back.f_trace
        back = back.f_back
    return SET_INTERRUPT


def setups(
    folder: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> Iterator[tuple[int, WriterSetup, Callable[[], object]]]:
    """A fresh setup for every opcode of the scenario, or for one in `stride`."""
    counting = WriterSetup(folder / "count", compiled=compiled)
    count = run_and_interrupt(10**9, interrupt_at_next, scenario(counting))
    counting.check()
    close_all(counting)
    for number in range(1, count + 1, stride):
        outbox_dir = folder / str(number)
        setup = WriterSetup(outbox_dir, compiled=compiled)
        yield number, setup, scenario(setup)
        close_all(setup)
        shutil.rmtree(outbox_dir)


def close_all(setup: WriterSetup) -> None:
    setup.over = True
    setup.disk.close_inherited()


class RecordingHandler:
    """Handles SIGINT: records where it came, and calls `handler` without tracing."""

    def __init__(self, handler: Callable[[], None]) -> None:
        self.handler = handler
        self.where = ""

    def __call__(self, _signal: int, frame: FrameType | None) -> None:
        sys.settrace(None)
        assert frame is not None
        self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
        self.handler()

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous_handler = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous_handler)


def problems_of(setup: WriterSetup, number: int, where: str) -> list[str]:
    """The problems of a setup after an interrupt."""
    try:
        setup.check()
    except (AssertionError, OSError) as error:
        return [f"opcode {number}, at {where}: {error}"]
    return []


def name_of(scenario: Scenario) -> str:
    """The id of a scenario in the report."""
    return scenario.__name__


@both_implementations
@strides
@pytest.mark.parametrize("scenario", CALLERS, ids=name_of)
def test_a_keyboard_interrupt_at_any_opcode_loses_no_event_and_tears_no_line(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """The interrupted event is stored whole or not at all; the next append works."""
    interrupted = 0
    problems: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
        handler = RecordingHandler(interrupt)
        with handler.installed():
            try:
                run_and_interrupt(number, interrupt_at_next, action)
            except KeyboardInterrupt:
                interrupted += 1
        problems += problems_of(setup, number, handler.where)
    assert not problems
    assert interrupted > 10 / stride or compiled


@both_implementations
@strides
@pytest.mark.parametrize("scenario", CALLERS + THREADS, ids=name_of)
def test_a_signal_handler_that_enqueues_at_any_opcode_loses_no_event(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """Its own event is stored too, exactly once."""
    problems: list[str] = []
    for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
        handler = RecordingHandler(setup.put_inner)
        with handler.installed():
            run_and_interrupt(number, interrupt_at_next, action)
        assert INNER in setup.attempted
        problems += problems_of(setup, number, handler.where)
    assert not problems


class Garbage:
    """Enqueues when it is collected. Only the garbage collector can collect it, because it refers to itself."""

    def __init__(self, setup: WriterSetup) -> None:
        self.setup = setup
        self.itself = self
        self.weight: list[list[None]] = [[] for _ in range(50)]  # more than the threshold

    def __del__(self) -> None:
        if self.setup.over:
            return
        gc.disable()
        frame = sys._getframe(1)
        self.setup.garbage_at.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        self.setup.put_inner()


def collect_at_next_allocation(setup: WriterSetup) -> Interrupter:
    """Make the collector find garbage as soon as a container is allocated."""

    def enable_collector(frame: FrameType, _local: object) -> None:
        sys.settrace(None)
        frame.f_trace = None
        gc.collect()  # empties the lists of free containers; those that are freed meanwhile are allocated and kept below
        Garbage(setup)
        setup.kept = [[], [], [], [], (setup,), (setup,), (setup, setup), (setup, setup), (setup, setup, setup)]
        gc.enable()  # this function allocates nothing after this

    return enable_collector


@both_implementations
@strides
@pytest.mark.parametrize("scenario", CALLERS + THREADS, ids=name_of)
def test_a_finalizer_that_enqueues_at_any_opcode_loses_no_event(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """The finalizer runs wherever a container is allocated."""
    problems: list[str] = []
    collected = 0
    with gc_control.collection_at_next_allocation():
        for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
            run_and_interrupt(number, collect_at_next_allocation(setup), action)
            gc.disable()
            collected += bool(setup.garbage_at)
            problems += problems_of(setup, number, " ".join(setup.garbage_at))
    assert not problems
    assert collected > 10 / stride or compiled


# Interrupts at random moments.


def check_for_real(setup: WriterSetup) -> None:
    """Like `WriterSetup.check`, for a setup whose sealer runs in a thread."""
    assert setup.sealer.stop(30)
    counts: Counter[int] = Counter()
    for name, data in setup.files().items():
        contents = reader.read_lines(data, lambda: None)
        assert (name, contents.damaged) == (name, [])
        counts.update(msgspec.json.decode(payload)["n"] for payload in contents.payloads)
    assert set(setup.accepted) <= set(counts) <= set(setup.attempted)
    assert not [number for number, count in counts.items() if count != 1]
    assert setup.writer.pending_counts()[2] == len(counts)


@contextmanager
def alarms(handler: Callable[[], None]) -> Iterator[list[int]]:
    """Call `handler` from a real signal a few thousand times a second, at most two nested. Counts the calls."""
    count = [0]
    depth = 0

    def next_alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00001 * (count[0] % 20))

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal depth
        count[0] += 1
        depth += 1
        try:
            if depth == 1:  # on a busy machine, a handler may take longer than the interval
                next_alarm()
            handler()
        finally:
            depth -= 1
            if depth == 0:
                next_alarm()

    previous_handler = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    try:
        yield count
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


def continue_until_enough(count: list[int]) -> Callable[[], bool]:
    """A function that tells whether to continue: for a while, and on a busy machine until enough signals came."""
    least = time.monotonic() + REAL_SIGNALS_S
    return lambda: (now := time.monotonic()) < least or (count[0] <= 1000 and now < least + 60.0)


def test_thousands_of_keyboard_interrupts_lose_no_event_and_tear_no_line(tmp_path: Path) -> None:
    """A timer sends them while the sealer runs in its thread."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=50, max_bytes=2**30)
    setup.sealer.start()
    setup.sealer.run_rounds()
    armed = False

    def interrupt() -> None:
        if armed:
            raise KeyboardInterrupt

    with gc_control.no_foreign_garbage(), alarms(interrupt) as count:
        should_continue = continue_until_enough(count)
        while should_continue():
            try:
                armed = True
                while should_continue():
                    setup.put()
                armed = False
            except KeyboardInterrupt:
                armed = False
        armed = False
    assert setup.put() == ENQUEUED
    assert count[0] > 1000
    check_for_real(setup)


def test_thousands_of_signal_handlers_that_enqueue_lose_no_event(tmp_path: Path) -> None:
    """A handler may also interrupt another one."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=50, max_bytes=2**30)
    setup.sealer.start()
    setup.sealer.run_rounds()
    with alarms(setup.put_inner) as count:
        should_continue = continue_until_enough(count)
        while should_continue():
            number = 10**9 + setup.next_number()
            setup.put(number)
            while (
                len(setup.writer.retired) > RETIRED_MAX // 2
            ):  # the disk is slow; above twice as many segments, appends of handlers are dropped
                # wait: polls the sealer
                threading.Event().wait(0.001)
    assert not setup.refused
    assert count[0] > 1000
    check_for_real(setup)


def test_finalizers_that_enqueue_in_any_thread_lose_no_event(tmp_path: Path) -> None:
    """Any thread may collect the garbage."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=5, max_bytes=2**30)

    class Node:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if not setup.over:
                setup.put_inner()

    setup.sealer.start()
    setup.sealer.run_rounds()
    thresholds = gc.get_threshold()
    gc.set_threshold(7)
    try:
        for number in range(20_000):
            Node()
            setup.put(10**9 + number)
    finally:
        gc.set_threshold(*thresholds)

    def all_is_collected() -> bool:
        gc.collect()  # does nothing while another thread collects
        return sum(number < 10**9 for number in setup.attempted) == 20_000

    wait_until(all_is_collected)
    assert sum(number < 10**9 for number in setup.accepted) > 10_000
    check_for_real(setup)
    setup.over = True


class _EnqueuingHandler(logging.Handler):
    """A log handler of an application that enqueues log records."""

    def __init__(self, setup: WriterSetup) -> None:
        super().__init__()
        self.setup = setup
        self.messages: list[str] = []

    def emit(self, message: logging.LogRecord) -> None:
        self.messages.append(message.getMessage())
        self.setup.put_inner()


def test_a_log_handler_that_enqueues_our_log_records_neither_hangs_nor_loses_events(tmp_path: Path) -> None:
    """A full disk and a deleted file are logged at points where the handler can append."""
    setup = WriterSetup(tmp_path / "outbox")
    handler = _EnqueuingHandler(setup)
    logger = logging.getLogger("pillarbox")
    logger.addHandler(handler)
    try:
        setup.put()
        setup.disk.error = errno.ENOSPC
        setup.put()
        setup.sealer.step()
        assert "dropping events: disk_full" in handler.messages[-1]
        setup.sealer.step()
        setup.writer.rotate("manual")
        os.unlink(setup.outbox_dir.path_of(setup.writer.retired[0].locked_file.name))
        setup.sealer.step()
        assert any("was deleted externally; recreated" in message for message in handler.messages)
    finally:
        logger.removeHandler(handler)
    assert len(setup.accepted) == 1 + len(handler.messages)
    setup.check()


def test_events_of_a_handler_in_a_new_segment_are_counted_and_synced(tmp_path: Path) -> None:
    """The handler needs a new segment, because the interrupted one ends with a torn line."""
    setup = WriterSetup(tmp_path)
    setup.put()
    setup.disk.meanwhile = setup.put_inner
    setup.put()
    (segment,) = setup.writer.retired
    assert (segment.events, segment.bytes) == (1, setup.disk.size(segment.fd))
    setup.disk.synced.clear()
    setup.sealer.step()
    assert setup.disk.synced == [segment.fd]
    setup.check()
