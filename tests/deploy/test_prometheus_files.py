"""Alert rules, queries and the endpoint, checked by Prometheus's own tools and by a Prometheus that runs."""

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


def test_promtool_finds_the_rules_and_the_example_right() -> None:
    """The example reads the rules."""
    said = run_promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"SUCCESS: {len(load_alert_rules())} rules found" in said


def test_every_alert_has_a_case_in_which_it_speaks_and_one_in_which_it_must_not() -> None:
    """And promtool finds that it does so."""
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {(case["alertname"], bool(case["exp_alerts"])) for case in cases} == {
        (rule["alert"], speaks) for rule in load_alert_rules() for speaks in (True, False)
    }
    assert "SUCCESS" in run_promtool("test", "rules", TESTS)


def test_promtool_finds_the_queries_of_the_dashboard_right(tmp_path: Path) -> None:
    """As the expressions of recording rules."""
    recorded = [{"record": f"query:{at}", "expr": query} for at, query in enumerate(dashboard_queries().values())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"SUCCESS: {len(recorded)} rules found" in run_promtool("check", "rules", tmp_path / "queries.yml")


def test_promtool_finds_the_names_and_texts_of_the_endpoint_right(tmp_path: Path) -> None:
    """What `pillarbox deliver --metrics` serves."""
    fill_outbox(tmp_path / "box")
    with running_deliver(tmp_path) as url:
        assert run_promtool("check", "metrics", stdin=fetch(url)) == ""


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """The address of a Prometheus that has the example's configuration, but scrapes `target`, and each second."""
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


def asked(address: str, query: str) -> list[Any]:
    """What it answers."""
    answer = json.loads(fetch(f"{address}/api/v1/query?{urlencode({'query': query})}"))
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found


def until_nothing(wrong: Callable[[], object]) -> None:
    """Look again until nothing is wrong."""
    deadline = time.monotonic() + WAIT_S
    while found := wrong():
        assert time.monotonic() < deadline, found
        threading.Event().wait(0.1)


def standing(address: str) -> set[tuple[str, str, str]]:
    """How each rule stands: its name, whether it can be evaluated, and whether it speaks."""
    (group,) = json.loads(fetch(f"{address}/api/v1/rules"))["data"]["groups"]
    return {(rule["name"], rule["health"], rule["state"]) for rule in group["rules"]}


def has_scraped(address: str) -> bool:
    try:
        return bool(asked(address, 'count_over_time(pillarbox_state{state="idle"}[1m]) >= 3'))
    except OSError:
        return False  # it has not begun


def test_a_prometheus_that_scrapes_a_deliverer_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """Where they read what a deliverer tells, with numbers; no rule fails, and no alert speaks of an outbox that is well."""
    fill_outbox(tmp_path / "box")
    told = {row.prometheus_name for row in documented_metrics() if "deliver" in row.source}
    (tmp_path / "prometheus").mkdir()
    with running_deliver(tmp_path) as url:
        scrape_until(url, is_idle)  # all that there is to tell is told from the first scrape on
        with prometheus(tmp_path / "prometheus", url.split("/")[2]) as address:
            log = tmp_path / "prometheus" / "log"
            until_nothing(lambda: "" if has_scraped(address) else f"nothing is scraped: {log.read_text()}")
            # A scrape that took too long leaves nothing to read, and an alert pending, until the next one.
            until_nothing(
                lambda: [
                    name
                    for name, query in dashboard_queries().items()
                    if not asked(address, query) and metric_names(query) <= told
                ]
            )
            expected = {(rule["alert"], "ok", "inactive") for rule in load_alert_rules()}
            until_nothing(lambda: standing(address) ^ expected)
