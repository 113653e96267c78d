"""Reads the files in deploy/ with the tools that use them."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"


@cache
def prometheus_tools() -> Path:
    """Return the directory of prometheus and promtool."""
    completed = subprocess.run([ROOT / "tools" / "prometheus"], capture_output=True, text=True, timeout=600, check=False)
    assert completed.returncode == 0, f"deploy/prometheus was not checked: {completed.stderr}"
    return Path(completed.stdout.strip())


def run_promtool(*arguments: object, stdin: str = "") -> str:
    """Run promtool, which must succeed, and return its output."""
    command = [str(prometheus_tools() / "promtool"), *map(str, arguments)]
    completed = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout + completed.stderr


def load_dashboard() -> dict[str, Any]:
    """Return the Grafana dashboard."""
    result: dict[str, Any] = json.loads((DEPLOY / "grafana" / "pillarbox.json").read_text())
    return result


def load_alert_rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    result: list[dict[str, Any]] = group["rules"]
    return result


def dashboard_queries() -> dict[str, str]:
    """Return the dashboard's queries by panel and letter, with every variable set to All."""
    result = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in load_dashboard()["panels"]
        for target in panel.get("targets", ())
    }
    return {name: re.sub(r"\$\w+", ".*", expr.replace("$__rate_interval", "1m")) for name, expr in result.items()}


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics in an expression."""
    return {name.removesuffix("_bucket") for name in re.findall(r"\bpillarbox_\w+", expression)}
