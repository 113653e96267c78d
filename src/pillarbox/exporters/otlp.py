"""Exports over OTLP/HTTP with OpenTelemetry's SDK and its environment variables. Needs the extra `otlp`."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from pillarbox.exporters.collector import DIRECTORY_METRICS
from pillarbox.telemetry import DELIVERY_METRICS, create_flush_duration, create_instruments, sink_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger("pillarbox")

_LAST_EXPORT_TIMEOUT_S: Final = 5.0  # at exit, for a collector that may not respond


class OtlpExporter:
    """Exports from `start` to `close`, every OTEL_METRIC_EXPORT_INTERVAL ms and once more at the end."""

    def __init__(
        self,
        url: str | None,
        sinks: Callable[[], Iterable[tuple[str, object]]],
        directories: Callable[[], Iterable[tuple[str, object]]],
    ) -> None:
        self._sinks = sinks
        self._directories = directories
        self._exporter = OTLPMetricExporter(endpoint=None if url is None else f"{url.rstrip('/')}/v1/metrics")

    def start(self) -> None:
        """Start to export."""
        ours = Resource({"service.name": "pillarbox", "service.version": version("pillarbox")})
        resource = Resource.create(ours.merge(OTELResourceDetector().detect()).attributes)
        self._provider = MeterProvider([PeriodicExportingMetricReader(self._exporter)], resource)
        meter = self._provider.get_meter("pillarbox", version("pillarbox"))
        create_instruments(meter, DELIVERY_METRICS, self._sinks)
        create_instruments(meter, DIRECTORY_METRICS, self._directories)
        self._duration = create_flush_duration(meter)

    def record_flush(self, outbox: str, sink: str, seconds: float) -> None:
        """Record how long a batch file took."""
        self._duration.record(seconds, {"outbox": outbox, **sink_attributes(sink)})

    def close(self) -> None:
        """Export the last values and stop."""
        try:
            self._provider.shutdown(_LAST_EXPORT_TIMEOUT_S * 1000)
        except Exception as error:  # noqa: BLE001 - a failed export must not fail delivery
            log.warning("OTLP: the last export failed: %s", error)
