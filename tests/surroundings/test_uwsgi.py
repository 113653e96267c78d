"""uWSGI embeds Python and forks in C: its master loads the application, and its workers are forked from the master."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.surroundings.server import ROOT, check_delivery, free_port, post_events, running

UWSGI = Path(sys.executable).parent / "uwsgi"
if not UWSGI.exists():
    pytest.skip("uWSGI is not installed (pyuwsgi)", allow_module_level=True)

WORKERS = 3


def command(port: int, *options: str) -> list[str]:
    served = ("--http-socket", f"127.0.0.1:{port}", "--wsgi", "tests.surroundings.wsgi_app", "--venv", sys.prefix, "--need-app")
    life = ("--master", "--workers", str(WORKERS), "--die-on-term", "--worker-reload-mercy", "10")
    return [str(UWSGI), *served, *life, *options]


@pytest.mark.parametrize("used_at_import", [False, True], ids=["used after the fork", "used before the fork"])
@pytest.mark.parametrize("hooks", [False, True], ids=["forks without hooks", "forks with hooks"])
@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_each_event_of_uwsgi_workers_arrives_once_at_each_sink(
    tmp_path: Path, deliver: str, hooks: bool, used_at_import: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several workers share the outbox that the master created."""
    if used_at_import:
        monkeypatch.setenv("USE_AT_IMPORT", "1")
    port = free_port()
    options = ["--enable-threads", *(["--py-call-uwsgi-fork-hooks"] if hooks else [])]
    log = check_delivery(command(port, *options), port, tmp_path, deliver=deliver)
    assert "Traceback" not in log


def test_without_threads_the_log_names_the_option(tmp_path: Path) -> None:
    """The events of the requests are stored."""
    port = free_port()
    environ = {"OUTBOX": json.dumps({"directory": str(tmp_path / "box")}), "PYTHONPATH": str(ROOT)}
    with running(command(port), tmp_path, port, environ):
        post_events(port, 10)
    assert "add enable-threads" in (tmp_path / "server.log").read_text()
