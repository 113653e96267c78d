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
from bench.child import Answer, Order
from bench.machine import ROOT, Watch, spread, versions
from bench.plan import ROUNDS_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import IO

    from bench.plan import Goal, Section

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
    """Measure sections one after the other; each comes with the name of its module."""
    assert chosen
    packages = [package for _, section in chosen for one in section.contestants for package in one.packages]
    watch, began, started = Watch(), datetime.now(UTC), now()
    ran = versions(packages)  # read first: files edited meanwhile are not what runs
    sections: list[results.Section] = []
    for at, (module, section) in enumerate(chosen):
        later_s = sum(other.budget_s for _, other in chosen[at + 1 :]) * (QUICK_SHARE if options.quick else 1)
        sections.append(_SectionRun(module, section, options, later_s).run_rounds())
        found = results.Results(
            began=f"{began:%Y-%m-%d %H:%M} UTC",
            seconds=round(now() - started, 1),
            quick=options.quick,
            seed=options.seed,
            machine=watch.describe(options.folder),
            versions=ran,
            sections=sections,
        )
        options.save(found)
    return found


class _SectionRun:
    """One section of one run."""

    def __init__(self, module: str, section: Section, options: Options, later_s: float) -> None:
        self._module = module
        self._section = section
        self._options = options
        self._later_s = later_s  # estimated time of the sections after this one
        self._place = options.folder / section.key
        self._rounds_planned = 1 if options.quick else section.rounds
        self._order: list[list[str]] = []
        self._rounds: list[dict[str, dict[str, float]]] = []
        self._failed: dict[str, str] = {}
        self._took: dict[str, list[float]] = {}  # contestant -> seconds of each of its rounds
        self._began = now()

    def run_rounds(self) -> results.Section:
        """Run all rounds; a contestant that fails is left out of the following ones."""
        section = self._section
        self._say(f"{section.title}: {len(section.contestants)} contestants, rounds: {self._rounds_planned}")
        try:
            prepared = self._prepare()
            while prepared and len(self._rounds) < self._rounds_planned and self._has_time():
                self._round()
        finally:
            shutil.rmtree(self._place, ignore_errors=True)
        seconds = now() - self._began
        self._say(f"took {seconds:.0f} s, of a budget of {section.budget_s:.0f}; rounds: {len(self._rounds)}")
        return results.Section(
            key=section.key,
            title=section.title,
            about=" ".join(section.about.split()),
            contestants=[one.name for one in section.contestants],
            ours=[one.name for one in section.contestants if one.ours],
            columns=[results.Column(*column) for column in section.columns],
            chart=section.chart,
            rounds_planned=self._rounds_planned,
            order=self._order,
            rounds=self._rounds,
            failed=self._failed,
            goals=[_goal(goal, self._rounds) for goal in section.goals],
            seconds=round(seconds, 1),
        )

    def _say(self, text: str) -> None:
        self._options.report(f"{self._section.key:10} {text}")

    def _prepare(self) -> bool:
        shutil.rmtree(self._place, ignore_errors=True)
        (self._place / "shared").mkdir(parents=True)
        spread(self._place)
        if self._section.prepare is None:
            return True
        self._say("prepares")
        answer = self._ask("")
        if answer.failed:
            self._say(f"cannot be prepared: {answer.failed}")
            self._failed = {one.name: answer.failed for one in self._section.contestants}
        return not answer.failed

    def _has_time(self) -> bool:
        """Whether another round fits into the budget; the first ROUNDS_MIN run in any case."""
        turns = sum(statistics.mean(took) for name, took in self._took.items() if name not in self._failed)
        return len(self._rounds) < ROUNDS_MIN or now() - self._began + turns <= self._section.budget_s

    def _round(self) -> None:
        number = len(self._rounds) + 1
        names = [one.name for one in self._section.contestants if one.name not in self._failed]
        order = shuffled(names, self._options.seed, self._section.key, number)
        self._order.append(order)
        figures: dict[str, dict[str, float]] = {}
        for at, name in enumerate(order):
            began = now()
            answer = self._ask(name)
            took = now() - began
            self._took.setdefault(name, []).append(took)
            if answer.failed:
                self._failed[name] = answer.failed
            else:
                figures[name] = answer.figures
            self._say(
                f"round {number} of {self._rounds_planned}  {name:36} {took:5.1f} s  "
                f"{f'FAILED: {answer.failed}' if answer.failed else self._left(order[at + 1 :])}"
            )
        self._rounds.append(figures)

    def _left(self, names: Sequence[str]) -> str:
        """An estimate of the time left, from the rounds so far and the budgets of the next sections."""
        known = {name: statistics.mean(took) for name, took in self._took.items() if name not in self._failed}
        typical = statistics.mean(known.values()) if known else 0.0
        a_round = sum(known.get(one.name, typical) for one in self._section.contestants if one.name not in self._failed)
        this = sum(known.get(name, typical) for name in names) + a_round * (self._rounds_planned - len(self._rounds) - 1)
        budget = max(0.0, self._section.budget_s - (now() - self._began))
        left = min(this, budget) + self._later_s
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"

    def _environment(self, contestant: str) -> dict[str, str]:
        return {name: value for one in self._section.contestants if one.name == contestant for name, value in one.environment}

    def _ask(self, contestant: str) -> Answer:
        """Run one contestant once, in a new directory."""
        # Its name decides where on the disk it is: never where files of an earlier turn were removed.
        own, answer, log = self._place / uuid.uuid4().hex, self._place / "answer.json", self._place / "log"
        own.mkdir()
        order = Order(
            self._module, self._section.key, contestant, str(own), str(self._place / "shared"), str(answer), self._options.quick
        )
        try:
            with log.open("wb") as output:
                ended = bounded(
                    [sys.executable, "-m", "bench.child", msgspec.json.encode(order).decode()],
                    self._section.timeout_s,
                    output,
                    self._environment(contestant),
                )
            if ended is None:
                return Answer(failed=f"not done after {self._section.timeout_s:g} s")
            if not answer.exists():
                return Answer(failed=f"ended with status {ended}: {log.read_text(errors='replace').strip()[-REASON_MAX:]}")
            found = msgspec.json.decode(answer.read_bytes(), type=Answer)
            return Answer(found.figures, " ".join(found.failed.split())[:REASON_MAX])
        finally:
            answer.unlink(missing_ok=True)
            shutil.rmtree(own, ignore_errors=True)


def shuffled(names: Sequence[str], seed: int, key: str, number: int) -> list[str]:
    """The order of one round; it does not depend on which other sections run."""
    return random.Random(f"{seed} {key} {number}").sample(names, len(names))


def bounded(command: Sequence[str], timeout_s: float, output: IO[bytes], environment: Mapping[str, str]) -> int | None:
    """Run a command and end all processes that it started; returns its exit status, or None after the time limit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not _is_a_setting(name)} | dict(environment),
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


def _is_a_setting(name: str) -> bool:
    """Of an outbox: what is measured has the settings that its section names."""
    return name.startswith(("PILLARBOX_", "TRACKING_OUTBOX_")) and not name.startswith(("PILLARBOX_TEST_", PURE_PYTHON))


def _goal(goal: Goal, rounds: Sequence[dict[str, dict[str, float]]]) -> results.Goal:
    """The goal's figure in each round that measured all of its contestants."""
    found = []
    for figures in rounds:
        with contextlib.suppress(KeyError):
            found.append(goal.ratio(figures))
    return results.Goal(text=goal.text, bound=goal.bound, at_least=goal.at_least, unit=goal.unit, found=found)
