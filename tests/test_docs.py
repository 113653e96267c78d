"""The documents say what is true: code blocks run, and nothing is left out."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pillarbox import errors, telemetry
from pillarbox.exporters.collector import DIRECTORY_METRICS
from pillarbox.exporters.prometheus import prometheus_name
from pillarbox.outcome import DROP_REASONS
from pillarbox.settings import _ALIASES, Settings
from pillarbox.sinks import schemes
from pillarbox.stats import StateName

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
REFERENCE = (DOCS / "reference" / "settings.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "deploy" / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def metric_rows() -> list[str]:
    """The lines of the table in docs/reference/metrics.md."""
    return re.findall(r"^\| `pillarbox.*$", (DOCS / "reference" / "metrics.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_the_python_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    """Each block by itself, in an empty folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """One after the other, in one folder."""
    (script,) = blocks(README, "sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "delivered 1 " in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Within the repository."""
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def test_every_setting_is_in_the_reference() -> None:
    """With a row of its own, and the older names."""
    for field in msgspec.structs.fields(Settings):
        assert f"\n| `{field.name}` |" in REFERENCE, field.name
    for alias in _ALIASES:
        assert f"`{alias}`" in REFERENCE


def test_every_outcome_state_and_error_is_in_the_reference() -> None:
    """By name."""
    names = [*DROP_REASONS, *StateName.__args__]  # type: ignore[attr-defined]  # what a Literal has
    names += [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    for name in names:
        assert f"`{name}`" in REFERENCE or f".{name}`" in REFERENCE, name


def test_every_metric_is_documented_with_its_unit_and_where_it_comes_from() -> None:
    """And no other; the name that it has at Prometheus follows from name and unit."""
    duration = telemetry.Metric(*telemetry.FLUSH_DURATION, "gauge", list)  # a histogram's name is made as a gauge's
    sources = {
        "application": [*telemetry.PENDING_METRICS, *telemetry.WRITER_METRICS, *telemetry.DELIVERY_METRICS, duration],
        "deliver": [*telemetry.DELIVERY_METRICS, *DIRECTORY_METRICS, duration],
    }
    ours: dict[tuple[str, str, str], str] = {}
    for source, metrics in sources.items():
        for metric in metrics:
            row = f"pillarbox.{metric.name}", metric.unit, prometheus_name(metric.name, metric.unit, metric.kind)
            ours[row] = f"{ours[row]}, {source}" if row in ours else source
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in metric_rows()]
    assert {(name, unit, there): source for _, name, unit, there, _, _, source, _ in rows} == ours


def test_every_destination_has_a_row_in_the_guarantees() -> None:
    """What it tells repeats by, and what its acceptance survives."""
    text = (DOCS / "explanation" / "guarantees.md").read_text().lower()
    for scheme in schemes():
        assert f"\n| {scheme.partition('+')[0]} |" in text


def test_the_command_line_reference_is_up_to_date() -> None:
    """Mend it with tools/cli-reference."""
    reference = runpy.run_path(str(ROOT / "tools" / "cli-reference"))["reference"]
    assert (DOCS / "reference" / "cli.md").read_text() == reference()


def test_no_document_names_a_path_of_the_machine_it_was_written_on() -> None:
    """Nor does any other file."""
    for file in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        path = ROOT / file
        if path.is_file() and path != Path(__file__):
            assert not re.search(rb"/root/|/work/|/home/[a-z]", path.read_bytes()), file
