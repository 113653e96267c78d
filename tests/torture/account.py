"""Records the events that each writer attempted to store, and their outcomes, in shared memory that outlives killed processes.

The answers of destinations are counted in the same way, because their processes are killed as well.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from tests.torture import events
from tests.torture.events import EVENTS_MAX

NEVER, BEGUN, REFUSED, UNSURE, ACKNOWLEDGED = range(5)  # the recorded states of an event
_STATES: Final = ("never attempted", "attempted", "dropped", "dropped with io_error", "acknowledged")
_SHOWN: Final = 8  # events that one message names

Event = tuple[int, int]  # life and number


class Notes:
    """The records that one writer makes of its events, before and after it stores them."""

    def __init__(self, shared: mmap.mmap, first: int) -> None:
        self._shared = shared
        self._first = first

    def note_attempt(self, numbers: range) -> None:
        """Record that events are about to be stored."""
        start = self._first + numbers.start
        self._shared[start : start + len(numbers)] = bytes([BEGUN]) * len(numbers)

    def note_outcome(self, number: int, state: int) -> None:
        """Record the outcome of an event."""
        self._shared[self._first + number] = state


class Arrivals(NamedTuple):
    """How often each event is at the destination and among the dead letters, once nothing is pending."""

    arrived: Mapping[Event, int]
    dead: Mapping[Event, int]
    quarantined: frozenset[Event]  # whose ids can be read in quarantine


class Sums(NamedTuple):
    """Counts of events of a directory, and how many of them were acknowledged."""

    begun: int
    acknowledged: int
    arrived: int
    dead: int


class EventRecords:
    """The recorded states of the events of every process that wrote to a directory."""

    def __init__(self, seed: int, slots: int) -> None:
        self._seed = seed
        self._shared = mmap.mmap(-1, slots * EVENTS_MAX)
        self._lives: dict[int, bytes] = {}

    def notes(self, slot: int) -> Notes:
        """The records of the process that uses this slot."""
        return Notes(self._shared, slot * EVENTS_MAX)

    def take_over_notes(self, slot: int, life: int) -> None:
        """Take over the records of a dead writer."""
        span = slice(slot * EVENTS_MAX, (slot + 1) * EVENTS_MAX)
        self._lives[life] = self._shared[span].rstrip(bytes([NEVER]))
        self._shared[span] = bytes(EVENTS_MAX)

    def attempted(self, slots: Iterable[int]) -> int:
        """The number of attempted events, including those of running writers."""
        size = EVENTS_MAX
        living = sum(size - self._shared[slot * size : (slot + 1) * size].count(NEVER) for slot in slots)
        return living + sum(len(states) - states.count(NEVER) for states in self._lives.values())

    def check(self, found: Arrivals, *, takes_all: bool = False) -> list[str]:
        """List what is wrong. Each good event must be once at the destination, each poisoned one once among the dead letters.

        At a destination that `takes_all`, poisoned events are good. An event that was attempted and not acknowledged may be
        there or not; a dropped event must not be.
        """
        wrong: dict[str, list[Event]] = {}
        locations = (("at the destination", found.arrived, False), ("among the dead letters", found.dead, True))
        for location, counts, for_poisoned in locations:
            for event, count in counts.items():
                state = self._state(event)
                if state in (NEVER, REFUSED):
                    wrong.setdefault(f"invented: {location} although {_STATES[state]}", []).append(event)
                elif (not takes_all and events.poisoned(self._seed, *event)) != for_poisoned:
                    wrong.setdefault(f"{'good' if for_poisoned else 'poisoned'}, and {location}", []).append(event)
                elif count > 1:
                    wrong.setdefault(f"{location} {count} times", []).append(event)
        for event in self._owed():
            if event not in found.arrived and event not in found.dead:
                where = "lost: in quarantine although acknowledged" if event in found.quarantined else "lost"
                wrong.setdefault(where, []).append(event)
        return [_complaint(what, those) for what, those in wrong.items()]

    def sums(self, found: Arrivals) -> Sums:
        """The counts of the events and of their arrivals."""
        acknowledged = sum(states.count(ACKNOWLEDGED) for states in self._lives.values())
        return Sums(self.attempted(()), acknowledged, len(found.arrived), len(found.dead))

    def _owed(self) -> Iterator[Event]:
        for life, states in self._lives.items():
            yield from ((life, number) for number, state in enumerate(states) if state == ACKNOWLEDGED)

    def _state(self, event: Event) -> int:
        states = self._lives.get(event[0], b"")
        return states[event[1]] if event[1] < len(states) else NEVER


def _complaint(what: str, those: Sequence[Event]) -> str:
    shown = ", ".join(f"{life}-{number}" for life, number in those[:_SHOWN])
    return f"{len(those)} {what}: {shown}{', ...' if len(those) > _SHOWN else ''}"


class SharedCounters:
    """Counters by name in shared memory. Each process has its own row."""

    def __init__(self, names: Sequence[str], rows: int) -> None:
        self._names = {name: index for index, name in enumerate(names)}
        self._shared = mmap.mmap(-1, max(1, rows * len(names) * 8))

    def row(self, row: int) -> CounterRow:
        """The row of one process."""
        return CounterRow(self._shared, self._names, row * len(self._names) * 8)

    def sums(self) -> Counter[str]:
        """The sum of all rows."""
        totals: Counter[str] = Counter()
        width = len(self._names)
        for index, (value,) in enumerate(struct.iter_unpack("=Q", self._shared[: len(self._shared) // 8 * 8])):
            totals[list(self._names)[index % width]] += value
        return +totals


class CounterRow:
    """The counters of one process."""

    def __init__(self, shared: mmap.mmap, names: Mapping[str, int], first: int) -> None:
        self._shared = shared
        self._names = names
        self._first = first

    def add(self, name: str) -> None:
        """Count one more."""
        at = self._first + 8 * self._names[name]
        struct.pack_into("=Q", self._shared, at, struct.unpack_from("=Q", self._shared, at)[0] + 1)
