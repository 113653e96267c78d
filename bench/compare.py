"""Measures this checkout beside another revision, in turn, in one run: `python -m bench.compare REVISION`.

Figures of two runs cannot be compared, for the machine is not the same from one minute to the next. So each round measures
both, in random order, each turn in a process of its own: `enqueue`, 64 threads and 1,000 coroutines under `power`, and a drain
into SQLite. The other revision is unpacked into a temporary folder, and its extension is compiled there. The measurements use
the public interface only, and so run on both.

A turn is this file, run as a script with the path of a source tree.
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
EVENTS: Final = 200_000  # of `enqueue`, and of the drain
POWER_EVENTS: Final = 16_000
THREADS: Final = 64
COROUTINES: Final = 1_000
WARM: Final = 2_000
TURN_S: Final = 300.0


def _event(pillarbox: Any) -> Any:
    return pillarbox.TrackingEvent(event_key="puzzle_solved", scope_kind="Module", scope_id="m-1", metadata_json='{"ms":1234}')


def enqueue(pillarbox: Any, folder: str) -> dict[str, float]:
    """Microseconds for each call: the mean of a loop, and the median and p99.9 of single calls."""
    with pillarbox.Outbox(f"{folder}/enqueue", max_bytes=2**33) as outbox:
        put, event = outbox.enqueue, _event(pillarbox)
        for _ in range(WARM):
            put(event)
        began = time.perf_counter_ns()
        for _ in range(EVENTS):
            put(event)
        mean = (time.perf_counter_ns() - began) / EVENTS / 1e3
        took = []
        for _ in range(EVENTS):
            before = time.perf_counter_ns()
            put(event)
            took.append(time.perf_counter_ns() - before)
    took.sort()
    return {
        "enqueue mean us": mean,
        "enqueue median us": took[EVENTS // 2] / 1e3,
        "enqueue p99.9 us": took[EVENTS * 999 // 1000] / 1e3,
    }


def power(pillarbox: Any, folder: str) -> dict[str, float]:
    """Events a second that are synced, by threads and by coroutines."""
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
    """Events a second from sealed files into SQLite."""
    directory = f"{folder}/drain"
    with pillarbox.Outbox(directory, max_bytes=2**33) as outbox:
        outbox.enqueue_many([_event(pillarbox) for _ in range(500)])
        for _ in range(EVENTS // 500 - 1):
            outbox.enqueue_many([_event(pillarbox) for _ in range(500)])
    outbox = pillarbox.Outbox(directory, sink=f"sqlite:///{folder}/events.db", max_bytes=2**33)
    began = time.perf_counter()
    done = outbox.flush(TURN_S)
    took = time.perf_counter() - began
    outbox.close()
    if not done:
        message = "the drain did not end in time"
        raise RuntimeError(message)
    return {"drain into SQLite, events/s": EVENTS / took}


SECTIONS: Final[dict[str, Callable[[Any, str], dict[str, float]]]] = {"enqueue": enqueue, "power": power, "drain": drain}


def turn(source: str, section: str) -> None:
    """Measure one section of one tree, and print the figures as JSON."""
    sys.path.insert(0, source)
    import pillarbox  # noqa: PLC0415 - of the tree that was named

    if not (pillarbox.__file__ or "").startswith(source):
        message = f"pillarbox was imported from {pillarbox.__file__}, not from {source}"
        raise RuntimeError(message)
    with tempfile.TemporaryDirectory(prefix="pillarbox-compare-", dir=ROOT / "var") as folder:
        print(json.dumps(SECTIONS[section](pillarbox, folder)))


def unpacked(revision: str, folder: Path) -> str:
    """The source folder of another revision, with its extension compiled in place."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=archive, check=True)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True, capture_output=True
    )
    return str(folder / "src")


def measured(source: str, section: str) -> dict[str, float]:
    """The figures of one turn, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--turn", source, section]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=TURN_S)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print a table: the medians of both, and their ratio in the median round."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("revision", help="a git revision, for example HEAD~1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    typed = parser.parse_args()
    (ROOT / "var").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pillarbox-compare-") as folder:
        trees = {typed.revision: unpacked(typed.revision, Path(folder)), "this checkout": str(ROOT / "src")}
        found: dict[str, dict[str, list[float]]] = {tree: {} for tree in trees}
        for number in range(typed.rounds):
            for section in typed.sections:
                for tree in random.sample(list(trees), len(trees)):
                    for name, value in measured(trees[tree], section).items():
                        found[tree].setdefault(name, []).append(value)
            print(f"round {number + 1} of {typed.rounds}", file=sys.stderr, flush=True)
    before, after = found.values()
    print(f"| median of {typed.rounds} rounds | {' | '.join(trees)} | ratio |\n| --- | --- | --- | --- |")
    for name in before:
        ratio = statistics.median(new / old for old, new in zip(before[name], after[name], strict=True))
        print(f"| {name} | {statistics.median(before[name]):,.2f} | {statistics.median(after[name]):,.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turn"]:
        turn(*sys.argv[2:4])
    else:
        main()
