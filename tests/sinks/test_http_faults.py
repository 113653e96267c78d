"""The HTTP sink where the network, TLS or the server fail: nothing hangs, nothing is taken for acceptance, nothing is shown."""

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
from tests.sinks.test_http import SECRET, answer_of, batch

OK = {"Content-Type": "application/json"}


@pytest.fixture
def server() -> Iterator[Server]:
    """One that says yes to everything until it is told otherwise."""
    with Server() as running:
        yield running


@pytest.mark.parametrize(
    ("say", "said"),
    [
        (CannedResponse(raw=b""), "cut the connection"),
        (CannedResponse(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), "not HTTP"),
        (CannedResponse(raw=b"\x00\xff" * 500), "not HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 abc\r\n\r\n"), "not HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000), "not HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), "not HTTP"),
        (CannedResponse(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "not HTTP"),
        (CannedResponse(raw=b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"refus'), "cut the connection"),
        (CannedResponse(200, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=60), "cut the connection"),
        (CannedResponse(200, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=5), "cut the connection"),
        (CannedResponse(400, b'{"refused":[{"index":0}]}', OK, cut_after_bytes=70), "cut the connection"),
        (CannedResponse(raw=b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"refused":[{"ind'), "no whole JSON"),
    ],
)
def test_what_is_no_whole_answer_is_tried_again(server: Server, say: CannedResponse, said: str) -> None:
    """It may have been accepted or not: the key makes it harmless."""
    server.respond = always(say)
    found = answer_of(server.url())
    assert isinstance(found, Retry), found
    assert said in found.reason


def test_a_status_that_speaks_for_itself_counts_though_its_text_is_cut_off(server: Server) -> None:
    """So that `Retry-After` is not lost, and a wrong set-up is seen."""
    for status, kind in ((503, Retry), (429, Retry), (401, Misconfigured), (413, Rejected)):
        server.respond = always(
            CannedResponse(status, b"x" * 100, {"Retry-After": "7"} if kind is Retry else {}, cut_after_bytes=90)
        )
        found = answer_of(server.url())
        assert isinstance(found, kind)
        assert getattr(found, "after", 7.0) == 7.0


@pytest.mark.parametrize(
    "say",
    [
        HANG,
        CannedResponse(byte_delay_s=0.5),
        CannedResponse(200, b"x" * 5000, byte_delay_s=0.02),
        CannedResponse(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 500, byte_delay_s=0.02),
    ],
)
def test_no_call_takes_longer_than_its_timeout(server: Server, say: CannedResponse) -> None:
    """Nor where bytes keep coming, one by one."""
    server.respond = always(say)
    began = monotonic()
    found = answer_of(server.url("#timeout=0.3"))
    assert isinstance(found, Retry)
    assert "within 0.3 s" in found.reason
    assert monotonic() - began < 15


def test_calls_that_time_out_or_are_cancelled_take_no_connection_away(server: Server) -> None:
    """However many, also while others wait for their turn: the next one goes through."""
    server.respond = always(HANG)

    async def work() -> Any:
        sink = HttpSink(server.url("#timeout=3&connections=2"), TrackingEvent)
        tasks = [asyncio.create_task(sink.deliver(batch())) for _ in range(30)]
        await asyncio.sleep(0.01)
        for task in tasks[::3]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in found} == {Retry, asyncio.CancelledError}
        server.respond = always(CannedResponse())
        assert await asyncio.gather(*[sink.deliver(batch()) for _ in range(10)]) == [Delivered(3)] * 10
        await sink.close()

    run_async(work())
    wait_until(lambda: server.open_connections == 0)


def test_connections_are_kept_and_bounded(server: Server) -> None:
    """As many as the URL says, and no more than are needed."""

    async def work() -> None:
        sink = HttpSink(server.url("#connections=3"), TrackingEvent)
        assert sink.capabilities.concurrent
        for _ in range(3):
            await asyncio.gather(*[sink.deliver(batch()) for _ in range(12)])
        await sink.close()

    run_async(work())
    assert server.connections <= 3
    assert len(server.requests) == 36


def test_a_connection_that_the_server_closed_meanwhile_is_not_used(server: Server) -> None:
    """The next call opens another."""
    server.respond = always(CannedResponse(headers={"Connection": "close"}))

    async def work() -> Any:
        sink = HttpSink(server.url(), TrackingEvent)
        found = [await sink.deliver(batch()) for _ in range(3)]
        await sink.close()
        assert await sink.deliver(batch()) == Delivered(3)  # opens again
        await sink.close()
        return found

    assert run_async(work()) == [Delivered(3)] * 3


def test_where_nobody_listens_the_address_and_the_cause_are_named() -> None:
    """The system's own words."""
    found = answer_of(closed_port_url())
    assert isinstance(found, Retry)
    assert "127.0.0.1" in found.reason
    assert "Connect" in found.reason or "refused" in found.reason
    found = answer_of("http://nowhere.invalid/")
    assert isinstance(found, Retry)
    assert "nowhere.invalid" in found.reason


def test_a_server_that_refuses_by_size_before_it_has_read_is_understood() -> None:
    """As proxies do: 413 comes while the body is still on its way."""
    with Server(body_max=1000) as server:
        for _ in range(5):
            found = answer_of(server.url("#compress=none"), batch(20_000))
            assert isinstance(found, Rejected), found
            assert found.rejection.code == "too_large"


def test_no_more_of_an_answer_is_read_than_its_bound(server: Server) -> None:
    """A long text does not hurt; JSON that cannot be read to its end does, for it may refuse something."""
    server.respond = always(CannedResponse(200, b"x" * 3_000_000))
    assert answer_of(server.url()) == Delivered(3)
    server.respond = always(CannedResponse(200, b'{"refused":[' + b"0," * 1_500_000 + b"0]}", OK))
    assert isinstance(answer_of(server.url()), Misconfigured)
    assert answer_of(server.url("#answer=status")) == Delivered(3)
    server.respond = always(CannedResponse(200, b"\x1f\x8b", OK | {"Content-Encoding": "gzip"}))
    assert isinstance(answer_of(server.url()), Misconfigured)
    server.respond = always(CannedResponse(400, b'{"refused":[' + b"0," * 1_500_000 + b"0]}", OK))
    assert isinstance(answer_of(server.url()), Rejected)


def test_refusals_by_index_come_over_the_wire(server: Server) -> None:
    """With and without an acceptance of the others."""
    named = json.dumps({"accepted": 2, "refused": [{"index": 1, "code": "c", "reason": "r"}]}).encode()
    server.respond = always(CannedResponse(202, named, OK))
    assert answer_of(server.url()) == PartialFailure({1: answer_of(server.url()).refused[1]}, 2)
    server.respond = always(CannedResponse(422, b'{"refused":[2]}', OK))
    assert answer_of(server.url()).accepted is None


@pytest.fixture
def safe_server(certificate: Path) -> Iterator[Server]:
    """The same over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, f"{certificate}.key")
    with Server(tls=context) as running:
        yield running


def test_over_tls_the_certificate_must_be_vouched_for(safe_server: Server, certificate: Path) -> None:
    """By the authority that the URL names; without one the way out is said, and no event leaves."""
    found = answer_of(safe_server.url())
    assert isinstance(found, Misconfigured)
    assert "ca_file=" in found.reason
    assert safe_server.requests == []
    assert answer_of(safe_server.url(f"/e#ca_file={certificate}")) == Delivered(3)
    other = answer_of(safe_server.url(f"/e#ca_file={certificate}").replace("localhost", "127.0.0.1"))
    assert isinstance(other, Misconfigured)
    assert "127.0.0.1" in other.reason


def test_a_ca_file_that_is_mended_counts_without_a_restart(safe_server: Server, certificate: Path, tmp_path: Path) -> None:
    """Delivery goes on alone."""
    file = tmp_path / "ca.pem"
    other = httpx.create_ssl_context().get_ca_certs(binary_form=True)[0]
    file.write_text(ssl.DER_cert_to_PEM_cert(other))

    async def work() -> None:
        sink = HttpSink(safe_server.url(f"#ca_file={file}"), TrackingEvent)
        assert isinstance(await sink.deliver(batch()), Misconfigured)
        shutil.copy(certificate, file)
        assert await sink.deliver(batch()) == Delivered(3)
        await sink.close()

    run_async(work())


def test_a_proxy_is_used_where_one_is_named_and_only_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the environment says to everybody."""
    with Server(always(CannedResponse(407))) as proxy:
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url())
        assert answer_of(server.url()) == Delivered(3)
        assert proxy.requests == []
        monkeypatch.setenv("EVENTS_PROXY", f"http://me:{SECRET}@127.0.0.1:{proxy.port}")
        for scheme in ("http", "https"):
            found = answer_of(f"{scheme}://shop.invalid/in#proxy_env=EVENTS_PROXY")
            assert isinstance(found, Misconfigured)
            assert "proxy_env" in found.reason
        assert [request.target for request in proxy.requests] == ["http://shop.invalid/in", "shop.invalid:443"]
        assert all(request.headers["proxy-authorization"].startswith("Basic ") for request in proxy.requests)
        proxy.respond = always(CannedResponse(502))
        assert isinstance(answer_of("https://shop.invalid/in#proxy_env=EVENTS_PROXY"), Retry)
        proxy.respond = always(CannedResponse(200))
        assert answer_of("http://shop.invalid/in#proxy_env=EVENTS_PROXY") == Delivered(3)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_hangs_in_the_middle_of_the_tls_handshake_is_tried_again(server: Server) -> None:
    """Within the timeout. httpcore leaves that socket to the garbage collector, which says so."""
    found = answer_of(server.url("#timeout=0.3").replace("http:", "https:"))
    assert isinstance(found, Retry)
    gc.collect()


def test_tls_that_meets_none_is_tried_again() -> None:
    """A server that is being set up may well speak plainly for a while."""
    with Server(greeting=b"220 mail.example ready\r\n") as other:
        found = answer_of(other.url().replace("http:", "https:"))
        assert isinstance(found, Retry)
        assert "SSL" in found.reason


def test_a_ca_file_that_is_none_is_named_with_the_way_out(tmp_path: Path) -> None:
    """Missing, or without a certificate in it."""
    from pillarbox.errors import SinkUnusableError

    (tmp_path / "empty.pem").write_text("")
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(SinkUnusableError, match=f"{name}.*PEM"):
            answer_of(f"https://localhost/#ca_file={tmp_path / name}")


def check(url: str) -> list[CheckResult]:
    async def work() -> list[CheckResult]:
        sink = HttpSink(url, TrackingEvent)
        found = list(await sink.check())
        await sink.close()
        return found

    return run_async(work())


@pytest.mark.parametrize(
    ("say", "fine"),
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
def test_check_says_whether_the_destination_answers(server: Server, say: CannedResponse, fine: bool) -> None:
    """Without sending an event."""
    server.respond = always(say)
    assert check(server.url("#timeout=0.5" if say == HANG else ""))[-1].ok is fine
    assert [request.method for request in server.requests] == ["OPTIONS"]
    assert server.requests[0].raw_body == b""


def test_check_says_what_proves_who_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it can be read on the way; and which variable is missing."""
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)
    assert "nothing that proves" in check(server.url())[0].message
    found = check(server.url("#token_env=EVENTS_TOKEN&secret_env=EVENTS_TOKEN&header_env=X-Key:EVENTS_TOKEN"))
    assert [one.ok for one in found] == [True, True, True]
    assert "token in EVENTS_TOKEN, X-Key from EVENTS_TOKEN, a signature with the secret in EVENTS_TOKEN" in found[0].message
    assert "use https" in found[1].message
    assert server.requests[-1].headers["authorization"] == f"Bearer {SECRET}"
    (missing,) = check(server.url("#token_env=NOT_SET_ANYWHERE"))
    assert not missing.ok
    assert "NOT_SET_ANYWHERE" in missing.message
    assert not check(closed_port_url())[-1].ok


def test_no_secret_shows_whatever_happens(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the server sends back all that it was sent, and every logger tells all it knows."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)

    def echo(status: int, request: Request) -> CannedResponse:
        text = f"{request.method} {request.target} {request.headers}".encode()
        return CannedResponse(status, text)

    answers: list[Any] = []
    for status in (200, 302, 400, 401, 413, 418, 429, 500):
        server.respond = lambda request, status=status: echo(status, request)  # type: ignore[misc]
        answers += [answer_of(server.url(f"?key={SECRET}x#token_env=EVENTS_TOKEN&secret_env=EVENTS_TOKEN"))]
        answers += [answer_of(server.url(f"?key={SECRET}x#header_env=X-Key:EVENTS_TOKEN", user=f"me:{SECRET}@"))]
        answers += check(server.url(f"?key={SECRET}x#token_env=EVENTS_TOKEN"))
    assert SECRET not in caplog.text
    caplog.set_level(logging.INFO)  # below it, the library shows the headers that the server sends, and this one sends ours
    for say in (
        CannedResponse(raw=b"nonsense"),
        HANG,
        CannedResponse(302, headers={"Location": f"http://u:{SECRET}@other.example/{SECRET}"}),
    ):
        server.respond = always(say)
        answers.append(answer_of(server.url("#token_env=EVENTS_TOKEN&timeout=0.1")))
    answers.append(answer_of(f"http://me:{SECRET}@127.0.0.1:1/?key={SECRET}"))
    assert SECRET not in repr(answers)
    assert SECRET not in caplog.text
    assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
