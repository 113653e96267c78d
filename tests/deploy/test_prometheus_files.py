"""Prometheus's own tools and a running Prometheus check the alert rules, the queries and the endpoint."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from tests.conftest import wait_until
from tests.deploy.deploy_files import (
    PROMETHEUS,
    dashboard_queries,
    load_alert_rules,
    metric_names,
    prometheus_tools,
    run_promtool,
)
from tests.exporters.scraping import WAIT_S, documented_metrics, fetch, fill_outbox, running_deliver, scrape_until
from tests.exporters.test_prometheus import is_idle

TESTS = PROMETHEUS / "alerts_test.yml"
_LISTENING = re.compile(r'"Listening on" address=(\S+)\s')


def test_promtool_accepts_the_rules_and_the_example_configuration() -> None:
    """The example loads the rules."""
    output = run_promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"SUCCESS: {len(load_alert_rules())} rules found" in output


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    """Promtool runs both."""
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {(case["alertname"], bool(case["exp_alerts"])) for case in cases} == {
        (rule["alert"], fires) for rule in load_alert_rules() for fires in (True, False)
    }
    assert "SUCCESS" in run_promtool("test", "rules", TESTS)


def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """As expressions of recording rules."""
    recorded = [{"record": f"query:{at}", "expr": query} for at, query in enumerate(dashboard_queries().values())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"SUCCESS: {len(recorded)} rules found" in run_promtool("check", "rules", tmp_path / "queries.yml")


def test_promtool_accepts_the_names_and_descriptions_of_the_endpoint(tmp_path: Path) -> None:
    """Those that `pillarbox deliver --metrics` serves."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as url:
        assert run_promtool("check", "metrics", stdin=fetch(url)) == ""


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Run a Prometheus with the example configuration that scrapes `target` each second; yields its URL."""
    config = (PROMETHEUS / "prometheus.yml").read_text().replace("15s", "1s").replace("127.0.0.1:9464", target)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    command = [
        str(prometheus_tools() / "prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
    ]
    command.append("--web.listen-address=127.0.0.1:0")
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: _LISTENING.search((folder / "log").read_text()) is not None)
            yield "http://" + _LISTENING.findall((folder / "log").read_text())[0]
        finally:
            process.terminate()


def query_prometheus(address: str, query: str) -> list[Any]:
    """Return the result of a query."""
    response = json.loads(fetch(f"{address}/api/v1/query?{urlencode({'query': query})}"))
    assert response["status"] == "success", response
    result: list[Any] = response["data"]["result"]
    return result


def wait_until_empty(list_problems: Callable[[], object]) -> None:
    """Wait until `list_problems` returns nothing."""
    deadline = time.monotonic() + WAIT_S
    while result := list_problems():
        assert time.monotonic() < deadline, result
        # wait: the time between two queries
        threading.Event().wait(0.1)  # the time between two queries


def rule_states(address: str) -> set[tuple[str, str, str]]:
    """Return the name, health and state of each rule."""
    (group,) = json.loads(fetch(f"{address}/api/v1/rules"))["data"]["groups"]
    return {(rule["name"], rule["health"], rule["state"]) for rule in group["rules"]}


def has_scraped(address: str) -> bool:
    try:
        return bool(query_prometheus(address, 'count_over_time(pillarbox_state{state="idle"}[1m]) >= 3'))
    except OSError:
        return False  # it has not started


def test_a_running_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """With values for the metrics of the delivery process; no rule fails, and no alert fires for a healthy outbox."""
    fill_outbox(tmp_path / "box")
    delivery_metrics = {row.prometheus_name for row in documented_metrics() if "deliver" in row.source}
    (tmp_path / "prometheus").mkdir()
    with running_deliver(tmp_path) as url:
        scrape_until(url, is_idle)  # so that the first scrape has all metrics
        with prometheus(tmp_path / "prometheus", url.split("/")[2]) as address:
            log = tmp_path / "prometheus" / "log"
            wait_until_empty(lambda: "" if has_scraped(address) else f"no scrape succeeded: {log.read_text()}")
            # After a scrape that timed out, queries are empty and alerts pending until the next one.
            wait_until_empty(
                lambda: [
                    name
                    for name, query in dashboard_queries().items()
                    if not query_prometheus(address, query) and metric_names(query) <= delivery_metrics
                ]
            )
            expected = {(rule["alert"], "ok", "inactive") for rule in load_alert_rules()}
            wait_until_empty(lambda: rule_states(address) ^ expected)
