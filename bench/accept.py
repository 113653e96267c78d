"""How long `enqueue` takes: one thread, default settings, sealing included, beside loops that encode and write, or only write.

The rare slow ones are held against the loop that only writes: what the disk and the machine do to it, they do to anybody.
"""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bench import sample
from pillarbox import Outbox
from pillarbox.store import record
from pillarbox.store.filesystem import RealFilesystem

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 7
GOAL = 2.0  # of mean and median, to the loop that encodes and writes
GOAL_P999 = 3.0  # to the loop that only writes
now = time.perf_counter_ns


class Timing(NamedTuple):
    """Microseconds for one event."""

    mean: float
    median: float
    p99: float
    p999: float


def timing_of(nanoseconds: list[int]) -> Timing:
    """Mean and percentiles."""
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
    return timing_of(took)


def only_write(place: Path, count: int) -> Timing:
    """Only `os.write`, of the same line."""
    line, write = record.line(msgspec.json.encode(sample.event())), os.write
    fd = os.open(place / "write.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    took = [0] * count
    for index in range(count):
        began = now()
        write(fd, line)
        took[index] = now() - began
    os.close(fd)
    os.unlink(place / "write.ndjson")
    return timing_of(took)


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
    shutil.rmtree(place / "outbox")
    return timing_of(took), sealed


def syncs(place: Path, count: int) -> tuple[int, int]:
    """How many syncs sealing takes meanwhile, and how many of them are on the thread that calls `enqueue`."""
    seen: list[int] = []

    class Watched(RealFilesystem):
        def sync_data(self, fd: int) -> None:
            seen.append(threading.get_ident())
            super().sync_data(fd)

        def sync_directory(self, path: str) -> None:
            seen.append(threading.get_ident())
            super().sync_directory(path)

    one = sample.event()
    outbox = Outbox(str(place / "outbox"), max_bytes=2**40)
    outbox._filesystem.__class__ = Watched
    seen.clear()
    for _ in range(count):
        outbox.enqueue(one)
    outbox.close(60)
    shutil.rmtree(place / "outbox")
    return len(seen), seen.count(threading.get_ident())


def measure(place: Path, quick: bool) -> None:
    """Print all of them, and the ratios of each round."""
    count = 50_000 if quick else 300_000
    print(f"\naccept: {ROUNDS} rounds of {count:,} events, in turn; microseconds an event")
    floors: list[Timing] = []
    writes: list[Timing] = []
    ours: list[Timing] = []
    sealing: list[float] = []
    for number in range(ROUNDS):
        for step in (0, 1, 2) if number % 2 else (2, 1, 0):
            if step == 0:
                floors.append(floor(place, count))
            elif step == 1:
                timing, seconds = enqueue(place, count)
                ours.append(timing)
                sealing.append(seconds)
            else:
                writes.append(only_write(place, count))
    for name, timings in (("os.write", writes), ("encode + os.write", floors), ("enqueue", ours)):
        middle = Timing(*map(statistics.median, zip(*timings, strict=True)))
        print(
            f"  {name:18} mean {middle.mean:5.2f}  median {middle.median:5.2f}  p99 {middle.p99:6.1f}  p99.9 {middle.p999:6.1f}"
        )
    for field, base, label, goal in (
        ("mean", floors, "encode + os.write", GOAL),
        ("median", floors, "encode + os.write", GOAL),
        ("p999", writes, "os.write", GOAL_P999),
    ):
        ratios = sorted(getattr(b, field) / getattr(a, field) for a, b in zip(base, ours, strict=True))
        print(
            f"  ratio of {field} to {label}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
            f"goal: at most {goal:g}"
        )
    print(f"  from the last event until everything is sealed: {statistics.median(sealing) * 1e3:.0f} ms")
    in_all, mine = syncs(place, count // 10)
    print(
        f"  syncs while {count // 10:,} events are accepted and sealed: {in_all:,}, on the thread that calls: {mine}; goal: 0"
    )
