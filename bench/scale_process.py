"""Measures an outbox with a large backlog, in a process that has done nothing else: `python -m bench.scale_process`.

Prints its figures as JSON and exits without closing the outbox, so that nothing more is delivered.
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


def measure_enqueue(directory: str, files: int, events: int) -> dict[str, float]:
    """Open the outbox without a sink and, once all files are counted, enqueue events: microseconds per call."""
    began = now()
    outbox = Outbox(directory, max_bytes=_UNBOUNDED, max_files=_UNBOUNDED)
    event = sample.event()
    assert outbox.enqueue(event)
    opened = now() - began
    while outbox.stats().pending_files < files:
        time.sleep(0.01)
    mean_us = untimed(outbox.enqueue, event, events // 2)
    took = timed(outbox.enqueue, event, events // 2)
    assert outbox.stats().accepted == events // 2 * 2 + 1
    return {"open_s": opened / 1e9, **figures(mean_us, took)}


def measure_delivery(directory: str, database: str, files: int) -> dict[str, float]:
    """Open the outbox with SQLite as the sink. Deliver at most so many files, for about two seconds after the first."""
    began = now()
    outbox = Outbox(directory, sink=f"sqlite:///{database}", max_bytes=_UNBOUNDED, max_files=_UNBOUNDED)
    assert outbox.enqueue(sample.event("the-first-new-one"))
    while (stats := outbox.stats()).state.name != "draining" and not stats.delivered:
        time.sleep(0.001)
    first, cpu = now(), time.process_time_ns()
    while (flushed := (stats := outbox.stats()).flushed_files) < files and not (flushed and now() - first > DELIVER_S * 1e9):
        time.sleep(0.001)
    took, used = now() - first, time.process_time_ns() - cpu
    measured = {"begin_s": (first - began) / 1e9, "rss_mib": peak_resident_bytes() / 2**20}
    if files >= FILES_TIMED:
        measured |= {"per_s": stats.delivered / took * 1e9, "cpu_s": used / stats.delivered / 1e3}
    return measured


def peak_resident_bytes() -> float:
    """The peak of the resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage below may also count the memory of the parent before exec
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    task, directory, *rest = sys.argv[1:]
    result = (
        measure_enqueue(directory, *map(int, rest)) if task == "accept" else measure_delivery(directory, rest[0], int(rest[1]))
    )
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
