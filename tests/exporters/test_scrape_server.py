"""The metrics port under clients that mean harm: it holds few descriptors, waits for nobody, and answers only what names it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox.exporters.scrape_server import Response, ScrapeServer
from pillarbox.system.sockets import Socket
from tests.conftest import wait_until
from tests.exporters.scraping import fetch, fill_outbox, parse_samples, sample_value, start_deliver

PAGE = b"x 1\n" * 100
GET = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class RunningServer:
    """A server in a thread, and what it renders."""

    def __init__(self, host: str = "127.0.0.1", page: bytes = PAGE) -> None:
        self.page = page
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = Socket(fileno=socket.create_server((host, 0), family=family).detach())
        self.port = listener.getsockname()[1]
        self.host = host
        self.server = ScrapeServer(listener, host, self.render)
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def render(self, query: str, headers: dict[str, str]) -> Response:
        if not self.page:
            raise ValueError("there is nothing to show")
        return Response("200 OK", [("Content-Type", "text/plain")], self.page)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)

    def exchange(self, request: bytes) -> bytes:
        """Send a request and read until the server closes the connection."""
        with self.connect() as client:
            client.sendall(request)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            answer += data
    return answer


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """Listening on a loopback address."""
    running = RunningServer()
    yield running
    running.server.stop()
    running.thread.join(30)
    assert not running.thread.is_alive()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_a_page_is_served(server: RunningServer) -> None:
    """Whole, and the connection ends."""
    answer = server.exchange(GET)
    assert status_of(answer) == 200
    assert answer.endswith(PAGE)
    assert b"Content-Length: 400\r\n" in answer


def test_a_request_may_come_in_pieces(server: RunningServer) -> None:
    """As from a slow network."""
    with server.connect() as client:
        for at in range(0, len(GET), 7):
            client.sendall(GET[at : at + 7])
        assert status_of(read_all(client)) == 200


def test_a_page_larger_than_the_buffers_is_sent_whole() -> None:
    """To a client that reads slowly."""
    running = RunningServer(page=b"y" * 20_000_000)
    try:
        assert len(running.exchange(GET)) > 20_000_000
    finally:
        running.server.stop()
        running.thread.join(30)


@pytest.mark.parametrize("beginning", [b"", b"G", b"GET /metrics HTTP/1.1\r\nX: "])
def test_slow_clients_cost_a_handful_of_descriptors_and_keep_no_scraper_out(server: RunningServer, beginning: bytes) -> None:
    """Delivery needs the descriptors; a client that drips is closed for one that asks."""
    before, threads = open_descriptors(), set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(245)]
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(beginning)
        assert status_of(server.exchange(GET)) == 200
        wait_until(lambda: open_descriptors() - before <= len(clients) + 8)
        assert len(set(threading.enumerate()) - threads) < 20
        assert status_of(server.exchange(GET)) == 200


def test_a_dripping_request_has_a_deadline_as_a_whole(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each byte."""
    monkeypatch.setattr("pillarbox.exporters.scrape_server._REQUEST_MAX_S", 0.3)
    with server.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")

        def is_closed() -> bool:
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        wait_until(is_closed, 30)


@pytest.mark.parametrize(
    "request_bytes", [b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000, b"x" * 100_000, b"a:b\r\n" * 30_000]
)
def test_a_large_head_is_rejected(server: RunningServer, request_bytes: bytes) -> None:
    """Before it takes memory."""
    with server.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(request_bytes)
        answer = read_all(client)
    assert answer == b"" or status_of(answer) == 431


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),
        (b"GET /other HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
        (b"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
        (b"GET /metrics?name%5B%5D=x HTTP/1.1\r\nHost: localhost:9464\r\nX: \xff\r\n\r\n", 200),
    ],
)
def test_a_request_is_answered_by_what_it_is(server: RunningServer, request_bytes: bytes, status: int) -> None:
    """Only a GET of the page gets it."""
    assert status_of(server.exchange(request_bytes)) == status


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9464", True),
        ("[::1]:9464", True),
        ("10.0.0.5", True),
        ("localhost", True),
        ("LOCALHOST.:1", True),
        ("app.localhost", True),
        (socket.gethostname(), True),
        ("evil.example", False),
        ("evil.example:9464", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example@127.0.0.1", False),
        ("127.0.0.1/evil.example", False),
        ("", False),
        ("[", False),
        ("127.0.0.1 evil.example", False),
    ],
)
def test_the_host_must_name_this_machine(server: RunningServer, host: str, allowed: bool) -> None:
    """A page whose name resolves to 127.0.0.1 is read by a browser under its own name, not under that of the machine."""
    answer = server.exchange(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert (status_of(answer) == 200) is allowed
    assert allowed or PAGE not in answer


def test_the_name_in_the_option_is_allowed() -> None:
    """So a name of one's own can be used on a loopback address too."""
    listener = Socket(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    port = listener.getsockname()[1]
    server = ScrapeServer(listener, "Metrics.Internal.", lambda _query, _headers: Response("200 OK", [], b""))
    thread = threading.Thread(target=server.serve)
    thread.start()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: metrics.internal:1\r\n\r\n")
        assert status_of(read_all(client)) == 200
    server.stop()
    thread.join(30)


def test_an_error_while_the_page_is_made_ends_only_that_request() -> None:
    """The next one is served."""
    running = RunningServer()
    page = running.page
    running.page = b""
    try:
        assert status_of(running.exchange(GET)) == 500
        running.page = page
        assert status_of(running.exchange(GET)) == 200
    finally:
        running.server.stop()
        running.thread.join(30)


def descriptors_of(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_delivery_goes_on_beside_245_dripping_connections(tmp_path: Path) -> None:
    """With few descriptors, as a service may have."""
    fill_outbox(tmp_path / "box")
    sink = ["--sink", "sqlite:///events.db"]
    process = start_deliver("-d", "box", *sink, "--metrics", "127.0.0.1:0", cwd=tmp_path)
    try:
        assert process.stderr
        url = process.stderr.readline().removeprefix("INFO serving metrics at ").strip()
        port = int(url.split(":")[2].partition("/")[0])
        with contextlib.ExitStack() as stack:
            for _ in range(245):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                with contextlib.suppress(OSError):
                    client.sendall(b"GET /metr")
            wait_until(lambda: sample_value(parse_samples(fetch(url)), "pillarbox_delivered_total") == 4)
            assert descriptors_of(process) < 60
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
