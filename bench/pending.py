"""What an outbox does with much pending, in a process that has loaded nothing else: `python -m bench.pending`.

Prints its figures as JSON and ends without letting go of anything, so that nothing more is delivered.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from bench import sample
from bench.timing import figures, now, timed, untimed
from pillarbox import Outbox

DELIVER_S = 2.0
FILES_TIMED = 100
_UNBOUNDED = 2**40


def accept(directory: str, files: int, events: int) -> dict[str, float]:
    """Open without a sink and, once all files are counted, enqueue so many events: microseconds of a call, sealing included."""
    began = now()
    outbox = Outbox(directory, max_bytes=_UNBOUNDED, max_files=_UNBOUNDED)
    one = sample.event()
    assert outbox.enqueue(one)
    opened = now() - began
    while outbox.stats().pending_files < files:
        time.sleep(0.01)
    mean_us = untimed(outbox.enqueue, one, events // 2)
    took = timed(outbox.enqueue, one, events // 2)
    assert outbox.stats().accepted == events // 2 * 2 + 1
    return {"open_s": opened / 1e9, **figures(mean_us, took)}


def deliver(directory: str, database: str, files: int) -> dict[str, float]:
    """Open with SQLite behind it, and deliver at most so many files, for some two seconds from the first one on."""
    began = now()
    outbox = Outbox(directory, sink=f"sqlite:///{database}", max_bytes=_UNBOUNDED, max_files=_UNBOUNDED)
    assert outbox.enqueue(sample.event("the-first-new-one"))
    while (stats := outbox.stats()).state.name != "draining" and not stats.delivered:
        time.sleep(0.001)
    first, cpu = now(), time.process_time_ns()
    while (flushed := (stats := outbox.stats()).flushed_files) < files and not (flushed and now() - first > DELIVER_S * 1e9):
        time.sleep(0.001)
    took, used = now() - first, time.process_time_ns() - cpu
    found = {"begin_s": (first - began) / 1e9, "rss_mib": highest_resident() / 2**20}
    if files >= FILES_TIMED:
        found |= {"per_s": stats.delivered / took * 1e9, "cpu_s": used / stats.delivered / 1e3}
    return found


def highest_resident() -> float:
    """The most bytes of memory that this process has had so far."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone; the call below counts what ran in this process before it
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    what, directory, *rest = sys.argv[1:]
    found = accept(directory, *map(int, rest)) if what == "accept" else deliver(directory, rest[0], int(rest[1]))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
