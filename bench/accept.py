"""How long `enqueue` takes, sealing included: relative to a baseline, in threads, in processes, on an asyncio event loop."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import threading
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

import msgspec

from bench import sample
from bench.definitions import Column, Contestant, Goal, Section, figure, ratio
from bench.timing import WARMUP_CALLS, Mean, Stopwatch, figures, now, timed, untimed
from pillarbox import Outbox, TrackingEvent
from pillarbox.event import new_event_id, now_micros
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier

    from bench.definitions import Figures, RoundPaths

EVENTS_PER_CALL = 100  # events of one `enqueue_many`
THREADS = 8
BARRIER_TIMEOUT_S = 60  # how long callers wait for one another
T = TypeVar("T")


def _count(folder: RoundPaths) -> int:
    """Events of each of the two loops of a round."""
    return 20_000 if folder.quick else 300_000


@contextlib.contextmanager
def _open_file(folder: RoundPaths) -> Iterator[int]:
    fd = os.open(folder.own / "floor.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield fd
    finally:
        os.close(fd)


def baseline(folder: RoundPaths) -> Figures:
    """Only msgspec and `os.write`, without a function around them."""
    event, encode, write, count = sample.event(), msgspec.json.Encoder().encode, os.write, _count(folder)
    call_times = [0] * count
    with _open_file(folder) as fd:
        for _ in repeat(None, WARMUP_CALLS):
            write(fd, encode(event))
        loop = Stopwatch()
        for _ in repeat(None, count):
            write(fd, encode(event))
        mean = loop.mean(count)
        for index in range(count):
            began = now()
            write(fd, encode(event))
            call_times[index] = now() - began
    return figures(mean, call_times)


def only_write(folder: RoundPaths) -> Figures:
    """Only `os.write`, of the line as it is on disk."""
    line, calls = record.line(msgspec.json.encode(sample.event())), _count(folder)
    with _open_file(folder) as fd:
        write = partial(os.write, fd)
        untimed(write, line, WARMUP_CALLS)
        mean = untimed(write, line, calls)
        return figures(mean, timed(write, line, calls))


@contextlib.contextmanager
def _outbox(folder: RoundPaths, events: int) -> Iterator[Outbox]:
    """An outbox with default settings, warmed up. The round fails unless every event is on disk at the end."""
    outbox = Outbox(str(folder.own / "outbox"))
    untimed(outbox.enqueue, sample.event(), WARMUP_CALLS)
    yield outbox
    outbox.close(60)
    _check_all_on_disk(folder, events + WARMUP_CALLS)


def _check_all_on_disk(folder: RoundPaths, events: int) -> None:
    stored = sum(file.read_bytes().count(b"\n") for file in (folder.own / "outbox").glob("sealed-*"))
    if stored != events:
        raise RuntimeError(f"{stored} of {events} events are on disk")


def enqueue(folder: RoundPaths) -> Figures:
    """One thread; also the time from the last event until everything is sealed."""
    event, count = sample.event(), _count(folder)
    with _outbox(folder, 2 * count) as outbox:
        mean = untimed(outbox.enqueue, event, count)
        call_times = timed(outbox.enqueue, event, count)
        began = now()
        outbox.close(60)
        return {**figures(mean, call_times), "sealed_ms": (now() - began) / 1e6}


def enqueue_new_events(folder: RoundPaths) -> Figures:
    """One thread that creates each event: ten fields, among them a new id and the time."""
    count = _count(folder)
    with _outbox(folder, 2 * count) as outbox:
        put = outbox.enqueue

        def create_and_enqueue(path: str) -> None:
            put(
                TrackingEvent(
                    event_key="page_view", scope_kind="Site", scope_id="site-1", user_id="user-12345", metadata_json=path
                )
            )

        mean = untimed(create_and_enqueue, sample.event().metadata_json, count)
        return figures(mean, timed(create_and_enqueue, sample.event().metadata_json, count))


def enqueue_many(folder: RoundPaths) -> Figures:
    """A hundred events per call; the mean is per event, the median and tails are per call."""
    events, count = [sample.event()] * EVENTS_PER_CALL, _count(folder)
    with _outbox(folder, 2 * count) as outbox:
        loop = Stopwatch()
        for _ in repeat(None, count // EVENTS_PER_CALL):
            outbox.enqueue_many(events)
        mean = loop.mean(count)
        return figures(mean, timed(outbox.enqueue_many, events, count // EVENTS_PER_CALL))


def threads(folder: RoundPaths) -> Figures:
    """Eight threads that share an outbox."""
    event, per_thread = sample.event(), _count(folder) // THREADS
    with _outbox(folder, 2 * per_thread * THREADS) as outbox:
        mean, _ = _run_in_threads(lambda: untimed(outbox.enqueue, event, per_thread), per_thread * THREADS)
        _, call_times = _run_in_threads(lambda: timed(outbox.enqueue, event, per_thread), per_thread * THREADS)
        return figures(mean, [ns for times in call_times for ns in times])


def _run_in_threads(call: Callable[[], T], count: int) -> tuple[Mean, list[T]]:
    """Run `call` in all threads at once; returns the mean over `count` events, and the result of each thread."""
    call_results: list[T] = []
    ready = threading.Barrier(THREADS + 1, timeout=BARRIER_TIMEOUT_S)

    def caller() -> None:
        ready.wait()
        call_results.append(call())

    callers = [threading.Thread(target=caller) for _ in range(THREADS)]
    for thread in callers:
        thread.start()
    ready.wait()
    loop = Stopwatch()
    for thread in callers:
        thread.join()
    mean = loop.mean(count)
    assert len(call_results) == THREADS
    return mean, call_results


def processes(number: int, folder: RoundPaths) -> Figures:
    """Processes with one outbox each, on the same directory."""
    per_process = _count(folder) // number
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(number)
    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    callers = [context.Process(target=_run_process, args=(folder, per_process, ready, sender)) for _, sender in pipes]
    for caller in callers:
        caller.start()
    intervals, cpu, call_times = [], [], []
    for receiver, _ in pipes:
        if not receiver.poll(BARRIER_TIMEOUT_S):
            raise RuntimeError(f"a process did not finish within {BARRIER_TIMEOUT_S} s")
        interval, cpu_us, calls = receiver.recv()
        intervals.append(interval)
        cpu.append(cpu_us)
        call_times += calls
    for caller in callers:
        caller.join()
    _check_all_on_disk(folder, number * (2 * per_process + WARMUP_CALLS))
    wall = max(ended for _, ended in intervals) - min(began for began, _ in intervals)
    return figures(Mean(wall / per_process / number / 1e3, statistics.mean(cpu)), call_times)


def _run_process(folder: RoundPaths, count: int, ready: Barrier, sender: Connection) -> None:
    """The work of one process. The monotonic clock is the same in all of them."""
    event = sample.event()
    outbox = Outbox(str(folder.own / "outbox"))
    untimed(outbox.enqueue, event, WARMUP_CALLS)
    ready.wait(BARRIER_TIMEOUT_S)
    began = now()
    mean = untimed(outbox.enqueue, event, count)
    ended = now()
    ready.wait(BARRIER_TIMEOUT_S)
    call_times = timed(outbox.enqueue, event, count)
    outbox.close(60)
    sender.send(((began, ended), mean.cpu, call_times))


def enqueue_from_a_coroutine(folder: RoundPaths) -> Figures:
    """One coroutine that awaits each event."""
    event, count = sample.event(), _count(folder)

    async def run(outbox: Outbox) -> Figures:
        put = outbox.enqueue_async
        loop = Stopwatch()
        for _ in repeat(None, count):
            await put(event)
        mean = loop.mean(count)
        call_times = [0] * count
        for index in range(count):
            began = now()
            await put(event)
            call_times[index] = now() - began
        return figures(mean, call_times)

    with _outbox(folder, 2 * count) as outbox:
        return asyncio.run(run(outbox))


def ids_and_times(folder: RoundPaths) -> Figures:
    """The defaults of an event: a new id, and the time."""
    new_id, micros, count = new_event_id, now_micros, _count(folder)
    loop = Stopwatch()
    for _ in repeat(None, count):
        new_id()
        micros()
    mean = loop.mean(count)
    call_times = [0] * count
    for index in range(count):
        began = now()
        new_id()
        micros()
        call_times[index] = now() - began
    return figures(mean, call_times)


FLOOR, WRITE, ENQUEUE, ENQUEUE_MANY = "encode + os.write", "os.write", "enqueue", f"enqueue_many({EVENTS_PER_CALL})"
ONE_PROCESS, PROCESSES, IDS = "enqueue, 1 process", "enqueue, 4 processes", "id and timestamp"

ABOUT = """
Default settings (`durability="process"`), sealing included, nothing delivered. The event has 281 bytes as JSON; it is made
beforehand, unless the name says that the call makes it. "In Python" runs without the C extension. The baseline is a loop that
encodes the same event with msgspec and calls `os.write`: no newline, no checksum, no function around it. Each round has
300,000 events in a loop that reads no clock, which gives the mean and the events per second, and 300,000 in a loop that reads
the clock at each call, which gives the median and the tails (and costs 0.05 to 0.1 us per call, for everyone). With several
callers, the mean is the total time divided by the total number of events. For `enqueue_many`, the median and the tails are per
call of 100 events. After each round the events on disk are counted. Processor time is that of all threads, including the
sealer. "Sealed" is the time from the last event until all files are fsynced and renamed and the outbox is closed.
"""

SECTION = Section(
    key="accept",
    title="Accepting events",
    about=ABOUT,
    rounds=7,
    contestants=(
        Contestant(WRITE, only_write),
        Contestant(FLOOR, baseline),
        Contestant(ENQUEUE, enqueue, ours=True),
        Contestant("enqueue, in Python", enqueue, ours=True, environment=(("PILLARBOX_PURE_PYTHON", "1"),)),
        Contestant("make an event and enqueue", enqueue_new_events, ours=True),
        Contestant(ENQUEUE_MANY, enqueue_many, ours=True),
        Contestant(f"enqueue, {THREADS} threads", threads, ours=True),
        Contestant(ONE_PROCESS, partial(processes, 1), ours=True),
        Contestant(PROCESSES, partial(processes, 4), ours=True),
        Contestant("await enqueue_async", enqueue_from_a_coroutine, ours=True),
        Contestant(IDS, ids_and_times, ours=True),
    ),
    columns=(
        Column("mean_us", "mean, us per event", 2),
        Column("median_us", "median, us per call", 2),
        Column("p99_us", "p99, us", 1),
        Column("p999_us", "p99.9, us", 1),
        Column("per_s", "events/s", 0),
        Column("cpu_s", "CPU, s per million", 2),
        Column("sealed_ms", "sealed, ms", 0),
    ),
    goals=(
        Goal("mean of `enqueue` in one thread, relative to the baseline", ratio(ENQUEUE, FLOOR, "mean_us"), 1.5),
        Goal(f"mean of `{ENQUEUE_MANY}` per event, relative to `enqueue`", ratio(ENQUEUE_MANY, ENQUEUE, "mean_us"), 0.5),
        Goal(
            "events/s of 4 processes on one directory, relative to 1 process",
            ratio(PROCESSES, ONE_PROCESS, "per_s"),
            1.6,
            at_least=True,
        ),
        Goal("mean of an id and a timestamp", figure(IDS, "mean_us"), 0.5, unit="us"),
    ),
    chart="mean_us",
)
