"""`make bench`: runs all sections, prints a table for each, and writes every figure to `var/bench/results.json`.

`python -m bench accept power` runs some sections. Exit code 1: something could not be measured. A missed goal is no error.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from typing import TYPE_CHECKING

from bench import formatting, page, results, sections
from bench.machine import ROOT
from bench.run import Options, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDER = ROOT / "var" / "bench"


def main(arguments: Sequence[str], modules: Sequence[str] = sections.MODULES, folder: Path = FOLDER) -> int:
    """Run the given sections, or all of them; returns the exit code."""
    known_sections = sections.sections_by_key(modules)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run the benchmark.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(known_sections)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="run less of everything, to see that it works")
    parser.add_argument("--seed", type=int, help="seed of the random orders")
    parser.add_argument("--page", action="store_true", help="also write docs/dev/benchmarks.md, its charts and its JSON")
    parsed = parser.parse_args(arguments)
    for key in parsed.sections:
        if key not in known_sections:
            parser.error(f"unknown section {key!r}; use one of {', '.join(known_sections)}")
    seed = random.SystemRandom().randrange(2**32) if parsed.seed is None else parsed.seed
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    options = Options(
        folder,
        seed,
        parsed.quick,
        lambda text: print(text, flush=True),
        lambda partial_results: file.write_bytes(results.encode(partial_results)),
    )
    measured = run([known_sections[key] for key in parsed.sections or known_sections], options)
    print_results(measured)
    print(f"\nEvery figure: {file}")
    if parsed.page:
        page.write(measured, ROOT / "docs" / "dev")
    return 1 if any(section.failed for section in measured.sections) else 0


def print_results(run_results: results.Results) -> None:
    """Print a table for each section, and its goals."""
    print(f"\n{run_results.began}, seed {run_results.seed}, {formatting.minutes(run_results.seconds)}")
    for warning in formatting.warnings(run_results):
        print(f"  {warning}")
    for name, value in formatting.machine(run_results):
        print(f"  {name}: {value}")
    for section in run_results.sections:
        rounds = f"{formatting.rounds(section)}, {formatting.minutes(section.seconds)}"
        print(f"\n{section.title}: {rounds}; median (minimum to maximum)")
        rows = [["", *(column.heading for column in section.columns)]]
        for name in section.contestants:
            cells = [(column, section.spread(name, column.metric)) for column in section.columns]
            rows.append(
                [name, *("" if spread is None else formatting.spread(spread, column.digits) for column, spread in cells)]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print(
                f"  {row[0]:{widths[0]}}  "
                + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            )
        for name, reason in section.failed.items():
            print(f"  {name}: NOT MEASURED: {reason}")
        for goal in section.goals:
            print(f"  {formatting.verdict(goal):12} {goal.text}: {formatting.measured(goal)}; goal: {formatting.bound(goal)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the child processes too
    sys.exit(main(sys.argv[1:]))
