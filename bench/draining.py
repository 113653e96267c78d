"""How long `enqueue` takes while a backlog is delivered: in the same process, in a child of it, and by another service."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Literal

import msgspec

from bench import sample
from bench.plan import Column, Contestant, Goal, Section, ratio
from bench.timing import now, tails
from pillarbox import Outbox, TrackingEvent
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.plan import Figures, RoundPaths

FILES = 900
SLICE_NS = 50_000_000
SLICES = 30  # at most; fewer where the backlog is gone before
SLICES_MIN = 4
GIVE_WAY_EVERY = 50
START_S = 30  # for a deliverer to begin


class _Line(msgspec.Struct):
    event: TrackingEvent


def prepare(shared: Path, quick: bool) -> None:
    """The backlog."""
    sample.sealed_files(shared / "backlog", 300 if quick else FILES)


def _timed(put: Callable[[], object], folder: RoundPaths, goes_on: Callable[[], bool] = lambda: True) -> Figures:
    """What one call after the other takes, while what else is to go on does. The slice in which it ended does not count."""
    took: list[int] = []
    wanted = SLICES_MIN if folder.quick else SLICES
    spent = slices = 0
    while slices < wanted:
        piece: list[int] = []
        began = first = now()
        end = began + SLICE_NS
        while began < end:
            put()
            after = now()
            piece.append(after - began)
            began = after
        if not goes_on():
            break
        took += piece
        spent += began - first
        slices += 1
    if slices < SLICES_MIN:
        raise RuntimeError(f"the backlog was gone after {slices} slices of {SLICE_NS / 1e9:g} s")
    return {"mean_us": spent / len(took) / 1e3, **tails(took)}


@contextlib.contextmanager
def _file(folder: RoundPaths) -> Iterator[int]:
    fd = os.open(folder.own / "lines.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield fd
    finally:
        os.close(fd)


def only_write(folder: RoundPaths) -> Figures:
    """`os.write`, with nothing beside it."""
    line = record.line(msgspec.json.encode(sample.event()))
    with _file(folder) as fd:
        return _timed(lambda: os.write(fd, line), folder)


def idle(folder: RoundPaths) -> Figures:
    """`enqueue`, with nothing to deliver."""
    one = sample.event()
    with Outbox(str(folder.own / "outbox"), max_bytes=2**40) as outbox:
        put = outbox.enqueue
        return _timed(lambda: put(one), folder)


def control(folder: RoundPaths) -> Figures:
    """`msgspec` and `os.write`, beside a thread that reads and decodes the backlog over and over."""
    stop = threading.Event()
    decode = msgspec.json.Decoder(_Line).decode

    def work() -> None:
        while True:
            for file in sorted((folder.shared / "backlog").iterdir()):
                for number, line in enumerate(file.read_bytes().splitlines()):
                    decode(line)
                    if number % GIVE_WAY_EVERY == 0:
                        time.sleep(0)
                if stop.is_set():
                    return

    one, encode, write = sample.event(), msgspec.json.Encoder().encode, os.write
    thread = threading.Thread(target=work)
    with _file(folder) as fd:
        thread.start()
        try:
            return _timed(lambda: write(fd, encode(one)), folder)
        finally:
            stop.set()
            thread.join()


class _Backlog:
    """A copy to be delivered. Files go in order: while the last is there, there is more to do."""

    def __init__(self, folder: RoundPaths) -> None:
        self._place = folder
        self.directory = folder.own / "outbox"
        shutil.copytree(folder.shared / "backlog", self.directory)
        os.sync()  # writing the copy back is not to be measured
        self._names = sorted(os.listdir(self.directory))
        self._last = self.directory / self._names[-1]

    def _goes_on(self) -> bool:
        """Whether there is something left to deliver."""
        return self._last.exists()

    def _left(self) -> int:
        """How many files."""
        return len(set(self._names) & set(os.listdir(self.directory)))

    def _wait_for_the_first(self) -> None:
        """Until the deliverer is at work."""
        first, until = self.directory / self._names[0], time.monotonic() + START_S
        while first.exists():
            if time.monotonic() > until:
                raise RuntimeError("nothing is delivered")
            time.sleep(0.001)

    def measure(self, put: Callable[[], object]) -> Figures:
        """Also how fast it is delivered meanwhile: otherwise the figures say nothing."""
        self._wait_for_the_first()
        left, began = self._left(), now()
        found = _timed(put, self._place, self._goes_on)
        delivered = (left - self._left()) * sample.BATCH
        return {**found, "delivered_per_s": delivered / (now() - began) * 1e9}


def here(deliver: Literal["thread", "process"], folder: RoundPaths) -> Figures:
    """Delivered by a thread of this process, or by its child."""
    one, backlog = sample.event(), _Backlog(folder)
    sink = f"sqlite:///{folder.own / 'events.db'}"
    outbox = Outbox(str(backlog.directory), sink=sink, deliver=deliver, max_bytes=2**40)
    put = outbox.enqueue
    assert put(one)
    found = backlog.measure(lambda: put(one))
    outbox.close(0.1)
    return found


def service(folder: RoundPaths) -> Figures:
    """Delivered by `pillarbox deliver`."""
    one, backlog = sample.event(), _Backlog(folder)
    command = [sys.executable, "-m", "pillarbox", "deliver", "-d", str(backlog.directory), "-q"]
    outbox = Outbox(str(backlog.directory), max_bytes=2**40)
    put = outbox.enqueue
    assert put(one)
    deliverer = subprocess.Popen([*command, "--sink", f"sqlite:///{folder.own / 'events.db'}"], stdout=subprocess.DEVNULL)
    try:
        return backlog.measure(lambda: put(one))
    finally:
        deliverer.kill()
        deliverer.wait()
        outbox.close(1)


WRITE, CONTROL = "os.write, idle", "encode + os.write, beside a decoder"
THREAD, CHILD, SERVICE = "enqueue, same process", 'enqueue, deliver="process"', "enqueue, pillarbox deliver"

ABOUT = """
`enqueue` in a loop for 1.5 s while batches of 500 events are delivered to SQLite: by a thread of the same process, by its child
process (`deliver="process"`), and by a separate service (`pillarbox deliver`). The control is a loop of encode and `os.write`
beside a thread that decodes the same lines and yields the GIL (`sleep(0)`) every 50 lines: the cost of sharing the interpreter
with any delivery worker in Python. The switch interval of the interpreter is not changed. Every call is timed; calls after the
end of the backlog do not count.
"""

SECTION = Section(
    key="draining",
    title="Accepting events while a backlog is delivered",
    about=ABOUT,
    rounds=5,
    contestants=(
        Contestant(WRITE, only_write),
        Contestant(CONTROL, control),
        Contestant("enqueue, idle", idle, ours=True),
        Contestant(THREAD, partial(here, "thread"), ours=True),
        Contestant(CHILD, partial(here, "process"), ours=True),
        Contestant(SERVICE, service, ours=True),
    ),
    columns=(
        Column("mean_us", "mean, us per call", 2),
        Column("median_us", "median, us", 2),
        Column("p99_us", "p99, us", 1),
        Column("p999_us", "p99.9, us", 1),
        Column("delivered_per_s", "delivered, events/s", 0),
    ),
    goals=(
        Goal("p99.9 with delivery in the same process, relative to the control", ratio(THREAD, CONTROL, "p999_us"), 2.0),
        Goal('p99.9 with `deliver="process"`, relative to the idle `os.write` loop', ratio(CHILD, WRITE, "p999_us"), 3.0),
        Goal("p99.9 with `pillarbox deliver`, relative to the idle `os.write` loop", ratio(SERVICE, WRITE, "p999_us"), 3.0),
    ),
    prepare=prepare,
    chart="p999_us",
    budget_s=120,
)
