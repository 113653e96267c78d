"""How long `enqueue` takes while a backlog is delivered: in the same process, in a child of it, and by another service.

The control is a loop that encodes and writes, beside a thread that decodes the same lines and gives way every 50 of them: what
sharing the interpreter with a deliverer costs anybody who writes one in Python.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Literal

import msgspec

from bench import sample
from bench.accept import Timing, timing_of
from pillarbox import Outbox, TrackingEvent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROUNDS = 5
SECONDS = 2.0  # of each round, at most
GIVE_WAY_EVERY = 50
GOAL = 2.0  # of the 99.9th percentile in the same process, to the control's
now = time.perf_counter_ns


class _Line(msgspec.Struct):
    event: TrackingEvent


def timed(put: Callable[[], object]) -> Timing:
    """What one call after the other takes, for a while."""
    took: list[int] = []
    end = now() + int(SECONDS * 1e9)
    began = now()
    while began < end:
        put()
        after = now()
        took.append(after - began)
        began = after
    return timing_of(took)


def control(backlog: Path, place: Path) -> Timing:
    """`msgspec` and `os.write`, beside a thread that reads and decodes the backlog over and over."""
    stop = threading.Event()
    decode = msgspec.json.Decoder(_Line).decode

    def work() -> None:
        while not stop.is_set():
            for file in sorted(backlog.iterdir()):
                for number, line in enumerate(file.read_bytes().splitlines()):
                    decode(line)
                    if number % GIVE_WAY_EVERY == 0:
                        time.sleep(0)
                if stop.is_set():
                    return

    one, encode, write = sample.event(), msgspec.json.Encoder().encode, os.write
    fd = os.open(place / "control.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        return timed(lambda: write(fd, encode(one)))
    finally:
        stop.set()
        thread.join()
        os.close(fd)
        os.unlink(place / "control.ndjson")


def here(deliver: Literal["thread", "process"], backlog: Path, place: Path) -> tuple[Timing, int]:
    """Also how many events were delivered meanwhile: otherwise the figure says nothing."""
    shutil.copytree(backlog, place / "outbox")
    one = sample.event()
    database = place / "events.db"
    outbox = Outbox(str(place / "outbox"), sink=f"sqlite:///{database}", deliver=deliver, max_bytes=2**40)
    outbox.enqueue(one)
    while not database.exists():
        time.sleep(0.001)
    put, before = outbox.enqueue, outbox.stats().delivered
    timing = timed(lambda: put(one))
    delivered = outbox.stats().delivered - before
    outbox.close(60)
    return timing, delivered


def own_process(backlog: Path, place: Path) -> tuple[Timing, int]:
    """The same, delivered by `pillarbox deliver`."""
    shutil.copytree(backlog, place / "outbox")
    command = [sys.executable, "-m", "pillarbox", "deliver", "-d", str(place / "outbox"), "-q"]
    one = sample.event()
    outbox = Outbox(str(place / "outbox"), max_bytes=2**40)
    before = outbox.stats().pending_files
    deliverer = subprocess.Popen([*command, "--sink", f"sqlite:///{place / 'events.db'}"], stdout=subprocess.DEVNULL)
    try:
        while not (place / "events.db").exists():
            time.sleep(0.01)
        outbox.enqueue(one)
        put = outbox.enqueue
        timing = timed(lambda: put(one))
        left = sum(name.name in set(os.listdir(place / "outbox")) for name in backlog.iterdir())
    finally:
        deliverer.terminate()
        deliverer.wait(30)
        outbox.close(60)
    return timing, (before - left) * sample.BATCH


def measure(place: Path, quick: bool) -> None:
    """Print all of them in turn, and the ratios of each round."""
    rounds = 2 if quick else ROUNDS
    files = 1200
    backlog = place / "backlog"
    sample.sealed_files(backlog, files)
    print(f"\nenqueue while draining into SQLite: {rounds} rounds of {SECONDS:g} s, in turn; microseconds an event")
    found: dict[str, list[Timing]] = {"control": [], "same": [], "child": [], "own": []}
    delivered: dict[str, list[int]] = {"same": [], "child": [], "own": []}
    ways: dict[str, Callable[[Path, Path], tuple[Timing, int]]] = {
        "same": partial(here, "thread"),
        "child": partial(here, "process"),
        "own": own_process,
    }
    for number in range(rounds):
        for name in found if number % 2 else reversed(found):
            at = place / "round"
            at.mkdir()
            if name == "control":
                found[name].append(control(backlog, at))
            else:
                timing, count = ways[name](backlog, at)
                found[name].append(timing)
                delivered[name].append(count)
            shutil.rmtree(at)
    labels = {"control": "beside a decoder", "same": "same process", "child": "its child", "own": "another service"}
    for name, label in labels.items():
        middle = Timing(*map(statistics.median, zip(*found[name], strict=True)))
        also = f"; {statistics.median(delivered[name]) / SECONDS:,.0f} events/s delivered" if name in delivered else ""
        print(
            f"  {label:18} mean {middle.mean:6.2f}  median {middle.median:5.2f}  p99 {middle.p99:7.1f}  "
            f"p99.9 {middle.p999:7.1f}{also}"
        )
    for name, label, goal in (
        ("same", "in the same process", f"; goal: at most {GOAL:g}"),
        ("child", 'in a child (deliver="process")', ""),
        ("own", "by another service", ""),
    ):
        ratios = sorted(b.p999 / a.p999 for a, b in zip(found["control"], found[name], strict=True))
        print(f"  ratio of p99.9 {label}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}){goal}")
