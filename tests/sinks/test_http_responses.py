"""Classification of HTTP responses: every status, every form of `Retry-After`, and bodies that name events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.sinks.base import Delivered, Misconfigured, PartialFailure, Rejected, Retry
from pillarbox.sinks.http.responses import RETRY_AFTER_MAX_S, HttpResponse, classify_response, parse_retry_after

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
INDEXES = [3, 5, 8]


def classify(status: int, body: object = b"", *, reads_body: bool = True, **more: Any) -> Any:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
        more.setdefault("content_type", "application/json")
    return classify_response(HttpResponse(status, body=body, **more), INDEXES, NOW, reads_body=reads_body)


EXPECTED: Mapping[int, type] = (
    dict.fromkeys(range(100, 200), Misconfigured)
    | dict.fromkeys(range(200, 300), Delivered)
    | dict.fromkeys(range(300, 500), Misconfigured)
    | dict.fromkeys(range(500, 600), Retry)
    | dict.fromkeys(range(600, 1000), Misconfigured)
    | {207: Misconfigured, 400: Rejected, 422: Rejected, 413: Rejected}
    | dict.fromkeys([408, 409, 425, 429], Retry)
    | dict.fromkeys([501, 505, 511], Misconfigured)
)


@pytest.mark.parametrize(("status", "kind"), EXPECTED.items())
def test_every_status_has_a_result(status: int, kind: type) -> None:
    """Whatever the body; a reason names the status."""
    for body in (b"", b"<html><title>Oh\n no</title></html>", b"no", b"{", b"[]", b'"x"', b"{}", b"\xff\x00"):
        result = classify(status, body)
        assert type(result) is kind
        if isinstance(result, (Misconfigured, Retry)):
            assert str(status) in result.reason
        if isinstance(result, Delivered):
            assert result == Delivered(3)


@pytest.mark.parametrize(
    "status", [100, 101, 300, 304, 401, 403, 404, 405, 406, 407, 410, 411, 415, 418, 421, 426, 501, 505, 511]
)
def test_a_misconfiguration_says_what_to_do(status: int) -> None:
    """On one line."""
    reason = classify(status, b"some text").reason
    assert "\n" not in reason
    advice = ("correct", "make ", "give ", "use ", "put ", "choose", "log ", "into the sink's URL", "shorten")
    assert any(way in reason for way in advice)


def test_a_redirect_is_reported_and_not_followed() -> None:
    """The message names the host only, because the rest of the location may be secret."""
    result = classify(302, location="https://user:secret@login.example/path?token=secret")
    assert "login.example" in result.reason
    assert "secret" not in result.reason
    assert "same server" in classify(301, location="/elsewhere?k=secret").reason
    assert "without a location" in classify(308).reason
    assert isinstance(classify(307, location="https://[broken"), Misconfigured)


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        ("7", "", 7.0),
        (" 120 ", "", 120.0),
        ("0", "", 0.0),
        ("1.5", "", 1.5),
        ("-5", "", 0.0),
        ("9" * 500, "", RETRY_AFTER_MAX_S),
        ("100000000", "", 1e8),
        ("Fri, 15 Jan 2027 08:01:00 GMT", "", 60.0),
        ("Friday, 15-Jan-27 08:01:00 GMT", "", 60.0),
        ("Fri Jan 15 08:01:00 2027", "", 60.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", "", 0.0),
        # The server's clock is five years ahead; only the time between its two dates counts.
        ("Thu, 15 Jan 2032 08:01:00 GMT", "Thu, 15 Jan 2032 08:00:30 GMT", 30.0),
        ("7", "Thu, 15 Jan 2032 08:00:30 GMT", 7.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", "no date", 60.0),
        ("", "", None),
        ("soon", "", None),
        ("1e3", "", None),
        ("nan", "", None),
        ("Fri, 99 Jan 99999 08:01:00 GMT", "", None),
    ],
)
def test_retry_after_is_parsed_in_each_of_its_forms(text: str, date: str, seconds: float | None) -> None:
    """The time is never shortened."""
    assert parse_retry_after(text, date, NOW) == seconds


def test_a_date_without_a_time_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of the three HTTP date formats has no zone."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert parse_retry_after("Fri Jan 15 08:01:00 2027", "", NOW) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text(), st.text())
def test_any_retry_after_gives_a_bounded_time_or_none(text: str, date: str) -> None:
    """Whatever its text and the date."""
    result = parse_retry_after(text, date, NOW)
    assert result is None or 0 <= result <= RETRY_AFTER_MAX_S < sys.float_info.max


@pytest.mark.parametrize("status", [408, 409, 413, 425, 429, 500, 502, 503, 504, 507, 520, 599])
def test_retry_after_delays_the_next_attempt(status: int) -> None:
    """A 413 with it is temporary."""
    result = classify(status, b"busy", retry_after="7")
    assert result == Retry(result.reason, 7.0)


@pytest.mark.parametrize("status", [200, 201, 202, 207])
@pytest.mark.parametrize("word", ["refused", "rejected"])
def test_a_2xx_response_may_reject_events(status: int, word: str) -> None:
    """It names them by their index in the request; the result names them by their index in the batch."""
    result = classify(status, {"accepted": 2, "duplicates": 1, word: [{"index": 1, "code": "no_user", "reason": "nobody"}]})
    assert result == PartialFailure({5: result.rejected[5]}, 2, 1)
    assert result.rejected[5] == ("no_user", "nobody")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"accepted": 3}, Delivered(3)),
        ({"accepted": 3, "duplicates": 3}, Delivered(3, 3)),
        ({"accepted": 1, "duplicates": 2}, Delivered(3, 2)),
        ({"accepted": 3, "duplicates": 99, "refused": []}, Delivered(3, 3)),
        ({"accepted": 3, "rejected": 0}, Delivered(3)),
        ({"accepted": True, "refused": None}, Delivered(3)),
        ({"status": "ok"}, Delivered(3)),
        ({"accepted": "all"}, Delivered(3)),
        ([], Delivered(3)),
        ({"refused": [0, 1, 2]}, 0),
    ],
)
def test_the_counts_of_a_2xx_response_are_used(body: object, expected: object) -> None:
    """Bodies in another format are ignored."""
    result = classify(200, body)
    assert (result.accepted if isinstance(result, PartialFailure) else result) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"accepted": 0},
        {"accepted": 1, "duplicates": 1},
        {"rejected": 2},
        {"refused": True},
        {"refused": "some"},
        {"refused": [{"index": 3}]},
        {"refused": [{"index": -1}]},
        {"refused": [{"index": True}]},
        {"refused": [{"reason": "which?"}]},
        {"refused": [{"index": 0}], "accepted": 1},
    ],
)
def test_a_2xx_response_that_does_not_account_for_all_events_is_not_an_acceptance(body: object) -> None:
    """Delivery stops, and the message names answer=status, which accepts the response."""
    result = classify(200, body)
    assert isinstance(result, Misconfigured)
    assert "answer=status" in result.reason
    assert classify(200, body, reads_body=False) == Delivered(3)


def test_an_unreadable_json_response_is_not_an_acceptance() -> None:
    """It may have named rejected events; a body that is not JSON names none."""
    assert isinstance(classify(200, b'{"refused":[{"ind', content_type="application/json"), Retry)
    assert isinstance(classify(200, b'{"refused":[{"ind', content_type="application/problem+json; charset=utf-8"), Retry)
    assert isinstance(classify(200, b'{"refused":', content_type="application/json", is_complete=False), Misconfigured)
    assert classify(200, b"<html>", content_type="text/html", is_complete=False) == Delivered(3)
    assert classify(200, b"{garbage", content_type="text/plain") == Delivered(3)
    assert classify(204, b"", content_type="application/json") == Delivered(3)
    assert isinstance(classify(200, b'{"a":' * 10_000, content_type="application/json"), Retry)


@pytest.mark.parametrize("status", [400, 422])
def test_a_rejection_may_name_the_events(status: int) -> None:
    """The server kept no event of the request unless the body says so."""
    entries = [{"index": 0, "message": "bad"}, {"index": 2, "code": 17}]
    result = classify(status, {"rejected": entries})
    assert result == PartialFailure(result.rejected)
    assert result.rejected == {3: ("refused_by_destination", "bad"), 8: ("17", "the server gave no reason")}
    assert classify(status, {"rejected": entries, "accepted": 0}) == result
    assert classify(status, {"rejected": entries, "accepted": 1}) == PartialFailure(result.rejected, 1)


def test_a_rejection_that_kept_unnamed_events_stops_delivery() -> None:
    """Sending the kept events again would duplicate them."""
    for body in ({"rejected": 1, "accepted": 2}, {"rejected": [0], "accepted": 1}, {"accepted": 1}):
        assert isinstance(classify(400, body), Misconfigured)


@pytest.mark.parametrize("body", [{"rejected": 1}, {"refused": [{"index": 9}]}, {"detail": "no"}, {"refused": []}])
def test_a_rejection_without_usable_indexes_rejects_the_whole_batch(body: object) -> None:
    """Delivery then finds the rejected events by halving the batch."""
    assert isinstance(classify(422, body), Rejected)


def test_a_response_is_quoted_shortened_and_without_secrets() -> None:
    """Redacted before it is shortened, so that no part of a secret remains at the end."""
    body = b"x" * 195 + b" s3cret-token\n and more" * 50

    def redact(text: str) -> str:
        return text.replace("s3cret-token", "...")

    for status in (400, 401, 413, 503):
        result: Any = classify_response(HttpResponse(status, body=body), INDEXES, NOW, redact)
        reason = result.rejection.reason if isinstance(result, Rejected) else result.reason
        assert "s3" not in reason
        assert "\n" not in reason
        assert len(reason) < 500
    entries = json.dumps({"refused": [{"index": 0, "code": "s3cret-token" * 9, "reason": "s3cret-token" * 50}]}).encode()
    result = classify_response(HttpResponse(400, "application/json", body=entries), INDEXES, NOW, redact)
    assert "s3" not in str(result)
    assert len(result.rejected[3].code) <= 64
