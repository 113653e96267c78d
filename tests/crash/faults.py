"""Every operation of some histories fails, once and permanently, with each error that fits; then every state that a crash leaves.

The code must go on: no layer raises what it must not, nothing that is acknowledged is lost, nothing that is dropped arrives; and once
the disk works again, the same processes deliver everything that they had accepted, without a restart.
"""

from __future__ import annotations

import ast
import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from pillarbox.store.layout import Kind
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import PARTIAL_VERBS, VERBS, Fault, FaultCounter
from tests.crash.compiled_order import fault_filesystem
from tests.crash.enumeration import VIOLATIONS_MAX, Bounds, Enumeration, Origin
from tests.crash.enumeration import reproduce as reproduce_crash
from tests.crash.simulation import LOCKS, Obligations, SimulationWorld, kind_at, numbers_in

# Chosen so that each has something that the others have not: rotation, both durabilities, dead letters and quarantine,
# adoption after a death, a second process, eviction, a close, and two files that are sealed together.
HISTORIES: Final = ("ararsd", "aasasrsd", "ppsprsd", "mxgrsd", "agkxsd", "AapSsSd", "masrsvas", "apmc", "pxAKdsas")
WAIT_S: Final = 120.0  # longer than any pause before something is tried again


class FaultReport(NamedTuple):
    """What was checked."""

    faults: int  # runs in which something failed
    checked: int  # states, with what was owed
    distinct: int
    violations: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.faults} faults; {self.checked} states checked, {self.distinct} distinct; {len(self.violations)} violations"
        )
        return "\n".join([text, *self.violations])


def world_with_faults(counter: FaultCounter) -> SimulationWorld:
    """Processes on a disk that fails as a counter says."""
    world = SimulationWorld(lambda plain: fault_filesystem(plain, counter))
    world.disk_has_failed = lambda: counter.failures > 0
    # A refused call of which a part is on the disk and cannot be cut off: whoever adopts the file cannot know.
    world.can_truncate = all(fault.verb != "truncate" for fault in counter.faults)
    return world


def faults_of(history: str) -> Iterator[tuple[Fault, ...]]:
    """Each operation of a history failing, in each way."""
    counter = FaultCounter()
    world_with_faults(counter).run(history)
    for verb, errnos in VERBS.items():
        for nth, code, for_good in itertools.product(range(1, counter.counts[verb] + 1), errnos, (False, True)):
            yield (Fault(verb, nth, code, for_good),)
            if verb in PARTIAL_VERBS:
                yield (Fault(verb, nth, code, for_good, partial=True),)


def pairs_of(history: str) -> Iterator[tuple[Fault, ...]]:
    """Each write of a history that is partial and then fails, while that part cannot be cut off."""
    counter = FaultCounter()
    world_with_faults(counter).run(history)
    for nth, code, for_good in itertools.product(range(1, counter.counts["write"] + 1), VERBS["truncate"], (False, True)):
        yield Fault("write", nth, errno.ENOSPC, permanent=True, partial=True), Fault("truncate", 1, code, for_good)


def check(enumeration: Enumeration, history: str, faults: tuple[Fault, ...]) -> bool:
    """Run a history with faults, check all its moments, and then what the living processes deliver; whether anything failed."""
    counter = FaultCounter(*faults)
    world = world_with_faults(counter)
    origin: Origin = {"history": history, "faults": tuple(map(tuple, faults))}
    try:
        world.run(history)
        if not counter.failures:
            return False
        enumeration.check_trace(origin, list(world.disk.trace), 0, None, len(history))
        problem = afterwards(world, counter)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        problem = f"raised: {error!r}"
    if problem:
        enumeration.violations.append(f"{problem}\n  reproduce({str(origin)!r})")
    return True


def afterwards(world: SimulationWorld, counter: FaultCounter) -> str:
    """What is wrong once the disk works again and the living processes had time to continue."""
    counter.clear_faults()
    for _ in range(2):
        world.clock.advance(WAIT_S)  # for what was parked
        start = len(world.disk.trace)
        world.run("asrSsd")
    if not any(op.note and op.note[0] == "acknowledged" for op in world.disk.trace[start:]):  # type: ignore[index]
        return "nothing is accepted though the disk works again"
    account, survivors = Obligations(), DurabilityModel(ignoring=LOCKS)
    for op in world.disk.trace:
        account.apply(op, lambda path: survivors.complete_state()[path])
        survivors.apply(op)
    left = world.disk.files
    kept = {number for path, data in left.items() if kind_at(path) in (Kind.DEAD, Kind.CORRUPT) for number in numbers_in(data)}
    if lost := account.owed(power=False) - kept:
        return f"not delivered though the disk works again: {sorted(lost)}"
    if wrong := account.refused & set(world.destination.arrived):
        return f"the caller was told that it is refused, and it arrives: {sorted(wrong)}"
    waiting = [path for path, data in left.items() if kind_at(path) in (Kind.SEALED, Kind.TEMPORARY)]
    return f"left behind though the disk works again: {waiting}" if waiting else ""


def reproduce(text: str) -> str:
    """What is wrong after the history and the faults that a violation names; empty if nothing is any more."""
    origin: Origin = ast.literal_eval(text)
    history, faults = origin["history"], origin["faults"]
    assert isinstance(history, str)
    assert isinstance(faults, tuple)
    counter = FaultCounter(*(Fault(*fault) for fault in faults))
    if "crashes" in origin:
        return reproduce_crash(text, lambda _origin: world_with_faults(counter))
    try:
        world = world_with_faults(counter)
        world.run(history)
        return afterwards(world, counter)
    except Exception as error:  # noqa: BLE001 - as in `check`
        return f"raised: {error!r}"


def run(
    bounds: Bounds,
    cases: Iterable[tuple[str, tuple[Fault, ...]]],
    until: Callable[[], bool] = lambda: False,
) -> FaultReport:
    """Check histories with their faults; `all_cases` has all of them."""
    enumeration = Enumeration(bounds)
    met = 0
    for history, faults in cases:
        if until() or len(enumeration.violations) >= VIOLATIONS_MAX:
            break
        met += check(enumeration, history, faults)
    return FaultReport(met, enumeration.checked, len(enumeration.known), tuple(enumeration.violations))


def all_cases(part: int = 0, parts: int = 1) -> Iterator[tuple[str, tuple[Fault, ...]]]:
    """The n-th part of m of all histories with all their faults."""
    every = ((history, faults) for history in HISTORIES for faults in itertools.chain(faults_of(history), pairs_of(history)))
    return itertools.islice(every, part, None, parts)
