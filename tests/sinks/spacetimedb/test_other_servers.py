"""What answers is not what the URL promises: a proxy, a server of an unknown version, one that talks nonsense."""

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
    """Starts a server with these answers and returns its port."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> int:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

            def do_GET(self) -> None:
                """Whatever is asked."""
                status, kind, body = answers(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815 - the base class's name

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (proxy, "is there a proxy in between, or another server at this address? (Welcome to nginx)"),
        (unknown_version, "the server, 7.0.1, does not describe the database as 1.x and 2.x do"),
        (nonsense, "is this SpacetimeDB, and of a version that Pillarbox knows?"),
    ],
)
def test_it_is_said_in_check_state_and_log_and_no_event_is_lost(
    serve: Callable[[Answers], int], tmp_path: Path, answers: Answers, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence; the events stay as they are."""
    url = f"spacetimedb://:t@127.0.0.1:{serve(answers)}/events"
    (*_, finding) = run_check(url)
    assert not finding.ok
    assert said in finding.message
    with Outbox(str(tmp_path / "box"), sink=url) as outbox:
        assert outbox.enqueue(event(1))
        assert not outbox.flush(0.4)
        assert outbox.stats().state.name == "stopped"
        assert said in outbox.stats().last_error
        assert (outbox.stats().dead, outbox.stats().pending_files) == (0, 1)
    assert said in caplog.text
