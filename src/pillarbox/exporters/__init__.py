"""What a process that only delivers shows of itself and of the directory: a Prometheus endpoint, and OpenTelemetry's OTLP.

`readings` says what there is to tell, once for both; `prometheus` and `otlp` each need an extra, and are imported only where
they are asked for. Names, units and meaning are in `docs/reference/metrics.md`. Neither can hold up delivery: both run on
threads of their own, and what they read of the directory costs a tenth of the time at most.
"""

from __future__ import annotations

from pillarbox.exporters.exposition import MetricsExporters

__all__ = ["MetricsExporters"]
