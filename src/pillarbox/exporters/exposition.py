"""What `pillarbox deliver` shows of itself, as it was asked to: at an endpoint, by export, both or neither."""

from __future__ import annotations

import logging
from os import environ
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

from pillarbox.errors import UsageError
from pillarbox.exporters.collector import DirectoryCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

# OpenTelemetry's own: where one of them is set, its programs export, unless they are told by the third not to.
_OTLP_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTER_VARIABLE: Final = "OTEL_METRICS_EXPORTER"


class _Exporter(Protocol):
    """One way in which the numbers leave the process."""

    def start(self) -> None:
        """Let them out."""

    def record_flush(self, outbox: str, sink: str, seconds: float) -> None:
        """A file took so long."""

    def close(self) -> None:
        """End what has begun, within seconds."""


class MetricsExporters:
    """Each way is opened or refused (`UsageError`) now, and goes from `start` to `close`.

    `metrics` is where to listen, HOST:PORT, for Prometheus; port 0 is any that is free. `otlp` is the address of an
    OpenTelemetry collector, without `/v1/metrics`; None leaves that to OpenTelemetry's environment variables.
    """

    def __init__(self, directory: Directory, settings: Settings, clock: Clock, metrics: str | None, otlp: str | None) -> None:
        self._outbox = settings.directory
        self._read_sink_stats: Callable[[], Mapping[str, SinkStats]] = dict
        self._exporters: list[_Exporter] = []
        collector = DirectoryCollector(directory, settings, clock)
        if metrics is not None:
            self._exporters.append(self._open_prometheus(metrics, collector))
        if otlp is not None or _otlp_requested_by_environment():
            self._open_otlp(otlp, collector)

    def _sink_snapshots(self) -> list[tuple[str, Mapping[str, SinkStats]]]:
        return [(self._outbox, self._read_sink_stats())]

    def _open_prometheus(self, address: str, collector: DirectoryCollector) -> _Exporter:
        try:
            from pillarbox.exporters.prometheus import PrometheusExporter  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise UsageError(f"--metrics: needs {error.name}; pip install 'pillarbox[metrics]'") from None
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"--metrics {address}: must be HOST:PORT, 127.0.0.1:9464 for example")
        try:
            endpoint = PrometheusExporter(host, int(port), self._sink_snapshots, collector.collect)
        except OSError as error:
            raise UsageError(f"--metrics {address}: cannot listen there: {error.strerror or error}") from None
        log.info("metrics at %s", endpoint.url)
        return endpoint

    def _open_otlp(self, url: str | None, collector: DirectoryCollector) -> None:
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError("--otlp: must be an address like http://127.0.0.1:4318")
            if "@" in parts.netloc:
                raise UsageError("--otlp: must have no password in it; OTEL_EXPORTER_OTLP_HEADERS is for that")
        try:
            from pillarbox.exporters.otlp import OtlpExporter  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            missing = f"needs {error.name}; pip install 'pillarbox[otlp]'"
            if url is not None:
                raise UsageError(f"--otlp: {missing}") from None
            log.warning("nothing is exported over OTLP, although the environment asks for it: %s", missing)
            return
        self._exporters.append(OtlpExporter(url, self._sink_snapshots, collector.collect))

    def start(self, read_sink_stats: Callable[[], Mapping[str, SinkStats]]) -> None:
        """Tell from now on, also how the sinks stand, each by its name."""
        self._read_sink_stats = read_sink_stats
        for way in self._exporters:
            way.start()

    def record_flush(self, seconds: float, sink: str) -> None:
        """A file took so long."""
        for way in self._exporters:
            way.record_flush(self._outbox, sink, seconds)

    def close(self) -> None:
        """Export what is not yet, and hang up."""
        for way in self._exporters:
            way.close()


def _otlp_requested_by_environment() -> bool:
    return environ.get(_EXPORTER_VARIABLE, "otlp") == "otlp" and any(environ.get(name) for name in _OTLP_ENDPOINTS)
