"""Servers that are not a known SpacetimeDB: a proxy, an unknown version, and one with an invalid schema."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pillarbox import Outbox
from tests.conftest import event
from tests.sinks.spacetimedb.server import run_check

Answers = Callable[[str], tuple[int, str, bytes]]  # path -> status, content type, body
HTML = b"<!doctype html><html><head><title>Welcome to nginx</title></head></html>"


def proxy(_path: str) -> tuple[int, str, bytes]:
    return 200, "text/html", HTML


def unknown_version(path: str) -> tuple[int, str, bytes]:
    if path == "/v1/health":
        return 200, "application/json", b'{"version":"7.0.1"}'
    return 400, "text/plain", b"Failed to deserialize query string: unknown variant `9`, expected `11`"


def nonsense(_path: str) -> tuple[int, str, bytes]:
    return 200, "application/json", b'{"typespace":5}'


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], int]]:
    """Return a function that starts a server with these responses and returns its port."""
    servers: list[ThreadingHTTPServer] = []

    def start(responses: Answers) -> int:
        class ResponseHandler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Log nothing."""

            def do_GET(self) -> None:
                """Send the response for the path."""
                status, kind, body = responses(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the base class's name

        server = ThreadingHTTPServer(("127.0.0.1", 0), ResponseHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (
            proxy,
            "HTML with status 200 (Welcome to nginx), so it is not from SpacetimeDB: check the URL, and whether a proxy is in between",
        ),
        (unknown_version, "the server (7.0.1) does not describe the database as SpacetimeDB 1.x and 2.x do"),
        (nonsense, "check the URL and the server's version"),
    ],
)
def test_check_state_and_log_report_the_server_and_no_event_is_lost(
    serve: Callable[[Answers], int], tmp_path: Path, responses: Answers, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Delivery stops, and the events stay pending."""
    url = f"spacetimedb://:t@127.0.0.1:{serve(responses)}/events"
    (*_, check) = run_check(url)
    assert not check.ok
    assert message in check.message
    with Outbox(str(tmp_path / "box"), sink=url) as outbox:
        assert outbox.enqueue(event(1))
        assert not outbox.flush(0.4)
        assert outbox.stats().state.name == "stopped"
        assert message in outbox.stats().last_error
        assert (outbox.stats().dead, outbox.stats().pending_files) == (0, 1)
    assert message in caplog.text
