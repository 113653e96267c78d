"""The HTTP sink under failures of the network, TLS and the server: it does not hang, accept by mistake or show secrets."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from pillarbox import TrackingEvent
from pillarbox.sinks.base import CheckResult, Delivered, Misconfigured, PartialFailure, Rejected, Retry
from pillarbox.sinks.http import HttpSink
from tests.conftest import wait_until
from tests.sinks.http_server import HANG, CannedResponse, Request, Server, always, closed_port_url, run_async
from tests.sinks.test_http import SECRET, batch, result_of

OK = {"Content-Type": "application/json"}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that accepts everything until `respond` is set."""
    with Server() as running:
        yield running


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (CannedResponse(raw=b""), "closed the connection"),
        (CannedResponse(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), "something other than HTTP"),
        (CannedResponse(raw=b"\x00\xff" * 500), "something other than HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 abc\r\n\r\n"), "something other than HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000), "something other than HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), "something other than HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "something other than HTTP"),
        (CannedResponse(raw=b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"refus'), "closed the connection"),
        (CannedResponse(200, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=60), "closed the connection"),
        (CannedResponse(200, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=5), "closed the connection"),
        (CannedResponse(400, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=70), "closed the connection"),
        (
            CannedResponse(raw=b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"refused":[{"ind'),
            "not complete JSON",
        ),
    ],
)
def test_an_incomplete_response_is_retried(server: Server, response: CannedResponse, message: str) -> None:
    """The batch may have been accepted or not; the idempotency key makes the repeat harmless."""
    server.respond = always(response)
    result = result_of(server.url())
    assert isinstance(result, Retry), result
    assert message in result.reason


def test_a_status_counts_although_its_body_is_cut_off(server: Server) -> None:
    """So `Retry-After` is not lost and a misconfiguration is seen."""
    for status, kind in ((503, Retry), (429, Retry), (401, Misconfigured), (413, Rejected)):
        server.respond = always(
            CannedResponse(status, b"x" * 100, {"Retry-After": "7"} if kind is Retry else {}, cut_after_bytes=90)
        )
        result = result_of(server.url())
        assert isinstance(result, kind)
        assert getattr(result, "after_s", 7.0) == 7.0


@pytest.mark.parametrize(
    "response",
    [
        HANG,
        CannedResponse(byte_delay_s=0.5),
        CannedResponse(200, b"x" * 5000, byte_delay_s=0.02),
        CannedResponse(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 500, byte_delay_s=0.02),
    ],
)
def test_no_request_takes_longer_than_its_timeout(server: Server, response: CannedResponse) -> None:
    """Even if bytes keep arriving one by one."""
    server.respond = always(response)
    began = monotonic()
    result = result_of(server.url("#timeout=0.3"))
    assert isinstance(result, Retry)
    assert "within 0.3 s" in result.reason
    assert monotonic() - began < 15


def test_requests_that_time_out_or_are_cancelled_leak_no_connection(server: Server) -> None:
    """However many, and while others wait for a connection: the next request succeeds."""
    server.respond = always(HANG)

    async def work() -> Any:
        sink = HttpSink(server.url("#timeout=3&connections=2"), TrackingEvent)
        tasks = [asyncio.create_task(sink.deliver(batch())) for _ in range(30)]
        # wait: all requests are under way while the test acts
        await asyncio.sleep(0.01)
        for task in tasks[::3]:
            task.cancel()
        result = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(item) for item in result} == {Retry, asyncio.CancelledError}
        server.respond = always(CannedResponse())
        assert await asyncio.gather(*[sink.deliver(batch()) for _ in range(10)]) == [Delivered(3)] * 10
        await sink.close()

    run_async(work())
    wait_until(lambda: server.open_connections == 0)


def test_connections_are_reused_and_bounded(server: Server) -> None:
    """To the number in the URL."""

    async def work() -> None:
        sink = HttpSink(server.url("#connections=3"), TrackingEvent)
        assert sink.capabilities.concurrent
        for _ in range(3):
            await asyncio.gather(*[sink.deliver(batch()) for _ in range(12)])
        await sink.close()

    run_async(work())
    assert server.connections <= 3
    assert len(server.requests) == 36


def test_a_connection_that_the_server_closed_is_replaced(server: Server) -> None:
    """The next request opens another."""
    server.respond = always(CannedResponse(headers={"Connection": "close"}))

    async def work() -> Any:
        sink = HttpSink(server.url(), TrackingEvent)
        result = [await sink.deliver(batch()) for _ in range(3)]
        await sink.close()
        assert await sink.deliver(batch()) == Delivered(3)  # after `close` it opens new connections
        await sink.close()
        return result

    assert run_async(work()) == [Delivered(3)] * 3


def test_a_failed_connection_names_the_address_and_the_cause() -> None:
    """In the words of the operating system."""
    result = result_of(closed_port_url())
    assert isinstance(result, Retry)
    assert "127.0.0.1" in result.reason
    assert "Connect" in result.reason or "refused" in result.reason
    result = result_of("http://nowhere.invalid/")
    assert isinstance(result, Retry)
    assert "nowhere.invalid" in result.reason


def test_a_413_that_arrives_while_the_body_is_being_sent_is_understood() -> None:
    """Proxies respond before they have read the whole body."""
    with Server(body_max=1000) as server:
        for _ in range(5):
            result = result_of(server.url("#compress=none"), batch(20_000))
            assert isinstance(result, Rejected), result
            assert result.rejection.code == "too_large"


def test_a_response_is_read_up_to_a_bound(server: Server) -> None:
    """A long text is accepted; JSON that is cut at the bound is not, because it may reject events."""
    server.respond = always(CannedResponse(200, b"x" * 3_000_000))
    assert result_of(server.url()) == Delivered(3)
    server.respond = always(CannedResponse(200, b'{"refused":[' + b"0," * 1_500_000 + b"0]}", OK))
    assert isinstance(result_of(server.url()), Misconfigured)
    assert result_of(server.url("#answer=status")) == Delivered(3)
    server.respond = always(CannedResponse(200, b"\x1f\x8b", OK | {"Content-Encoding": "gzip"}))
    assert isinstance(result_of(server.url()), Misconfigured)
    server.respond = always(CannedResponse(400, b'{"refused":[' + b"0," * 1_500_000 + b"0]}", OK))
    assert isinstance(result_of(server.url()), Rejected)


def test_rejections_by_index_are_read_from_a_response(server: Server) -> None:
    """With and without an acceptance of the other events."""
    named = json.dumps({"accepted": 2, "refused": [{"index": 1, "code": "c", "reason": "r"}]}).encode()
    server.respond = always(CannedResponse(202, named, OK))
    assert result_of(server.url()) == PartialFailure({1: result_of(server.url()).rejected[1]}, 2)
    server.respond = always(CannedResponse(422, b'{"refused":[2]}', OK))
    assert result_of(server.url()).accepted is None


def test_an_untrusted_certificate_stops_delivery(tls_server: Server, certificate: Path) -> None:
    """The message names ca_file, and no event is sent."""
    result = result_of(tls_server.url())
    assert isinstance(result, Misconfigured)
    assert "ca_file=" in result.reason
    assert tls_server.requests == []
    assert result_of(tls_server.url(f"/e#ca_file={certificate}")) == Delivered(3)
    other = result_of(tls_server.url(f"/e#ca_file={certificate}").replace("localhost", "127.0.0.1"))
    assert isinstance(other, Misconfigured)
    assert "127.0.0.1" in other.reason


def test_a_corrected_ca_file_is_read_without_a_restart(tls_server: Server, certificate: Path, tmp_path: Path) -> None:
    """Delivery resumes by itself."""
    file = tmp_path / "ca.pem"
    other = httpx.create_ssl_context().get_ca_certs(binary_form=True)[0]
    file.write_text(ssl.DER_cert_to_PEM_cert(other))

    async def work() -> None:
        sink = HttpSink(tls_server.url(f"#ca_file={file}"), TrackingEvent)
        assert isinstance(await sink.deliver(batch()), Misconfigured)
        shutil.copy(certificate, file)
        assert await sink.deliver(batch()) == Delivered(3)
        await sink.close()

    run_async(work())


def test_a_proxy_is_used_only_if_the_url_names_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxies in the environment are ignored."""
    with Server(always(CannedResponse(407))) as proxy:
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url())
        assert result_of(server.url()) == Delivered(3)
        assert proxy.requests == []
        monkeypatch.setenv("EVENTS_PROXY", f"http://me:{SECRET}@127.0.0.1:{proxy.port}")
        for scheme in ("http", "https"):
            result = result_of(f"{scheme}://shop.invalid/in#proxy_env=EVENTS_PROXY")
            assert isinstance(result, Misconfigured)
            assert "proxy_env" in result.reason
        assert [request.target for request in proxy.requests] == ["http://shop.invalid/in", "shop.invalid:443"]
        assert all(request.headers["proxy-authorization"].startswith("Basic ") for request in proxy.requests)
        proxy.respond = always(CannedResponse(502))
        assert isinstance(result_of("https://shop.invalid/in#proxy_env=EVENTS_PROXY"), Retry)
        proxy.respond = always(CannedResponse(200))
        assert result_of("http://shop.invalid/in#proxy_env=EVENTS_PROXY") == Delivered(3)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_hangs_in_the_tls_handshake_is_retried(server: Server) -> None:
    """Within the timeout. httpcore leaves that socket to the garbage collector, which emits a warning."""
    result = result_of(server.url("#timeout=0.3").replace("http:", "https:"))
    assert isinstance(result, Retry)
    gc.collect()


def test_a_server_without_tls_is_retried() -> None:
    """A server that is being set up may speak plain HTTP for a while."""
    with Server(greeting=b"220 mail.example ready\r\n") as other:
        result = result_of(other.url().replace("http:", "https:"))
        assert isinstance(result, Retry)
        assert "SSL" in result.reason


def test_an_unusable_ca_file_is_named_with_the_format_it_needs(tmp_path: Path) -> None:
    """A missing file, and a file without a certificate."""
    from pillarbox.errors import SinkUnusableError

    (tmp_path / "empty.pem").write_text("")
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(SinkUnusableError, match=f"{name}.*PEM"):
            result_of(f"https://localhost/#ca_file={tmp_path / name}")


def check(url: str) -> list[CheckResult]:
    async def work() -> list[CheckResult]:
        sink = HttpSink(url, TrackingEvent)
        result = list(await sink.check())
        await sink.close()
        return result

    return run_async(work())


@pytest.mark.parametrize(
    ("response", "ok"),
    [
        *[(CannedResponse(status), True) for status in (200, 204, 400, 404, 405, 422, 501)],
        *[(CannedResponse(status), False) for status in (301, 401, 403, 407, 410, 421, 426, 429, 500, 503)],
        (CannedResponse(200, headers={"Allow": "OPTIONS, post"}), True),
        (CannedResponse(200, headers={"Allow": "GET, HEAD"}), False),
        (CannedResponse(405, headers={"Allow": "GET, HEAD"}), False),
        (HANG, False),
        (CannedResponse(raw=b"nonsense"), False),
    ],
)
def test_check_reports_whether_the_destination_is_reachable(server: Server, response: CannedResponse, ok: bool) -> None:
    """Without sending an event."""
    server.respond = always(response)
    assert check(server.url("#timeout=0.5" if response == HANG else ""))[-1].ok is ok
    assert [request.method for request in server.requests] == ["OPTIONS"]
    assert server.requests[0].raw_body == b""


def test_check_lists_the_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns about plain HTTP and names a missing variable."""
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)
    assert "sends no credentials" in check(server.url())[0].message
    result = check(server.url("#token_env=EVENTS_TOKEN&secret_env=EVENTS_TOKEN&header_env=X-Key:EVENTS_TOKEN"))
    assert [item.ok for item in result] == [True, True, True]
    assert "token in EVENTS_TOKEN, X-Key from EVENTS_TOKEN, a signature with the secret in EVENTS_TOKEN" in result[0].message
    assert "use https" in result[1].message
    assert server.requests[-1].headers["authorization"] == f"Bearer {SECRET}"
    (missing,) = check(server.url("#token_env=NOT_SET_ANYWHERE"))
    assert not missing.ok
    assert "NOT_SET_ANYWHERE" in missing.message
    assert not check(closed_port_url())[-1].ok


def test_no_secret_is_shown_or_logged(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the server returns the whole request, and every logger logs all it can."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)

    def echo(status: int, request: Request) -> CannedResponse:
        text = f"{request.method} {request.target} {request.headers}".encode()
        return CannedResponse(status, text)

    results: list[Any] = []
    for status in (200, 302, 400, 401, 413, 418, 429, 500):
        server.respond = lambda request, status=status: echo(status, request)  # type: ignore[misc]
        results += [result_of(server.url(f"?key={SECRET}x#token_env=EVENTS_TOKEN&secret_env=EVENTS_TOKEN"))]
        results += [result_of(server.url(f"?key={SECRET}x#header_env=X-Key:EVENTS_TOKEN", user=f"me:{SECRET}@"))]
        results += check(server.url(f"?key={SECRET}x#token_env=EVENTS_TOKEN"))
    assert SECRET not in caplog.text
    caplog.set_level(logging.INFO)  # at DEBUG the library logs response headers, and this server returns the request's
    for response in (
        CannedResponse(raw=b"nonsense"),
        HANG,
        CannedResponse(302, headers={"Location": f"http://u:{SECRET}@other.example/{SECRET}"}),
    ):
        server.respond = always(response)
        results.append(result_of(server.url("#token_env=EVENTS_TOKEN&timeout=0.1")))
    results.append(result_of(f"http://me:{SECRET}@127.0.0.1:1/?key={SECRET}"))
    assert SECRET not in repr(results)
    assert SECRET not in caplog.text
    assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
