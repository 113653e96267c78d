"""Every operation of histories with several sinks fails, once and permanently, with each possible error.

After any fault, a batch that could not be fanned out is reported, and once the disk works again, the same process or the next
one delivers everything to every sink.
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

# Fan-out, a later sink, a sink with the backlog, a removed sink, eviction, recovery after a kill.
HISTORIES: Final = ("aafxfd", "afcfafd", "afxpf", "afrafd", "afav", "afokfd")


def faults_of(history: str) -> Iterator[Fault]:
    """Every fault of every operation of a history."""
    counter = FaultCounter()
    FanOutWorld(lambda filesystem: fault_filesystem(filesystem, counter)).run(history)
    for verb, errnos in VERBS.items():
        for nth, code, permanent in itertools.product(range(1, counter.counts[verb] + 1), errnos, (False, True)):
            yield Fault(verb, nth, code, permanent)
            if verb in PARTIAL_VERBS:
                yield Fault(verb, nth, code, permanent, partial=True)


def check(history: str, fault: Fault) -> tuple[list[Op], str]:
    """Run a history with a fault. Returns its trace, and the problem during the fault or after it."""
    counter = FaultCounter(fault)
    world = FanOutWorld(lambda filesystem: fault_filesystem(filesystem, counter))
    problem = ""
    for letter, _ in steps_of(history):
        try:
            world.run(letter)
        except DirectoryUnusableError:
            world.kill()
        except OSError:
            pass  # the caller reports it and tries again
        problem = problem or _unreported_batches(world, letter)
    trace = list(world.disk.trace)
    counter.clear_faults()
    if "r" in history:
        world.process.remove("b")
    for letter in "fdafdfd":
        world.clock.advance(120.0)
        world.run(letter)
    return trace, problem or afterwards(world)


def _unreported_batches(world: FanOutWorld, letter: str) -> str:
    """The batches that a fan-out left in the outbox without reporting a problem; empty if there are none."""
    remaining = [path for path in world.disk.files if kind_at(path) is Kind.SEALED and path.rpartition("/")[0] == OUTBOX_PATH]
    if letter == "f" and remaining and world.is_running and not world.process.reported_problem:
        return f"not fanned out, and not reported: {remaining}"
    return ""


def afterwards(world: FanOutWorld) -> str:
    """The problem of the deliveries at the end; empty if there is none."""
    obligations, model = SinkObligations(), DurabilityModel(ignoring=LOCKS)
    for op in world.disk.trace:
        obligations.apply(op, lambda path: model.complete_state().get(path, b""))
        model.apply(op)
    for sink in obligations.sinks:
        arrived = {number for receiver, _, number in obligations.arrived if receiver == sink}
        if lost := obligations.owed[sink] - arrived - obligations.evicted:
            return f"{sink} misses {sorted(lost)} although the disk works again"
    remaining = [path for path in world.disk.files if kind_at(path) in (Kind.SEALED, Kind.TEMPORARY, Kind.DEAD, Kind.CORRUPT)]
    return f"left behind although the disk works again: {remaining}" if remaining else ""
