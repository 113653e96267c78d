"""Where the time of `enqueue` goes: `python -m bench.pieces` prints what each piece costs by itself, undisturbed.

Each is run in chunks of 500, all of them in turn, in a random order; what is printed is the tenth percentile of its chunks,
which other work on the machine hardly reaches. Sealing is left out, for all events go to one file.
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


def each(call: Callable[[], object]) -> Callable[[], None]:
    """A chunk of calls."""

    def chunk() -> None:
        for _ in repeat(None, CHUNK):
            call()

    return chunk


def pieces(outbox: Outbox, fd: int) -> dict[str, Callable[[], None]]:
    """What is measured: all of it with a call of a `lambda` around, but for the first."""
    one, encode, lock = sample.event(), msgspec.json.Encoder().encode, threading.RLock()
    payload = encode(one)
    record = py_encode_record(payload)
    outbox.enqueue(one)
    enqueue, hundred = outbox.enqueue, [one] * 100
    in_python = getattr(enqueue, "__wrapped__", enqueue)

    def locked() -> None:
        with lock:
            pass

    def many() -> None:
        for _ in range(CHUNK // 100):
            outbox.enqueue_many(hundred)

    return {
        "a call, to be subtracted from the others": each(lambda: None),
        "msgspec encode": each(lambda: encode(one)),
        "zlib.crc32": each(lambda: crc32(payload)),
        "the record in Python: checksum and %": each(lambda: py_encode_record(payload)),
        "the record compiled": each(lambda: encode_record(payload)),
        "an RLock, taken and released": each(locked),
        "os.write of the record": each(lambda: os.write(fd, record)),
        "the floor: encode and os.write": each(lambda: os.write(fd, encode(one))),
        "enqueue in Python": each(lambda: in_python(one)),
        "enqueue" + ", compiled" * COMPILED: each(lambda: enqueue(one)),
        "enqueue_many(100), an event": many,
        "new_event_id()": each(new_event_id),
        "now_micros()": each(now_micros),
        "TrackingEvent(...), its id and time made": each(
            lambda: type(one)(event_key="page_view", scope_kind="Site", scope_id="site-1", user_id="user-12345")
        ),
    }


def main() -> None:
    """Measure and print."""
    folder = tempfile.mkdtemp(dir=ROOT)
    outbox = Outbox(f"{folder}/outbox", max_bytes=2**40, batch_size=10**9, batch_bytes=2**40)
    fd = os.open(f"{folder}/floor", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        works = pieces(outbox, fd)
        took: dict[str, list[int]] = {name: [] for name in works}
        for _ in range(CHUNKS):
            for name in random.sample(list(works), len(works)):
                began = time.perf_counter_ns()
                works[name]()
                took[name].append(time.perf_counter_ns() - began)
        for name, found in took.items():
            print(f"{name:44} {sorted(found)[CHUNKS // 10] / CHUNK / 1e3:5.2f} us")
    finally:
        outbox.close(60)
        os.close(fd)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
