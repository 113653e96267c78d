"""What each function in C gains: `python -m bench.native` measures it in Python and in C, side by side.

All functions run in chunks, in random order. The tenth percentile of the chunks is printed, because other work on the machine
hardly affects it. The last lines are for a thread that enqueues while another thread uses the file system all the time. The
batch operations and the directory scan are in C for that thread: they release the interpreter lock once, and not for each
system call. docs/dev/performance-native.md has the figures.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import count, repeat
from typing import TYPE_CHECKING, Any

import msgspec

from bench import sample
from bench.machine import ROOT
from pillarbox import Outbox, _native, event
from pillarbox._native import COMPILED
from pillarbox.outcome import ENQUEUED_POWER
from pillarbox.store.dirscan import ALL_NAMES
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNKS = 200
CALLS = 200  # per chunk, of functions that take a few microseconds
LINES = 200
FUTURES = 100
FILES = 2000  # in a directory
GROUP = 8  # files in a batch operation
BESIDE_S = 0.5  # duration of the enqueue loop in each round, while other work runs
ROUNDS = 7

Work = tuple[str, "Callable[[], object]", "Callable[[], object]", int]  # name, in Python, in C, items per call


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """A chunk of calls of a short function."""

    def chunk() -> None:
        for _ in repeat(None, CALLS):
            call()

    return chunk


def record_functions() -> Iterator[Work]:
    """Encoding and decoding of records."""
    payload = msgspec.json.encode(sample.event())
    line, check = _native.py_encode_record(payload), msgspec.json.Decoder(msgspec.Raw).decode
    data, without_line_feed = line * LINES, line[:-1]
    yield (
        "encode a record",
        repeated(lambda: _native.py_encode_record(payload)),
        repeated(lambda: _native.encode_record(payload)),
        CALLS,
    )
    yield (
        "decode a record",
        repeated(lambda: _native.py_decode_record(without_line_feed)),
        repeated(lambda: _native.decode_record(without_line_feed)),
        CALLS,
    )
    yield (
        "read a batch file, a record",
        lambda: _native.py_decode_records(data, 0, LINES, _native.py_decode_record, check),
        lambda: _native.decode_records(data, 0, LINES, _native.decode_record, check),
        LINES,
    )
    events, encode = [sample.event()] * LINES, msgspec.json.Encoder().encode
    arguments: Any = (events, encode, type(events[0]), 2**20, encode)
    yield (
        "encode many events, an event",
        lambda: _native.py_encode_records(*arguments),
        lambda: _native.encode_records(*arguments),
        LINES,
    )


def event_functions() -> Iterator[Work]:
    """The id, the time and the check of a `TrackingEvent`."""
    make_id, reseed = event._uuid7_generator()
    reseed(*event._random_seed())
    tracking_event, check = sample.event(), event._post_init
    yield "an id", repeated(make_id), repeated(event.new_event_id), CALLS
    yield "a time", repeated(event._now_micros), repeated(event.now_micros), CALLS
    yield "check an event", repeated(lambda: event._check_event(tracking_event)), repeated(lambda: check(tracking_event)), CALLS


def future_functions() -> Iterator[Work]:
    """Coroutines that wait for a group commit, from the creation of the future to its outcome."""
    loop = asyncio.new_event_loop()

    def work(make: Any, gather: Any, resolve: Any) -> Callable[[], object]:
        async def wait(future: Any) -> None:
            await future

        async def main() -> None:
            futures = [make(b"line\n", 1, loop) for _ in range(FUTURES)]
            tasks = [loop.create_task(wait(future)) for future in futures]
            await asyncio.sleep(0)
            gather(futures, FUTURES, 10**6, 10**9)
            loop.call_soon(resolve, futures, ENQUEUED_POWER)
            for task in tasks:
                await task

        return lambda: loop.run_until_complete(main())

    in_python = work(_native.PyCommitFuture, _native.py_gather_group, _native.py_resolve_futures)
    yield (
        "wait for a commit, an event",
        in_python,
        work(_native.CommitFuture, _native.gather_group, _native.resolve_futures),
        FUTURES,
    )


def file_functions(workdir: str) -> Iterator[Work]:
    """The batch operations and the directory scan."""
    number = count()
    folder = f"{workdir}/many"
    os.mkdir(folder)
    for index in range(FILES):
        with open(f"{folder}/sealed-{index:016d}-x.ndjson", "wb") as file:
            file.write(b"x")

    def write_group(files: OsFilesystem) -> Callable[[], object]:
        def group() -> None:
            paths = [f"{workdir}/{next(number)}" for _ in range(GROUP)]
            fds, _ = files.create_each(paths)
            files.rename_each(paths, [f"{path}x" for path in paths])
            files.close_each(fds)
            for path in paths:
                os.unlink(f"{path}x")

        return group

    in_python, compiled = OsFilesystem(), CompiledOsFilesystem()
    yield "create, rename and close files, a file", write_group(in_python), write_group(compiled), GROUP
    yield (
        "add up a directory, a file",
        lambda: in_python.file_totals(folder, ALL_NAMES),
        lambda: compiled.file_totals(folder, ALL_NAMES),
        FILES,
    )


def enqueue_function(outbox: Outbox) -> Iterator[Work]:
    """The hot path."""
    tracking_event = sample.event()
    outbox.enqueue(tracking_event)
    compiled: Any = outbox.enqueue
    in_python = compiled.__wrapped__
    yield "enqueue", repeated(lambda: in_python(tracking_event)), repeated(lambda: compiled(tracking_event)), CALLS


@contextmanager
def running_in_background(work: Callable[[], object]) -> Iterator[None]:
    """Repeat a function in another thread."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def time_enqueue(outbox: Outbox) -> float:
    """Microseconds per event, for a thread that enqueues for a while."""
    tracking_event, events, began = sample.event(), 0, time.perf_counter()
    while (took := time.perf_counter() - began) < BESIDE_S:
        for _ in repeat(None, 20):
            outbox.enqueue(tracking_event)
        events += 20
    return took / events * 1e6


def measure(works: list[Work]) -> None:
    """Measure all functions, and print the tenth percentile of each in Python and in C."""
    calls = {(name, how): call for name, *both, _ in works for how, call in zip(("Python", "C"), both, strict=True)}
    chunk_times: dict[tuple[str, str], list[int]] = {key: [] for key in calls}
    for _ in range(CHUNKS):
        for key in random.sample(list(calls), len(calls)):
            began = time.perf_counter_ns()
            calls[key]()
            chunk_times[key].append(time.perf_counter_ns() - began)
    for name, _, _, number in works:
        python, c = (sorted(chunk_times[name, how])[CHUNKS // 10] / number / 1e3 for how in ("Python", "C"))
        print(f"{name:42} {python:7.3f} us {c:7.3f} us   {python / c:4.1f} times")


def main() -> None:
    """Measure, and print the figures."""
    if not COMPILED:
        sys.exit("the C extension is not in use")
    workdir = tempfile.mkdtemp(dir=ROOT)
    outbox = Outbox(f"{workdir}/outbox", max_bytes=2**40, batch_size=10**9, batch_bytes=2**40)
    try:
        print(f"{'':42} {'Python':>10} {'C':>10}")
        files = list(file_functions(workdir))
        measure([*enqueue_function(outbox), *record_functions(), *event_functions(), *future_functions(), *files])
        rounds: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for name, python, c, _ in files:
                for how, work in (("Python", python), ("C", c)):
                    with running_in_background(work):
                        rounds.setdefault((name, how), []).append(time_enqueue(outbox))
            rounds.setdefault(("nothing", ""), []).append(time_enqueue(outbox))
        for (name, how), times in rounds.items():
            print(f"enqueue beside: {name}{' in ' * bool(how)}{how:6} {sorted(times)[ROUNDS // 2]:6.2f} us")
    finally:
        outbox.close(60)
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
