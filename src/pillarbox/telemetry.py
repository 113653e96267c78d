"""What is counted: plain counters inside, OpenTelemetry instruments outside.

The hot path touches no instrument: the instruments are observable, and read the counters when the application's metric reader
asks. Without an OpenTelemetry SDK all of it is a no-op. Names, units and meaning are in `docs/reference/metrics.md`.
"""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args
from weakref import WeakSet

import msgspec
from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from pillarbox.delivery.state import State, StateName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from opentelemetry.metrics import Histogram, Meter


COUNTED: Final = (
    "dead",
    "delivered",
    "discarded",
    "duplicates",
    "failed_flushes",
    "flushed_bytes",
    "flushed_files",
    "quarantined",
)


class DeliveryCounters:
    """Written by the deliverer's thread only; read by anyone."""

    __slots__ = (*COUNTED, "rate")

    def __init__(self) -> None:
        self.delivered = 0  # events that a destination has, `duplicates` of which it had before
        self.duplicates = 0
        self.dead = 0  # events kept as dead letters
        self.quarantined = 0  # spans of damaged bytes set aside
        self.discarded = 0  # of these two, those that were not kept for want of room
        self.flushed_files = 0
        self.flushed_bytes = 0
        self.failed_flushes = 0  # answers that were not an acceptance
        self.rate: float | None = None  # events a second that are sent at most; None: as many as the destination takes

    def snapshot(self, state: State, last_error: str) -> SinkStats:
        """What `stats()` shows of them."""
        counts = {name: getattr(self, name) for name in COUNTED}
        return SinkStats(state=state, last_error=last_error, rate=self.rate, **counts)


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
    rate: float | None  # events a second that are sent at most, while that is bounded
    last_error: str

    def degraded(self, reason: str) -> SinkStats:
        """The same, where something is wrong that is not the sink's."""
        return msgspec.structs.replace(self, state=State("degraded", reason), last_error=reason)


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
    rate: float | None  # events a second that are sent at most, while that is bounded
    last_error: str
    hook_failures: dict[str, int]  # how often each of the application's functions raised
    sinks: dict[str, SinkStats]  # by name, where there are several; what is counted above is the sum of them


class Observed(Protocol):
    """What the instruments read."""

    name: str

    def stats(self) -> Stats:
        """A snapshot."""


Reading = tuple[float, dict[str, str]]  # a number, and the attributes that it has beside `outbox`
FLUSH_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metric(NamedTuple):
    """One that is read when somebody asks: `pillarbox.<name>`, its unit in UCUM, and what makes numbers of a snapshot."""

    name: str
    unit: str
    description: str
    kind: Literal["counter", "gauge"]
    read: Callable[[Any], Iterable[Reading]]


FLUSH_DURATION: Final = ("flush.duration", "s", "From reading a sealed file to its removal")

# Of `Stats`, or of anything else with these two.
PENDING: Final = (
    Metric("pending.bytes", "By", "Bytes that wait for delivery", "gauge", lambda s: [(s.pending_bytes, {})]),
    Metric("pending.files", "{file}", "Files that wait for delivery", "gauge", lambda s: [(s.pending_files, {})]),
)

# Of `Stats`: what only the process of a writer knows.
WRITING: Final = (
    Metric("enqueued", "{event}", "Events accepted", "counter", lambda s: [(s.accepted, {})]),
    Metric("dropped", "{event}", "Events refused at the door", "counter", lambda s: _by("reason", s.dropped)),
    Metric("sealed", "{file}", "Files sealed", "counter", lambda s: _by("reason", s.sealed)),
    Metric("evicted", "{event}", "Events given up for newer ones", "counter", lambda s: [(s.evicted, {})]),
    Metric("hook.failures", "{call}", "Calls of hooks that raised", "counter", lambda s: _by("hook", s.hook_failures)),
)


def _by(attribute: str, counts: dict[str, int]) -> Iterator[Reading]:
    return ((count, {attribute: value}) for value, count in counts.items())


def of_sink(name: str) -> dict[str, str]:
    """The attribute that tells one of several sinks from the others; where there is only one, none is needed."""
    return {"sink": name} if name else {}


def _each(name: str) -> Callable[[Mapping[str, SinkStats | Stats]], Iterator[Reading]]:
    count = attrgetter(name)
    return lambda sinks: ((count(sink), of_sink(name)) for name, sink in sinks.items())


def _states(sinks: Mapping[str, SinkStats | Stats]) -> Iterator[Reading]:
    for name, sink in sinks.items():
        for state in get_args(StateName):
            yield int(state == sink.state.name), {"state": state, **of_sink(name)}


def _rates(sinks: Mapping[str, SinkStats | Stats]) -> Iterator[Reading]:
    return ((sink.rate, of_sink(name)) for name, sink in sinks.items() if sink.rate is not None)


# Of a `SinkStats` for each sink.
DELIVERING: Final = (
    Metric("corrupt", "{span}", "Damaged spans set aside", "counter", _each("quarantined")),
    Metric("dead", "{event}", "Events kept as dead letters", "counter", _each("dead")),
    Metric("discarded", "{record}", "Of these two, what was not kept for want of room", "counter", _each("discarded")),
    Metric("delivered", "{event}", "Events that the destination has", "counter", _each("delivered")),
    Metric("duplicates", "{event}", "Of these, events that it had before", "counter", _each("duplicates")),
    Metric("flushed.files", "{file}", "Files delivered and removed", "counter", _each("flushed_files")),
    Metric("flushed.bytes", "By", "Bytes of these files", "counter", _each("flushed_bytes")),
    Metric("flush.failures", "{attempt}", "Attempts that were not accepted", "counter", _each("failed_flushes")),
    Metric("rate.limit", "{event}/s", "Events that are sent at most, while that is bounded", "gauge", _rates),
    Metric("state", "{state}", "1 for the state the deliverer is in, 0 for the others", "gauge", _states),
)


def observe(meter: Meter, metrics: Iterable[Metric], snapshots: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Make an observable instrument of each, which reads what `snapshots` tells of each outbox, by its name."""
    for metric in metrics:
        make = meter.create_observable_gauge if metric.kind == "gauge" else meter.create_observable_counter
        callback = _observer(metric.read, snapshots)
        make(f"pillarbox.{metric.name}", callbacks=[callback], unit=metric.unit, description=metric.description)


def _observer(
    read: Callable[[Any], Iterable[Reading]], snapshots: Callable[[], Iterable[tuple[str, Any]]]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observations(_options: CallbackOptions) -> Iterator[Observation]:
        for outbox, snapshot in snapshots():
            for number, attributes in read(snapshot):
                yield Observation(number, {"outbox": outbox, **attributes})

    return observations


def make_flush_duration(meter: Meter) -> Histogram:
    """The one instrument that is called: once for each file."""
    name, unit, description = FLUSH_DURATION
    return meter.create_histogram(
        f"pillarbox.{name}", unit, description, explicit_bucket_boundaries_advisory=list(FLUSH_BUCKETS_S)
    )


class _Instruments:
    """One set of instruments a process, reading every open outbox."""

    def __init__(self) -> None:
        self._outboxes: WeakSet[Any] = WeakSet()
        meter = metrics.get_meter("pillarbox")
        observe(meter, (*PENDING, *WRITING), self._stats)
        observe(meter, DELIVERING, lambda: ((name, stats.sinks or {"": stats}) for name, stats in self._stats()))
        self.flush_duration = make_flush_duration(meter)

    def _stats(self) -> Iterator[tuple[str, Stats]]:
        return ((outbox.name, outbox.stats()) for outbox in list(self._outboxes))

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
