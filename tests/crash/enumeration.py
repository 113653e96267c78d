"""Checks every history up to a length with every state after a crash of it and of its recovery, and longer random histories.

Only the last step of a history is checked, because the steps before it are a history of their own.

Which moments are checked: everything between two syncs may be lost as a whole. So from one sync to the next, the set of states
after a power loss only grows, and the moment just before a sync has all states since the previous one. The obligations change
at marks and with the syncs themselves. So the moments before each sync and each mark, and the end, have every state together
with all obligations that it must meet. (The events that may arrive grow at marks too, but no byte of an event is written before
the mark that offers it. An eviction is marked before its first removal.) When all processes are killed, the disk keeps its
contents: one state after each operation.

States that differ only in names are counted once, as long as kinds and order are the same. The result of the recovery of a
state is remembered, and judged again when the same state occurs with other obligations.
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

ENDS: Final[Tears] = (1, -1)  # where writes are torn: after the first byte, and before the last
STATES_MAX: Final = 200_000  # of a moment; if there are more, this many are chosen at random
NAMES_FEW: Final = 6  # unsynced changes of names, above which a random history is sampled
SAMPLE: Final = 60  # states of a moment of a random history
VIOLATIONS_MAX: Final = 10  # the run ends at this number
LENGTH_MAX: Final = 14  # steps of a random history
KILLED_SHARE: Final = 1 / 8  # of the steps of a random history end with a kill
RANDOM_SHARE: Final = 1 / 4  # of the time is for random histories
PROGRESS_S: Final = 30.0  # between two lines of progress
LETTERS: Final = "".join(STEPS) + "aapdsk"  # of random histories; some are more likely


Origin = dict[str, object]  # how to reproduce a trace: a history, and the crashes after it


class Moment(NamedTuple):
    """A point in a trace at which the crash may happen."""

    at: int  # the number of operations before it
    model: DurabilityModel
    obligations: Obligations
    power: bool  # whether power is lost; otherwise all processes are killed
    same: bool = False  # no operation since the last moment with a power loss; only the obligations differ


class Bounds(NamedTuple):
    """How far an enumeration goes."""

    tears: Tears = ()  # at any byte
    in_recovery: int = 0  # recoveries of histories with up to this many steps are interrupted too
    states_max: int = STATES_MAX


class EnumerationReport(NamedTuple):
    """The figures and violations of a run."""

    histories: int
    complete: int  # all histories with up to this many steps were checked
    moments: int
    checked: int  # states, each with the obligations at its moment
    distinct: int
    in_recovery: int  # checked states after an interrupted recovery
    sampled: int  # moments of which only some states were checked
    seconds: float
    violations: tuple[str, ...]  # each has the text for `reproduce`

    def __str__(self) -> str:
        rate = self.checked / max(self.seconds, 1e-9)
        extent = f"{self.histories} histories, all of up to {self.complete} steps; {self.moments} moments"
        states = f"{self.checked} states checked, {self.distinct} distinct, {self.in_recovery} of interrupted recoveries"
        pace = f"{self.sampled} moments sampled; {self.seconds:.1f} s, {rate:.0f} states/s"
        return "\n".join([f"{extent}; {states}; {pace}; {len(self.violations)} violations", *self.violations])


def moments(trace: list[Op], start: int, obligations: Obligations, model: DurabilityModel) -> Iterator[Moment]:
    """The moments of a trace from an operation on. The objects that are yielded change with the iteration."""
    has_changed, same = True, False
    for at, op in enumerate(trace):
        is_boundary = op.verb in ("mark", "sync_data", "sync_failed", "sync_directory")
        if at >= start and is_boundary and has_changed:
            yield Moment(at, model, obligations, power=True, same=same)
            has_changed, same = False, True
        obligations.apply(op, lambda path: model.complete_state().get(path, b""))
        model.apply(op)
        has_changed, same = True, same and op.verb == "mark"
        if at >= start and op.verb not in ("sync_data", "sync_failed", "sync_directory"):
            yield Moment(at + 1, model, obligations, power=False)
    yield Moment(len(trace), model, obligations, power=True, same=same)


@lru_cache(maxsize=100_000)
def _kind_and_batch(name: str) -> tuple[str, str]:
    """The kind of a name, and the batch or file that it belongs to."""
    stem, is_temporary = name.removesuffix(".aside"), name.endswith(".aside")
    kind = layout.kind_of(stem).value + ("~" if is_temporary else "")
    return kind, stem.removeprefix("corrupt-").removeprefix("dead-").removesuffix(".spans.json").removesuffix(layout.SUFFIX)


def key_of(state: State) -> int:
    """A key that is equal for states that differ only in how their files are numbered."""
    names = sorted((*_kind_and_batch(path[len(OUTBOX_PATH) + 1 :]), data) for path, data in state.items())
    batches = sorted({batch for _, batch, _ in names})
    return hash(tuple([(kind, batches.index(batch), data) for kind, batch, data in names]))


class Enumeration:
    """Checks histories, and remembers the result of the recovery of each state."""

    def __init__(self, bounds: Bounds | None = None, judge: Callable[..., str] = problem_of) -> None:
        self.bounds = bounds or Bounds()
        self._judge = judge
        self.known: dict[int, int] = {}  # key of a state -> number of its outcome
        self._outcomes: list[RecoveryOutcome] = []
        self._numbers: dict[RecoveryOutcome, int] = {}
        self.histories = self.moments = self.checked = self.in_recovery = self.sampled = 0
        self._examples: dict[int, State] = {}
        self.violations: list[str] = []

    def check(self, history: str, chance: random.Random | None = None) -> bool:
        """Check the last step of a history, or with `chance` all of it. Returns whether that step did anything."""
        world = SimulationWorld()
        steps = steps_of(history)
        for letter, fuse in steps[:-1]:
            world.step(letter, fuse)
        start = len(world.disk.trace)
        was_running = world.is_running(steps[-1][0])
        world.step(*steps[-1])
        self.histories += 1
        self.check_trace({"history": history}, world.disk.trace, 0 if chance else start, chance, len(steps))
        operations = [op for op in world.disk.trace[start:] if op.path.rpartition("/")[2] not in LOCKS and op.verb != "mark"]
        return bool(operations) or (history[-1] in "rkK" and was_running and history[-2:-1] != history[-1])

    def check_trace(self, origin: Origin, trace: list[Op], start: int, chance: random.Random | None, steps: int) -> None:
        """Check the moments of a trace from an operation on."""
        deep = chance is None and steps <= self.bounds.in_recovery
        for moment in moments(trace, start, Obligations(), DurabilityModel(ignoring=LOCKS)):
            self.moments += 1
            states: Iterable[State] = [moment.model.complete_state()] if not moment.power else self._some(moment, chance)
            self._check_all(origin, moment, states, deep=deep)

    def _some(self, moment: Moment, chance: random.Random | None) -> Iterable[State]:
        if moment.same:
            return list(self._examples.values())
        model, bounds = moment.model, self.bounds
        if chance:
            # Counting all states would take longer than checking the sample.
            most, few = SAMPLE, model.unsynced_names <= NAMES_FEW and model.count(ENDS) <= SAMPLE
        else:
            most = bounds.states_max
            few = model.unsynced_names <= NAMES_MAX and model.count(bounds.tears) <= most
        if few:
            return model.states(bounds.tears)
        self.sampled += 1
        chosen = chance or random.Random(moment.at)
        return (model.random_state(chosen) for _ in range(most))

    def _check_all(self, origin: Origin, moment: Moment, states: Iterable[State], *, deep: bool, depth: int = 0) -> None:
        obligations, known = moment.obligations, self.known
        fine: dict[int, State] = {}  # outcomes without a problem at this moment, each with one of its states
        sealed = list(obligations.sealed.items())
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
            problem = self._judge(state, self._outcomes[number], obligations, power=moment.power)
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
        """Crash during the recovery of a state. The states after that must be recovered as well."""
        checked_before = self.checked
        deeper = _crashed(origin, moment, state)
        obligations = moment.obligations.after_crash(power=moment.power)
        model = DurabilityModel(ignoring=LOCKS)
        initial = sum(op.verb == "found" for op in disk.trace)
        for later in moments(disk.trace, initial, obligations, model):
            self.moments += 1
            states = [later.model.complete_state()] if not later.power else later.model.states(ENDS)
            self._check_all(deeper, later, states, deep=False, depth=1)
        self.in_recovery += self.checked - checked_before


def _crashed(origin: Origin, moment: Moment, state: State) -> Origin:
    crashes = origin.get("crashes", [])
    assert isinstance(crashes, list)
    return {**origin, "crashes": [*crashes, (moment.at, moment.power, state)]}


def reproduce(text: str, world_of: Callable[[Origin], SimulationWorld] = lambda _origin: SimulationWorld()) -> str:
    """Run the history and the crashes of a violation again. Returns the problem, or an empty string if it does not occur."""
    origin: Origin = ast.literal_eval(text)
    history, crashes = origin["history"], origin["crashes"]
    assert isinstance(history, str)
    assert isinstance(crashes, list)
    world = world_of(origin)
    world.run(history)
    trace, obligations, problem = world.disk.trace, Obligations(), "no crash is named"
    for depth, (at, power, state) in enumerate(crashes):
        for moment in moments(trace, 0, obligations, DurabilityModel(ignoring=LOCKS)):
            if (moment.at, moment.power) == (at, power):
                break
        if not moment.model.admits(state):
            return "the history is another now: this state is not possible at this moment"
        disk = Disk(state)
        problem = problem_of(state, _recovered(disk, depth), moment.obligations, power=power)
        trace, obligations = disk.trace, moment.obligations.after_crash(power=power)
    return problem


def _recovered(disk: Disk, depth: int) -> RecoveryOutcome:
    try:
        return recover(disk, depth)
    except Exception as error:  # noqa: BLE001 - every exception is a violation
        return RecoveryOutcome((), frozenset(), f"the recovery raises {error!r}")


class Histories:
    """All histories, level by level: each is extended if its last step did anything."""

    def __init__(self, part: int = 0, parts: int = 1) -> None:
        self._longer = [""]
        self._part, self._parts = part, parts  # this part of the histories with two or more steps
        self.complete = 0  # steps

    def check_longer(self, enumeration: Enumeration, until: Callable[[], bool] = lambda: False) -> bool:
        """Check the histories that are one step longer. Returns whether all were checked."""
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
    """Check longer random histories, in which processes are also killed in the middle of a step."""
    chance = random.Random(seed)
    while not until() and len(enumeration.violations) < VIOLATIONS_MAX:
        letters = [chance.choice(LETTERS) for _ in range(chance.randint(4, LENGTH_MAX))]
        fuses = [str(chance.randint(1, 12)) if chance.random() < KILLED_SHARE else "" for _ in letters]
        enumeration.check("".join(letter + fuse for letter, fuse in zip(letters, fuses, strict=True)), chance)


class _WorkerShare(NamedTuple):
    """The part of a run that one worker process does."""

    steps: int
    seconds: float
    seed: int
    part: int
    parts: int
    bounds: Bounds


def _work(share: _WorkerShare) -> tuple[EnumerationReport, bytes]:
    """Run the part of one worker. Returns its report, and the keys of the states that it saw."""
    logging.disable(logging.CRITICAL)
    begin = last_progress = time.monotonic()
    enumeration = Enumeration(share.bounds)

    def report() -> EnumerationReport:
        e = enumeration
        counts = (e.histories, histories.complete, e.moments, e.checked, len(e.known), e.in_recovery, e.sampled)
        return EnumerationReport(*counts, time.monotonic() - begin, tuple(e.violations))

    def until(end: float) -> bool:
        nonlocal last_progress
        now = time.monotonic()
        if now - last_progress >= PROGRESS_S:
            last_progress = now
            print(f"[{share.part}] {report()}", flush=True)  # noqa: T201 - it is run by hand
        return now - begin >= end

    histories = Histories(share.part, share.parts)
    in_order = share.seconds * (1 - RANDOM_SHARE)
    while histories.complete < share.steps and histories.check_longer(enumeration, lambda: until(in_order)):
        pass
    if share.seconds < math.inf:
        check_by_chance(enumeration, share.seed * share.parts + share.part, lambda: until(share.seconds))
    return report(), array("q", enumeration.known).tobytes()


def run(
    steps: int, seconds: float = math.inf, seed: int = 0, workers: int = 1, bounds: Bounds | None = None
) -> EnumerationReport:
    """Check all histories with up to `steps` steps, and longer random ones for the rest of `seconds`."""
    shares = [_WorkerShare(steps, seconds, seed, part, workers, bounds or Bounds()) for part in range(workers)]
    begin = time.monotonic()
    if workers == 1:
        return _work(shares[0])[0]
    # Forked, so that hashes are the same in all processes.
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
