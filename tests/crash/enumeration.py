"""Every history up to a length, every state that a crash may leave of it and of its recovery; then longer random histories.

Only the last step of a history is checked, because what came before is a history of its own.

Which moments are checked: everything between two syncs may be lost as a whole, so from one sync to the next the set of states that a
loss of power may leave only grows, and the moment just before a sync has all states since the one before. What is owed changes at
marks and with the syncs themselves. So the moments before each sync and each mark, and the end, have every state together with
everything that was owed of it. (What may arrive grows at marks too, but no byte of an event is written before the mark that offers
it. An eviction is marked before its first removal.) When all processes die, the disk keeps what is there: one state after each
operation.

States that differ only in names are counted once, as long as kinds and order are the same. The result of recovering a state is
remembered, and judged again when the same state is found while something else is owed.
"""

from __future__ import annotations

import ast
import logging
import math
import random
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Final, NamedTuple

from pillarbox.store import layout
from pillarbox.testing.crash import Disk, Op, State
from pillarbox.testing.durability_model import NAMES_MAX, DurabilityModel, Tears
from tests.crash.simulation import (
    LOCKS,
    OUTBOX_PATH,
    STEPS,
    Obligations,
    RecoveryOutcome,
    SimulationWorld,
    problem_of,
    recover,
    steps_of,
)

ENDS: Final[Tears] = (1, -1)  # of a write that is torn, with one byte of it there or missing
STATES_MAX: Final = 200_000  # of a moment; above, so many are chosen
NAMES_FEW: Final = 6  # unsynced changes of names of a history that was chosen by chance
SAMPLE: Final = 60  # states of a moment of a history that was chosen by chance
VIOLATIONS_MAX: Final = 10  # then it ends
LENGTH_MAX: Final = 14  # steps of a history that is chosen by chance
FUSED: Final = 1 / 8  # of its steps are cut short
BY_CHANCE: Final = 1 / 4  # of the time is for them
TELL_S: Final = 30.0  # between two lines on how it goes
LETTERS: Final = "".join(STEPS) + "aapdsk"  # what is more likely in them


Origin = dict[str, object]  # what leads to a trace: a history, and the crashes after it


class Moment(NamedTuple):
    """A point in a trace at which everything may stop."""

    at: int  # so many operations are done
    survivors: DurabilityModel
    account: Obligations
    power: bool  # lost; otherwise all processes die
    same: bool = False  # no operation since the last moment that power was lost at: only what is owed is another


class Bounds(NamedTuple):
    """How far an enumeration goes."""

    tears: Tears = ()  # at any byte
    in_recovery: int = 0  # histories of up to so many steps have their recoveries cut short too
    states_max: int = STATES_MAX


class EnumerationReport(NamedTuple):
    """What was checked."""

    histories: int
    complete: int  # all histories up to so many steps were
    moments: int
    checked: int  # states, with what was owed at their moment
    distinct: int
    in_recovery: int  # of those checked, left by a recovery that was cut short
    sampled: int  # moments of which not all states were looked at
    seconds: float
    violations: tuple[str, ...]  # each is for `reproduce`

    def __str__(self) -> str:
        rate = self.checked / max(self.seconds, 1e-9)
        extent = f"{self.histories} histories, all of up to {self.complete} steps; {self.moments} moments"
        states = f"{self.checked} states checked, {self.distinct} distinct, {self.in_recovery} of recoveries cut short"
        pace = f"{self.sampled} moments sampled; {self.seconds:.1f} s, {rate:.0f} states/s"
        return "\n".join([f"{extent}; {states}; {pace}; {len(self.violations)} violations", *self.violations])


def moments(trace: list[Op], start: int, account: Obligations, survivors: DurabilityModel) -> Iterator[Moment]:
    """The moments of a trace from an operation on. The objects that are yielded change with the iteration."""
    news, same = True, False
    for at, op in enumerate(trace):
        decisive = op.verb in ("mark", "sync_data", "sync_failed", "sync_directory")
        if at >= start and decisive and news:
            yield Moment(at, survivors, account, power=True, same=same)
            news, same = False, True
        account.apply(op, lambda path: survivors.complete_state().get(path, b""))
        survivors.apply(op)
        news, same = True, same and op.verb == "mark"
        if at >= start and op.verb not in ("sync_data", "sync_failed", "sync_directory"):
            yield Moment(at + 1, survivors, account, power=False)
    yield Moment(len(trace), survivors, account, power=True, same=same)


@lru_cache(maxsize=100_000)
def _told_apart(name: str) -> tuple[str, str]:
    """What a name says, and the batch or file that it belongs to."""
    stem, aside = name.removesuffix(".aside"), name.endswith(".aside")
    kind = layout.kind_of(stem).value + ("~" if aside else "")
    return kind, stem.removeprefix("corrupt-").removeprefix("dead-").removesuffix(".spans.json").removesuffix(layout.SUFFIX)


def key_of(state: State) -> int:
    """A key that is equal for states that differ only in how their files are numbered."""
    names = sorted((*_told_apart(path[len(OUTBOX_PATH) + 1 :]), data) for path, data in state.items())
    batches = sorted({batch for _, batch, _ in names})
    return hash(tuple([(kind, batches.index(batch), data) for kind, batch, data in names]))


class Enumeration:
    """Checks histories, and remembers the result of recovering each state."""

    def __init__(self, bounds: Bounds | None = None, judge: Callable[..., str] = problem_of) -> None:
        self.bounds = bounds or Bounds()
        self._judge = judge
        self.known: dict[int, int] = {}  # state -> what came of it
        self._outcomes: list[RecoveryOutcome] = []
        self._numbers: dict[RecoveryOutcome, int] = {}
        self.histories = self.moments = self.checked = self.in_recovery = self.sampled = 0
        self._examples: dict[int, State] = {}
        self.violations: list[str] = []

    def check(self, history: str, chance: random.Random | None = None) -> bool:
        """Check the last step of a history, or with `chance` all of it; whether that step did anything."""
        world = SimulationWorld()
        steps = steps_of(history)
        for letter, fuse in steps[:-1]:
            world.step(letter, fuse)
        start = len(world.disk.trace)
        existed = world.lives(steps[-1][0])
        world.step(*steps[-1])
        self.histories += 1
        self.check_trace({"history": history}, world.disk.trace, 0 if chance else start, chance, len(steps))
        done = [op for op in world.disk.trace[start:] if op.path.rpartition("/")[2] not in LOCKS and op.verb != "mark"]
        return bool(done) or (history[-1] in "rkK" and existed and history[-2:-1] != history[-1])

    def check_trace(self, origin: Origin, trace: list[Op], start: int, chance: random.Random | None, steps: int) -> None:
        """Check the moments of a trace from an operation on."""
        deep = chance is None and steps <= self.bounds.in_recovery
        for moment in moments(trace, start, Obligations(), DurabilityModel(ignoring=LOCKS)):
            self.moments += 1
            states: Iterable[State] = [moment.survivors.complete_state()] if not moment.power else self._some(moment, chance)
            self._check_all(origin, moment, states, deep=deep)

    def _some(self, moment: Moment, chance: random.Random | None) -> Iterable[State]:
        if moment.same:
            return list(self._examples.values())
        survivors, bounds = moment.survivors, self.bounds
        if chance:
            # To count them all would take longer than what is looked at of them.
            most, few = SAMPLE, survivors.unsynced_names <= NAMES_FEW and survivors.count(ENDS) <= SAMPLE
        else:
            most = bounds.states_max
            few = survivors.unsynced_names <= NAMES_MAX and survivors.count(bounds.tears) <= most
        if few:
            return survivors.states(bounds.tears)
        self.sampled += 1
        chosen = chance or random.Random(moment.at)
        return (survivors.random_state(chosen) for _ in range(most))

    def _check_all(self, origin: Origin, moment: Moment, states: Iterable[State], *, deep: bool, depth: int = 0) -> None:
        account, known = moment.account, self.known
        fine: dict[int, State] = {}  # outcomes that are right at this moment, each with one of its states
        sealed = list(account.sealed.items())
        for state in states:
            self.checked += 1
            key = key_of(state)
            number = known.get(key)
            if number is None:
                disk = Disk(state)
                number = known[key] = self._number(_recovered(disk, depth))
                if deep:
                    self._cut_recovery(origin, moment, state, disk)
            if number in fine and not any(path in state and state[path] != data for path, data in sealed):
                continue
            problem = self._judge(state, self._outcomes[number], account, power=moment.power)
            if problem:
                self.violations.append(f"{problem}\n  reproduce({str(_crashed(origin, moment, state))!r})")
                return
            fine[number] = state
        if moment.power and depth == 0:
            self._examples = fine

    def _number(self, outcome: RecoveryOutcome) -> int:
        number = self._numbers.setdefault(outcome, len(self._outcomes))
        if number == len(self._outcomes):
            self._outcomes.append(outcome)
        return number

    def _cut_recovery(self, origin: Origin, moment: Moment, state: State, disk: Disk) -> None:
        """Crash during the recovery of a state; what that leaves must be recovered as well."""
        before = self.checked
        deeper = _crashed(origin, moment, state)
        account = moment.account.after_crash(power=moment.power)
        survivors = DurabilityModel(ignoring=LOCKS)
        found = sum(op.verb == "found" for op in disk.trace)
        for later in moments(disk.trace, found, account, survivors):
            self.moments += 1
            states = [later.survivors.complete_state()] if not later.power else later.survivors.states(ENDS)
            self._check_all(deeper, later, states, deep=False, depth=1)
        self.in_recovery += self.checked - before


def _crashed(origin: Origin, moment: Moment, state: State) -> Origin:
    crashes = origin.get("crashes", [])
    assert isinstance(crashes, list)
    return {**origin, "crashes": [*crashes, (moment.at, moment.power, state)]}


def reproduce(text: str, world_of: Callable[[Origin], SimulationWorld] = lambda _origin: SimulationWorld()) -> str:
    """What is wrong after the history and the crashes that a violation names; empty if nothing is any more."""
    origin: Origin = ast.literal_eval(text)
    history, crashes = origin["history"], origin["crashes"]
    assert isinstance(history, str)
    assert isinstance(crashes, list)
    world = world_of(origin)
    world.run(history)
    trace, account, problem = world.disk.trace, Obligations(), "no crash is named"
    for depth, (at, power, state) in enumerate(crashes):
        for moment in moments(trace, 0, account, DurabilityModel(ignoring=LOCKS)):
            if (moment.at, moment.power) == (at, power):
                break
        if not moment.survivors.admits(state):
            return "the history is another now: the state is none that may be left at this moment"
        disk = Disk(state)
        problem = problem_of(state, _recovered(disk, depth), moment.account, power=power)
        trace, account = disk.trace, moment.account.after_crash(power=power)
    return problem


def _recovered(disk: Disk, depth: int) -> RecoveryOutcome:
    try:
        return recover(disk, depth)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        return RecoveryOutcome((), frozenset(), f"the recovery raises {error!r}")


class Histories:
    """All histories, level by level: each is extended if its last step did anything."""

    def __init__(self, part: int = 0, parts: int = 1) -> None:
        self._longer = [""]
        self._part, self._parts = part, parts  # of those with two steps and more, the n-th of m is ours
        self.complete = 0  # steps

    def check_longer(self, enumeration: Enumeration, until: Callable[[], bool] = lambda: False) -> bool:
        """Check the histories that are one step longer; whether all were checked."""
        histories = [history + letter for history in self._longer for letter in STEPS]
        if self.complete == 1:
            histories = histories[self._part :: self._parts]
        longer: list[str] = []
        for history in histories:
            if until() or len(enumeration.violations) >= VIOLATIONS_MAX:
                return False
            if enumeration.check(history):
                longer.append(history)
        self._longer = longer
        self.complete += 1
        return True


def check_by_chance(enumeration: Enumeration, seed: int, until: Callable[[], bool]) -> None:
    """Check longer random histories, in which processes also die in the middle of a step."""
    chance = random.Random(seed)
    while not until() and len(enumeration.violations) < VIOLATIONS_MAX:
        letters = [chance.choice(LETTERS) for _ in range(chance.randint(4, LENGTH_MAX))]
        fuses = [str(chance.randint(1, 12)) if chance.random() < FUSED else "" for _ in letters]
        enumeration.check("".join(letter + fuse for letter, fuse in zip(letters, fuses, strict=True)), chance)


class _WorkerShare(NamedTuple):
    """What one worker process does."""

    steps: int
    seconds: float
    seed: int
    part: int
    parts: int
    bounds: Bounds


def _work(share: _WorkerShare) -> tuple[EnumerationReport, bytes]:
    """A worker's part of `run`, and the states that it has seen."""
    logging.disable(logging.CRITICAL)
    begin = told = time.monotonic()
    enumeration = Enumeration(share.bounds)

    def report() -> EnumerationReport:
        e = enumeration
        counts = (e.histories, histories.complete, e.moments, e.checked, len(e.known), e.in_recovery, e.sampled)
        return EnumerationReport(*counts, time.monotonic() - begin, tuple(e.violations))

    def until(end: float) -> bool:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_S:
            told = now
            print(f"[{share.part}] {report()}", flush=True)  # noqa: T201 - it is run by hand
        return now - begin >= end

    histories = Histories(share.part, share.parts)
    in_order = share.seconds * (1 - BY_CHANCE)
    while histories.complete < share.steps and histories.check_longer(enumeration, lambda: until(in_order)):
        pass
    if share.seconds < math.inf:
        check_by_chance(enumeration, share.seed * share.parts + share.part, lambda: until(share.seconds))
    return report(), array("q", enumeration.known).tobytes()


def run(
    steps: int, seconds: float = math.inf, seed: int = 0, workers: int = 1, bounds: Bounds | None = None
) -> EnumerationReport:
    """Check all histories of up to so many steps, and with a time limit random longer ones for the rest of it."""
    shares = [_WorkerShare(steps, seconds, seed, part, workers, bounds or Bounds()) for part in range(workers)]
    begin = time.monotonic()
    if workers == 1:
        return _work(shares[0])[0]
    # Forked, so that a hash is the same in all of them.
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        results = list(pool.map(_work, shares))
    states: set[int] = set()
    for _, keys in results:
        states.update(array("q", keys))
    reports = [report for report, _ in results]
    return EnumerationReport(
        histories=sum(report.histories for report in reports),
        complete=min(report.complete for report in reports),
        moments=sum(report.moments for report in reports),
        checked=sum(report.checked for report in reports),
        distinct=len(states),
        in_recovery=sum(report.in_recovery for report in reports),
        sampled=sum(report.sampled for report in reports),
        seconds=time.monotonic() - begin,
        violations=tuple(violation for report in reports for violation in report.violations),
    )
