"""Signals and garbage collection at every point of an append, a rotation and a round of the sealer.

A scenario runs with every opcode of `writer.py` and `directory.py` traced (`sys.settrace` with `f_trace_opcodes`); it is then
run again once for each opcode, and ahead of that opcode a signal becomes pending, or the garbage collector is let loose. WHEN
the handler runs is left to CPython, so that the points are the real ones: 3.11 looks for signals at `RESUME`, at backward
jumps, and after a C function that was called by `CALL` or `CALL_FUNCTION_EX` has returned, with the exception raised as if at
that `CALL`; it collects garbage where a container is allocated, which is at other opcodes too.

What makes the signal pending must not itself run Python code, which would take it: one event ahead, the trace function is
replaced by a function of the interpreter (`PyErr_SetInterrupt`), which takes the arguments of one and looks at none of them.

The last tests do the same with real signals, real garbage and real log handlers, wherever they strike.
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

Strike = Callable[[FrameType, object], Any]  # gets the frame and its trace function; returns the next one

# Both ways of the hot path. Compiled, it has opcodes only where it leaves something to the writer.
both_ways = pytest.mark.parametrize(
    "compiled", [False, True] if COMPILED else [False], ids=lambda compiled: "C" * compiled or "Python"
)

# All opcodes, or some. A prime, so that in a loop others are struck each time.
strides = pytest.mark.parametrize("stride", [pytest.param(1, id="all", marks=pytest.mark.proof), pytest.param(17, id="some")])

PENDING = ctypes.pythonapi.PyErr_SetInterrupt
PENDING.argtypes, PENDING.restype = (ctypes.py_object,) * 3, None


def run_and_strike(number: int, strike: Strike, action: Callable[[], object], traced: set[str] = TRACED) -> int:
    """Run `action` and call `strike` ahead of the `number`-th opcode of the traced modules; returns how many were seen."""
    seen = 0

    def local(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal seen
        if event == "opcode":
            seen += 1
            if seen == number:
                return strike(frame, local)
        return local

    def every(frame: FrameType, _event: str, _arg: object) -> Any:
        if frame.f_code.co_filename not in traced:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return local if seen < number else PENDING

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # hypothesis times collections by a callback, and an interrupt that comes within it is lost
    sys.settrace(every)
    try:
        action()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return seen


def interrupt_at_next(frame: FrameType, local: object) -> Any:
    """Have a signal be pending from the next opcode on, in whichever frame that is."""
    back = frame.f_back
    while back is not None:
        back.f_trace = PENDING if back.f_trace is local else back.f_trace
        back = back.f_back
    return PENDING


def setups(
    folder: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> Iterator[tuple[int, WriterSetup, Callable[[], object]]]:
    """A fresh setup for every opcode of the scenario, or for one in `stride`."""
    counting = WriterSetup(folder / "count", compiled=compiled)
    count = run_and_strike(10**9, interrupt_at_next, scenario(counting))
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


class Struck:
    """Takes SIGINT, remembers where it came, and calls `handler`, untraced."""

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
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def trouble_of(setup: WriterSetup, number: int, where: str) -> list[str]:
    """What is wrong with a setup after it was struck."""
    try:
        setup.check()
    except (AssertionError, OSError) as error:
        return [f"opcode {number}, at {where}: {error}"]
    return []


def name_of(scenario: Scenario) -> str:
    """For the report."""
    return scenario.__name__


@both_ways
@strides
@pytest.mark.parametrize("scenario", CALLERS, ids=name_of)
def test_a_keyboard_interrupt_at_any_opcode_loses_no_event_and_tears_no_line(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """The interrupted event is stored whole or not at all; the next append works."""
    interrupted = 0
    trouble: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
        struck = Struck(interrupt)
        with struck.installed():
            try:
                run_and_strike(number, interrupt_at_next, action)
            except KeyboardInterrupt:
                interrupted += 1
        trouble += trouble_of(setup, number, struck.where)
    assert not trouble
    assert interrupted > 10 / stride or compiled


@both_ways
@strides
@pytest.mark.parametrize("scenario", CALLERS + THREADS, ids=name_of)
def test_a_signal_handler_that_enqueues_at_any_opcode_loses_no_event(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """Its own event is stored too, exactly once."""
    trouble: list[str] = []
    for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
        struck = Struck(setup.put_inner)
        with struck.installed():
            run_and_strike(number, interrupt_at_next, action)
        assert INNER in setup.attempted
        trouble += trouble_of(setup, number, struck.where)
    assert not trouble


class Garbage:
    """Enqueues when it is collected; collected it can only be by the garbage collector, for it holds itself."""

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


def collect_at_next_allocation(setup: WriterSetup) -> Strike:
    """Have the collector find garbage as soon as a container is allocated."""

    def strike(frame: FrameType, _local: object) -> None:
        sys.settrace(None)
        frame.f_trace = None
        gc.collect()  # empties the lists of free containers, and the few that have come back by the end are kept
        Garbage(setup)
        setup.kept = [[], [], [], [], (setup,), (setup,), (setup, setup), (setup, setup), (setup, setup, setup)]
        gc.enable()  # from here on nothing is allocated by this function

    return strike


@both_ways
@strides
@pytest.mark.parametrize("scenario", CALLERS + THREADS, ids=name_of)
def test_a_finalizer_that_enqueues_at_any_opcode_loses_no_event(
    tmp_path: Path, scenario: Scenario, stride: int, *, compiled: bool
) -> None:
    """A `__del__`, wherever something is allocated."""
    trouble: list[str] = []
    collected = 0
    with gc_control.collection_at_next_allocation():
        for number, setup, action in setups(tmp_path, scenario, stride, compiled=compiled):
            run_and_strike(number, collect_at_next_allocation(setup), action)
            gc.disable()
            collected += bool(setup.garbage_at)
            trouble += trouble_of(setup, number, " ".join(setup.garbage_at))
    assert not trouble
    assert collected > 10 / stride or compiled


# Without knowing where it strikes.


def check_for_real(setup: WriterSetup) -> None:
    """As `WriterSetup.check`, for one whose sealer has a thread."""
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
    """Call `handler` from a real signal a few thousand times a second, two within one another at most; counts how often."""
    count = [0]
    depth = 0

    def next_alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00001 * (count[0] % 20))

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal depth
        count[0] += 1
        depth += 1
        try:
            if depth == 1:  # on a busy machine a handler takes longer than that, and so would all within it
                next_alarm()
            handler()
        finally:
            depth -= 1
            if depth == 0:
                next_alarm()

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    try:
        yield count
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def long_enough(count: list[int]) -> Callable[[], bool]:
    """Whether to go on: for a while, and on a busy machine until there were enough signals."""
    least = time.monotonic() + REAL_SIGNALS_S
    return lambda: (now := time.monotonic()) < least or (count[0] <= 1000 and now < least + 60.0)


def test_thousands_of_keyboard_interrupts_lose_no_event_and_tear_no_line(tmp_path: Path) -> None:
    """From a timer, while the sealer runs in its thread."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=50, max_bytes=2**30)
    setup.sealer.start()
    armed = False

    def interrupt() -> None:
        if armed:
            raise KeyboardInterrupt

    with gc_control.no_foreign_garbage(), alarms(interrupt) as count:
        going_on = long_enough(count)
        while going_on():
            try:
                armed = True
                while going_on():
                    setup.put()
                armed = False
            except KeyboardInterrupt:
                armed = False
        armed = False
    assert setup.put() == ENQUEUED
    assert count[0] > 1000
    check_for_real(setup)


def test_thousands_of_signal_handlers_that_enqueue_lose_no_event(tmp_path: Path) -> None:
    """Also one that interrupts another."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=50, max_bytes=2**30)
    setup.sealer.start()
    with alarms(setup.put_inner) as count:
        going_on = long_enough(count)
        while going_on():
            number = 10**9 + setup.next_number()
            setup.put(number)
            while len(setup.writer.retired) > RETIRED_MAX // 2:  # the disk is busy; beyond twice as many handlers are refused
                # wait: the pause between two polls of the sealer
                threading.Event().wait(0.001)
    assert not setup.refused
    assert count[0] > 1000
    check_for_real(setup)


def test_finalizers_that_enqueue_in_any_thread_lose_no_event(tmp_path: Path) -> None:
    """Whichever thread collects the garbage."""
    setup = WriterSetup(tmp_path / "outbox", SystemClock(), batch_size=5, max_bytes=2**30)

    class Node:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if not setup.over:
                setup.put_inner()

    setup.sealer.start()
    before = gc.get_threshold()
    gc.set_threshold(7)
    try:
        for number in range(20_000):
            Node()
            setup.put(10**9 + number)
    finally:
        gc.set_threshold(*before)

    def all_is_collected() -> bool:
        gc.collect()  # does nothing while the other thread is at it
        return sum(number < 10**9 for number in setup.attempted) == 20_000

    wait_until(all_is_collected)
    assert sum(number < 10**9 for number in setup.accepted) > 10_000
    check_for_real(setup)
    setup.over = True


class _EnqueuingHandler(logging.Handler):
    """What an application may have: its log goes into the outbox."""

    def __init__(self, setup: WriterSetup) -> None:
        super().__init__()
        self.setup = setup
        self.messages: list[str] = []

    def emit(self, message: logging.LogRecord) -> None:
        self.messages.append(message.getMessage())
        self.setup.put_inner()


def test_a_log_handler_that_enqueues_our_log_records_neither_hangs_nor_loses_events(tmp_path: Path) -> None:
    """The disk is full, a file is deleted, the disk works again: each is logged where the handler can append."""
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


def test_what_a_handler_stores_in_a_segment_of_its_own_is_counted_and_synced(tmp_path: Path) -> None:
    """The segment that it interrupts ends in a torn line."""
    setup = WriterSetup(tmp_path)
    setup.put()
    setup.disk.meanwhile = setup.put_inner
    setup.put()
    (own,) = setup.writer.retired
    assert (own.events, own.bytes) == (1, setup.disk.size(own.fd))
    setup.disk.synced.clear()
    setup.sealer.step()
    assert setup.disk.synced == [own.fd]
    setup.check()
