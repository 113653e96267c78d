"""Serves `GET /metrics` in Prometheus's text format, or in OpenMetrics on request. Needs the extra `metrics`."""

from __future__ import annotations

import socket
import threading
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Histogram, MetricsHandler
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from pillarbox.exporters.collector import DIRECTORY_METRICS
from pillarbox.telemetry import DELIVERY_METRICS, FLUSH_BUCKETS_S, FLUSH_DURATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.telemetry import Metric

_CLIENT_TIMEOUT_S: Final = 5.0  # the connection of a client that sends nothing for so long is closed
# The words for OpenTelemetry's units in Prometheus names; other units in braces are left out.
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


class _MetricsServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that hangs does not delay the exit

    def server_bind(self) -> None:
        """Bind without `HTTPServer`'s lookup of the host name, which may be slow."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


class _MetricsHandler(MetricsHandler):
    timeout = _CLIENT_TIMEOUT_S

    def do_GET(self) -> None:  # noqa: N802 - http.server's own
        """Answer a scrape."""
        try:
            if urlsplit(self.path).path == "/metrics":
                super().do_GET()
            else:
                self.send_error(404, "the metrics are at /metrics")
        except ConnectionError:
            self.close_connection = True  # the client has disconnected

    def version_string(self) -> str:
        """Hide the versions of Python and the server."""
        return "pillarbox"


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
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = type("_Server", (_MetricsServer,), {"address_family": family})
        self._server: ThreadingHTTPServer = listening(address, _MetricsHandler.factory(registry))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="pillarbox-metrics", daemon=True)

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def record_flush(self, outbox: str, sink: str, seconds: float) -> None:
        """Record how long a batch file took."""
        self._families.duration.labels(outbox, sink).observe(seconds)

    def close(self) -> None:
        """Stop serving and listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
