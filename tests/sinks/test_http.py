"""The HTTP sink against a real server: the requests that it sends."""

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

SECRET = "s3cret-do-not-show"  # noqa: S105 - must appear in no message


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that accepts everything until `respond` is set."""
    with Server() as running:
        yield running


def batch(count: int = 3, batch_id: str = "sealed-1-a", **members: object) -> Batch:
    encode = Codec(TrackingEvent).encode
    return Batch(batch_id, [encode(event(number, **members)) for number in range(count)])


def deliver(url: str, *batches: Batch, clock: ManualClock | None = None) -> list[DeliveryResult]:
    """Deliver the batches in sequence with one sink."""

    async def work() -> list[DeliveryResult]:
        sink = HttpSink(url, TrackingEvent, clock)
        await sink.open()
        results = [await sink.deliver(item) for item in batches]
        await sink.close()
        return results

    return run_async(work())


def result_of(url: str, item: Batch | None = None) -> Any:
    return deliver(url, item or batch())[0]


@pytest.mark.parametrize("form", ["ndjson", "json", "cloudevents"])
@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_events_are_sent_byte_for_byte_as_they_were_stored(server: Server, form: str, compress: str) -> None:
    """In each format and compression, in order."""
    sent = batch(120, metadata_json='{"a":"\\u2028 ü \\n"}')
    assert result_of(server.url(f"/e?x=1#format={form}&compress={compress}"), sent) == Delivered(120)
    (request,) = server.requests
    assert request.events == [json.loads(payload) for payload in sent.payloads]
    for payload in sent.payloads:
        assert payload in request.body
    kinds = {"ndjson": "x-ndjson", "json": "json", "cloudevents": "cloudevents-batch+json"}
    assert request.headers["content-type"] == f"application/{kinds[form]}"
    assert request.headers.get("content-encoding", "none") == compress
    assert (request.method, request.target) == ("POST", "/e?x=1")


def test_the_headers_name_pillarbox_and_the_batch(server: Server) -> None:
    """Characters of a foreign file name are percent-encoded in the idempotency key."""
    ids = ["sealed-1795436302841870-12491cba-455d-49a5-9918-9b68e35471d2:0-249", "sealed-ö ~\udcff%", "sealed-bad"]
    deliver(server.url(), *(batch(1, item) for item in ids))
    assert [request.idempotency_key for request in server.requests] == [ids[0], "sealed-%C3%B6%20~%FF%25", "sealed-bad"]
    for request in server.requests:
        assert request.headers["user-agent"].startswith("pillarbox/")
        assert request.headers["accept-encoding"] == "identity"
        assert "cookie" not in request.headers
    assert server.connections == 1


def test_a_batch_is_the_same_bytes_under_the_same_key_at_every_attempt(server: Server) -> None:
    """Also when another sink object sends it."""
    server.respond = in_sequence(
        CannedResponse(503),
        CannedResponse(200, b"{", {"Content-Type": "application/json"}),
        CannedResponse(429),
        CannedResponse(),
    )
    for form in ("ndjson", "cloudevents"):
        server.requests.clear()
        item = batch()
        deliver(server.url(f"#format={form}"), item, item)
        deliver(server.url(f"#format={form}"), batch(), batch())
        assert len({(request.idempotency_key, request.raw_body) for request in server.requests}) == 1
        assert len(server.requests) == 4


def test_a_compressed_body_does_not_contain_the_time() -> None:
    """Otherwise the same batch would have other bytes a second later."""
    assert compress("gzip", b"x")[4:8] == bytes(4)


def test_a_cloudevent_has_the_attributes_of_the_specification(server: Server) -> None:
    """With their types, and the event as data."""
    item = batch(1, event_key="sign\u00fcp", occurred_at_micros=1_795_436_302_841_870)
    for options in ("", "&source=urn:shop&type_field=event_key", "&source=urn:shop&type=com.example.event"):
        deliver(server.url(f"#format=cloudevents{options}"), Batch("b", item.payloads))
    envelopes = [json.loads(request.body)[0] for request in server.requests]
    assert envelopes[0] == {
        "specversion": "1.0",
        "id": "e-000000",
        "source": "pillarbox",
        "type": "TrackingEvent",
        "time": "2026-11-23T12:18:22.841870Z",
        "datacontenttype": "application/json",
        "data": json.loads(item.payloads[0]),
    }
    assert [(each["source"], each["type"]) for each in envelopes[1:]] == [
        ("urn:shop", "signüp"),
        ("urn:shop", "com.example.event"),
    ]


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
def test_a_time_is_formatted_as_rfc_3339(micros: bytes, text: bytes | None) -> None:
    """None where RFC 3339 cannot write it."""
    assert format_rfc3339(micros) == text


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))  # noqa: DTZ001 - all of it is UTC
def test_a_time_is_formatted_as_the_standard_library_does(time: datetime) -> None:
    """For every year that it supports."""
    micros = (time - datetime(1970, 1, 1)) // timedelta(microseconds=1)  # noqa: DTZ001
    assert format_rfc3339(b"%d" % micros) == time.isoformat(timespec="microseconds").encode() + b"Z"


class IntegerIdEvent(msgspec.Struct, rename="camel"):
    """An event type with an integer as its id and other field names."""

    event_id: int
    shop_name: str = ""


def test_only_events_without_an_id_are_rejected_as_cloudevents(server: Server) -> None:
    """The other events are sent, and the indexes of all results are those of the batch."""
    lines = [b'{"eventId":7}', b'{"eventId":null}', b"[]", b'{"eventId":""}', b'{"eventId":-8,"shopName":"x"}', b"{}"]

    async def work() -> list[Any]:
        sink = HttpSink(server.url("#format=cloudevents&type_field=shop_name"), IntegerIdEvent)
        results: list[Any] = [await sink.deliver(Batch("b", lines))]
        server.respond = always(CannedResponse(400, b'{"refused":[1]}'))
        results.append(await sink.deliver(Batch("b", lines)))
        server.respond = always(CannedResponse(400))
        results.append(await sink.deliver(Batch("b", lines)))
        results.append(await sink.deliver(Batch("b", lines[1:4])))
        await sink.close()
        return results

    without_server, by_index, as_a_whole, none = run_async(work())
    assert (set(without_server.rejected), without_server.accepted) == ({1, 2, 3, 5}, 2)
    assert (set(by_index.rejected), by_index.accepted) == ({1, 2, 3, 4, 5}, None)
    assert (set(as_a_whole.rejected), as_a_whole.accepted) == ({1, 2, 3, 5}, None)
    assert (set(none.rejected), none.accepted) == ({0, 1, 2}, 0)
    assert len(server.requests) == 3
    assert [(item["id"], item["type"]) for item in json.loads(server.requests[0].body)] == [
        ("7", "IntegerIdEvent"),
        ("-8", "x"),
    ]


def test_credentials_are_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the scheme that the URL selects."""
    monkeypatch.setenv("EVENTS_TOKEN", SECRET)
    deliver(server.url("#token_env=EVENTS_TOKEN&header_env=X-Api-Key:EVENTS_TOKEN"), batch())
    deliver(server.url("", user="me:p%40ss@"), batch())
    deliver(server.url(), batch())
    bearer, basic, none = (request.headers for request in server.requests)
    assert (bearer["authorization"], bearer["x-api-key"]) == (f"Bearer {SECRET}", SECRET)
    assert base64.b64decode(basic["authorization"].removeprefix("Basic ")) == b"me:p@ss"
    assert "authorization" not in none


def test_a_body_is_signed_as_standard_webhooks_specifies(
    server: Server, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """Over id, time and the bytes sent, with each secret, and again at each attempt because the time counts."""
    monkeypatch.setenv("EVENTS_SECRET", "whsec_" + base64.b64encode(b"k" * 32).decode() + " the-older-one")
    item = batch()
    deliver(server.url("#secret_env=EVENTS_SECRET"), item, clock=clock)
    clock.advance(90)
    deliver(server.url("#secret_env=EVENTS_SECRET"), item, clock=clock)
    times = []
    for request in server.requests:
        name, moment_sent = request.headers["webhook-id"], request.headers["webhook-timestamp"]
        times.append(int(moment_sent))
        signed = name.encode() + b"." + moment_sent.encode() + b"." + request.raw_body
        expected = [
            base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in (b"k" * 32, b"the-older-one")
        ]
        assert request.headers["webhook-signature"] == f"v1,{expected[0]} v1,{expected[1]}"
        assert name == request.idempotency_key == item.id
    assert times[1] - times[0] == 90


def test_the_specifications_example_gives_its_signature(server: Server) -> None:
    """The example of the specification's own test suite."""
    from pillarbox.sinks.http.sink import signature_headers

    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = dict(signature_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [key]))
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_missing_variable_stops_delivery_and_is_named(server: Server) -> None:
    """From `open` on; nothing is sent without its credentials."""
    from pillarbox.errors import SinkUnusableError

    sink = HttpSink(server.url("#token_env=NOT_SET_ANYWHERE"), TrackingEvent)
    for work in (sink.open, lambda: sink.deliver(batch())):
        with pytest.raises(SinkUnusableError, match="NOT_SET_ANYWHERE"):
            run_async(work())
    assert server.requests == []
