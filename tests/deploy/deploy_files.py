"""What is in deploy/, read as its tools read it."""

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
    """The folder of prometheus and promtool."""
    done = subprocess.run([ROOT / "tools" / "prometheus"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"deploy/prometheus was not checked: {done.stderr}"
    return Path(done.stdout.strip())


def run_promtool(*arguments: object, stdin: str = "") -> str:
    """What it says of files that it finds nothing wrong with."""
    command = [str(prometheus_tools() / "promtool"), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def load_dashboard() -> dict[str, Any]:
    """Grafana's."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "pillarbox.json").read_text())
    return found


def load_alert_rules() -> list[dict[str, Any]]:
    """The alert rules."""
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def dashboard_queries() -> dict[str, str]:
    """What the dashboard asks, by panel and letter, with every variable at All."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in load_dashboard()["panels"]
        for target in panel.get("targets", ())
    }
    return {name: re.sub(r"\$\w+", ".*", expr.replace("$__rate_interval", "1m")) for name, expr in found.items()}


def metric_names(expression: str) -> set[str]:
    """The names of the metrics that it reads."""
    return {name.removesuffix("_bucket") for name in re.findall(r"\bpillarbox_\w+", expression)}
