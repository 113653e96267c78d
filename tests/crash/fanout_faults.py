"""Every operation of histories with several sinks fails, once and permanently, with each error that fits.

Whatever fails: a batch that could not be fanned out is always reported, and once the disk works again the same process, or the next
one, delivers everything to every sink.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

from pillarbox.errors import DirectoryUnusableError
from pillarbox.store.layout import Kind
from pillarbox.testing.crash import Op
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import PARTIAL_VERBS, VERBS, Fault, FaultCounter
from tests.crash.compiled_order import fault_filesystem
from tests.crash.fanout import LOCKS, FanOutWorld, SinkObligations
from tests.crash.interleave import OUTBOX_PATH
from tests.crash.simulation import kind_at, steps_of

# Handing over, a later sink, one that was asked for, one that goes, eviction, adoption after a death.
HISTORIES: Final = ("aafxfd", "afcfafd", "afxpf", "afrafd", "afav", "afokfd")


def faults_of(history: str) -> Iterator[Fault]:
    """Each operation of a history failing, in each way."""
    meter = FaultCounter()
    FanOutWorld(lambda plain: fault_filesystem(plain, meter)).run(history)
    for verb, errnos in VERBS.items():
        for nth, code, for_good in itertools.product(range(1, meter.counts[verb] + 1), errnos, (False, True)):
            yield Fault(verb, nth, code, for_good)
            if verb in PARTIAL_VERBS:
                yield Fault(verb, nth, code, for_good, partial=True)


def check(history: str, fault: Fault) -> tuple[list[Op], str]:
    """What happens with a fault, and what is wrong with it, during it or once the disk works again."""
    meter = FaultCounter(fault)
    world = FanOutWorld(lambda plain: fault_filesystem(plain, meter))
    problem = ""
    for letter, _ in steps_of(history):
        try:
            world.run(letter)
        except DirectoryUnusableError:
            world.kill()
        except OSError:
            pass  # whoever calls says so, and tries it again
        problem = problem or _silence(world, letter)
    trace = list(world.disk.trace)
    meter.clear_faults()
    if "r" in history:
        world.process.remove("b")
    for letter in "fdafdfd":
        world.clock.advance(120.0)
        world.run(letter)
    return trace, problem or afterwards(world)


def _silence(world: FanOutWorld, letter: str) -> str:
    """Whether a round of handing over that left a file behind has not said so."""
    waits = [path for path in world.disk.files if kind_at(path) is Kind.SEALED and path.rpartition("/")[0] == OUTBOX_PATH]
    if letter == "f" and waits and world.lives and not world.process.trouble:
        return f"not handed over, and nobody says so: {waits}"
    return ""


def afterwards(world: FanOutWorld) -> str:
    """What is wrong with what arrived at last."""
    owed, survivors = SinkObligations(), DurabilityModel(ignoring=LOCKS)
    for op in world.disk.trace:
        owed.apply(op, lambda path: survivors.complete_state().get(path, b""))
        survivors.apply(op)
    for sink in owed.sinks:
        had = {number for one, _, number in owed.arrived if one == sink}
        if lost := owed.owed[sink] - had - owed.evicted:
            return f"{sink} misses {sorted(lost)} though the disk works again"
    left = [path for path in world.disk.files if kind_at(path) in (Kind.SEALED, Kind.TEMPORARY, Kind.DEAD, Kind.CORRUPT)]
    return f"left behind though the disk works again: {left}" if left else ""
