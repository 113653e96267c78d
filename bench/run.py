"""Runs sections: in each round every contestant once, in random order, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bench import results
from bench.definitions import ROUNDS_MIN
from bench.machine import ROOT, MachineMonitor, spread_directories, versions
from bench.round_process import RoundRequest, RoundResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import IO

    from bench.definitions import Goal, Section

QUICK_SHARE = 0.1  # of a section's budget, to estimate the time left of a quick run
PURE_PYTHON = "PILLARBOX_PURE_PYTHON"  # not a setting: it selects the code that runs
REASON_MAX = 300  # characters
now = time.monotonic


class Options(NamedTuple):
    """The options of a run."""

    folder: Path  # everything is written here, so it must be on the file system to measure
    seed: int
    quick: bool = False
    report: Callable[[str], None] = print
    save: Callable[[results.Results], object] = id  # called with the results so far after each section


def run(chosen: Sequence[tuple[str, Section]], options: Options) -> results.Results:
    """Measure sections one after the other. Each comes with the name of its module."""
    assert chosen
    packages = [package for _, section in chosen for contestant in section.contestants for package in contestant.packages]
    monitor, began, started = MachineMonitor(), datetime.now(UTC), now()
    measured_versions = versions(packages)  # read first, because files may be edited while the benchmark runs
    sections: list[results.SectionResult] = []
    for index, (module, section) in enumerate(chosen):
        later_s = sum(other.budget_s for _, other in chosen[index + 1 :]) * (QUICK_SHARE if options.quick else 1)
        sections.append(_SectionRun(module, section, options, later_s).run_rounds())
        run_results = results.Results(
            began=f"{began:%Y-%m-%d %H:%M} UTC",
            seconds=round(now() - started, 1),
            quick=options.quick,
            seed=options.seed,
            machine=monitor.describe(options.folder),
            versions=measured_versions,
            sections=sections,
        )
        options.save(run_results)
    return run_results


class _SectionRun:
    """The rounds of one section."""

    def __init__(self, module: str, section: Section, options: Options, later_s: float) -> None:
        self._module = module
        self._section = section
        self._options = options
        self._later_s = later_s  # estimated time of the sections after this one
        self._workdir = options.folder / section.key
        self._rounds_planned = 1 if options.quick else section.rounds
        self._order: list[list[str]] = []
        self._rounds: list[dict[str, dict[str, float]]] = []
        self._failed: dict[str, str] = {}
        self._took: dict[str, list[float]] = {}  # contestant -> seconds of each of its rounds
        self._began = now()

    def run_rounds(self) -> results.SectionResult:
        """Run all rounds; a contestant that fails is left out of the following ones."""
        section = self._section
        self._report(f"{section.title}: {len(section.contestants)} contestants, rounds: {self._rounds_planned}")
        try:
            prepared = self._prepare()
            while prepared and len(self._rounds) < self._rounds_planned and self._has_time():
                self._run_round()
        finally:
            shutil.rmtree(self._workdir, ignore_errors=True)
        seconds = now() - self._began
        self._report(f"took {seconds:.0f} s, of a budget of {section.budget_s:.0f}; rounds: {len(self._rounds)}")
        return results.SectionResult(
            key=section.key,
            title=section.title,
            about=" ".join(section.about.split()),
            contestants=[contestant.name for contestant in section.contestants],
            ours=[contestant.name for contestant in section.contestants if contestant.ours],
            columns=[results.ColumnHeading(*column) for column in section.columns],
            chart=section.chart,
            rounds_planned=self._rounds_planned,
            order=self._order,
            rounds=self._rounds,
            failed=self._failed,
            goals=[_goal(goal, self._rounds) for goal in section.goals],
            seconds=round(seconds, 1),
        )

    def _report(self, text: str) -> None:
        self._options.report(f"{self._section.key:10} {text}")

    def _prepare(self) -> bool:
        shutil.rmtree(self._workdir, ignore_errors=True)
        (self._workdir / "shared").mkdir(parents=True)
        spread_directories(self._workdir)
        if self._section.prepare is None:
            return True
        self._report("preparing")
        result = self._run_process("")
        if result.failed:
            self._report(f"cannot be prepared: {result.failed}")
            self._failed = {contestant.name: result.failed for contestant in self._section.contestants}
        return not result.failed

    def _has_time(self) -> bool:
        """Whether another round fits into the budget; the first ROUNDS_MIN run in any case."""
        turns = sum(statistics.mean(took) for name, took in self._took.items() if name not in self._failed)
        return len(self._rounds) < ROUNDS_MIN or now() - self._began + turns <= self._section.budget_s

    def _run_round(self) -> None:
        number = len(self._rounds) + 1
        names = [contestant.name for contestant in self._section.contestants if contestant.name not in self._failed]
        order = shuffled(names, self._options.seed, self._section.key, number)
        self._order.append(order)
        figures: dict[str, dict[str, float]] = {}
        for index, name in enumerate(order):
            began = now()
            result = self._run_process(name)
            took = now() - began
            self._took.setdefault(name, []).append(took)
            if result.failed:
                self._failed[name] = result.failed
            else:
                figures[name] = result.figures
            self._report(
                f"round {number} of {self._rounds_planned}  {name:36} {took:5.1f} s  "
                f"{f'FAILED: {result.failed}' if result.failed else self._time_left(order[index + 1 :])}"
            )
        self._rounds.append(figures)

    def _time_left(self, names: Sequence[str]) -> str:
        """An estimate of the time left, from the rounds so far and the budgets of the next sections."""
        known = {name: statistics.mean(took) for name, took in self._took.items() if name not in self._failed}
        typical = statistics.mean(known.values()) if known else 0.0
        a_round = sum(
            known.get(contestant.name, typical)
            for contestant in self._section.contestants
            if contestant.name not in self._failed
        )
        this = sum(known.get(name, typical) for name in names) + a_round * (self._rounds_planned - len(self._rounds) - 1)
        budget = max(0.0, self._section.budget_s - (now() - self._began))
        left = min(this, budget) + self._later_s
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"

    def _environment(self, name: str) -> dict[str, str]:
        return dict(variable for each in self._section.contestants if each.name == name for variable in each.environment)

    def _run_process(self, contestant: str) -> RoundResult:
        """Run one contestant once, in a new directory."""
        # ext4 places a directory by its name: a new name avoids the place where files of an earlier round were deleted.
        own, result_file, log = self._workdir / uuid.uuid4().hex, self._workdir / "result.json", self._workdir / "log"
        own.mkdir()
        request = RoundRequest(
            self._module,
            self._section.key,
            contestant,
            str(own),
            str(self._workdir / "shared"),
            str(result_file),
            self._options.quick,
        )
        try:
            with log.open("wb") as output:
                ended = run_with_timeout(
                    [sys.executable, "-m", "bench.round_process", msgspec.json.encode(request).decode()],
                    self._section.timeout_s,
                    output,
                    self._environment(contestant),
                )
            if ended is None:
                return RoundResult(failed=f"not done after {self._section.timeout_s:g} s")
            if not result_file.exists():
                return RoundResult(failed=f"ended with status {ended}: {log.read_text(errors='replace').strip()[-REASON_MAX:]}")
            parsed = msgspec.json.decode(result_file.read_bytes(), type=RoundResult)
            return RoundResult(parsed.figures, " ".join(parsed.failed.split())[:REASON_MAX])
        finally:
            result_file.unlink(missing_ok=True)
            shutil.rmtree(own, ignore_errors=True)


def shuffled(names: Sequence[str], seed: int, key: str, number: int) -> list[str]:
    """The order of one round; it does not depend on which other sections run."""
    return random.Random(f"{seed} {key} {number}").sample(names, len(names))


def run_with_timeout(command: Sequence[str], timeout_s: float, output: IO[bytes], environment: Mapping[str, str]) -> int | None:
    """Run a command, then kill all processes that it started. Returns its exit status, or None after the time limit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not _is_outbox_setting(name)} | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_outbox_setting(name: str) -> bool:
    """Whether a variable is a setting of an outbox. These are removed, because each section names its own settings."""
    return name.startswith(("PILLARBOX_", "TRACKING_OUTBOX_")) and not name.startswith(("PILLARBOX_TEST_", PURE_PYTHON))


def _goal(goal: Goal, rounds: Sequence[dict[str, dict[str, float]]]) -> results.GoalResult:
    """The goal's figure in each round that measured all of its contestants."""
    figures_of_rounds = []
    for figures in rounds:
        with contextlib.suppress(KeyError):
            figures_of_rounds.append(goal.ratio(figures))
    return results.GoalResult(text=goal.text, bound=goal.bound, at_least=goal.at_least, unit=goal.unit, found=figures_of_rounds)
