"""Compares this checkout with another revision, measured alternately in one run: `python -m bench.compare REVISION`.

Figures of two runs cannot be compared, because the speed of the machine changes from minute to minute. So each round measures
both revisions in random order, each in a process of its own: `enqueue`, 64 threads and 1,000 coroutines with durability
`power`, and a drain into SQLite. The other revision is unpacked into a temporary folder, and its C extension is compiled
there. The measurements use only the public interface, so they run on both.

A measurement is this file, run as a script with the path of a source tree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).resolve().parents[1]
EVENTS: Final = 200_000  # for `enqueue` and for the drain
POWER_EVENTS: Final = 16_000
THREADS: Final = 64
COROUTINES: Final = 1_000
WARMUP_CALLS: Final = 2_000
TIMEOUT_S: Final = 300.0


def _event(pillarbox: Any) -> Any:
    return pillarbox.TrackingEvent(event_key="puzzle_solved", scope_kind="Module", scope_id="m-1", metadata_json='{"ms":1234}')


def enqueue(pillarbox: Any, folder: str) -> dict[str, float]:
    """Microseconds per call: the mean of a loop, and the median and p99.9 of single calls."""
    with pillarbox.Outbox(f"{folder}/enqueue", max_bytes=2**33) as outbox:
        put, event = outbox.enqueue, _event(pillarbox)
        for _ in range(WARMUP_CALLS):
            put(event)
        began = time.perf_counter_ns()
        for _ in range(EVENTS):
            put(event)
        mean = (time.perf_counter_ns() - began) / EVENTS / 1e3
        call_times = []
        for _ in range(EVENTS):
            before = time.perf_counter_ns()
            put(event)
            call_times.append(time.perf_counter_ns() - before)
    call_times.sort()
    return {
        "enqueue mean us": mean,
        "enqueue median us": call_times[EVENTS // 2] / 1e3,
        "enqueue p99.9 us": call_times[EVENTS * 999 // 1000] / 1e3,
    }


def power(pillarbox: Any, folder: str) -> dict[str, float]:
    """Fsynced events per second, by threads and by coroutines."""
    figures = {}
    with pillarbox.Outbox(f"{folder}/threads", durability="power", max_bytes=2**33) as outbox:
        event = _event(pillarbox)

        def work() -> None:
            for _ in range(POWER_EVENTS // THREADS):
                outbox.enqueue(event)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures["power, 64 threads, events/s"] = POWER_EVENTS / (time.perf_counter() - began)
    with pillarbox.Outbox(f"{folder}/coroutines", durability="power", max_bytes=2**33) as outbox:

        async def caller() -> None:
            for _ in range(POWER_EVENTS // COROUTINES):
                await outbox.enqueue_async(event)

        async def all_callers() -> float:
            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(COROUTINES)))
            return time.perf_counter() - began

        figures["power, 1,000 coroutines, events/s"] = POWER_EVENTS / asyncio.run(all_callers())
    return figures


def drain(pillarbox: Any, folder: str) -> dict[str, float]:
    """Events per second from batch files into SQLite."""
    directory = f"{folder}/drain"
    with pillarbox.Outbox(directory, max_bytes=2**33) as outbox:
        outbox.enqueue_many([_event(pillarbox) for _ in range(500)])
        for _ in range(EVENTS // 500 - 1):
            outbox.enqueue_many([_event(pillarbox) for _ in range(500)])
    outbox = pillarbox.Outbox(directory, sink=f"sqlite:///{folder}/events.db", max_bytes=2**33)
    began = time.perf_counter()
    completed = outbox.flush(TIMEOUT_S)
    took = time.perf_counter() - began
    outbox.close()
    if not completed:
        message = f"the drain took more than {TIMEOUT_S:g} s"
        raise RuntimeError(message)
    return {"drain into SQLite, events/s": EVENTS / took}


SECTIONS: Final[dict[str, Callable[[Any, str], dict[str, float]]]] = {"enqueue": enqueue, "power": power, "drain": drain}


def measure_section(source: str, section: str) -> None:
    """Measure one section with one source tree, and print the figures as JSON."""
    sys.path.insert(0, source)
    import pillarbox  # noqa: PLC0415 - of the tree that was named

    if not (pillarbox.__file__ or "").startswith(source):
        message = f"pillarbox was imported from {pillarbox.__file__}, not from {source}"
        raise RuntimeError(message)
    with tempfile.TemporaryDirectory(prefix="pillarbox-compare-", dir=ROOT / "var") as folder:
        print(json.dumps(SECTIONS[section](pillarbox, folder)))


def unpack_revision(revision: str, folder: Path) -> str:
    """Unpack another revision and compile its C extension; returns its source folder."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=archive, check=True)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True, capture_output=True
    )
    return str(folder / "src")


def run_measurement(source: str, section: str) -> dict[str, float]:
    """Run one measurement in a process of its own; returns the figures."""
    command = [sys.executable, str(Path(__file__)), "--measure", source, section]
    completed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    figures: dict[str, float] = json.loads(completed.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print a table: the medians of both revisions, and the median of the ratios of the rounds."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("revision", help="a git revision, for example HEAD~1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    (ROOT / "var").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pillarbox-compare-") as folder:
        trees = {options.revision: unpack_revision(options.revision, Path(folder)), "this checkout": str(ROOT / "src")}
        figures: dict[str, dict[str, list[float]]] = {tree: {} for tree in trees}
        for number in range(options.rounds):
            for section in options.sections:
                for tree in random.sample(list(trees), len(trees)):
                    for name, value in run_measurement(trees[tree], section).items():
                        figures[tree].setdefault(name, []).append(value)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    before, after = figures.values()
    print(f"| median of {options.rounds} rounds | {' | '.join(trees)} | ratio |\n| --- | --- | --- | --- |")
    for name in before:
        ratio = statistics.median(new / old for old, new in zip(before[name], after[name], strict=True))
        print(f"| {name} | {statistics.median(before[name]):,.2f} | {statistics.median(after[name]):,.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_section(*sys.argv[2:4])
    else:
        main()
