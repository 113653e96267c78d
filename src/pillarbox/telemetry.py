"""What is counted: plain counters inside, OpenTelemetry instruments outside.

The hot path touches no instrument: the instruments are observable, and read the counters when the application's metric reader
asks. Without an OpenTelemetry SDK all of it is a no-op. Names, units and meaning are in `docs/reference/metrics.md`.
"""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args
from weakref import WeakSet

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from pillarbox.stats import StateName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from opentelemetry.metrics import Histogram, Meter

    from pillarbox.stats import SinkStats, Stats


class HasStats(Protocol):
    """What the instruments read."""

    name: str

    def stats(self) -> Stats:
        """A snapshot."""


Measurement = tuple[float, dict[str, str]]  # a number, and the attributes that it has beside `outbox`
FLUSH_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metric(NamedTuple):
    """One that is read when somebody asks: `pillarbox.<name>`, its unit in UCUM, and what makes numbers of a snapshot."""

    name: str
    unit: str
    description: str
    kind: Literal["counter", "gauge"]
    read: Callable[[Any], Iterable[Measurement]]


FLUSH_DURATION: Final = ("flush.duration", "s", "From reading a sealed file to its removal")

# Of `Stats`, or of anything else with these two.
PENDING_METRICS: Final = (
    Metric("pending.bytes", "By", "Bytes that wait for delivery", "gauge", lambda s: [(s.pending_bytes, {})]),
    Metric("pending.files", "{file}", "Files that wait for delivery", "gauge", lambda s: [(s.pending_files, {})]),
)

# Of `Stats`: what only the process of a writer knows.
WRITER_METRICS: Final = (
    Metric("enqueued", "{event}", "Events accepted", "counter", lambda s: [(s.accepted, {})]),
    Metric("dropped", "{event}", "Events refused at the door", "counter", lambda s: _measure_by("reason", s.dropped)),
    Metric("sealed", "{file}", "Files sealed", "counter", lambda s: _measure_by("reason", s.sealed)),
    Metric("evicted", "{event}", "Events given up for newer ones", "counter", lambda s: [(s.evicted, {})]),
    Metric("hook.failures", "{call}", "Calls of hooks that raised", "counter", lambda s: _measure_by("hook", s.hook_failures)),
)


def _measure_by(attribute: str, counts: dict[str, int]) -> Iterator[Measurement]:
    return ((count, {attribute: value}) for value, count in counts.items())


def sink_attributes(name: str) -> dict[str, str]:
    """The attribute that tells one of several sinks from the others; where there is only one, none is needed."""
    return {"sink": name} if name else {}


def _measure_each_sink(name: str) -> Callable[[Mapping[str, SinkStats | Stats]], Iterator[Measurement]]:
    count = attrgetter(name)
    return lambda sinks: ((count(sink), sink_attributes(name)) for name, sink in sinks.items())


def _measure_states(sinks: Mapping[str, SinkStats | Stats]) -> Iterator[Measurement]:
    for name, sink in sinks.items():
        for state in get_args(StateName):
            yield int(state == sink.state.name), {"state": state, **sink_attributes(name)}


def _measure_rates(sinks: Mapping[str, SinkStats | Stats]) -> Iterator[Measurement]:
    return ((sink.rate, sink_attributes(name)) for name, sink in sinks.items() if sink.rate is not None)


# Of a `SinkStats` for each sink.
DELIVERY_METRICS: Final = (
    Metric("corrupt", "{span}", "Damaged spans set aside", "counter", _measure_each_sink("quarantined")),
    Metric("dead", "{event}", "Events kept as dead letters", "counter", _measure_each_sink("dead")),
    Metric(
        "discarded", "{record}", "Of these two, what was not kept for want of room", "counter", _measure_each_sink("discarded")
    ),
    Metric("delivered", "{event}", "Events that the destination has", "counter", _measure_each_sink("delivered")),
    Metric("duplicates", "{event}", "Of these, events that it had before", "counter", _measure_each_sink("duplicates")),
    Metric("flushed.files", "{file}", "Files delivered and removed", "counter", _measure_each_sink("flushed_files")),
    Metric("flushed.bytes", "By", "Bytes of these files", "counter", _measure_each_sink("flushed_bytes")),
    Metric("flush.failures", "{attempt}", "Attempts that were not accepted", "counter", _measure_each_sink("failed_flushes")),
    Metric("rate.limit", "{event}/s", "Events that are sent at most, while that is bounded", "gauge", _measure_rates),
    Metric("state", "{state}", "1 for the state the deliverer is in, 0 for the others", "gauge", _measure_states),
)


def create_instruments(meter: Meter, metrics: Iterable[Metric], snapshots: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Make an observable instrument of each, which reads what `snapshots` tells of each outbox, by its name."""
    for metric in metrics:
        make = meter.create_observable_gauge if metric.kind == "gauge" else meter.create_observable_counter
        callback = _observable_callback(metric.read, snapshots)
        make(f"pillarbox.{metric.name}", callbacks=[callback], unit=metric.unit, description=metric.description)


def _observable_callback(
    read: Callable[[Any], Iterable[Measurement]], snapshots: Callable[[], Iterable[tuple[str, Any]]]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observations(_options: CallbackOptions) -> Iterator[Observation]:
        for outbox, snapshot in snapshots():
            for number, attributes in read(snapshot):
                yield Observation(number, {"outbox": outbox, **attributes})

    return observations


def create_flush_duration(meter: Meter) -> Histogram:
    """The one instrument that is called: once for each file."""
    name, unit, description = FLUSH_DURATION
    return meter.create_histogram(
        f"pillarbox.{name}", unit, description, explicit_bucket_boundaries_advisory=list(FLUSH_BUCKETS_S)
    )


class Instruments:
    """One set of instruments a process, reading every open outbox."""

    def __init__(self) -> None:
        self._outboxes: WeakSet[Any] = WeakSet()
        meter = metrics.get_meter("pillarbox")
        create_instruments(meter, (*PENDING_METRICS, *WRITER_METRICS), self._read_stats)
        create_instruments(
            meter, DELIVERY_METRICS, lambda: ((name, stats.sinks or {"": stats}) for name, stats in self._read_stats())
        )
        self.flush_duration = create_flush_duration(meter)

    def _read_stats(self) -> Iterator[tuple[str, Stats]]:
        return ((outbox.name, outbox.stats()) for outbox in list(self._outboxes))

    def observe_outbox(self, outbox: HasStats) -> None:
        """Read this outbox too, as long as it lives."""
        self._outboxes.add(outbox)


_instruments: Instruments | None = None
_instruments_lock = threading.Lock()


def instruments() -> Instruments:
    """The instruments of this process, made at first use so that the application's SDK can be there before."""
    global _instruments  # noqa: PLW0603 - OpenTelemetry has one meter provider a process as well
    with _instruments_lock:
        if _instruments is None:
            _instruments = Instruments()
        return _instruments
