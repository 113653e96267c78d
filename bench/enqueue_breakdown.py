"""How the time of `enqueue` is spent: `python -m bench.enqueue_breakdown` prints the time of each of its steps.

All steps run in chunks of 500 calls, in random order. The tenth percentile of the chunks is printed, because other work on the
machine hardly affects it. Sealing is left out: all events go into one segment.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from itertools import repeat
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from bench import sample
from bench.machine import ROOT
from pillarbox import Outbox
from pillarbox._native import COMPILED, encode_record, py_encode_record
from pillarbox.event import new_event_id, now_micros

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 500
CHUNKS = 200


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """A chunk of calls."""

    def chunk() -> None:
        for _ in repeat(None, CHUNK):
            call()

    return chunk


def steps(outbox: Outbox, fd: int) -> dict[str, Callable[[], None]]:
    """The functions to measure. All except `enqueue_many` are called through a `lambda`."""
    event, encode, lock = sample.event(), msgspec.json.Encoder().encode, threading.RLock()
    payload = encode(event)
    record = py_encode_record(payload)
    outbox.enqueue(event)
    enqueue, hundred = outbox.enqueue, [event] * 100
    in_python = getattr(enqueue, "__wrapped__", enqueue)

    def lock_and_unlock() -> None:
        with lock:
            pass

    def enqueue_hundred() -> None:
        for _ in range(CHUNK // 100):
            outbox.enqueue_many(hundred)

    return {
        "a call, to be subtracted from the others": repeated(lambda: None),
        "msgspec encode": repeated(lambda: encode(event)),
        "zlib.crc32": repeated(lambda: crc32(payload)),
        "the record in Python: checksum and %": repeated(lambda: py_encode_record(payload)),
        "the record compiled": repeated(lambda: encode_record(payload)),
        "an RLock, acquired and released": repeated(lock_and_unlock),
        "os.write of the record": repeated(lambda: os.write(fd, record)),
        "the baseline: encode and os.write": repeated(lambda: os.write(fd, encode(event))),
        "enqueue in Python": repeated(lambda: in_python(event)),
        "enqueue" + ", compiled" * COMPILED: repeated(lambda: enqueue(event)),
        "enqueue_many(100), an event": enqueue_hundred,
        "new_event_id()": repeated(new_event_id),
        "now_micros()": repeated(now_micros),
        "TrackingEvent(...), with a new id and time": repeated(
            lambda: type(event)(event_key="page_view", scope_kind="Site", scope_id="site-1", user_id="user-12345")
        ),
    }


def main() -> None:
    """Measure, and print the figures."""
    folder = tempfile.mkdtemp(dir=ROOT)
    outbox = Outbox(f"{folder}/outbox", max_bytes=2**40, batch_size=10**9, batch_bytes=2**40)
    fd = os.open(f"{folder}/floor", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        chunks = steps(outbox, fd)
        chunk_times: dict[str, list[int]] = {name: [] for name in chunks}
        for _ in range(CHUNKS):
            for name in random.sample(list(chunks), len(chunks)):
                began = time.perf_counter_ns()
                chunks[name]()
                chunk_times[name].append(time.perf_counter_ns() - began)
        for name, times in chunk_times.items():
            print(f"{name:44} {sorted(times)[CHUNKS // 10] / CHUNK / 1e3:5.2f} us")
    finally:
        outbox.close(60)
        os.close(fd)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
