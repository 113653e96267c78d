"""The documentation is correct: its code blocks run, and nothing public is missing."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import yaml

import pillarbox
from pillarbox import errors, telemetry, testing
from pillarbox.exporters.collector import DIRECTORY_METRICS
from pillarbox.exporters.prometheus import prometheus_name
from pillarbox.outcome import DROP_REASONS
from pillarbox.settings import _ALIASES, Settings
from pillarbox.sinks import schemes
from pillarbox.stats import StateName

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS_PAGE = DOCS / "reference" / "settings.md"
OUTCOMES_PAGE = DOCS / "reference" / "outcomes.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "deploy" / "README.md", *sorted(DOCS.rglob("*.md"))]
# A block of Python or shell code. If it is not run, a comment on the line before it says why.
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class CodeBlock(NamedTuple):
    """A code block of a page."""

    line: int
    language: str
    code: str


def code_blocks(page: Path) -> list[CodeBlock]:
    """The code blocks of a page that the test runs, in order."""
    text = page.read_text()
    return [
        CodeBlock(text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in BLOCK.finditer(text) if not match[1]
    ]


def run_block(block: CodeBlock, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in a folder, without the user's settings, with `pillarbox` and this Python on the path."""
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("PILLARBOX_", "TRACKING_OUTBOX_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*command, block.code],
        cwd=folder,
        env=environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def metric_rows() -> list[str]:
    """The rows of the table in docs/reference/metrics.md."""
    return re.findall(r"^\| `pillarbox.*$", (DOCS / "reference" / "metrics.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page)], ids=page_id)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run in one empty folder, one after the other."""
    for block in code_blocks(page):
        completed = run_block(block, tmp_path)
        assert completed.returncode == 0, f"{page_id(page)}:{block.line}: {completed.stdout}{completed.stderr}"


def test_a_failing_block_is_detected(tmp_path: Path) -> None:
    """In both languages."""
    assert run_block(CodeBlock(1, "python", "raise SystemExit(3)"), tmp_path).returncode == 3
    assert run_block(CodeBlock(1, "sh", "false | true"), tmp_path).returncode == 1


def test_every_page_is_in_the_navigation_and_the_site_uses_no_fonts_from_the_network() -> None:
    """`make docs` checks the built site itself."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    in_navigation = re.findall(r"[\w/-]+\.md", json.dumps(config["nav"]))
    assert sorted(in_navigation) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert config["theme"]["font"] is False
    assert config["strict"] is True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_files_are_valid(page: Path) -> None:
    """Links to other sites are not checked."""
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def shown_default(value: object) -> str:
    """The default of a setting in the form that the table uses."""
    if value is None or value in ("", {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**20}Mi" if value % 2**30 else f"{value // 2**30}Gi"
    return str(value)


def test_every_setting_is_in_the_reference_with_its_default() -> None:
    """The reference has no other settings, and names the aliases."""
    text = SETTINGS_PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*)\|", text, re.MULTILINE)
    documented = {name: default.strip("` ").removesuffix(" s") for name, default in rows}
    fields = msgspec.structs.fields(Settings)
    assert sorted(documented) == sorted(field.name for field in fields)
    for field in fields:
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        text_of_default = documented[field.name].removesuffix(".0")
        if field.name not in {"directory", "min_free_bytes"}:  # required; computed from the volume
            assert text_of_default == shown_default(default).removesuffix(".0"), field.name
    for alias in _ALIASES:
        assert f"`{alias}`" in text


def test_every_outcome_and_state_is_in_the_reference_and_every_error_is_generated() -> None:
    """The page of errors is generated from their docstrings."""
    text = OUTCOMES_PAGE.read_text()
    for name in (*DROP_REASONS, *StateName.__args__):  # type: ignore[attr-defined]  # what a Literal has
        assert f"\n| `{name}` |" in text, name
    assert "::: pillarbox.errors" in text
    for name, kind in vars(errors).items():
        assert not isinstance(kind, type) or kind.__doc__, name


def test_everything_public_is_in_the_reference() -> None:
    """Each name has a directive; the errors share one."""
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    aliases = {"Outcome", "Durability", "DropReason"}
    for name in set(pillarbox.__all__) - aliases - set(vars(errors)):
        assert f"::: pillarbox.{name}\n" in text or name.startswith("__"), name
    for name in testing.__all__:
        assert f"::: pillarbox.testing.{name}\n" in text, name


def test_every_metric_is_documented_with_its_unit_and_source() -> None:
    """The page has no other metrics. The Prometheus name follows from the name and the unit."""
    duration = telemetry.Metric(
        *telemetry.FLUSH_DURATION, "gauge", list
    )  # the name of a histogram is formed like that of a gauge
    sources = {
        "application": [*telemetry.PENDING_METRICS, *telemetry.WRITER_METRICS, *telemetry.DELIVERY_METRICS, duration],
        "deliver": [*telemetry.DELIVERY_METRICS, *DIRECTORY_METRICS, duration],
    }
    expected_rows: dict[tuple[str, str, str], str] = {}
    for source, metrics in sources.items():
        for metric in metrics:
            row = f"pillarbox.{metric.name}", metric.unit, prometheus_name(metric.name, metric.unit, metric.kind)
            expected_rows[row] = f"{expected_rows[row]}, {source}" if row in expected_rows else source
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in metric_rows()]
    assert {(name, unit, prometheus): source for _, name, unit, prometheus, _, _, source, _ in rows} == expected_rows


def test_every_destination_has_a_row_in_the_guarantees() -> None:
    """It says how the destination detects duplicates, and what its durability is."""
    text = (DOCS / "explanation" / "guarantees.md").read_text().lower()
    for scheme in schemes():
        assert f"\n| {scheme.partition('+')[0]} |" in text


def test_the_command_line_reference_is_up_to_date() -> None:
    """If it is not, run tools/cli-reference."""
    reference = runpy.run_path(str(ROOT / "tools" / "cli-reference"))["reference"]
    assert (DOCS / "reference" / "cli.md").read_text() == reference()


def test_the_reference_of_the_json_output_is_up_to_date() -> None:
    """If it fails, run tools/json-reference. A field without a meaning needs a comment behind it in the source."""
    reference = runpy.run_path(str(ROOT / "tools" / "json-reference"))["reference"]
    text = (DOCS / "reference" / "json-output.md").read_text()
    assert text == reference()
    assert not re.findall(r"^.*\|  \|$", text, re.MULTILINE)


def test_no_file_contains_a_path_of_a_developer_machine() -> None:
    """This applies to all files in the repository."""
    for file in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        path = ROOT / file
        if path.is_file() and path != Path(__file__):
            assert not re.search(rb"/root/|/work/|/home/[a-z]", path.read_bytes()), file


def test_every_function_in_the_life_of_an_event_exists() -> None:
    """Each name can be imported."""
    names = re.findall(r"`(pillarbox(?:\.\w+)+)`", (DOCS / "explanation" / "life-of-an-event.md").read_text())
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(name)


def test_every_test_and_file_named_in_the_proofs_exists() -> None:
    """Tests by name, other files by path."""
    text = (DOCS / "dev" / "proofs.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`((?:tests|pillarbox)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "src" / path).exists(), path
