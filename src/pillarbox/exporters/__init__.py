"""Metrics of a process that only delivers: a Prometheus endpoint and an OTLP export, both optional.

collector.py    reads the directory and defines its metrics
prometheus.py   serves `/metrics`; needs the extra `metrics`
otlp.py         exports over OTLP; needs the extra `otlp`

Names, units and meanings are in `docs/reference/metrics.md`. The exporters run on threads of their own and read the directory
for at most a tenth of the time, so they cannot delay delivery.
"""

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

# OpenTelemetry's own variables: either of the first two enables the export, and the third can disable it.
_OTLP_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PORT_DIGITS_MAX: Final = 5
_EXPORTER_VARIABLE: Final = "OTEL_METRICS_EXPORTER"


class _Exporter(Protocol):
    """One way to export the metrics."""

    def start(self) -> None:
        """Start to export."""

    def record_flush(self, outbox: str, sink: str, seconds: float) -> None:
        """Record how long a batch file took, from reading to deletion."""

    def close(self) -> None:
        """Stop, within seconds. Only after `start`."""


class MetricsExporters:
    """The exporters that the options and the environment ask for. They run from `start` to `close`.

    Args:
        directory: the outbox directory.
        settings: its settings.
        clock: the clock.
        metrics: HOST:PORT to listen on for Prometheus; port 0 is any free port. None: no endpoint.
        otlp: the URL of an OpenTelemetry collector, without `/v1/metrics`. None: OpenTelemetry's environment variables decide.

    Raises:
        UsageError: an address is wrong or in use, or an extra is not installed.
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
            raise UsageError(f"--metrics needs the package {error.name}: pip install 'pillarbox[metrics]'") from None
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or len(port) > _PORT_DIGITS_MAX or int(port) > 65535:
            raise UsageError(f"--metrics {address}: use HOST:PORT, for example 127.0.0.1:9464")
        try:
            endpoint = PrometheusExporter(host, int(port), self._sink_snapshots, collector.collect)
        except OSError as error:
            raise UsageError(f"--metrics {address}: cannot listen on this address: {error.strerror or error}") from None
        except UnicodeError:  # a name that cannot be a host name
            raise UsageError(f"--metrics {address}: use HOST:PORT, for example 127.0.0.1:9464") from None
        log.info("serving metrics at %s", endpoint.url)
        return endpoint

    def _open_otlp(self, url: str | None, collector: DirectoryCollector) -> None:
        if url is not None:
            try:
                parts = urlsplit(url)
                is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                is_valid = False
            if not is_valid:
                raise UsageError("--otlp: use a URL, for example http://127.0.0.1:4318")
            if "@" in parts.netloc:
                raise UsageError("--otlp: remove user and password from the URL; set OTEL_EXPORTER_OTLP_HEADERS instead")
        try:
            from pillarbox.exporters.otlp import OtlpExporter  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            missing = f"needs the package {error.name}: pip install 'pillarbox[otlp]'"
            if url is not None:
                raise UsageError(f"--otlp {missing}") from None
            log.warning("no metrics are exported over OTLP, although the environment requests it: the export %s", missing)
            return
        self._exporters.append(OtlpExporter(url, self._sink_snapshots, collector.collect))

    def start(self, read_sink_stats: Callable[[], Mapping[str, SinkStats]]) -> None:
        """Start all exporters; `read_sink_stats` returns the statistics of each sink by its name."""
        self._read_sink_stats = read_sink_stats
        for exporter in self._exporters:
            exporter.start()

    def record_flush(self, seconds: float, sink: str) -> None:
        """Record how long a batch file took, from reading to deletion."""
        for exporter in self._exporters:
            exporter.record_flush(self._outbox, sink, seconds)

    def close(self) -> None:
        """Export the last values and stop."""
        for exporter in self._exporters:
            exporter.close()


def _otlp_requested_by_environment() -> bool:
    return environ.get(_EXPORTER_VARIABLE, "otlp") == "otlp" and any(environ.get(name) for name in _OTLP_ENDPOINTS)
