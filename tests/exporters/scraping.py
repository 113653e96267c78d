"""Runs a real `pillarbox deliver` on a filled directory, and reads its metrics."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from pillarbox import Outbox, TrackingEvent

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("PILLARBOX_", "OTEL_"))},
    "no_proxy": "*",
    "PILLARBOX_MAX_RATE": "100000",  # without a limit there is no rate metric
}
WAIT_S = 60.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class DocumentedMetric(NamedTuple):
    """One row of the table in docs/reference/metrics.md."""

    name: str
    unit: str
    prometheus_name: str
    source: str


def documented_metrics() -> list[DocumentedMetric]:
    """Return the table in docs/reference/metrics.md."""
    lines = re.findall(r"^\| `pillarbox.*$", DOCS.read_text(), re.MULTILINE)
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in lines]
    return [DocumentedMetric(name, unit, exported, source) for _, name, unit, exported, _, _, source, _ in cells]


def fill_outbox(box: Path) -> None:
    """Write two batch files: four events, two of them with one id, and a file with a record of another type and a damaged line."""
    events = [TrackingEvent(event_id=str(number % 3), event_key="k", scope_kind="Site", scope_id="s") for number in range(4)]
    with Outbox(str(box)) as outbox:
        assert all(outbox.enqueue_many(events))
    (box / "sealed-0000000000000001-x.ndjson").write_bytes(b'{"event":{"colour":"red"}}\nno record\n')


def start_deliver(*arguments: object, cwd: Path, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `pillarbox deliver`."""
    command = [sys.executable, "-m", "pillarbox", "deliver", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT | (environ or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def running_deliver(cwd: Path, *sinks: str, metrics_address: str = "127.0.0.1:0") -> Iterator[str]:
    """Run `pillarbox deliver`; yields the URL of its metrics."""
    options = [word for sink in sinks or ["sqlite:///events.db"] for word in ("--sink", sink)]
    process = start_deliver("-d", "box", *options, "--metrics", metrics_address, cwd=cwd)
    try:
        assert process.stderr
        output = process.stderr.readline()
        yield output.removeprefix("INFO serving metrics at ").strip()
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=WAIT_S)[1]
        assert process.returncode == 0, output


def fetch(url: str, accept: str = "") -> str:
    """Return the body of the response to a GET request."""
    opener = build_opener(ProxyHandler({}))
    opener.addheaders = [("Accept", accept)]
    with opener.open(url, timeout=WAIT_S) as response:
        return str(response.read().decode())


def parse_samples(text: str) -> Samples:
    """Parse the samples and their labels with Prometheus's own parser."""
    families = text_string_to_metric_families(text)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def sample_value(samples: Samples, name: str, **labels: str) -> float:
    """Return one sample of the outbox `box`."""
    return samples[name, frozenset({"outbox": "box", **labels}.items())]


def scrape_until(url: str, condition: Callable[[Samples], bool]) -> Samples:
    """Scrape until the samples meet a condition."""
    deadline = time.monotonic() + WAIT_S
    while not condition(samples := parse_samples(fetch(url))):
        assert time.monotonic() < deadline, samples
        # wait: the time between two scrapes
        threading.Event().wait(0.02)  # the time between two scrapes
    return samples
