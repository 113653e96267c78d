"""The OTLP export of a real `pillarbox deliver`, received by an HTTP server and decoded with OpenTelemetry's types."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics

from tests.exporters.scraping import WAIT_S, documented_metrics, fill_outbox, start_deliver
from tests.sinks.http_server import HANG, Server, always

SINK = ("-d", "box", "--sink", "sqlite:///events.db", "--once")


def last_export(server: Server) -> ResourceMetrics:
    request = server.requests[-1]
    assert (request.method, request.target) == ("POST", "/v1/metrics")
    export = ExportMetricsServiceRequest()
    export.ParseFromString(request.body)
    resource: ResourceMetrics = export.resource_metrics[0]
    return resource


def run_to_end(*arguments: object, cwd: Path, environ: dict[str, str] | None = None) -> str:
    process = start_deliver(*arguments, cwd=cwd, environ=environ)
    message = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 0, message
    return message


@pytest.mark.parametrize("by_option", [True, False], ids=["option", "environment"])
def test_the_last_export_has_exactly_the_documented_metrics(tmp_path: Path, by_option: bool) -> None:
    """With units, values and the name of the service."""
    fill_outbox(tmp_path / "box")
    with Server() as collector:
        address = collector.url("")
        if by_option:
            run_to_end(*SINK, "--otlp", address, cwd=tmp_path)
        else:
            run_to_end(*SINK, cwd=tmp_path, environ={"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_SERVICE_NAME": "events"})
    resource = last_export(collector)
    service = {entry.key: entry.value.string_value for entry in resource.resource.attributes}["service.name"]
    assert service == ("pillarbox" if by_option else "events")
    metrics = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    assert {name: metric.unit for name, metric in metrics.items()} == {
        row.name: row.unit for row in documented_metrics() if "deliver" in row.source
    }
    (delivered,) = metrics["pillarbox.delivered"].sum.data_points
    assert (delivered.as_int, metrics["pillarbox.delivered"].sum.is_monotonic) == (4, True)
    assert [(entry.key, entry.value.string_value) for entry in delivered.attributes] == [("outbox", "box")]
    (duration,) = metrics["pillarbox.flush.duration"].histogram.data_points
    assert (duration.count, duration.explicit_bounds[0]) == (2, 0.001)
    files_by_kind = {
        point.attributes[1].value.string_value: point.as_int for point in metrics["pillarbox.kept.files"].gauge.data_points
    }
    assert files_by_kind == {"dead": 1, "quarantine": 1, "delivered": 0}


def test_a_collector_that_does_not_respond_delays_the_exit_by_seconds(tmp_path: Path) -> None:
    """No event is lost."""
    fill_outbox(tmp_path / "box")
    with Server(always(HANG)) as collector:
        began = time.monotonic()
        run_to_end(*SINK, "--otlp", collector.url(""), cwd=tmp_path)
        assert time.monotonic() - began < 45
    assert not list((tmp_path / "box").glob("sealed-*"))


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "="},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "="},
    ],
    ids=["nothing", "none", "disabled"],
)
def test_nothing_is_exported_unless_the_environment_requests_it(tmp_path: Path, environ: dict[str, str]) -> None:
    """Nor if the environment disables the export."""
    fill_outbox(tmp_path / "box")
    with Server() as collector:
        values = {name: collector.url("") if value == "=" else value for name, value in environ.items()}
        run_to_end(*SINK, cwd=tmp_path, environ=values)
    assert collector.requests == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:4318", "--otlp: use a URL, for example http://127.0.0.1:4318"),
        (
            "http://user:secret@127.0.0.1:4318",
            "--otlp: remove user and password from the URL; set OTEL_EXPORTER_OTLP_HEADERS instead",
        ),
    ],
)
def test_an_invalid_url_is_a_usage_error(tmp_path: Path, url: str, message: str) -> None:
    """The message does not repeat a password."""
    process = start_deliver(*SINK, "--otlp", url, cwd=tmp_path)
    output = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 2
    assert message in output
    assert "secret" not in output
