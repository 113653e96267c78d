"""How long `enqueue` takes while a backlog is delivered: by the same process, its child process, or a separate service."""

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
from bench.definitions import Column, Contestant, Goal, Section, ratio
from bench.timing import now, tails
from pillarbox import Outbox, TrackingEvent
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.definitions import Figures, RoundPaths

FILES = 900
SLICE_NS = 50_000_000
SLICES = 30  # at most; fewer if the backlog is drained earlier
SLICES_MIN = 4
LINES_PER_YIELD = 50
START_S = 30  # limit for the first delivered batch


class _Line(msgspec.Struct):
    event: TrackingEvent


def prepare(shared: Path, quick: bool) -> None:
    """Write the backlog."""
    sample.sealed_files(shared / "backlog", 300 if quick else FILES)


def _time_calls(put: Callable[[], object], folder: RoundPaths, is_draining: Callable[[], bool] = lambda: True) -> Figures:
    """Time one call after the other while the other work continues. The slice in which that work ended does not count."""
    call_times: list[int] = []
    slices_max = SLICES_MIN if folder.quick else SLICES
    total_ns = slices = 0
    while slices < slices_max:
        slice_times: list[int] = []
        began = first = now()
        end = began + SLICE_NS
        while began < end:
            put()
            after = now()
            slice_times.append(after - began)
            began = after
        if not is_draining():
            break
        call_times += slice_times
        total_ns += began - first
        slices += 1
    if slices < SLICES_MIN:
        raise RuntimeError(f"the backlog was drained after {slices} slices of {SLICE_NS / 1e9:g} s")
    return {"mean_us": total_ns / len(call_times) / 1e3, **tails(call_times)}


@contextlib.contextmanager
def _open_file(folder: RoundPaths) -> Iterator[int]:
    fd = os.open(folder.own / "lines.ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield fd
    finally:
        os.close(fd)


def only_write(folder: RoundPaths) -> Figures:
    """`os.write`, with nothing else running."""
    line = record.line(msgspec.json.encode(sample.event()))
    with _open_file(folder) as fd:
        return _time_calls(lambda: os.write(fd, line), folder)


def enqueue_idle(folder: RoundPaths) -> Figures:
    """`enqueue`, with nothing to deliver."""
    event = sample.event()
    with Outbox(str(folder.own / "outbox"), max_bytes=2**40) as outbox:
        put = outbox.enqueue
        return _time_calls(lambda: put(event), folder)


def encode_beside_decoder(folder: RoundPaths) -> Figures:
    """`msgspec` and `os.write`, beside a thread that reads and decodes the backlog again and again."""
    stop = threading.Event()
    decode = msgspec.json.Decoder(_Line).decode

    def decode_backlog() -> None:
        while True:
            for file in sorted((folder.shared / "backlog").iterdir()):
                for number, line in enumerate(file.read_bytes().splitlines()):
                    decode(line)
                    if number % LINES_PER_YIELD == 0:
                        time.sleep(0)
                if stop.is_set():
                    return

    event, encode, write = sample.event(), msgspec.json.Encoder().encode, os.write
    thread = threading.Thread(target=decode_backlog)
    with _open_file(folder) as fd:
        thread.start()
        try:
            return _time_calls(lambda: write(fd, encode(event)), folder)
        finally:
            stop.set()
            thread.join()


class _Backlog:
    """A copy of the backlog to deliver. Batches are delivered in order, so the drain lasts while the last file exists."""

    def __init__(self, folder: RoundPaths) -> None:
        self._paths = folder
        self.directory = folder.own / "outbox"
        shutil.copytree(folder.shared / "backlog", self.directory)
        os.sync()  # so that the writeback of the copy is not measured
        self._names = sorted(os.listdir(self.directory))
        self._last = self.directory / self._names[-1]

    def _is_draining(self) -> bool:
        """Whether there is something left to deliver."""
        return self._last.exists()

    def _files_left(self) -> int:
        """The number of files that are not delivered yet."""
        return len(set(self._names) & set(os.listdir(self.directory)))

    def _wait_for_first_delivery(self) -> None:
        """Wait until the first batch is delivered."""
        first, until = self.directory / self._names[0], time.monotonic() + START_S
        while first.exists():
            if time.monotonic() > until:
                raise RuntimeError(f"nothing was delivered within {START_S} s")
            time.sleep(0.001)

    def measure(self, put: Callable[[], object]) -> Figures:
        """Time the calls, and measure the rate of the delivery meanwhile: without it, the figures would mean nothing."""
        self._wait_for_first_delivery()
        files_before, began = self._files_left(), now()
        figures = _time_calls(put, self._paths, self._is_draining)
        delivered = (files_before - self._files_left()) * sample.BATCH
        return {**figures, "delivered_per_s": delivered / (now() - began) * 1e9}


def deliver_from_this_process(deliver: Literal["thread", "process"], folder: RoundPaths) -> Figures:
    """Delivered by a thread of this process, or by its child process."""
    event, backlog = sample.event(), _Backlog(folder)
    sink = f"sqlite:///{folder.own / 'events.db'}"
    outbox = Outbox(str(backlog.directory), sink=sink, deliver=deliver, max_bytes=2**40)
    put = outbox.enqueue
    assert put(event)
    figures = backlog.measure(lambda: put(event))
    outbox.close(0.1)
    return figures


def deliver_from_a_service(folder: RoundPaths) -> Figures:
    """Delivered by `pillarbox deliver`."""
    event, backlog = sample.event(), _Backlog(folder)
    command = [sys.executable, "-m", "pillarbox", "deliver", "-d", str(backlog.directory), "-q"]
    outbox = Outbox(str(backlog.directory), max_bytes=2**40)
    put = outbox.enqueue
    assert put(event)
    process = subprocess.Popen([*command, "--sink", f"sqlite:///{folder.own / 'events.db'}"], stdout=subprocess.DEVNULL)
    try:
        return backlog.measure(lambda: put(event))
    finally:
        process.kill()
        process.wait()
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
        Contestant(CONTROL, encode_beside_decoder),
        Contestant("enqueue, idle", enqueue_idle, ours=True),
        Contestant(THREAD, partial(deliver_from_this_process, "thread"), ours=True),
        Contestant(CHILD, partial(deliver_from_this_process, "process"), ours=True),
        Contestant(SERVICE, deliver_from_a_service, ours=True),
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
