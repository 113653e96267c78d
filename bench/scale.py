"""Ten million pending events: how long an outbox takes to open, and how much memory it has while it delivers them.

And 200,000 sealed files, which is as many as a directory holds by default: what listing them costs.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from bench import sample

if TYPE_CHECKING:
    from pathlib import Path

_CHILD = """
import sys, time, psutil
import pillarbox
from bench import sample
directory, database, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
process = psutil.Process()
before = process.memory_info().rss
began = time.perf_counter()
outbox = pillarbox.Outbox(directory, sink=f"sqlite:///{database}", max_bytes=2**40)
outcome = outbox.enqueue(sample.event("the-first-new-one"))
opened = time.perf_counter() - began
assert outcome, outcome
highest = 0
while time.perf_counter() - began < seconds:
    highest = max(highest, process.memory_info().rss)
    time.sleep(0.05)
stats = outbox.stats()
outbox.close()
print(opened, before, highest, stats.delivered, stats.pending_files)
"""


_LISTING_CHILD = """
import sys, time
import pillarbox
from bench import sample
def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
directory, seconds = sys.argv[1], float(sys.argv[2])
before = memory("VmRSS")
began = time.perf_counter()
outbox = pillarbox.Outbox(directory, max_bytes=2**40, max_files=2**30)
outcome = outbox.enqueue(sample.event("the-first-new-one"))
opened = time.perf_counter() - began
assert outcome, outcome
time.sleep(seconds)
pending = outbox.stats().pending_files
outbox.close()
print(opened, before, memory("VmHWM"), pending)
"""


def measure(place: Path, quick: bool) -> None:
    """Print the time to open and the highest resident memory."""
    _deliver(place, quick)
    _list(place, quick)


def _list(place: Path, quick: bool) -> None:
    files = 20_000 if quick else 200_000
    print(f"\nscale: {files:,} sealed files of one event, names and sizes in the system's cache; nothing is delivered")
    sample.sealed_files(place / "many", files, batch=1)
    command = [sys.executable, "-c", _LISTING_CHILD, str(place / "many"), "5"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    opened, before, highest, pending = map(float, done.stdout.split())
    print(f"  from opening to the first event accepted: {opened:.2f} s; goal: under 3. Files counted: {pending:,.0f}")
    print(f"  resident memory grows by {(highest - before) / 2**20:.1f} MiB at most, in five seconds; goal: under 100")


def _deliver(place: Path, quick: bool) -> None:
    files = 2_000 if quick else 20_000
    seconds = 5 if quick else 20
    print(f"\nscale: {files * sample.BATCH:,} pending events in {files:,} files; delivering into SQLite for {seconds} s")
    size = sample.sealed_files(place / "outbox", files)
    command = [sys.executable, "-c", _CHILD, str(place / "outbox"), str(place / "events.db"), str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    opened, before, highest, delivered, left = map(float, done.stdout.split())
    print(f"  on disk: {size / 1e9:.2f} GB, {size / files / sample.BATCH:.0f} bytes an event")
    print(f"  from opening to the first event accepted: {opened:.2f} s; goal: under 1")
    print(f"  resident memory while delivering: at most {highest / 2**20:.0f} MiB (an interpreter with the library in it has")
    print(f"    {before / 2**20:.0f} MiB); goal: under 80. Delivered meanwhile: {delivered:,.0f}; files left: {left:,.0f}")
