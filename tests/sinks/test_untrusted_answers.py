"""What any server may answer: a body of any kind costs little time, and nothing that it repeats of a request is shown."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import Batch
from pillarbox.sinks.http.responses import RESPONSE_BYTES_MAX, HttpResponse
from pillarbox.sinks.http.responses import classify_response as classify_http
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse, parse_version
from pillarbox.sinks.spacetimedb.responses import classify_response as classify_spacetimedb
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, ReturnKind, SchemaError
from tests.sinks.http_server import CannedResponse, Request, Server

SECRET = "s3cret/token+that==nobody&sees"  # noqa: S105 - not a real one
EVENT = TrackingEvent(event_id="1", event_key="k", scope_kind="Site", scope_id="s", occurred_at_micros=1)
PAYLOAD = msgspec.json.encode(EVENT)
RETURNS: tuple[ReturnKind, ...] = ("nothing", "count", "result")
CPU_MAX_S = 1.0  # for one body of 1 MiB; a quadratic pattern takes minutes
STATUSES = [200, 207, 302, 400, 401, 404, 413, 422, 429, 500, 503, 530]

UNITS = [
    b"<title", b"<title ", b"<title>", b"<title>a", b"<TITLE><", b"<", b">", b" ", b"\n", b"a", b"\x00", b"\xff", b"\xf0\x9f\x98\x80",
    b"event[", b"event[0]", b"event[0].a: ; event[", b"event[0]: ; ", b"event[9999999999]: x; ", b"[0][", b"[0][1", b"[", b'{"a":',
    b'"', b"\\", b"9", b"0.", b"-", b"e9", b"invalid arguments for [0][9", b"panic ", b"\xe2\x80\xa8", b"&#x27;", b"%25", b"s3cr",
]  # fmt: skip


def repeated(unit: bytes) -> bytes:
    return (unit * (RESPONSE_BYTES_MAX // len(unit) + 1))[:RESPONSE_BYTES_MAX]


def json_bodies() -> list[bytes]:
    """Valid JSON with a great many entries."""
    count = RESPONSE_BYTES_MAX // 16
    return [
        json.dumps({"rejected": [0] * (RESPONSE_BYTES_MAX // 3)}).encode(),
        json.dumps({"rejected": [{"index": 0}] * (count // 2), "accepted": 0}).encode(),
        json.dumps({"refused": [{"index": 0, "reason": "x" * (RESPONSE_BYTES_MAX - 100)}]}).encode(),
        json.dumps([1, "event[0]: a; " * (count // 2)]).encode(),
        json.dumps({"accepted": 1, **{str(number): number for number in range(count)}}).encode(),
        b"[" * (RESPONSE_BYTES_MAX // 2) + b"]" * (RESPONSE_BYTES_MAX // 2),
    ]


BODIES = [*(prefix + repeated(unit) for unit in UNITS for prefix in (b"", b"<html>")), *json_bodies()]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_no_body_of_a_mebibyte_takes_long_to_classify(number: int) -> None:
    """A server that answers with garbage must not stop the application: the interpreter is locked meanwhile."""
    body = BODIES[number]
    redact = make_redactor()
    for status in STATUSES:
        for kind in ("text/html", "application/json"):
            began = time.thread_time()
            result = classify_http(HttpResponse(status, kind, body=body), [0], 0.0, redact)
            assert time.thread_time() - began < CPU_MAX_S
            assert len(repr(result)) < 5000
            for returns in RETURNS:
                response = SpacetimeDbResponse(status, kind, "", body, has_execution_time=True, redact=redact)
                began = time.thread_time()
                result = classify_spacetimedb(response, "f", [0], returns)
                parse_version(response)
                assert time.thread_time() - began < CPU_MAX_S
                assert len(repr(result)) < 5000


def make_redactor() -> Any:
    sink: Any = make_sink(f"spacetimedb://:{quote(SECRET, safe='')}@127.0.0.1:1/d", TrackingEvent)
    return sink._settings.redactor()


@pytest.mark.parametrize("unit", UNITS)
def test_no_text_of_a_mebibyte_takes_long_to_parse_as_a_schema(unit: bytes) -> None:
    """It is not a schema, and that is all that is said of it."""
    began = time.thread_time()
    with pytest.raises(SchemaError):
        DatabaseSchema(repeated(unit))
    assert time.thread_time() - began < CPU_MAX_S


ECHOES: list[Callable[[str], str]] = [
    str,
    html.escape,
    json.dumps,
    lambda text: json.dumps({"rejected": [{"index": 0, "code": text[:64], "reason": text}]}),
    lambda text: json.dumps([1, f"event[0].x: {text}"]),
    lambda text: f"event[0].x: {text}",
    lambda text: f"<html><title>{text}</title>",
    lambda text: quote(text, safe=""),
    lambda text: base64.b64encode(text.encode()).decode(),
    lambda text: text.encode().hex(),
    lambda text: f"invalid arguments for f [0][0] {text}",
    lambda text: json.dumps({"version": text}),
    lambda text: " " * (4096 - len(text) + 10) + text + " " * 4096,
]


def shown_parts(text: str) -> list[str]:
    """The pieces of the secret, in any encoding, that a text shows."""
    forms = [SECRET, quote(SECRET, safe=""), html.escape(SECRET), SECRET.encode().hex()]
    forms += [base64.b64encode(b"x" * before + SECRET.encode()).decode()[4:-4] for before in range(3)]
    return [form[at : at + 8] for form in forms for at in range(len(form) - 7) if form[at : at + 8] in text]


def texts_of(url: str) -> str:
    """Everything that a sink reports of one batch and of a check."""

    async def run() -> str:
        sink = make_sink(url, TrackingEvent)
        texts = [repr(sink)]
        batch = Batch("sealed-1", [PAYLOAD])
        try:
            try:
                await sink.open()
            except (SinkUnusableError, OSError) as error:
                texts.append(str(error))
            sink.prepare(batch)
            texts.append(repr(await sink.deliver(batch)))
            texts += [message for _, message in await sink.check()]
        finally:
            await sink.close()
        return "\n".join(texts)

    return asyncio.run(run())


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("echo", range(len(ECHOES)))
def test_nothing_that_a_server_repeats_of_a_request_is_shown(
    echo: int, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the token, nor the password, nor the query, by any sink, in a result, a check or a log line."""

    def respond(request: Request) -> CannedResponse:
        authorization = request.headers.get("authorization", "")
        text = f"{authorization} {request.target}"
        if authorization.startswith("Basic "):
            text += base64.b64decode(authorization.removeprefix("Basic ")).decode()
        kind = "text/html" if "<" in ECHOES[echo]("x") else "application/json"
        headers = {
            "Content-Type": kind,
            "Location": f"https://{quote(SECRET, safe='')}/",
            "spacetime-execution-duration-micros": "1",
        }
        return CannedResponse(status, ECHOES[echo](text).encode(), headers)

    monkeypatch.setenv("TOKEN_OF_TEST", SECRET)
    quoted = quote(SECRET, safe="")
    with caplog.at_level(logging.DEBUG, logger="pillarbox"), Server(respond) as server:
        texts = [
            texts_of(server.url("/hook#token_env=TOKEN_OF_TEST")),
            texts_of(server.url("/hook#header_env=Authorization:TOKEN_OF_TEST")),
            texts_of(server.url(f"/hook?key={quoted}", user=f"me:{quoted}@")),
            texts_of(f"spacetimedb://:{quoted}@127.0.0.1:{server.port}/events?timeout=5"),
        ]
    for text in [*texts, caplog.text]:
        assert shown_parts(text) == [], text


def test_a_proxy_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may answer with the credentials that it got."""

    def respond(request: Request) -> CannedResponse:
        return CannedResponse(
            502, f"{request.headers} {base64.b64decode(request.headers['proxy-authorization'][6:]).decode()}".encode()
        )

    with Server(respond) as server:
        monkeypatch.setenv("PROXY_OF_TEST", f"http://me:{quote(SECRET, safe='')}@127.0.0.1:{server.port}")
        text = texts_of("http://example.invalid/hook#proxy_env=PROXY_OF_TEST")
    assert "502" in text
    assert shown_parts(text) == [], text
    assert base64.b64encode(f"me:{SECRET}".encode()).decode()[:12] not in text
