"""What is counted: plain counters inside, OpenTelemetry instruments outside.

The hot path touches no instrument: the instruments are observable, and read the counters when the application's metric reader
asks. Without an OpenTelemetry SDK all of it is a no-op. Names, units and meaning are in `docs/metrics.md`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args
from weakref import WeakSet

import msgspec
from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from pillarbox.delivery.state import State, StateName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class DeliveryCounters:
    """Written by the deliverer's thread only; read by anyone."""

    __slots__ = (
        "dead",
        "delivered",
        "discarded",
        "duplicates",
        "failed_flushes",
        "flushed_bytes",
        "flushed_files",
        "quarantined",
    )

    def __init__(self) -> None:
        self.delivered = 0  # events that a destination has, `duplicates` of which it had before
        self.duplicates = 0
        self.dead = 0  # events kept as dead letters
        self.quarantined = 0  # spans of damaged bytes set aside
        self.discarded = 0  # of these two, those that were not kept for want of room
        self.flushed_files = 0
        self.flushed_bytes = 0
        self.failed_flushes = 0  # answers that were not an acceptance

    def snapshot(self, state: State, last_error: str) -> SinkStats:
        """What `stats()` shows of them."""
        return SinkStats(state=state, last_error=last_error, **{name: getattr(self, name) for name in self.__slots__})


class SinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the delivery to one sink. Counts are of this process since it opened the outbox."""

    state: State
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    last_error: str


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an outbox. Counts are of this process since it opened the outbox; pending is the directory's."""

    state: State
    durability: str
    pending_bytes: int
    pending_files: int
    accepted: int
    dropped: dict[str, int]  # by reason
    sealed: dict[str, int]  # files, by reason
    evicted: int  # events given up for newer ones
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    last_error: str
    hook_failures: dict[str, int]  # how often each of the application's functions raised
    sinks: dict[str, SinkStats]  # by name, where there are several; what is counted above is the sum of them


class Observed(Protocol):
    """What the instruments read."""

    name: str

    def stats(self) -> Stats:
        """A snapshot."""


# (name, unit, description, kind, what it reads: numbers with their attributes)
_Reading = tuple[int, dict[str, str]]
_INSTRUMENTS: Final[tuple[tuple[str, str, str, str, Callable[[Stats], Iterable[_Reading]]], ...]] = (
    ("pending.bytes", "By", "Bytes that wait for delivery", "gauge", lambda s: [(s.pending_bytes, {})]),
    ("pending.files", "{file}", "Files that wait for delivery", "gauge", lambda s: [(s.pending_files, {})]),
    ("enqueued", "{event}", "Events accepted", "counter", lambda s: [(s.accepted, {})]),
    ("dropped", "{event}", "Events refused at the door", "counter", lambda s: _by("reason", s.dropped)),
    ("sealed", "{file}", "Files sealed", "counter", lambda s: _by("reason", s.sealed)),
    ("evicted", "{event}", "Events given up for newer ones", "counter", lambda s: [(s.evicted, {})]),
    ("corrupt", "{span}", "Damaged spans set aside", "counter", lambda s: [(s.quarantined, {})]),
    ("dead", "{event}", "Events kept as dead letters", "counter", lambda s: [(s.dead, {})]),
    ("delivered", "{event}", "Events that the destination has", "counter", lambda s: [(s.delivered, {})]),
    ("duplicates", "{event}", "Of these, events that it had before", "counter", lambda s: [(s.duplicates, {})]),
    ("flushed.files", "{file}", "Files delivered and removed", "counter", lambda s: [(s.flushed_files, {})]),
    ("flushed.bytes", "By", "Bytes of these files", "counter", lambda s: [(s.flushed_bytes, {})]),
    ("flush.failures", "{attempt}", "Attempts that were not accepted", "counter", lambda s: [(s.failed_flushes, {})]),
    (
        "hook.failures",
        "{call}",
        "Calls of hooks that raised",
        "counter",
        lambda s: _by("hook", s.hook_failures),
    ),
    ("state", "1", "1 for the state the deliverer is in, 0 for the others", "gauge", lambda s: _states(s.state)),
)


def _by(attribute: str, counts: dict[str, int]) -> Iterator[_Reading]:
    return ((count, {attribute: value}) for value, count in counts.items())


def _states(state: State) -> Iterator[_Reading]:
    return ((int(name == state.name), {"state": name}) for name in get_args(StateName))


class _Instruments:
    """One set of instruments a process, reading every open outbox."""

    def __init__(self) -> None:
        self._outboxes: WeakSet[Any] = WeakSet()
        meter = metrics.get_meter("pillarbox")
        for name, unit, description, kind, read in _INSTRUMENTS:
            make = meter.create_observable_gauge if kind == "gauge" else meter.create_observable_counter
            make(f"pillarbox.{name}", callbacks=[self._observer(read)], unit=unit, description=description)
        self.flush_duration = meter.create_histogram(
            "pillarbox.flush.duration", unit="s", description="From reading a sealed file to its removal"
        )

    def _observer(self, read: Callable[[Stats], Iterable[_Reading]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            for outbox in list(self._outboxes):
                for number, attributes in read(outbox.stats()):
                    yield Observation(number, {"outbox": outbox.name, **attributes})

        return observe

    def add(self, outbox: Observed) -> None:
        """Read this outbox too, as long as it lives."""
        self._outboxes.add(outbox)


_instruments: _Instruments | None = None
_making = threading.Lock()


def instruments() -> _Instruments:
    """The instruments of this process, made at first use so that the application's SDK can be there before."""
    global _instruments  # noqa: PLW0603 - OpenTelemetry has one meter provider a process as well
    with _making:
        if _instruments is None:
            _instruments = _Instruments()
        return _instruments
