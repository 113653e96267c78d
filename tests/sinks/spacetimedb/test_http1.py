"""The HTTP/1.1 connection: anything but a complete response closes it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox.sinks.spacetimedb import http1
from pillarbox.sinks.spacetimedb.http1 import ConnectionBrokenError, Http1Connection, Http1Response, connect
from pillarbox.sinks.spacetimedb.pool import PooledConnection, TransportError
from pillarbox.sinks.spacetimedb.url import parse_url
from tests.sinks.http_server import HANG, CannedResponse, Server, always, in_sequence, run_async

HEADERS = [("Host", "localhost")]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
UNENDED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


async def send_request(connection: Http1Connection, content: bytes = b"", timeout_s: float = 30.0) -> Http1Response:
    headers = [*HEADERS, ("Content-Length", str(len(content)))] if content else HEADERS
    return await connection.request("POST" if content else "GET", "/v1/ping", headers, content, timeout_s)


def send_requests(server: Server, *contents: bytes, timeout_s: float = 30.0) -> tuple[list[Http1Response | Exception], bool]:
    """Send requests over one connection; return their results and whether the connection is closed."""

    async def send_all() -> tuple[list[Http1Response | Exception], bool]:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        results: list[Http1Response | Exception] = []
        for content in contents:
            try:
                results.append(await send_request(connection, content, timeout_s))
            except (ConnectionBrokenError, TimeoutError) as error:
                results.append(error)
        is_closed = connection.is_closed
        connection.close()
        await connection.wait_closed()
        return results, is_closed

    return run_async(send_all())


@pytest.mark.parametrize(
    ("response", "body", "stays_open"),
    [
        (CannedResponse(200, b"abcde"), b"abcde", True),
        (CannedResponse(200, b"abcde", byte_delay_s=0.001), b"abcde", True),
        (CannedResponse(raw=CHUNKED, byte_delay_s=0.0), b"abcde", True),
        (CannedResponse(raw=b"HTTP/1.1 100 Continue\r\n\r\n" + CannedResponse(200, b"abcde").to_bytes()), b"abcde", True),
        (CannedResponse(200, b"abcde", {"Connection": "close"}), b"abcde", False),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\n\r\nabcde"), b"abcde", False),  # the end of the connection ends the response
        (CannedResponse(raw=b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nabcde"), b"abcde", False),
        (CannedResponse(500, b""), b"", True),
    ],
)
def test_a_response_is_read_in_every_framing(server: Server, response: CannedResponse, body: bytes, stays_open: bool) -> None:
    """In pieces, in chunks or up to the end of the connection, which then is not reused."""
    server.respond = always(response)
    (results,), was_closed = send_requests(server, b"x" * 100_000)
    assert isinstance(results, Http1Response)
    assert (results.status, results.body) == (500 if not body else 200, body)
    assert server.requests[0].raw_body == b"x" * 100_000
    if response.raw is None:  # the test server closes the connection after a raw response
        assert was_closed is not stays_open


def test_requests_reuse_the_connection(server: Server) -> None:
    """With a body and without one."""
    server.respond = in_sequence(CannedResponse(200, b"1"), CannedResponse(404, b"2"), CannedResponse(200, b"3"))
    results, _ = send_requests(server, b"x", b"", b"y")
    assert [(result.status, result.body) for result in results if isinstance(result, Http1Response)] == [
        (200, b"1"),
        (404, b"2"),
        (200, b"3"),
    ]
    assert ([request.method for request in server.requests], server.connections) == (["POST", "GET", "POST"], 1)


def test_bytes_after_a_response_are_not_the_next_response(server: Server) -> None:
    """The connection is closed; otherwise every later response would belong to the request before."""
    whole = CannedResponse(200, b"first").to_bytes()
    server.respond = in_sequence(
        CannedResponse(raw=whole + CannedResponse(200, b"unasked").to_bytes()), CannedResponse(200, b"second")
    )
    results, was_closed = send_requests(server, b"x", b"y")
    assert isinstance(results[0], Http1Response)
    assert results[0].body == b"first"
    assert type(results[1]) is ConnectionBrokenError
    assert was_closed


def test_a_response_above_the_limit_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill the memory."""
    monkeypatch.setattr(http1, "RESPONSE_BYTES_MAX", 1000)
    server.respond = in_sequence(CannedResponse(200, b"x" * 1000), CannedResponse(200, b"x" * 1001))
    results, was_closed = send_requests(server, b"x", b"y")
    assert [type(result) for result in results] == [Http1Response, ConnectionBrokenError]
    assert "1000 bytes" in str(results[1])
    assert was_closed


def test_a_connection_closed_without_a_response_is_reported(server: Server) -> None:
    """In our words, not those of h11."""
    server.respond = always(CannedResponse(raw=b""))
    results, _ = send_requests(server, b"x")
    assert str(results[0]) == "the server closed it without a response"


@pytest.mark.parametrize(
    "response",
    [
        CannedResponse(raw=b""),
        CannedResponse(raw=UNENDED),
        CannedResponse(raw=b"nonsense\r\n\r\n"),
        CannedResponse(200, b"abcde", cut_after_bytes=20),
    ],
)
def test_an_incomplete_response_is_an_error_and_closes_the_connection(server: Server, response: CannedResponse) -> None:
    """Cut off anywhere, or not HTTP."""
    server.respond = always(response)
    results, was_closed = send_requests(server, b"x", b"x")
    assert [type(result) for result in results] == [ConnectionBrokenError, ConnectionBrokenError]
    assert all(str(result) for result in results)
    assert was_closed


def test_the_timeout_limits_a_pause_and_not_the_whole_response(server: Server) -> None:
    """A slow response that makes progress may take longer."""
    server.respond = always(HANG)
    (results,), was_closed = send_requests(server, b"x", timeout_s=0.05)
    assert isinstance(results, TimeoutError)
    assert was_closed
    server.respond = always(CannedResponse(200, b"x" * 30, byte_delay_s=0.02))
    (results,), _ = send_requests(server, b"x", timeout_s=1.0)
    assert isinstance(results, Http1Response)


def test_a_response_before_the_request_is_sent_counts_and_closes_the_connection(server: Server) -> None:
    """A 413, for example; the rest of the body would be taken for the next request."""
    server.body_max = 1000
    (results,), was_closed = send_requests(server, b"x" * 50_000_000)
    assert isinstance(results, Http1Response)
    assert results.status == 413
    assert was_closed


def test_a_cancelled_request_closes_its_connection(server: Server) -> None:
    """Its response would be taken for that of the next request."""
    server.respond = in_sequence(HANG, CannedResponse(200, b"second"))

    async def cancelled() -> tuple[bool, bytes]:
        pooled = PooledConnection(parse_url(f"spacetimedb://127.0.0.1:{server.port}/db"))
        call = asyncio.create_task(pooled.request("POST", "/", b"first"))
        while not server.requests:  # noqa: ASYNC110 - the server runs in another thread
            # wait: the pause between two polls of the server, which runs in a thread
            await asyncio.sleep(0.001)
        connection = pooled._connection
        call.cancel()
        await asyncio.wait({call})
        response = await pooled.request("POST", "/", b"second")
        await pooled.close()
        assert connection is not None
        return connection.is_closed, response.body

    assert run_async(cancelled()) == (True, b"second")
    assert server.connections == 2


@pytest.mark.parametrize("unasked", [CannedResponse(408, b"too slow").to_bytes(), b"nonsense\r\n\r\n"])
def test_a_response_before_any_request_closes_the_connection(server: Server, unasked: bytes) -> None:
    """No request is sent over such a connection."""
    server.greeting = unasked

    async def greeted() -> bool:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        await connection.wait_closed()
        return connection.is_closed

    assert run_async(greeted())


def test_a_pooled_connection_that_was_closed_is_replaced_visibly(server: Server) -> None:
    """`last_used` changes; the confirmation compares it."""

    async def sockets() -> list[object]:
        connection = PooledConnection(parse_url(f"spacetimedb://127.0.0.1:{server.port}/db"))
        results = []
        for _ in range(3):
            await connection.request("GET", "/")
            results.append(connection.last_used)
            if len(results) == 2:
                connection.last_used.close()
        await connection.close()
        await connection.close()
        return results

    first, second, third = run_async(sockets())
    assert first is second
    assert second is not third


def test_an_invalid_request_is_an_error_and_nothing_of_it_is_sent(server: Server) -> None:
    """A line feed in a header, for example."""

    async def broken() -> tuple[str, bool]:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        assert (await send_request(connection)).status == 200
        try:
            await connection.request("GET", "/", [*HEADERS, ("X", "a\r\nb")], b"", 10)
        except ConnectionBrokenError as error:
            return str(error), connection.is_closed
        return "", False

    message, closed = run_async(broken())
    assert message
    assert closed
    assert len(server.requests) == 1


def test_an_untrusted_certificate_is_an_error(
    certificate: Path, tls_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trusted are the authorities of the system and of certifi, for the host's name."""

    async def call(host: str, port: int) -> bytes:
        connection = PooledConnection(parse_url(f"spacetimedb+https://{host}:{port}/db"))
        try:
            return (await connection.request("POST", "/", b"x" * 300_000)).body
        finally:
            await connection.close()

    def assert_refused(host: str, port: int) -> None:
        with pytest.raises(TransportError, match="certificate"):
            run_async(call(host, port))

    with Server(tls=tls_context, respond=always(CannedResponse(200, b"safe"))) as safe:
        assert_refused("localhost", safe.port)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert_refused("127.0.0.1", safe.port)
        assert run_async(call("localhost", safe.port)) == b"safe"
    assert [request.raw_body for request in safe.requests] == [b"x" * 300_000]
