"""The HTTP sink against a real server: what is sent, and what becomes of every answer and of none."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox import TrackingEvent
from pillarbox.codec import Codec
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult
from pillarbox.sinks.http import HttpSink
from pillarbox.sinks.http.encoding import compress, format_rfc3339
from pillarbox.testing import ManualClock
from tests.conftest import event
from tests.sinks.http_server import CannedResponse, Server, always, in_sequence, run_async

SECRET = "s3cret-do-not-show"  # noqa: S105 - what the tests look for


@pytest.fixture
def server() -> Iterator[Server]:
    """One that says yes to everything until it is told otherwise."""
    with Server() as running:
        yield running


def batch(count: int = 3, batch_id: str = "sealed-1-a", **members: object) -> Batch:
    encode = Codec(TrackingEvent).encode
    return Batch(batch_id, [encode(event(number, **members)) for number in range(count)])


def deliver(url: str, *batches: Batch, clock: ManualClock | None = None) -> list[DeliveryResult]:
    """Deliver one after the other with one sink."""

    async def work() -> list[DeliveryResult]:
        sink = HttpSink(url, TrackingEvent, clock)
        await sink.open()
        answers = [await sink.deliver(one) for one in batches]
        await sink.close()
        return answers

    return run_async(work())


def answer_of(url: str, one: Batch | None = None) -> Any:
    return deliver(url, one or batch())[0]


@pytest.mark.parametrize("form", ["ndjson", "json", "cloudevents"])
@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_events_arrive_as_they_were_stored(server: Server, form: str, compress: str) -> None:
    """In each format and compression, in order."""
    sent = batch(120, metadata_json='{"a":"\\u2028 ü \\n"}')
    assert answer_of(server.url(f"/e?x=1#format={form}&compress={compress}"), sent) == Delivered(120)
    (request,) = server.requests
    assert request.events == [json.loads(payload) for payload in sent.payloads]
    for payload in sent.payloads:
        assert payload in request.body
    kinds = {"ndjson": "x-ndjson", "json": "json", "cloudevents": "cloudevents-batch+json"}
    assert request.headers["content-type"] == f"application/{kinds[form]}"
    assert request.headers.get("content-encoding", "none") == compress
    assert (request.method, request.target) == ("POST", "/e?x=1")


def test_the_head_of_a_call_says_who_calls_and_which_batch_it_is(server: Server) -> None:
    """Ids are sent as they are; other characters, which only a file that somebody else named has, are percent-encoded."""
    ids = ["sealed-1795436302841870-12491cba-455d-49a5-9918-9b68e35471d2:0-249", "sealed-ö ~\udcff%", "sealed-bad"]
    deliver(server.url(), *(batch(1, one) for one in ids))
    assert [request.idempotency_key for request in server.requests] == [ids[0], "sealed-%C3%B6%20~%FF%25", "sealed-bad"]
    for request in server.requests:
        assert request.headers["user-agent"].startswith("pillarbox/")
        assert request.headers["accept-encoding"] == "identity"
        assert "cookie" not in request.headers
    assert server.connections == 1


def test_a_batch_is_the_same_bytes_under_the_same_key_at_every_attempt(server: Server) -> None:
    """Also by another process, whose sink is another."""
    server.respond = in_sequence(
        CannedResponse(503),
        CannedResponse(200, b"{", {"Content-Type": "application/json"}),
        CannedResponse(429),
        CannedResponse(),
    )
    for form in ("ndjson", "cloudevents"):
        server.requests.clear()
        one = batch()
        deliver(server.url(f"#format={form}"), one, one)
        deliver(server.url(f"#format={form}"), batch(), batch())
        assert len({(request.idempotency_key, request.raw_body) for request in server.requests}) == 1
        assert len(server.requests) == 4


def test_a_compressed_body_does_not_hold_the_time() -> None:
    """Or the same batch would be other bytes a second later."""
    assert compress("gzip", b"x")[4:8] == bytes(4)


def test_a_cloud_event_has_what_the_specification_asks_for(server: Server) -> None:
    """Attributes in their types, and the event as data."""
    one = batch(1, event_key="sign\u00fcp", occurred_at_micros=1_795_436_302_841_870)
    for options in ("", "&source=urn:shop&type_field=event_key", "&source=urn:shop&type=com.example.event"):
        deliver(server.url(f"#format=cloudevents{options}"), Batch("b", one.payloads))
    found = [json.loads(request.body)[0] for request in server.requests]
    assert found[0] == {
        "specversion": "1.0",
        "id": "e-000000",
        "source": "pillarbox",
        "type": "TrackingEvent",
        "time": "2026-11-23T12:18:22.841870Z",
        "datacontenttype": "application/json",
        "data": json.loads(one.payloads[0]),
    }
    assert [(each["source"], each["type"]) for each in found[1:]] == [("urn:shop", "signüp"), ("urn:shop", "com.example.event")]


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (b"0", b"1970-01-01T00:00:00.000000Z"),
        (b"-1", b"1969-12-31T23:59:59.999999Z"),
        (b"951782400000000", b"2000-02-29T00:00:00.000000Z"),
        (b"4107542399999999", b"2100-02-28T23:59:59.999999Z"),
        (b"4107542400000000", b"2100-03-01T00:00:00.000000Z"),
        (b"253402300799999999", b"9999-12-31T23:59:59.999999Z"),
        (b"253402300800000000", None),
        (b"9223372036854775807", None),
        (b"-62135596800000000", b"0001-01-01T00:00:00.000000Z"),
        (b"-62135596800000001", None),
        (b"9" * 5000, None),
        (b"1.5", None),
        (b"null", None),
        (b"", None),
    ],
)
def test_a_moment_is_written_as_rfc_3339_does(micros: bytes, text: bytes | None) -> None:
    """Or left out, where it cannot be."""
    assert format_rfc3339(micros) == text


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001 - all of it is UTC
def test_a_moment_is_what_the_standard_library_makes_of_it(time: datetime) -> None:
    """For every year that it knows."""
    micros = (time - datetime(1970, 1, 1)) // timedelta(microseconds=1)  # noqa: DTZ001
    assert format_rfc3339(b"%d" % micros) == time.isoformat(timespec="microseconds").encode() + b"Z"


class Order(msgspec.Struct, rename="camel"):
    """An event type with a number for its id, under other names."""

    event_id: int
    shop_name: str = ""


def test_only_an_event_without_an_id_cannot_be_a_cloud_event(server: Server) -> None:
    """The others go, and are counted by where they stood."""
    lines = [b'{"eventId":7}', b'{"eventId":null}', b"[]", b'{"eventId":""}', b'{"eventId":-8,"shopName":"x"}', b"{}"]

    async def work() -> list[Any]:
        sink = HttpSink(server.url("#format=cloudevents&type_field=shop_name"), Order)
        answers: list[Any] = [await sink.deliver(Batch("b", lines))]
        server.respond = always(CannedResponse(400, b'{"refused":[1]}'))
        answers.append(await sink.deliver(Batch("b", lines)))
        server.respond = always(CannedResponse(400))
        answers.append(await sink.deliver(Batch("b", lines)))
        answers.append(await sink.deliver(Batch("b", lines[1:4])))
        await sink.close()
        return answers

    first, named, unnamed, none = run_async(work())
    assert (set(first.refused), first.accepted) == ({1, 2, 3, 5}, 2)
    assert (set(named.refused), named.accepted) == ({1, 2, 3, 4, 5}, None)
    assert (set(unnamed.refused), unnamed.accepted) == ({1, 2, 3, 5}, None)
    assert (set(none.refused), none.accepted) == ({0, 1, 2}, 0)
    assert len(server.requests) == 3
    assert [(one["id"], one["type"]) for one in json.loads(server.requests[0].body)] == [("7", "Order"), ("-8", "x")]


def test_credentials_are_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scheme that the URL asks for."""
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)
    deliver(server.url("#token_env=EVENTS_TOKEN&header_env=X-Api-Key:EVENTS_TOKEN"), batch())
    deliver(server.url("", user="me:p%40ss@"), batch())
    deliver(server.url(), batch())
    bearer, basic, none = (request.headers for request in server.requests)
    assert (bearer["authorization"], bearer["x-api-key"]) == (f"Bearer {SECRET}", SECRET)
    assert base64.b64decode(basic["authorization"].removeprefix("Basic ")) == b"me:p@ss"
    assert "authorization" not in none


def test_a_body_is_signed_as_standard_webhooks_says(
    server: Server, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """Over id, time and the bytes that were sent; with each secret; anew at each attempt, for the time counts."""
    monkeypatch.setenv("EVENTS_SECRET", "whsec_" + base64.b64encode(b"k" * 32).decode() + " the-older-one")
    one = batch()
    deliver(server.url("#secret_env=EVENTS_SECRET"), one, clock=clock)
    clock.advance(90)
    deliver(server.url("#secret_env=EVENTS_SECRET"), one, clock=clock)
    times = []
    for request in server.requests:
        name, moment_sent = request.headers["webhook-id"], request.headers["webhook-timestamp"]
        times.append(int(moment_sent))
        signed = name.encode() + b"." + moment_sent.encode() + b"." + request.raw_body
        wanted = [
            base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in (b"k" * 32, b"the-older-one")
        ]
        assert request.headers["webhook-signature"] == f"v1,{wanted[0]} v1,{wanted[1]}"
        assert name == request.idempotency_key == one.id
    assert times[1] - times[0] == 90


def test_a_signature_of_a_known_example_is_the_known_one(server: Server) -> None:
    """The example of the specification's own test suite."""
    from pillarbox.sinks.http.sink import signature_headers

    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = dict(signature_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [key]))
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_missing_variable_stops_delivery_and_names_the_way_out(server: Server) -> None:
    """From `open` on; nothing is sent without what it should carry."""
    from pillarbox.errors import SinkUnusableError

    sink = HttpSink(server.url("#token_env=NOT_SET_ANYWHERE"), TrackingEvent)
    for work in (sink.open, lambda: sink.deliver(batch())):
        with pytest.raises(SinkUnusableError, match="NOT_SET_ANYWHERE"):
            run_async(work())
    assert server.requests == []
