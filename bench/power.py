"""Many callers who each wait until their event survives a loss of power, beside a lone loop of write and sync.

Who shares a sync among N callers can serve N/2 of them with each: one group waits while the other's sync is under way. No more
than that is to be had, nor more than the same callers get where nobody waits for a sync.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from bench import sample
from pillarbox import Outbox
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pillarbox.outcome import Durability

ROUNDS = 9
THREADS = 64
COROUTINES = 1000
GOAL = 0.7
SYNCS = 500  # of the lone loop, a round
now = time.perf_counter


class Round(NamedTuple):
    """Events a second."""

    bare: float
    lone: float
    threads_process: float
    threads_power: float
    coroutines_process: float
    coroutines_power: float


def bare(place: Path, syncs: int) -> float:
    """`os.write` and `os.fdatasync`, one line at a time."""
    line = record.line(b'{"x":"' + b"x" * 280 + b'"}')
    fd = os.open(place / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    began = now()
    for _ in range(syncs):
        os.write(fd, line)
        os.fdatasync(fd)
    took = now() - began
    os.close(fd)
    os.unlink(place / "bare")
    return syncs / took


def _with_outbox(place: Path, durability: Durability, run: Callable[[Outbox], float]) -> float:
    outbox = Outbox(str(place / "outbox"), durability=durability, max_bytes=2**40)
    assert outbox.enqueue(sample.event())
    try:
        return run(outbox)
    finally:
        outbox.close(60)
        shutil.rmtree(place / "outbox")


def lone(outbox: Outbox, syncs: int) -> float:
    """One thread that waits for each of its events."""
    one = sample.event()
    began = now()
    for _ in range(syncs):
        assert outbox.enqueue(one)
    return syncs / (now() - began)


def threads(outbox: Outbox, seconds: float) -> float:
    """Threads that each wait for each of their events."""
    one, counts = sample.event(), [0] * THREADS
    stop = now() + seconds

    def call(index: int) -> None:
        while now() < stop:
            for _ in range(10):
                assert outbox.enqueue(one)
                counts[index] += 1

    callers = [threading.Thread(target=call, args=(index,)) for index in range(THREADS)]
    began = now()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return sum(counts) / (now() - began)


def coroutines(outbox: Outbox, each: int) -> float:
    """Coroutines of one loop that each wait for each of their events."""
    one = sample.event()

    async def call() -> None:
        for _ in range(each):
            assert await outbox.enqueue_async(one)

    async def all_calls() -> float:
        began = now()
        await asyncio.gather(*[call() for _ in range(COROUTINES)])
        return COROUTINES * each / (now() - began)

    return asyncio.run(all_calls())


def measure(place: Path, quick: bool) -> None:
    """Print the rates and what part they are of what can be had."""
    seconds, each, rounds = (0.5, 10, 3) if quick else (1.0, 30, ROUNDS)
    print(f"\npower: {rounds} rounds, in turn; events a second, medians")

    def once() -> Round:
        return Round(
            bare(place, SYNCS),
            _with_outbox(place, "power", lambda outbox: lone(outbox, SYNCS // 2)),
            _with_outbox(place, "process", lambda outbox: threads(outbox, seconds)),
            _with_outbox(place, "power", lambda outbox: threads(outbox, seconds)),
            _with_outbox(place, "process", lambda outbox: coroutines(outbox, each)),
            _with_outbox(place, "power", lambda outbox: coroutines(outbox, each)),
        )

    done = [once() for _ in range(rounds)]
    middle = Round(*map(statistics.median, zip(*done, strict=True)))
    print(f"  write + fdatasync, one loop {middle.bare:9,.0f}   one thread under power {middle.lone:9,.0f}")
    for callers, count in (("threads", THREADS), ("coroutines", COROUTINES)):
        power, process = f"{callers}_power", f"{callers}_process"
        ratios = sorted(getattr(one, power) / min(count / 2 * one.bare, getattr(one, process)) for one in done)
        print(
            f"  {count:5,} {callers:10} power {getattr(middle, power):9,.0f}   process {getattr(middle, process):9,.0f}   "
            f"{count // 2} x the loop {count / 2 * middle.bare:11,.0f}"
        )
        print(
            f"    ratio to the lesser of the two: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
            f"goal: at least {GOAL}"
        )
