"""The Prometheus endpoint of a real `pillarbox deliver`, read by Prometheus's own parser."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args
from urllib.error import HTTPError, URLError

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from pillarbox.exporters.collector import DirectoryCollector
from pillarbox.settings import Settings
from pillarbox.stats import StateName
from pillarbox.store.directory import Directory
from pillarbox.testing import ManualClock
from tests.exporters.scraping import (
    ENVIRONMENT,
    WAIT_S,
    Samples,
    documented_metrics,
    fetch,
    fill_outbox,
    running_deliver,
    sample_value,
    scrape_until,
)
from tests.sinks.http_server import closed_port_url


def labels(**of: str) -> frozenset[tuple[str, str]]:
    return frozenset({"outbox": "box", **of}.items())


def is_idle(samples: Samples) -> bool:
    """Whether everything is delivered and all metrics show it. They are updated at different times."""
    expected = (
        ("pillarbox_flushed_files_total", 2),
        ("pillarbox_flush_duration_seconds_count", 2),
        ("pillarbox_pending_files", 0),
        ("pillarbox_lease_held", 1),
    )
    whole = {(name, labels()): count for name, count in expected}
    return bool(sample_value(samples, "pillarbox_state", state="idle")) and whole.items() <= samples.items()


def test_the_endpoint_serves_exactly_the_documented_metrics(tmp_path: Path) -> None:
    """With name, type and unit, in both formats."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as url:
        scrape_until(url, is_idle)
        plain = list(text_string_to_metric_families(fetch(url)))
        text = fetch(url, "application/openmetrics-text; version=1.0.0")
    newer = list(openmetrics_families(text))  # type: ignore[no-untyped-call]  # the library has no types
    types = {
        row.prometheus_name: "counter" if row.prometheus_name.endswith("_total") else "gauge" for row in documented_metrics()
    }
    types["pillarbox_flush_duration_seconds"] = "histogram"
    expected = {row.prometheus_name: types[row.prometheus_name] for row in documented_metrics() if "deliver" in row.source}
    for families in (plain, newer):
        names = {family.name + "_total" * (family.type == "counter"): family.type for family in families}
        assert names == expected
        assert all(family.documentation for family in families)


def test_the_values_match_the_delivered_events_and_the_directory(tmp_path: Path) -> None:
    """Counts of the process, and sizes of the files."""
    box = tmp_path / "box"
    fill_outbox(box)
    with running_deliver(tmp_path) as url:
        samples = scrape_until(url, is_idle)
    counts = {
        "pillarbox_delivered_total": 4,
        "pillarbox_duplicates_total": 1,
        "pillarbox_dead_total": 1,
        "pillarbox_corrupt_total": 1,
        "pillarbox_discarded_total": 0,
        "pillarbox_flushed_files_total": 2,
        "pillarbox_flush_failures_total": 0,
        "pillarbox_flush_duration_seconds_count": 2,
        "pillarbox_pending_files": 0,
        "pillarbox_queue_files": 0,
        "pillarbox_oldest_age_seconds": 0,
        "pillarbox_lease_held": 1,
        "pillarbox_limit_files": 200_000,
        "pillarbox_rate_limit_per_second": 100_000,
    }
    assert {name: sample_value(samples, name) for name in counts} == counts
    for kind, prefix in (("dead", "dead-"), ("quarantine", "corrupt-")):
        sizes = [
            path.stat().st_size for path in box.glob(f"{prefix}*")
        ]  # of quarantine, with the file that says where it stood
        assert sample_value(samples, "pillarbox_kept_bytes", kind=kind) == sum(sizes)
        assert sample_value(samples, "pillarbox_kept_files", kind=kind) == 1
    states = {state: sample_value(samples, "pillarbox_state", state=state) for state in get_args(StateName)}
    assert states == {state: int(state == "idle") for state in states}
    assert 0 <= sample_value(samples, "pillarbox_heartbeat_age_seconds") < WAIT_S
    assert 0 < sample_value(samples, "pillarbox_volume_free_bytes") < sample_value(samples, "pillarbox_volume_size_bytes")


def test_each_of_several_sinks_has_its_own_values(tmp_path: Path) -> None:
    """Also while one is down; the metrics of the whole directory have no sink label."""
    fill_outbox(tmp_path / "box")
    counts = {
        "pillarbox_delivered_total": (4, 0),
        "pillarbox_queue_files": (0, 2),
        "pillarbox_lease_held": (1, 1),
        "pillarbox_dead_total": (1, 0),
    }

    others = {
        ("pillarbox_flush_duration_seconds_count", labels(sink="live")): 2,
        ("pillarbox_pending_files", labels()): 2,
        ("pillarbox_kept_files", labels(kind="dead", sink="live")): 1,
    }

    def of_both(samples: Samples, name: str) -> tuple[float | None, ...]:
        return tuple(samples.get((name, frozenset({("outbox", "box"), ("sink", sink)}))) for sink in ("live", "warehouse"))

    with running_deliver(tmp_path, "live=sqlite:///events.db", f"warehouse={closed_port_url()}") as url:
        # Each metric is updated by its own scan or heartbeat.
        samples = scrape_until(
            url,
            lambda samples: (
                all(of_both(samples, name) == both for name, both in counts.items())
                and bool(sample_value(samples, "pillarbox_state", state="waiting", sink="warehouse"))
                and others.items() <= samples.items()
            ),
        )
    assert sample_value(samples, "pillarbox_kept_files", kind="dead") == 0


def test_a_standby_process_reports_its_state(tmp_path: Path) -> None:
    """The heartbeat is that of the process that delivers."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as first:
        scrape_until(first, is_idle)  # this one delivers
        with running_deliver(tmp_path) as second:
            samples = scrape_until(second, lambda samples: bool(sample_value(samples, "pillarbox_state", state="standby")))
        assert sample_value(samples, "pillarbox_lease_held") == 0
        assert sample_value(samples, "pillarbox_heartbeat_age_seconds") < WAIT_S
        assert sample_value(samples, "pillarbox_delivered_total") == 0


def test_a_silent_client_delays_nothing(tmp_path: Path) -> None:
    """Neither delivery, nor another scrape, nor the exit."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as url:
        port = int(url.split(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as quiet:
            quiet.sendall(b"GET /metr")
            assert sample_value(scrape_until(url, is_idle), "pillarbox_delivered_total") == 4
            with pytest.raises(HTTPError, match="the metrics are at /metrics"):
                fetch(url.removesuffix("/metrics"))
    with pytest.raises(URLError):
        fetch(url)


def test_the_endpoint_listens_on_ipv6(tmp_path: Path) -> None:
    """In brackets, as in a URL."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path, metrics_address="[::1]:0") as url:
        assert url.startswith("http://[::1]:")
        scrape_until(url, is_idle)


def rejected_output(*arguments: str, cwd: Path, without: str = "nothing") -> str:
    program = f"import sys; sys.modules[{without!r}] = None; from pillarbox.cli import start; start()"
    command = [sys.executable, "-c", program, "deliver", "-d", "box", "--sink", "sqlite:///e.db", *arguments]
    completed = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == 2
    assert "Traceback" not in completed.stderr
    return completed.stderr


@pytest.mark.parametrize("address", ["9464", ":9464", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:http"])
def test_an_invalid_address_is_a_usage_error(tmp_path: Path, address: str) -> None:
    """The message shows a valid one."""
    assert f"--metrics {address}: use HOST:PORT, for example 127.0.0.1:9464" in rejected_output(
        "--metrics", address, cwd=tmp_path
    )


def test_an_address_in_use_is_a_usage_error(tmp_path: Path) -> None:
    """Before anything is delivered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert f"--metrics {address}: cannot listen on this address: Address already in use" in rejected_output(
            "--metrics", address, cwd=tmp_path
        )


@pytest.mark.parametrize(
    ("option", "value", "module", "extra"),
    [
        ("--metrics", "127.0.0.1:0", "prometheus_client", "metrics"),
        ("--otlp", "http://127.0.0.1:4318", "opentelemetry.exporter", "otlp"),
        ("--otlp", "http://127.0.0.1:4318", "opentelemetry.sdk", "otlp"),
    ],
)
def test_an_option_without_its_extra_says_what_to_install(
    tmp_path: Path, option: str, value: str, module: str, extra: str
) -> None:
    """By name."""
    output = rejected_output(option, value, cwd=tmp_path, without=module)
    assert f"{option} needs the package {module}" in output
    assert f"pip install 'pillarbox[{extra}]'" in output


def test_a_directory_that_cannot_be_listed_has_no_metrics(outbox_dir: Directory, clock: ManualClock) -> None:
    """They return with the directory."""
    collector = DirectoryCollector(outbox_dir, Settings(directory="box"), clock)
    moved = Path(outbox_dir.path).rename(f"{outbox_dir.path}.aside")
    assert collector.collect() == []
    moved.rename(outbox_dir.path)
    ((name, metrics),) = collector.collect()
    assert (name, metrics.pending_files) == ("box", 0)
