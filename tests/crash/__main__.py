"""`make torture MINUTES=n`: runs every harness for its share of the time, two at once, and then every mutant.

Prints the seeds and the figures. If a harness finds a violation, it ends with the violation and how to reproduce it. Each
harness is described in its module, and the results of long runs are in `docs/dev/proofs.md`.

    .venv/bin/python -m tests.crash --minutes 10
    .venv/bin/python -m tests.crash --stage kills --seconds 60 --seed 7    one harness
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from tests.crash import block_device, enumeration, faults, interleave, kills, lossy_fs, mutants, state_machine
from tests.torture import destinations
from tests.torture import run as torture

RESULT: Final = "RESULT "  # the prefix of the last line of a stage
PROGRESS_S: Final = 30.0  # between two lines of progress
FOUND: Final = "violations"

Figures = dict[str, int]


class Stage(NamedTuple):
    """A harness, and its share of the time of its lane."""

    lane: int
    share: float
    run: Callable[[float, int], Figures]


def say(text: object) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 - the report


def progress_printer() -> Callable[[object], None]:
    """A function that prints progress, at most every half minute."""
    last_time = time.monotonic()

    def print_progress(report: object) -> None:
        nonlocal last_time
        if time.monotonic() - last_time >= PROGRESS_S:
            last_time = time.monotonic()
            say(report)

    return print_progress


def work_folder(name: str) -> Path:
    """A new folder, which is kept if a violation is found."""
    return Path(tempfile.mkdtemp(prefix=f"pillarbox-{name}-"))


def states(seconds: float, seed: int) -> Figures:
    """Check every history up to a length with every state after a crash, and then longer random ones."""
    report = enumeration.run(99, seconds, seed, 1, enumeration.Bounds(in_recovery=2))
    say(report)
    figures = {
        "distinct states": report.distinct,
        "states checked": report.checked,
        "after an interrupted recovery": report.in_recovery,
    }
    return figures | {"histories": report.histories, "all of up to steps": report.complete, FOUND: len(report.violations)}


def failing_disks(seconds: float, seed: int) -> Figures:
    """Each operation of each history fails; then every state after a crash is checked."""
    logging.disable(logging.CRITICAL)
    end = time.monotonic() + seconds
    cases = list(faults.all_cases())
    random.Random(seed).shuffle(cases)
    report = faults.run(enumeration.Bounds(), cases, lambda: time.monotonic() >= end)
    say(report)
    return {"faults": report.faults, "of": len(cases), "states checked": report.checked, FOUND: len(report.violations)}


def interleavings(seconds: float, seed: int) -> Figures:
    """Half of the time with up to three preemptions, and half with two and a kill."""
    logging.disable(logging.CRITICAL)
    reports = [interleave.run(seconds / 2, seed, preemptions, dead) for preemptions, dead in ((3, 0), (2, 1))]
    for report in reports:
        say(report)
    violations = sum(len(report.violations) for report in reports)
    return {"schedules": sum(report.schedules for report in reports), FOUND: violations}


def sequences(seconds: float, seed: int) -> Figures:
    """Run the state machine. Raises with the shortest sequence that fails."""
    return {"sequences": 500 * state_machine.run(seconds, seed), FOUND: 0}


def kill_processes(seconds: float, seed: int) -> Figures:
    """Kill writers and delivery workers by SIGKILL."""
    report = kills.run(seconds, seed, work_folder("kills"), progress_printer())
    say(report)
    return {"kills": report.kills, "events": report.events, "acknowledged": report.acknowledged, FOUND: 0}


def kill_on_lossy_filesystem(seconds: float, seed: int) -> Figures:
    """Kill writers and delivery workers on a file system that loses unsynced changes."""
    report = lossy_fs.run(seconds, seed, work_folder("dropping"), progress_printer())
    say(report)
    return {"kills": report.kills, "cuts": report.rounds, "events": report.events, FOUND: 0}


def cut_power(seconds: float, seed: int) -> Figures:
    """Compare real file systems after a power loss with the durability model."""
    logging.disable(logging.CRITICAL)
    figures: Counter[str] = Counter()
    for filesystem in ("ext4", "xfs"):
        report = block_device.run(filesystem, seconds / 2, seed, work_folder(filesystem), progress_printer())
        say(report)
        figures[f"cuts of {filesystem}"] = report.cuts
    return {**figures, FOUND: 0}


def random_answers(destination: str) -> Callable[[float, int], Figures]:
    """The stage that kills writers and delivery workers in front of a destination that answers at random."""

    def stage(seconds: float, seed: int) -> Figures:
        if destination == "spacetimedb" and not destinations.has_server():
            say("skipped: there is no SpacetimeDB server, and tools/spacetimedb-server cannot build one")
            return {FOUND: 0}
        folder = work_folder(destination)
        report = torture.run(destination, seconds, seed, folder, progress_printer())
        say(report)
        shutil.rmtree(folder)
        answers = sum(report.answers.values())
        figures = {"kills": report.kills, "events": report.events, "acknowledged": report.acknowledged}
        return {**figures, "dead letters": report.dead, "answers": answers, FOUND: 0}

    return stage


STAGES: Final = {
    "states": Stage(0, 1.0, states),
    "kills": Stage(1, 0.16, kill_processes),
    "dropping": Stage(1, 0.1, kill_on_lossy_filesystem),
    "interleave": Stage(1, 0.12, interleavings),
    "machine": Stage(1, 0.07, sequences),
    "faults": Stage(1, 0.08, failing_disks),
    "kernel": Stage(1, 0.07, cut_power),
    **{name: Stage(1, 0.1, random_answers(name)) for name in destinations.DESTINATIONS},
}


def run_stage(name: str, seconds: float, seed: int) -> Figures:
    """Run a stage in its own process. Raises if it finds a violation or fails."""
    command = [sys.executable, "-m", "tests.crash", "--stage", name, "--seconds", f"{seconds:.0f}", "--seed", str(seed)]
    say(f"{name}: {seconds:.0f} s, seed {seed}")
    figures: Figures | None = None
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(RESULT):
                figures = json.loads(line.removeprefix(RESULT))
            else:
                say(f"{name}: {line.rstrip()}")
    if figures is None or figures.pop(FOUND):
        raise SystemExit(f"{name} with seed {seed} has found a violation, see above; to reproduce it: {' '.join(command)}")
    return figures


def run_lane(lane: int, seconds: float, seed: int) -> dict[str, Figures]:
    """Run the stages of a lane, one after another."""
    stages = {name: stage for name, stage in STAGES.items() if stage.lane == lane}
    return {name: run_stage(name, seconds * stage.share, seed) for name, stage in stages.items()}


SECONDS_PER_MUTANT_MAX: Final = 240.0  # for one harness: several times what any takes on the correct code


def first_finder(mutant: mutants.Mutant) -> str:
    """The first harness that finds a mutant; empty if none does.

    The unit tests come first if the mutant names some, and then the harnesses that are documented as its finders.
    """
    documented = mutants.documented_finders(mutant.name)
    quickest = mutants.UNIT_TESTS if mutants.named_tests(mutant) else ""
    for harness in sorted(mutants.chosen_for(mutant), key=lambda name: (name != quickest, name not in documented)):
        verdict = mutants.run_harnesses(mutant, {harness: SECONDS_PER_MUTANT_MAX})[harness]
        if verdict.found:
            if verdict.seconds >= SECONDS_PER_MUTANT_MAX:
                return f"{harness}, because {verdict.why}"
            return f"{harness} ({test})" if (test := mutants.failed_test(verdict)) else harness
    return ""


def run_mutants() -> Figures:
    """Run each mutant until a harness finds it. Raises if a harness finds something in the correct code."""
    say("mutants: each harness on the correct code first")
    mutants.bounds_from_correct_code(mutants.MUTANTS)
    survivors: list[str] = []
    output_lock = threading.Lock()

    def judge(mutant: mutants.Mutant) -> None:
        begin = time.monotonic()
        found_by = first_finder(mutant)
        verdict = f"found by {found_by} in {time.monotonic() - begin:.0f} s" if found_by else "SURVIVES"
        with output_lock:
            say(f"mutant {mutant.name}: {verdict}")
            if not found_by:
                survivors.append(mutant.name)

    with ThreadPoolExecutor(mutants.WORKERS) as pool:
        list(pool.map(judge, mutants.MUTANTS))
    if survivors:
        raise SystemExit(f"no harness finds {', '.join(survivors)}")
    return {"mutants": len(mutants.MUTANTS), "found": len(mutants.MUTANTS)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for the harnesses; the mutants take additional time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stage:
        say(RESULT + json.dumps(STAGES[chosen.stage].run(chosen.seconds, chosen.seed)))
        return
    say(f"torture: {chosen.minutes:g} minutes, seed {chosen.seed}")
    lanes = sorted({stage.lane for stage in STAGES.values()})
    with ThreadPoolExecutor(len(lanes)) as pool:
        results = pool.map(lambda lane: run_lane(lane, chosen.minutes * 60, chosen.seed), lanes)
        figures = {name: stage_figures for lane in results for name, stage_figures in lane.items()}
    if not chosen.no_mutants:
        figures["mutants"] = run_mutants()
    say("")
    for name, stage_figures in figures.items():
        say(f"{name:<11} {', '.join(f'{value:,} {unit}' for unit, value in stage_figures.items())}")
    say("0 lost, 0 invented, 0 failures to open")


if __name__ == "__main__":
    main()
