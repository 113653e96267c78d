"""The endpoint of a real `pillarbox deliver`, scraped over HTTP and read by Prometheus's own parser."""

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


def is_idle(found: Samples) -> bool:
    """All is delivered, and the look at the directory is as new; each number is read at a moment of its own."""
    moment = (
        ("pillarbox_flushed_files_total", 2),
        ("pillarbox_flush_duration_seconds_count", 2),
        ("pillarbox_pending_files", 0),
        ("pillarbox_lease_held", 1),
    )
    whole = {(name, labels()): count for name, count in moment}
    return bool(sample_value(found, "pillarbox_state", state="idle")) and whole.items() <= found.items()


def test_the_endpoint_has_every_metric_that_is_documented_and_no_other(tmp_path: Path) -> None:
    """By name, type and unit; in both formats."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as url:
        scrape_until(url, is_idle)
        plain = list(text_string_to_metric_families(fetch(url)))
        text = fetch(url, "application/openmetrics-text; version=1.0.0")
    newer = list(openmetrics_families(text))  # type: ignore[no-untyped-call]  # the library does not say
    types = {
        row.prometheus_name: "counter" if row.prometheus_name.endswith("_total") else "gauge" for row in documented_metrics()
    }
    types["pillarbox_flush_duration_seconds"] = "histogram"
    expected = {row.prometheus_name: types[row.prometheus_name] for row in documented_metrics() if "deliver" in row.source}
    for families in (plain, newer):
        names = {family.name + "_total" * (family.type == "counter"): family.type for family in families}
        assert names == expected
        assert all(family.documentation for family in families)


def test_the_numbers_are_what_was_delivered_and_what_is_in_the_directory(tmp_path: Path) -> None:
    """Counts of the process, sizes of the files."""
    box = tmp_path / "box"
    fill_outbox(box)
    with running_deliver(tmp_path) as url:
        found = scrape_until(url, is_idle)
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
    assert {name: sample_value(found, name) for name in counts} == counts
    for kind, prefix in (("dead", "dead-"), ("quarantine", "corrupt-")):
        (kept,) = box.glob(f"{prefix}*.ndjson")
        assert sample_value(found, "pillarbox_kept_bytes", kind=kind) == kept.stat().st_size
        assert sample_value(found, "pillarbox_kept_files", kind=kind) == 1
    states = {state: sample_value(found, "pillarbox_state", state=state) for state in get_args(StateName)}
    assert states == {state: int(state == "idle") for state in states}
    assert 0 <= sample_value(found, "pillarbox_heartbeat_age_seconds") < WAIT_S
    assert 0 < sample_value(found, "pillarbox_volume_free_bytes") < sample_value(found, "pillarbox_volume_size_bytes")


def test_of_several_sinks_each_is_told_of(tmp_path: Path) -> None:
    """What waits for the one that is down, and what the other one has; the directory as a whole has no sink."""
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

    def of_both(found: Samples, name: str) -> tuple[float | None, ...]:
        return tuple(found.get((name, frozenset({("outbox", "box"), ("sink", sink)}))) for sink in ("live", "warehouse"))

    with running_deliver(tmp_path, "live=sqlite:///events.db", f"warehouse={closed_port_url()}") as url:
        # Each is as new as its last look, or heartbeat.
        found = scrape_until(
            url,
            lambda found: (
                all(of_both(found, name) == both for name, both in counts.items())
                and bool(sample_value(found, "pillarbox_state", state="waiting", sink="warehouse"))
                and others.items() <= found.items()
            ),
        )
    assert sample_value(found, "pillarbox_kept_files", kind="dead") == 0


def test_a_process_that_stands_by_says_so(tmp_path: Path) -> None:
    """The heartbeat is the other one's."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as first:
        scrape_until(first, is_idle)  # it is this one that delivers
        with running_deliver(tmp_path) as second:
            found = scrape_until(second, lambda found: bool(sample_value(found, "pillarbox_state", state="standby")))
        assert sample_value(found, "pillarbox_lease_held") == 0
        assert sample_value(found, "pillarbox_heartbeat_age_seconds") < WAIT_S
        assert sample_value(found, "pillarbox_delivered_total") == 0


def test_a_client_that_keeps_quiet_holds_nobody_up(tmp_path: Path) -> None:
    """Neither delivery, nor another scrape, nor the end."""
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


def test_it_listens_on_an_address_of_the_newer_kind_too(tmp_path: Path) -> None:
    """In brackets, as in a URL."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path, metrics_address="[::1]:0") as url:
        assert url.startswith("http://[::1]:")
        scrape_until(url, is_idle)


def refused(*arguments: str, cwd: Path, without: str = "nothing") -> str:
    program = f"import sys; sys.modules[{without!r}] = None; from pillarbox.cli import main; main()"
    command = [sys.executable, "-c", program, "deliver", "-d", "box", "--sink", "sqlite:///e.db", *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("where", ["9464", ":9464", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:http"])
def test_what_is_no_address_is_a_usage_error(tmp_path: Path, where: str) -> None:
    """Which shows what one looks like."""
    assert f"--metrics {where}: must be HOST:PORT, 127.0.0.1:9464 for example" in refused("--metrics", where, cwd=tmp_path)


def test_an_address_that_is_taken_is_a_usage_error(tmp_path: Path) -> None:
    """Before anything is delivered."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"--metrics {where}: cannot listen there: Address already in use" in refused("--metrics", where, cwd=tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "module", "extra"),
    [
        ("--metrics", "127.0.0.1:0", "prometheus_client", "metrics"),
        ("--otlp", "http://127.0.0.1:4318", "opentelemetry.exporter", "otlp"),
        ("--otlp", "http://127.0.0.1:4318", "opentelemetry.sdk", "otlp"),
    ],
)
def test_without_its_extra_an_option_is_refused_with_the_way_to_get_it(
    tmp_path: Path, option: str, value: str, module: str, extra: str
) -> None:
    """By name."""
    said = refused(option, value, cwd=tmp_path, without=module)
    assert f"{option}: needs {module}" in said
    assert f"pip install 'pillarbox[{extra}]'" in said


def test_a_directory_that_cannot_be_listed_is_left_out(place: Directory, clock: ManualClock) -> None:
    """And is there again afterwards."""
    surveyor = DirectoryCollector(place, Settings(directory="box"), clock)
    aside = Path(place.path).rename(f"{place.path}.aside")
    assert surveyor.collect() == []
    aside.rename(place.path)
    ((name, ground),) = surveyor.collect()
    assert (name, ground.pending_files) == ("box", 0)
