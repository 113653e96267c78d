"""Serves `GET /metrics` in Prometheus's text format, or in OpenMetrics on request. Needs the extra `metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Histogram, make_wsgi_app
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from pillarbox.exporters.collector import DIRECTORY_METRICS
from pillarbox.exporters.scrape_server import Response, ScrapeServer
from pillarbox.sinks.event_loop import resolve_address
from pillarbox.system import threads
from pillarbox.system.sockets import AI_PASSIVE, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, Socket
from pillarbox.telemetry import DELIVERY_METRICS, FLUSH_BUCKETS_S, FLUSH_DURATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.telemetry import Metric

# The names of OpenTelemetry's units in Prometheus; other units in braces are left out.
_UNITS: Final = {"By": "bytes", "s": "seconds", "{event}/s": "per_second"}


def prometheus_name(name: str, unit: str, kind: str) -> str:
    """Return a metric's name in Prometheus: with its unit, and for a counter with `_total`."""
    words = ["pillarbox", *name.split(".")]
    if (unit_word := _UNITS.get(unit)) and words[-1] != unit_word:
        words.append(unit_word)
    return "_".join([*words, "total"] if kind == "counter" else words)


class _FamilyCollector(Collector):
    """Reads all values at each scrape."""

    def __init__(self, sources: Iterable[tuple[Iterable[Metric], Callable[[], Iterable[tuple[str, object]]]]]) -> None:
        self._sources = list(sources)
        name, unit, description = FLUSH_DURATION
        self.duration = Histogram(
            prometheus_name(name, unit, "histogram"),
            description,
            ["outbox", "sink"],
            registry=None,
            buckets=FLUSH_BUCKETS_S,
        )

    def collect(self) -> Iterator[Family]:
        """Yield all families that have a sample."""
        for metrics, snapshots in self._sources:
            values = list(snapshots())
            for metric in metrics:
                name = prometheus_name(metric.name, metric.unit, metric.kind)
                family = Family(name.removesuffix("_total"), metric.description, metric.kind)
                for outbox, snapshot in values:
                    for number, attributes in metric.read(snapshot):
                        family.add_sample(name, {"outbox": outbox, **attributes}, number)
                if family.samples:
                    yield family
        yield from self._flush_durations()

    def _flush_durations(self) -> Iterator[Family]:
        for collected in self.duration.collect():
            family = Family(collected.name, collected.documentation, collected.type)
            for sample in collected.samples:
                if not sample.name.endswith("_created"):
                    labels = {label: value for label, value in sample.labels.items() if value}
                    family.add_sample(sample.name, labels, sample.value)
            yield family


class PrometheusExporter:
    """Listens once it is created, and serves from `start` to `close`. Raises `OSError` if it cannot listen."""

    def __init__(
        self,
        host: str,
        port: int,
        sinks: Callable[[], Iterable[tuple[str, object]]],
        directories: Callable[[], Iterable[tuple[str, object]]],
    ) -> None:
        self._families = _FamilyCollector([(DELIVERY_METRICS, sinks), (DIRECTORY_METRICS, directories)])
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self._families)
        self._app = make_wsgi_app(registry)
        family, address = resolve_address(host, port, kind=SOCK_STREAM, flags=AI_PASSIVE)
        listener = Socket(family, SOCK_STREAM)
        try:
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
        self._server = ScrapeServer(listener, host, self._render)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{listener.getsockname()[1]}/metrics"
        self._thread = threads.Thread(target=self._server.serve, name="pillarbox-metrics")

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def record_flush(self, outbox: str, sink: str, seconds: float) -> None:
        """Record how long a batch file took."""
        self._families.duration.labels(outbox, sink).observe(seconds)

    def close(self) -> None:
        """Stop serving and listening."""
        self._server.stop()
        self._thread.join()

    def _render(self, query: str, headers: dict[str, str]) -> Response:
        """The metrics, in the format and encoding that a request accepts."""
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": query,
            "HTTP_ACCEPT": headers.get("accept", ""),
            "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding", ""),
        }
        answer = Response("500 Internal Server Error", [], b"")

        def start_response(status: str, answer_headers: list[tuple[str, str]], *_: object) -> Any:
            nonlocal answer
            answer = Response(status, answer_headers, b"")

        body = b"".join(self._app(environ, start_response))
        return answer._replace(body=body)
