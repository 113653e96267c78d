"""Every operation of some histories fails, once and permanently, with each possible error; then a crash follows.

The code must continue: no layer raises an unexpected exception, no acknowledged event is lost, no dropped event arrives; and
once the disk works again, the same processes deliver everything that they accepted, without a restart.
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

# Each covers something that the others do not: rotation, both durabilities, dead letters and quarantine, recovery after a kill,
# a second process, eviction, a close, and two segments that are sealed together.
HISTORIES: Final = ("ararsd", "aasasrsd", "ppsprsd", "mxgrsd", "agkxsd", "AapSsSd", "masrsvas", "apmc", "pxAKdsas")
WAIT_S: Final = 120.0  # longer than any pause before a retry


class FaultReport(NamedTuple):
    """What was checked."""

    faults: int  # runs in which something failed
    checked: int  # states, each with the obligations at its moment
    distinct: int
    violations: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.faults} faults; {self.checked} states checked, {self.distinct} distinct; {len(self.violations)} violations"
        )
        return "\n".join([text, *self.violations])


def world_with_faults(counter: FaultCounter) -> SimulationWorld:
    """Processes on a disk that fails according to a counter."""
    world = SimulationWorld(lambda filesystem: fault_filesystem(filesystem, counter))
    world.disk_has_failed = lambda: counter.failures > 0
    # If a part of a dropped append cannot be cut off, recovery cannot know that it was dropped.
    world.can_truncate = all(fault.verb != "truncate" for fault in counter.faults)
    return world


def faults_of(history: str) -> Iterator[tuple[Fault, ...]]:
    """Every fault of every operation of a history."""
    counter = FaultCounter()
    world_with_faults(counter).run(history)
    for verb, errnos in VERBS.items():
        for nth, code, permanent in itertools.product(range(1, counter.counts[verb] + 1), errnos, (False, True)):
            yield (Fault(verb, nth, code, permanent),)
            if verb in PARTIAL_VERBS:
                yield (Fault(verb, nth, code, permanent, partial=True),)


def pairs_of(history: str) -> Iterator[tuple[Fault, ...]]:
    """For each write of a history: it is partial and then fails, and the part cannot be cut off."""
    counter = FaultCounter()
    world_with_faults(counter).run(history)
    for nth, code, permanent in itertools.product(range(1, counter.counts["write"] + 1), VERBS["truncate"], (False, True)):
        yield Fault("write", nth, errno.ENOSPC, permanent=True, partial=True), Fault("truncate", 1, code, permanent)


def check(enumeration: Enumeration, history: str, faults: tuple[Fault, ...]) -> bool:
    """Run a history with faults, and check all moments, and the deliveries afterwards. Returns whether any fault occurred."""
    counter = FaultCounter(*faults)
    world = world_with_faults(counter)
    origin: Origin = {"history": history, "faults": tuple(map(tuple, faults))}
    try:
        world.run(history)
        if not counter.failures:
            return False
        enumeration.check_trace(origin, list(world.disk.trace), 0, None, len(history))
        problem = afterwards(world, counter)
    except Exception as error:  # noqa: BLE001 - every exception is a violation
        problem = f"raised: {error!r}"
    if problem:
        enumeration.violations.append(f"{problem}\n  reproduce({str(origin)!r})")
    return True


def afterwards(world: SimulationWorld, counter: FaultCounter) -> str:
    """The problem after the disk works again and the running processes had time to continue; empty if there is none."""
    counter.clear_faults()
    for _ in range(2):
        world.clock.advance(WAIT_S)  # longer than every back-off
        start = len(world.disk.trace)
        world.run("asrSsd")
    if not any(op.note and op.note[0] == "acknowledged" for op in world.disk.trace[start:]):  # type: ignore[index]
        return "nothing is accepted although the disk works again"
    obligations, model = Obligations(), DurabilityModel(ignoring=LOCKS)
    for op in world.disk.trace:
        obligations.apply(op, lambda path: model.complete_state()[path])
        model.apply(op)

    files = world.disk.files
    rejected = {
        number for path, data in files.items() if kind_at(path) in (Kind.DEAD, Kind.CORRUPT) for number in numbers_in(data)
    }
    if lost := obligations.owed(power=False) - rejected:
        return f"not delivered although the disk works again: {sorted(lost)}"

    if wrong := obligations.dropped & set(world.destination.arrived):
        return f"reported as dropped, and it arrives: {sorted(wrong)}"
    remaining = [path for path, data in files.items() if kind_at(path) in (Kind.SEALED, Kind.TEMPORARY)]
    return f"left behind although the disk works again: {remaining}" if remaining else ""


def reproduce(text: str) -> str:
    """Run the history and the faults of a violation again. Returns the problem, or an empty string if it does not occur."""
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
    """Check cases, each a history with its faults; `all_cases` returns all of them."""
    enumeration = Enumeration(bounds)
    occurred = 0
    for history, faults in cases:
        if until() or len(enumeration.violations) >= VIOLATIONS_MAX:
            break
        occurred += check(enumeration, history, faults)
    return FaultReport(occurred, enumeration.checked, len(enumeration.known), tuple(enumeration.violations))


def all_cases(part: int = 0, parts: int = 1) -> Iterator[tuple[str, tuple[Fault, ...]]]:
    """One of `parts` equal parts of all histories with all their faults."""
    cases = ((history, faults) for history in HISTORIES for faults in itertools.chain(faults_of(history), pairs_of(history)))
    return itertools.islice(cases, part, None, parts)
