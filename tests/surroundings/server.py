"""Starts a WSGI server with `wsgi_app.py` in a separate process, posts events to it, and checks where they arrived."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.sinks.http_server import Server

ROOT = Path(__file__).parents[2]
CLIENTS = 8


def free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        port: int = any_socket.getsockname()[1]
        return port


def request(port: int, target: str, method: str = "GET") -> str:
    """The body of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        body = response.read().decode()
    finally:
        connection.close()
    assert response.status == 200, body
    return body


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(command: Sequence[str], folder: Path, port: int, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; then stop it as a service manager does."""
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def post_events(port: int, count: int) -> None:
    """Store `count` events, from several clients at once."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda number: request(port, f"/enqueue/{number}", "POST"), range(count)))
    assert answers == ["stored"] * count


def sqlite_scopes(path: Path) -> list[str]:
    """The numbers of the events that arrived in the database."""
    if not path.exists():
        return []
    database = sqlite3.connect(path)
    try:
        return [row[0] for row in database.execute("SELECT scope_id FROM tracking_event")]
    except sqlite3.OperationalError:
        return []
    finally:
        database.close()


def http_scopes(server: Server) -> list[str]:
    """The same for the HTTP endpoint."""
    return [event["scope_id"] for request in server.requests for event in request.events]


def check_delivery(command: Sequence[str], port: int, folder: Path, *, count: int = 100, **settings: Any) -> str:
    """Post events to a server that delivers them to SQLite and by HTTP; each must arrive once. Returns the server's log."""
    with Server() as endpoint:
        sinks = {"table": f"sqlite:///{folder}/events.db", "web": endpoint.url()}
        outbox = {"directory": str(folder / "box"), "sinks": sinks, "flush_interval": 0.1} | settings
        environ = {"OUTBOX": json.dumps(outbox), "PYTHONPATH": str(ROOT)}
        with running(command, folder, port, environ):
            post_events(port, count)
            assert request(port, "/asyncio") == "a coroutine ran"
            log = folder / "server.log"
            wait_until(lambda: len(sqlite_scopes(folder / "events.db")) >= count, 30)
            wait_until(lambda: len(http_scopes(endpoint)) >= count, 30)
            assert request(port, "/flush").startswith("True"), log.read_text()
        expected = Counter(map(str, range(count)))
        assert Counter(sqlite_scopes(folder / "events.db")) - Counter(["import"]) == expected
        assert Counter(http_scopes(endpoint)) - Counter(["import"]) == expected
    verify = [sys.executable, "-m", "pillarbox", "verify", "-d", str(folder / "box")]
    verified = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    return log.read_text()
