"""What each compiled part gains: `python -m bench.native` prints the time of each in Python and in C, measured side by side.

Each is run in chunks, all of them in turn, in a random order. The tenth percentile of the chunks is printed, which other work
on the machine hardly reaches. The last lines are of a thread that enqueues while another uses the file system all the time. The
batch operations and the directory scan are compiled for that thread: they give up the interpreter lock once, and not at each
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
CALLS = 200  # of what takes less than some microseconds
LINES = 200
FUTURES = 100
FILES = 2000  # of a directory
GROUP = 8  # files of a batch operation
BESIDE_S = 0.5  # for which events are accepted beside something else, a round
ROUNDS = 7

Work = tuple[str, "Callable[[], object]", "Callable[[], object]", int]  # name, Python, C, and how many of it a call does


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """Some calls of something short."""

    def chunk() -> None:
        for _ in repeat(None, CALLS):
            call()

    return chunk


def of_lines() -> Iterator[Work]:
    """Records and the reading of them."""
    payload = msgspec.json.encode(sample.event())
    line, check = _native.py_encode_record(payload), msgspec.json.Decoder(msgspec.Raw).decode
    data, bare = line * LINES, line[:-1]
    n = _native
    yield ("encode a record", repeated(lambda: n.py_encode_record(payload)), repeated(lambda: n.encode_record(payload)), CALLS)
    yield ("decode a record", repeated(lambda: n.py_decode_record(bare)), repeated(lambda: n.decode_record(bare)), CALLS)
    yield (
        "read a batch file, a record",
        lambda: n.py_decode_records(data, 0, LINES, n.py_decode_record, check),
        lambda: n.decode_records(data, 0, LINES, n.decode_record, check),
        LINES,
    )
    events, encode = [sample.event()] * LINES, msgspec.json.Encoder().encode
    arguments: Any = (events, encode, type(events[0]), 2**20, encode)
    yield (
        "encode many events, an event",
        lambda: n.py_encode_records(*arguments),
        lambda: n.encode_records(*arguments),
        LINES,
    )


def of_events() -> Iterator[Work]:
    """What each `TrackingEvent` has made and checked for it."""
    make, reseed = event._uuid7_generator()
    reseed(*event._random_seed())
    one, check = sample.event(), event._post_init
    yield "an id", repeated(make), repeated(event.new_event_id), CALLS
    yield "a time", repeated(event._now_micros), repeated(event.now_micros), CALLS
    yield "check an event", repeated(lambda: event._check_event(one)), repeated(lambda: check(one)), CALLS


def of_futures() -> Iterator[Work]:
    """Coroutines that wait for a commit, from the making of the future to its outcome."""
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

    n = _native
    in_python = work(n.PyCommitFuture, n.py_gather_group, n.py_resolve_futures)
    yield "wait for a commit, an event", in_python, work(n.CommitFuture, n.gather_group, n.resolve_futures), FUTURES


def of_files(workdir: str) -> Iterator[Work]:
    """The batch operations and the directory scan, by themselves."""
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

    plain, compiled = OsFilesystem(), CompiledOsFilesystem()
    yield "create, rename and close files, a file", write_group(plain), write_group(compiled), GROUP
    yield (
        "add up a directory, a file",
        lambda: plain.file_totals(folder, ALL_NAMES),
        lambda: compiled.file_totals(folder, ALL_NAMES),
        FILES,
    )


def of_enqueue(outbox: Outbox) -> Iterator[Work]:
    """The hot path."""
    one = sample.event()
    outbox.enqueue(one)
    compiled: Any = outbox.enqueue
    in_python = compiled.__wrapped__
    yield "enqueue", repeated(lambda: in_python(one)), repeated(lambda: compiled(one)), CALLS


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Another thread does this all the time."""
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


def accept(outbox: Outbox) -> float:
    """Microseconds an event, of a thread that enqueues for a while."""
    one, events, began = sample.event(), 0, time.perf_counter()
    while (took := time.perf_counter() - began) < BESIDE_S:
        for _ in repeat(None, 20):
            outbox.enqueue(one)
        events += 20
    return took / events * 1e6


def measure(works: list[Work]) -> None:
    """Print the tenth percentile of each, in Python and in C."""
    calls = {(name, how): call for name, *both, _ in works for how, call in zip(("Python", "C"), both, strict=True)}
    took: dict[tuple[str, str], list[int]] = {key: [] for key in calls}
    for _ in range(CHUNKS):
        for key in random.sample(list(calls), len(calls)):
            began = time.perf_counter_ns()
            calls[key]()
            took[key].append(time.perf_counter_ns() - began)
    for name, _, _, number in works:
        python, c = (sorted(took[name, how])[CHUNKS // 10] / number / 1e3 for how in ("Python", "C"))
        print(f"{name:42} {python:7.3f} us {c:7.3f} us   {python / c:4.1f} times")


def main() -> None:
    """Measure and print."""
    if not COMPILED:
        sys.exit("the C extension is not in use here")
    workdir = tempfile.mkdtemp(dir=ROOT)
    outbox = Outbox(f"{workdir}/outbox", max_bytes=2**40, batch_size=10**9, batch_bytes=2**40)
    try:
        print(f"{'':42} {'Python':>10} {'C':>10}")
        files = list(of_files(workdir))
        measure([*of_enqueue(outbox), *of_lines(), *of_events(), *of_futures(), *files])
        rounds: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for name, python, c, _ in files:
                for how, work in (("Python", python), ("C", c)):
                    with beside(work):
                        rounds.setdefault((name, how), []).append(accept(outbox))
            rounds.setdefault(("nothing", ""), []).append(accept(outbox))
        for (name, how), found in rounds.items():
            print(f"enqueue beside: {name}{' in ' * bool(how)}{how:6} {sorted(found)[ROUNDS // 2]:6.2f} us")
    finally:
        outbox.close(60)
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
