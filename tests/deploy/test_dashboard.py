"""The dashboard and the alert rules use known types and documented metrics."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.deploy_files import DEPLOY, ROOT, dashboard_queries, load_alert_rules, load_dashboard, metric_names
from tests.exporters.scraping import documented_metrics

KNOWN = {row.prometheus_name for row in documented_metrics()}


def missing_paths(document: Any, decoded: Any, where: str = "") -> list[str]:
    """Return the paths in `document` whose value `decoded` does not have."""
    if isinstance(document, dict):
        if not isinstance(decoded, dict):
            return [where]
        return [path for key in document for path in missing_paths(document[key], decoded.get(key), f"{where}.{key}")]
    if isinstance(document, list):
        if not isinstance(decoded, list) or len(document) != len(decoded):
            return [where]
        return [
            path
            for index, pair in enumerate(zip(document, decoded, strict=True))
            for path in missing_paths(*pair, f"{where}[{index}]")
        ]
    return [] if document == decoded else [where]


def test_grafanas_types_keep_every_part_of_the_dashboard() -> None:
    """Grafana's SDK decodes and encodes it without loss; it would drop a misspelled field."""
    register_default_plugins()
    read = Dashboard.from_json(load_dashboard())
    assert missing_paths(load_dashboard(), json.loads(JSONEncoder().encode(read))) == []
    wrong = load_dashboard()
    wrong["panels"][1]["targets"][0]["expression"] = wrong["panels"][1]["targets"][0].pop("expr")
    assert missing_paths(wrong, json.loads(JSONEncoder().encode(Dashboard.from_json(wrong)))) == [
        ".panels[1].targets[0].expression"
    ]


def test_panels_do_not_overlap_and_are_described() -> None:
    """On 24 columns, with the selected data source."""
    panels = load_dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used_cells: set[tuple[int, int]] = set()
    for panel in panels:
        position = panel["gridPos"]
        columns, lines = (
            range(position["x"], position["x"] + position["w"]),
            range(position["y"], position["y"] + position["h"]),
        )
        cells = {(column, line) for column in columns for line in lines}
        assert max(columns) < 24
        assert not cells & used_cells, panel["title"]
        used_cells |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            for part in (panel, *panel["targets"]):
                assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_uses_exactly_the_documented_metrics() -> None:
    """Also in its variables."""
    assert {name for query in dashboard_queries().values() for name in metric_names(query)} == KNOWN
    assert metric_names(json.dumps(load_dashboard()["templating"])) <= KNOWN


@pytest.mark.parametrize("rule", load_alert_rules(), ids=lambda rule: rule["alert"])
def test_every_alert_uses_documented_metrics_and_existing_commands(rule: dict[str, Any]) -> None:
    """It has a severity, a summary and a description."""
    assert metric_names(rule["expr"]) <= KNOWN
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    commands = set(re.findall(r"^#+ (pillarbox .+)$", (ROOT / "docs" / "reference" / "cli.md").read_text(), re.MULTILINE))
    groups = {command.rpartition(" ")[0] for command in commands if command.count(" ") == 2}
    for command in re.findall(r"pillarbox [a-z]+(?: [a-z]+)?", rule["annotations"]["description"]):
        words = command.split()
        assert (command if " ".join(words[:2]) in groups else " ".join(words[:2])) in commands, command


def test_the_readme_lists_every_file() -> None:
    """By its name."""
    text = (DEPLOY / "README.md").read_text()
    for file in DEPLOY.rglob("*.[jys]*"):
        assert file.name in text, file
