"""`make bench`: runs all sections, prints a table for each, and writes every figure to `var/bench/results.json`.

`python -m bench accept power` runs some sections. Exit code 1: something could not be measured. A missed goal is no error.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from typing import TYPE_CHECKING

from bench import page, results, sections, words
from bench.machine import ROOT
from bench.run import Options, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDER = ROOT / "var" / "bench"


def main(arguments: Sequence[str], modules: Sequence[str] = sections.MODULES, folder: Path = FOLDER) -> int:
    """Run the sections that are named, or all of them; returns the exit code."""
    found = sections.sections_by_key(modules)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run the benchmark.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(found)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="run less of everything, to see that it works")
    parser.add_argument("--seed", type=int, help="seed of the random orders")
    parser.add_argument("--page", action="store_true", help="also write docs/dev/benchmarks.md, its charts and its JSON")
    typed = parser.parse_args(arguments)
    for key in typed.sections:
        if key not in found:
            parser.error(f"unknown section {key!r}; use one of {', '.join(found)}")
    seed = random.SystemRandom().randrange(2**32) if typed.seed is None else typed.seed
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    options = Options(
        folder, seed, typed.quick, lambda text: print(text, flush=True), lambda so_far: file.write_bytes(results.encode(so_far))
    )
    measured = run([found[key] for key in typed.sections or found], options)
    show(measured)
    print(f"\nEvery figure: {file}")
    if typed.page:
        page.write(measured, ROOT / "docs" / "dev")
    return 1 if any(section.failed for section in measured.sections) else 0


def show(found: results.Results) -> None:
    """Print a table for each section, and its goals."""
    print(f"\n{found.began}, seed {found.seed}, {words.minutes(found.seconds)}")
    for warning in words.warnings(found):
        print(f"  {warning}")
    for name, value in words.machine(found):
        print(f"  {name}: {value}")
    for section in found.sections:
        print(f"\n{section.title}: {words.rounds(section)}, {words.minutes(section.seconds)}; median (minimum to maximum)")
        rows = [["", *(column.heading for column in section.columns)]]
        for name in section.contestants:
            cells = [(column, section.spread(name, column.metric)) for column in section.columns]
            rows.append([name, *("" if one is None else words.spread(one, column.digits) for column, one in cells)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print(
                f"  {row[0]:{widths[0]}}  "
                + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            )
        for name, reason in section.failed.items():
            print(f"  {name}: NOT MEASURED: {reason}")
        for goal in section.goals:
            print(f"  {words.verdict(goal):12} {goal.text}: {words.measured(goal)}; goal: {words.bound(goal)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the child processes too
    sys.exit(main(sys.argv[1:]))
