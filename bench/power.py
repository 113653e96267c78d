"""Many callers that each wait for an fsync of their event, compared with a single loop of write and sync.

With N callers a sync can serve N/2 of them: one half waits while the other half's sync runs. The attainable rate is that, or
the rate of the same callers without syncs, whichever is less.
"""

from __future__ import annotations

import asyncio
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from bench import sample
from bench.definitions import Column, Contestant, Goal, Section
from bench.timing import now, tails
from pillarbox import Outbox
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.definitions import Figures, Round, RoundPaths
    from pillarbox.outcome import Durability

THREADS = 64
COROUTINES = 1000
CALLS_PER_CHECK = 10  # events between two checks of the time


def _seconds(folder: RoundPaths) -> float:
    """Length of each of the two loops of a round."""
    return 0.1 if folder.quick else 0.7


class _Caller:
    """Calls until the time is up. It counts the calls, and with `clocked` it times each of them."""

    def __init__(self, seconds: float, *, clocked: bool) -> None:
        self.stop = now() + int(seconds * 1e9)
        self.clocked = clocked
        self.took: list[int] = []
        self.count = 0

    def call(self, put: Callable[[], object]) -> None:
        """For threads."""
        while now() < self.stop:
            for _ in range(CALLS_PER_CHECK):
                began = now() if self.clocked else 0
                assert put()
                if self.clocked:
                    self.took.append(now() - began)
            self.count += CALLS_PER_CHECK

    async def call_async(self, outbox: Outbox) -> None:
        """For coroutines."""
        event = sample.event()
        while now() < self.stop:
            for _ in range(CALLS_PER_CHECK):
                began = now() if self.clocked else 0
                assert await outbox.enqueue_async(event)
                if self.clocked:
                    self.took.append(now() - began)
            self.count += CALLS_PER_CHECK


def _rate(callers: list[_Caller], began: int) -> float:
    return sum(caller.count for caller in callers) / (now() - began) * 1e9


def _run_threads(put: Callable[[], object], thread_count: int, folder: RoundPaths) -> Figures:
    callers: dict[bool, list[_Caller]] = {}
    rates = {}
    for clocked in (False, True):
        began = now()
        callers[clocked] = [_Caller(_seconds(folder), clocked=clocked) for _ in range(thread_count)]
        threads = [threading.Thread(target=caller.call, args=(put,)) for caller in callers[clocked]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates[clocked] = _rate(callers[clocked], began)
    return {"per_s": rates[False], **tails(ns for caller in callers[True] for ns in caller.took)}


def write_and_sync(folder: RoundPaths) -> Figures:
    """`os.write` and `os.fdatasync`, one line at a time, in one loop."""
    line = record.line(msgspec.json.encode(sample.event()))
    fd = os.open(folder.own / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def put() -> bool:
        os.write(fd, line)
        os.fdatasync(fd)
        return True

    try:
        return _run_threads(put, 1, folder)
    finally:
        os.close(fd)


def threads(number: int, durability: Durability, folder: RoundPaths) -> Figures:
    """Threads that wait for each of their events."""
    event = sample.event()
    with Outbox(str(folder.own / "outbox"), durability=durability, max_bytes=2**40) as outbox:
        assert outbox.enqueue(event)
        return _run_threads(partial(outbox.enqueue, event), number, folder)


def coroutines(durability: Durability, folder: RoundPaths) -> Figures:
    """Coroutines of one event loop that wait for each of their events."""

    async def run(outbox: Outbox, *, clocked: bool) -> tuple[float, list[_Caller]]:
        began = now()
        callers = [_Caller(_seconds(folder), clocked=clocked) for _ in range(COROUTINES)]
        await asyncio.gather(*[caller.call_async(outbox) for caller in callers])
        return _rate(callers, began), callers

    with Outbox(str(folder.own / "outbox"), durability=durability, max_bytes=2**40) as outbox:
        assert outbox.enqueue(sample.event())
        rate, _ = asyncio.run(run(outbox, clocked=False))
        _, callers = asyncio.run(run(outbox, clocked=True))
    return {"per_s": rate, **tails(ns for caller in callers for ns in caller.took)}


BASELINE = "write + fdatasync"
NAMES = {
    (number, durability): f"{number:,} {kind}, {durability}"
    for number, kind in ((THREADS, "threads"), (COROUTINES, "coroutines"))
    for durability in ("process", "power")
}


def _share_of_attainable(number: int) -> Callable[[Round], float]:
    """The rate with power, divided by the lesser of N/2 loops of write and sync and the same callers with process."""

    def share(figures: Round) -> float:
        attainable = min(number / 2 * figures[BASELINE]["per_s"], figures[NAMES[number, "process"]]["per_s"])
        return figures[NAMES[number, "power"]]["per_s"] / attainable

    return share


ABOUT = """
`durability="power"`: every caller waits until its own event is on disk (`fdatasync`), and callers share syncs. It is compared
with a single loop of `os.write` and `os.fdatasync`, and with the same callers and `durability="process"`. The attainable rate
is the lesser of N/2 events per sync (one half of the callers waits while the other half's sync runs) and the rate of the same
callers with "process". Each round calls for 0.7 s without reading a clock at each call, which gives the events per second, and
for 0.7 s with it, which gives the median and the tails. The time of a sync depends on the disk, and in a virtual machine on its
neighbours.
"""

SECTION = Section(
    key="power",
    title='Durability "power"',
    about=ABOUT,
    rounds=7,
    contestants=(
        Contestant(BASELINE, write_and_sync),
        Contestant("1 thread, power", partial(threads, 1, "power"), ours=True),
        Contestant(NAMES[THREADS, "process"], partial(threads, THREADS, "process"), ours=True),
        Contestant(NAMES[THREADS, "power"], partial(threads, THREADS, "power"), ours=True),
        Contestant(NAMES[COROUTINES, "process"], partial(coroutines, "process"), ours=True),
        Contestant(NAMES[COROUTINES, "power"], partial(coroutines, "power"), ours=True),
    ),
    columns=(
        Column("per_s", "events/s", 0),
        Column("median_us", "median, us per call", 0),
        Column("p99_us", "p99, us", 0),
        Column("p999_us", "p99.9, us", 0),
    ),
    goals=(
        Goal(
            "events/s of 1,000 coroutines with power, relative to the attainable rate",
            _share_of_attainable(COROUTINES),
            0.8,
            at_least=True,
        ),
        Goal(
            "events/s of 64 threads with power, relative to the attainable rate",
            _share_of_attainable(THREADS),
            0.7,
            at_least=True,
        ),
    ),
    chart="per_s",
    budget_s=120,
)
