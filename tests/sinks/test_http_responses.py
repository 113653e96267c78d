"""What an answer means: every status, `Retry-After` in each of its forms, and the bodies that say more."""

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


def answer(status: int, body: object = b"", *, counts: bool = True, **more: Any) -> Any:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
        more.setdefault("kind", "application/json")
    return classify_response(HttpResponse(status, body=body, **more), INDEXES, NOW, reads_body=counts)


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
def test_every_status_has_its_meaning(status: int, kind: type) -> None:
    """Whether or not a text comes with it; and each says what it is about."""
    for body in (b"", b"<html><title>Oh\n no</title></html>", b"no", b"{", b"[]", b'"x"', b"{}", b"\xff\x00"):
        found = answer(status, body)
        assert type(found) is kind
        if isinstance(found, (Misconfigured, Retry)):
            assert str(status) in found.reason
        if isinstance(found, Delivered):
            assert found == Delivered(3)


@pytest.mark.parametrize(
    "status", [100, 101, 300, 304, 401, 403, 404, 405, 406, 407, 410, 411, 415, 418, 421, 426, 501, 505, 511]
)
def test_where_the_set_up_is_at_fault_the_way_out_is_named(status: int) -> None:
    """One line, and a verb in it."""
    reason = answer(status, b"some text").reason
    assert "\n" not in reason
    assert any(way in reason for way in ("mend", "let", "use ", "put ", "choose", "log ", "give it", "into the sink's URL"))


def test_a_redirect_is_named_and_not_followed() -> None:
    """By its host alone: what follows may be secret."""
    found = answer(302, location="https://user:secret@login.example/path?token=secret")
    assert "login.example" in found.reason
    assert "secret" not in found.reason
    assert "same server" in answer(301, location="/elsewhere?k=secret").reason
    assert "does not say where" in answer(308).reason
    assert isinstance(answer(307, location="https://[broken"), Misconfigured)


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
        # The server's clock is five years ahead: what counts is the time between its two dates.
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
def test_retry_after_is_read_in_each_of_its_forms(text: str, date: str, seconds: float | None) -> None:
    """And never shortened."""
    assert parse_retry_after(text, date, NOW) == seconds


def test_a_date_without_a_zone_is_not_taken_for_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of HTTP's three forms has none, and means UTC."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert parse_retry_after("Fri Jan 15 08:01:00 2027", "", NOW) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text(), st.text())
def test_no_retry_after_is_too_odd(text: str, date: str) -> None:
    """It is a time that a clock can hold, or none."""
    found = parse_retry_after(text, date, NOW)
    assert found is None or 0 <= found <= RETRY_AFTER_MAX_S < sys.float_info.max


@pytest.mark.parametrize("status", [408, 409, 413, 425, 429, 500, 502, 503, 504, 507, 520, 599])
def test_a_time_that_is_named_is_kept(status: int) -> None:
    """Also with 413, which then says that it is too much at present."""
    found = answer(status, b"busy", retry_after="7")
    assert found == Retry(found.reason, 7.0)


@pytest.mark.parametrize("status", [200, 201, 202, 207])
@pytest.mark.parametrize("word", ["refused", "rejected"])
def test_an_acceptance_may_name_what_it_refuses(status: int, word: str) -> None:
    """By the index in the call; it comes back by the index in the batch."""
    found = answer(status, {"accepted": 2, "duplicates": 1, word: [{"index": 1, "code": "no_user", "reason": "nobody"}]})
    assert found == PartialFailure({5: found.refused[5]}, 2, 1)
    assert found.refused[5] == ("no_user", "nobody")


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
def test_counts_in_an_acceptance(body: object, expected: object) -> None:
    """Those of our form count; another form's do not hurt."""
    found = answer(200, body)
    assert (found.accepted if isinstance(found, PartialFailure) else found) == expected


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
def test_an_acceptance_that_leaves_events_out_is_not_taken_for_one(body: object) -> None:
    """Nothing may be deleted for it; the way out is named, and taken."""
    found = answer(200, body)
    assert isinstance(found, Misconfigured)
    assert "answer=status" in found.reason
    assert answer(200, body, counts=False) == Delivered(3)


def test_an_acceptance_that_cannot_be_read_is_not_taken_for_one() -> None:
    """It may have named refusals: cut off, too long, or compressed; what is no JSON has none to name."""
    assert isinstance(answer(200, b'{"refused":[{"ind', kind="application/json"), Retry)
    assert isinstance(answer(200, b'{"refused":[{"ind', kind="application/problem+json; charset=utf-8"), Retry)
    assert isinstance(answer(200, b'{"refused":', kind="application/json", whole=False), Misconfigured)
    assert answer(200, b"<html>", kind="text/html", whole=False) == Delivered(3)
    assert answer(200, b"{garbage", kind="text/plain") == Delivered(3)
    assert answer(204, b"", kind="application/json") == Delivered(3)
    assert isinstance(answer(200, b'{"a":' * 10_000, kind="application/json"), Retry)


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_may_name_the_events(status: int) -> None:
    """Nothing of the call was kept, unless the answer says so."""
    named = [{"index": 0, "message": "bad"}, {"index": 2, "code": 17}]
    found = answer(status, {"rejected": named})
    assert found == PartialFailure(found.refused)
    assert found.refused == {3: ("refused_by_destination", "bad"), 8: ("17", "the server gave no reason")}
    assert answer(status, {"rejected": named, "accepted": 0}) == found
    assert answer(status, {"rejected": named, "accepted": 1}) == PartialFailure(found.refused, 1)


def test_a_refusal_that_kept_some_and_does_not_say_which_stops() -> None:
    """To send anew what it kept would show it twice."""
    for body in ({"rejected": 1, "accepted": 2}, {"rejected": [0], "accepted": 1}, {"accepted": 1}):
        assert isinstance(answer(400, body), Misconfigured)


@pytest.mark.parametrize("body", [{"rejected": 1}, {"refused": [{"index": 9}]}, {"detail": "no"}, {"refused": []}])
def test_a_refusal_that_names_none_refuses_all(body: object) -> None:
    """The engine finds out which by halves."""
    assert isinstance(answer(422, body), Rejected)


def test_what_an_answer_says_is_shown_short_and_without_secrets() -> None:
    """One line; hidden before it is cut, so that no half of a secret is left at the end."""
    body = b"x" * 195 + b" s3cret-token\n and more" * 50

    def hide(text: str) -> str:
        return text.replace("s3cret-token", "...")

    for status in (400, 401, 413, 503):
        found: Any = classify_response(HttpResponse(status, body=body), INDEXES, NOW, hide)
        reason = found.rejection.reason if isinstance(found, Rejected) else found.reason
        assert "s3" not in reason
        assert "\n" not in reason
        assert len(reason) < 500
    named = json.dumps({"refused": [{"index": 0, "code": "s3cret-token" * 9, "reason": "s3cret-token" * 50}]}).encode()
    found = classify_response(HttpResponse(400, "application/json", body=named), INDEXES, NOW, hide)
    assert "s3" not in str(found)
    assert len(found.refused[3].code) <= 64
