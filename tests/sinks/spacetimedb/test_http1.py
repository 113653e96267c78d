"""One connection: whatever comes back over it, it is an answer, or nothing may be asked over it any more."""

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


async def ask(connection: Http1Connection, content: bytes = b"", timeout_s: float = 30.0) -> Http1Response:
    headers = [*HEADERS, ("Content-Length", str(len(content)))] if content else HEADERS
    return await connection.request("POST" if content else "GET", "/v1/ping", headers, content, timeout_s)


def talk(server: Server, *contents: bytes, timeout_s: float = 30.0) -> tuple[list[Http1Response | Exception], bool]:
    """What comes of so many calls over one connection, and whether that is closed by then."""

    async def all_of_it() -> tuple[list[Http1Response | Exception], bool]:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        found: list[Http1Response | Exception] = []
        for content in contents:
            try:
                found.append(await ask(connection, content, timeout_s))
            except (ConnectionBrokenError, TimeoutError) as error:
                found.append(error)
        is_closed = connection.is_closed
        connection.close()
        await connection.wait_closed()
        return found, is_closed

    return run_async(all_of_it())


@pytest.mark.parametrize(
    ("say", "body", "goes_on"),
    [
        (CannedResponse(200, b"abcde"), b"abcde", True),
        (CannedResponse(200, b"abcde", byte_delay_s=0.001), b"abcde", True),
        (CannedResponse(raw=CHUNKED, byte_delay_s=0.0), b"abcde", True),
        (CannedResponse(raw=b"HTTP/1.1 100 Continue\r\n\r\n" + CannedResponse(200, b"abcde").to_bytes()), b"abcde", True),
        (CannedResponse(200, b"abcde", {"Connection": "close"}), b"abcde", False),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\n\r\nabcde"), b"abcde", False),  # ends where the connection does
        (CannedResponse(raw=b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nabcde"), b"abcde", False),
        (CannedResponse(500, b""), b"", True),
    ],
)
def test_an_answer_is_read_however_it_comes(server: Server, say: CannedResponse, body: bytes, goes_on: bool) -> None:
    """In pieces, in chunks, up to the end of the connection; where that ends with it, nothing more is asked."""
    server.respond = always(say)
    (found,), was_closed = talk(server, b"x" * 100_000)
    assert isinstance(found, Http1Response)
    assert (found.status, found.body) == (500 if not body else 200, body)
    assert server.requests[0].raw_body == b"x" * 100_000
    if say.raw is None:  # the server hangs up by itself after an answer that it was given byte for byte
        assert was_closed is not goes_on


def test_call_after_call_goes_over_the_same_connection(server: Server) -> None:
    """With a content and without."""
    server.respond = in_sequence(CannedResponse(200, b"1"), CannedResponse(404, b"2"), CannedResponse(200, b"3"))
    found, _ = talk(server, b"x", b"", b"y")
    assert [(one.status, one.body) for one in found if isinstance(one, Http1Response)] == [
        (200, b"1"),
        (404, b"2"),
        (200, b"3"),
    ]
    assert ([request.method for request in server.requests], server.connections) == (["POST", "GET", "POST"], 1)


def test_what_comes_behind_an_answer_is_none_to_the_next_call(server: Server) -> None:
    """The connection is done with: every later answer would be that of the call before."""
    whole = CannedResponse(200, b"first").to_bytes()
    server.respond = in_sequence(
        CannedResponse(raw=whole + CannedResponse(200, b"unasked").to_bytes()), CannedResponse(200, b"second")
    )
    found, was_closed = talk(server, b"x", b"y")
    assert isinstance(found[0], Http1Response)
    assert found[0].body == b"first"
    assert type(found[1]) is ConnectionBrokenError
    assert was_closed


def test_an_answer_that_has_no_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill the memory."""
    monkeypatch.setattr(http1, "RESPONSE_BYTES_MAX", 1000)
    server.respond = in_sequence(CannedResponse(200, b"x" * 1000), CannedResponse(200, b"x" * 1001))
    found, was_closed = talk(server, b"x", b"y")
    assert [type(one) for one in found] == [Http1Response, ConnectionBrokenError]
    assert "1000 bytes" in str(found[1])
    assert was_closed


def test_a_server_that_hangs_up_is_said_to_have(server: Server) -> None:
    """Not in the words of the library below."""
    server.respond = always(CannedResponse(raw=b""))
    found, _ = talk(server, b"x")
    assert str(found[0]) == "the server hung up without an answer"


@pytest.mark.parametrize(
    "say",
    [
        CannedResponse(raw=b""),
        CannedResponse(raw=UNENDED),
        CannedResponse(raw=b"nonsense\r\n\r\n"),
        CannedResponse(200, b"abcde", cut_after_bytes=20),
    ],
)
def test_what_is_no_whole_answer_is_an_error_and_the_connection_is_done_with(server: Server, say: CannedResponse) -> None:
    """Cut anywhere, or not HTTP: nobody knows whether the call was carried out."""
    server.respond = always(say)
    found, was_closed = talk(server, b"x", b"x")
    assert [type(one) for one in found] == [ConnectionBrokenError, ConnectionBrokenError]
    assert all(str(one) for one in found)
    assert was_closed


def test_an_answer_that_does_not_come_is_given_up_and_a_slow_one_is_not(server: Server) -> None:
    """As long as it goes on, it may take longer than that in all."""
    server.respond = always(HANG)
    (found,), was_closed = talk(server, b"x", timeout_s=0.05)
    assert isinstance(found, TimeoutError)
    assert was_closed
    server.respond = always(CannedResponse(200, b"x" * 30, byte_delay_s=0.02))
    (found,), _ = talk(server, b"x", timeout_s=1.0)
    assert isinstance(found, Http1Response)


def test_an_answer_before_all_was_sent_counts_and_the_connection_is_closed(server: Server) -> None:
    """A 413, say: the rest of the body would be taken for the next call."""
    server.body_max = 1000
    (found,), was_closed = talk(server, b"x" * 50_000_000)
    assert isinstance(found, Http1Response)
    assert found.status == 413
    assert was_closed


def test_a_call_that_is_cancelled_takes_its_connection_with_it(server: Server) -> None:
    """Its answer would be taken for the next one's."""
    server.respond = in_sequence(HANG, CannedResponse(200, b"second"))

    async def cancelled() -> tuple[bool, bytes]:
        lane = PooledConnection(parse_url(f"spacetimedb://127.0.0.1:{server.port}/db"))
        call = asyncio.create_task(lane.request("POST", "/", b"first"))
        while not server.requests:  # noqa: ASYNC110 - it runs in another thread
            await asyncio.sleep(0.001)
        connection = lane._connection
        call.cancel()
        await asyncio.wait({call})
        reply = await lane.request("POST", "/", b"second")
        await lane.close()
        assert connection is not None
        return connection.is_closed, reply.body

    assert run_async(cancelled()) == (True, b"second")
    assert server.connections == 2


@pytest.mark.parametrize("unasked", [CannedResponse(408, b"too slow").to_bytes(), b"nonsense\r\n\r\n"])
def test_what_is_said_unasked_is_no_answer(server: Server, unasked: bytes) -> None:
    """Nothing is asked over a connection that began with it."""
    server.greeting = unasked

    async def greeted() -> bool:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        await connection.wait_closed()
        return connection.is_closed

    assert run_async(greeted())


def test_a_lane_whose_connection_was_closed_makes_another_and_says_so(server: Server) -> None:
    """By the `last_used` that its last answer came over, which is what a confirmation looks at."""

    async def sockets() -> list[object]:
        lane = PooledConnection(parse_url(f"spacetimedb://127.0.0.1:{server.port}/db"))
        found = []
        for _ in range(3):
            await lane.request("GET", "/")
            found.append(lane.last_used)
            if len(found) == 2:
                lane.last_used.close()
        await lane.close()
        await lane.close()
        return found

    first, second, third = run_async(sockets())
    assert first is second
    assert second is not third


def test_what_cannot_be_sent_is_an_error_and_not_half_sent(server: Server) -> None:
    """A line feed in a header, say."""

    async def broken() -> tuple[str, bool]:
        connection = await connect("127.0.0.1", server.port, 10, secure=False)
        assert (await ask(connection)).status == 200
        try:
            await connection.request("GET", "/", [*HEADERS, ("X", "a\r\nb")], b"", 10)
        except ConnectionBrokenError as error:
            return str(error), connection.is_closed
        return "", False

    said, closed = run_async(broken())
    assert said
    assert closed
    assert len(server.requests) == 1


def test_over_tls_the_certificate_must_be_vouched_for(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's authorities or certifi's; for the name that is called."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, f"{certificate}.key")

    async def call(host: str, port: int) -> bytes:
        lane = PooledConnection(parse_url(f"spacetimedb+https://{host}:{port}/db"))
        try:
            return (await lane.request("POST", "/", b"x" * 300_000)).body
        finally:
            await lane.close()

    def assert_refused(host: str, port: int) -> None:
        with pytest.raises(TransportError, match="certificate"):
            run_async(call(host, port))

    with Server(tls=context, respond=always(CannedResponse(200, b"safe"))) as safe:
        assert_refused("localhost", safe.port)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert_refused("127.0.0.1", safe.port)
        assert run_async(call("localhost", safe.port)) == b"safe"
    assert [request.raw_body for request in safe.requests] == [b"x" * 300_000]
