"""How long `enqueue` takes: one thread, default settings, sealing included, beside a loop that encodes and writes."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bench import sample
from pillarbox import Outbox

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 7
now = time.perf_counter_ns


class Timing(NamedTuple):
    """Microseconds for one event."""

    mean: float
    median: float
    p99: float
    p999: float


def _timing(nanoseconds: list[int]) -> Timing:
    ordered = sorted(nanoseconds)
    count = len(ordered)
    at = (ordered[count // 2], ordered[int(count * 0.99)], ordered[int(count * 0.999)])
    return Timing(sum(ordered) / count / 1e3, *(value / 1e3 for value in at))


def floor(place: Path, count: int) -> Timing:
    """Only msgspec and `os.write`."""
    one, encode, write = sample.event(), msgspec.json.Encoder().encode, os.write
    fd = os.open(place / "floor.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    took = [0] * count
    for index in range(count):
        began = now()
        write(fd, encode(one))
        took[index] = now() - began
    os.close(fd)
    os.unlink(place / "floor.ndjson")
    return _timing(took)


def enqueue(place: Path, count: int) -> tuple[Timing, float]:
    """An outbox with default settings; also the seconds from the last `enqueue` until its file is sealed."""
    one = sample.event()
    outbox = Outbox(str(place / "outbox"), max_bytes=2**40)
    outbox.enqueue(one)
    put = outbox.enqueue
    took = [0] * count
    for index in range(count):
        began = now()
        put(one)
        took[index] = now() - began
    began = now()
    outbox.close(60)
    sealed = (now() - began) / 1e9
    for name in os.listdir(place / "outbox"):
        os.unlink(place / "outbox" / name)
    return _timing(took), sealed


def measure(place: Path, quick: bool) -> None:
    """Print both, and the ratio of each round's mean and median."""
    count = 50_000 if quick else 300_000
    print(f"\naccept: {ROUNDS} rounds of {count:,} events, in turn; microseconds an event")
    floors: list[Timing] = []
    ours: list[Timing] = []
    sealing: list[float] = []
    for number in range(2 * ROUNDS):
        if number % 4 in (0, 3):
            floors.append(floor(place, count))
        else:
            timing, seconds = enqueue(place, count)
            ours.append(timing)
            sealing.append(seconds)
    for name, timings in (("encode + os.write", floors), ("enqueue", ours)):
        middle = Timing(*map(statistics.median, zip(*timings, strict=True)))
        print(
            f"  {name:18} mean {middle.mean:5.2f}  median {middle.median:5.2f}  p99 {middle.p99:6.1f}  p99.9 {middle.p999:6.1f}"
        )
    for field in ("mean", "median"):
        ratios = sorted(getattr(b, field) / getattr(a, field) for a, b in zip(floors, ours, strict=True))
        print(f"  ratio of {field}s: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); goal: at most 2")
    print(f"  from the last event until everything is sealed: {statistics.median(sealing) * 1e3:.0f} ms")
