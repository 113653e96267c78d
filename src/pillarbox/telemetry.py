"""OpenTelemetry instruments for the counters of `stats.py`.

The hot path calls no instrument: all but one are observable, and read the counters when the application's metric reader
collects. Without an OpenTelemetry SDK they do nothing. `docs/reference/metrics.md` lists names, units and meanings.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, get_args
from weakref import WeakSet

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from pillarbox.stats import StateName
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from opentelemetry.metrics import Histogram, Meter

    from pillarbox.stats import SinkStats, Stats


class HasStats(Protocol):
    """What has `stats`: an `Outbox`."""

    name: str

    def stats(self) -> Stats:
        """A snapshot of the counters."""


Measurement = tuple[float, dict[str, str]]  # the number, and its attributes besides `outbox`
FLUSH_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metric(NamedTuple):
    """An observable metric.

    Attributes:
        name: Its name after "pillarbox.".
        unit: Its unit in UCUM (ucum.org), as OpenTelemetry asks for.
        description: One line for people.
        kind: "counter" or "gauge".
        read: From a snapshot to measurements.
    """

    name: str
    unit: str
    description: str
    kind: Literal["counter", "gauge"]
    read: Callable[[Any], Iterable[Measurement]]


FLUSH_DURATION: Final = ("flush.duration", "s", "Time from reading a batch file to its removal")

# Read from `Stats`, or from anything else with these two attributes.
PENDING_METRICS: Final = (
    Metric("pending.bytes", "By", "Bytes pending delivery", "gauge", lambda s: [(s.pending_bytes, {})]),
    Metric("pending.files", "{file}", "Batch files pending delivery", "gauge", lambda s: [(s.pending_files, {})]),
)

# Read from `Stats`: counted in the process that writes.
WRITER_METRICS: Final = (
    Metric("enqueued", "{event}", "Events accepted", "counter", lambda s: [(s.accepted, {})]),
    Metric("dropped", "{event}", "Events that enqueue did not store", "counter", lambda s: _measure_by("reason", s.dropped)),
    Metric("sealed", "{file}", "Batches sealed", "counter", lambda s: _measure_by("reason", s.sealed)),
    Metric("evicted", "{event}", "Events deleted to make room for newer ones", "counter", lambda s: [(s.evicted, {})]),
    Metric(
        "hook.failures",
        "{call}",
        "Hook calls that raised",
        "counter",
        lambda s: _measure_by("hook", s.hook_failures),
    ),
)


def _measure_by(attribute: str, counts: dict[str, int]) -> Iterator[Measurement]:
    return ((count, {attribute: value}) for value, count in counts.items())


def sink_attributes(name: str) -> dict[str, str]:
    """The attribute that names one of several sinks; empty for the only sink."""
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


# Read from the `SinkStats` of each sink.
DELIVERY_METRICS: Final = (
    Metric("corrupt", "{span}", "Damaged byte ranges quarantined", "counter", _measure_each_sink("quarantined")),
    Metric("dead", "{event}", "Events dead-lettered", "counter", _measure_each_sink("dead")),
    Metric(
        "discarded",
        "{record}",
        "Dead letters and byte ranges discarded at their limit",
        "counter",
        _measure_each_sink("discarded"),
    ),
    Metric(
        "delivered",
        "{event}",
        "Events that the destination accepted",
        "counter",
        _measure_each_sink("delivered"),
    ),
    Metric("duplicates", "{event}", "Events that the destination already had", "counter", _measure_each_sink("duplicates")),
    Metric("flushed.files", "{file}", "Batch files delivered and removed", "counter", _measure_each_sink("flushed_files")),
    Metric("flushed.bytes", "By", "Bytes of delivered batch files", "counter", _measure_each_sink("flushed_bytes")),
    Metric(
        "flush.failures",
        "{attempt}",
        "Delivery attempts not accepted",
        "counter",
        _measure_each_sink("failed_flushes"),
    ),
    Metric("rate.limit", "{event}/s", "Current limit of the sending rate", "gauge", _measure_rates),
    Metric("state", "{state}", "1 for the current state of delivery, 0 for the others", "gauge", _measure_states),
)


def create_instruments(meter: Meter, metrics: Iterable[Metric], snapshots: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Create an observable instrument for each metric. `snapshots` yields the name and a snapshot of each outbox."""
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
    """Create the one instrument that is not observable; it is called once for each batch file."""
    name, unit, description = FLUSH_DURATION
    return meter.create_histogram(
        f"pillarbox.{name}", unit, description, explicit_bucket_boundaries_advisory=list(FLUSH_BUCKETS_S)
    )


class Instruments:
    """The instruments of a process. They read every open outbox."""

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
        """Read this outbox too, until it is garbage collected."""
        self._outboxes.add(outbox)


_instruments: Instruments | None = None
_instruments_lock = threads.Lock()


def instruments() -> Instruments:
    """The instruments of this process, created at first use, so that the application can install its SDK before."""
    global _instruments  # noqa: PLW0603 - OpenTelemetry has one meter provider per process too
    with _instruments_lock:
        if _instruments is None:
            _instruments = Instruments()
        return _instruments
