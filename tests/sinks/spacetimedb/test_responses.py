"""What an answer means: the rows that no real server can be made to give here, and the ones of proxies."""

from __future__ import annotations

from typing import Any

import pytest

from pillarbox.sinks.base import Delivered, Misconfigured, PartialFailure, Rejected, Retry
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse, classify_response
from pillarbox.sinks.spacetimedb.schema import ReturnKind

HTML = b"<html><head><title>Bad\n Gateway</title></head></html>"


def answer(
    status: int,
    body: bytes = b"",
    kind: str = "text/plain",
    after: str = "",
    returns: ReturnKind = "nothing",
    *,
    timed: bool = True,
) -> Any:
    return classify_response(SpacetimeDbResponse(status, kind, after, body, timed), "f", [3, 5, 8], returns)


@pytest.mark.parametrize(
    ("body", "returns", "expected"),
    [
        (b"", "nothing", Delivered(3)),
        (b"2", "count", Delivered(3, 1)),
        (b"[0,0]", "result", Delivered(3, 3)),
        (b'{"ok":3}', "result", Delivered(3, 0)),
        (b"[]", "value", Delivered(3, 0)),
        (b"[1,5]", "value", Delivered(3, 0)),
    ],
)
def test_accepted(body: bytes, returns: ReturnKind, expected: Delivered) -> None:
    """With the number that were there already, where the answer tells it."""
    assert answer(200, body, returns=returns) == expected


@pytest.mark.parametrize("body", [b'[1,"no"]', b'[1,{"Invalid":[]}]', b"[1,[]]", b'{"err":{"code":5}}'])
def test_an_error_of_any_type_in_a_result_is_a_refusal(body: bytes) -> None:
    """The call was rolled back."""
    assert isinstance(answer(200, body, returns="result"), Rejected)


@pytest.mark.parametrize(("body", "returns"), [(b"[2,1]", "result"), (b'"x"', "count"), (b"{", "value")])
def test_an_answer_of_another_shape_than_the_schemas_is_not_taken_for_acceptance(body: bytes, returns: ReturnKind) -> None:
    """Nothing may be deleted for it."""
    assert isinstance(answer(200, body, returns=returns), Misconfigured)


def test_what_no_function_can_have_answered_is_not_believed() -> None:
    """A 200 or 530 without the time that the function took is a proxy's."""
    assert isinstance(answer(200, b"maintenance", timed=False), Misconfigured)
    assert isinstance(answer(530, b"error code: 1033", timed=False), Retry)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_wait_and_try_again(status: int) -> None:
    """Also where a proxy says it in HTML."""
    assert isinstance(answer(status, b"busy"), Retry)
    assert isinstance(answer(status, HTML, "text/html"), Retry)
    assert answer(status, b"busy", after="7").after == 7.0


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"TokenError(Error(InvalidToken))", "token"),
        (402, b"Module energy budget exhausted.", "energy"),
        (403, b"not you", "client_connected"),
        (404, b"no such reducer", "no function f"),
        (404, b"No such procedure", "no function f"),
        (404, b"", "no such database"),
        (415, b"Expected request with `Content-Type: application/json`", "proxy"),
        (301, b"", "mend the URL"),
        (418, b"teapot", "mend the URL"),
        (400, b"no idea", "pillarbox check"),
    ],
)
def test_the_set_up_is_at_fault(status: int, body: bytes, said: str) -> None:
    """One sentence with the way out; no event is blamed."""
    found = answer(status, body)
    assert isinstance(found, Misconfigured)
    assert said in found.reason


@pytest.mark.parametrize("status", [200, 301, 400, 401, 404, 413])
def test_html_is_a_proxys(status: int) -> None:
    """Whatever the status, it is not taken for SpacetimeDB's word."""
    for kind in ("text/html; charset=utf-8", ""):
        found = answer(status, HTML, kind)
        assert isinstance(found, Misconfigured)
        assert "proxy" in found.reason
        assert "Bad Gateway" in found.reason


def test_the_function_may_name_several_events() -> None:
    """By their index in the call; they come back by their index in the batch."""
    found = answer(530, b"event[0].event_id: must not be empty; event[2]: too; loud")
    assert isinstance(found, PartialFailure)
    assert {index: refusal.reason for index, refusal in found.rejected.items()} == {
        3: "event_id: must not be empty",
        8: "too; loud",
    }
    assert found.accepted is None


def test_all_of_a_long_error_is_read() -> None:
    """Only what is shown is cut."""
    text = "; ".join(f"event[{index}].metadata_json: {'x' * 400}" for index in range(3))
    assert answer(530, text.encode()).refused.keys() == {3, 5, 8}


@pytest.mark.parametrize("text", [b"no reason", b"", b"event[7].x: out of this call", b"he said event[0].x: no"])
def test_an_error_that_names_none_refuses_all(text: bytes) -> None:
    """The engine narrows it down."""
    assert isinstance(answer(530, text), Rejected)


def test_a_path_in_a_400_names_the_event() -> None:
    """As both versions write it."""
    found = answer(400, b"invalid arguments for reducer f: [0][1].user_id: [0][1].user_id: invalid type")
    assert isinstance(found, PartialFailure)
    assert found.rejected.keys() == {5}


def test_413_refuses_the_call_for_its_size() -> None:
    """So that it is split."""
    found = answer(413, b"Failed to buffer the request body: length limit exceeded")
    assert isinstance(found, Rejected)
    assert found.rejection.code == "too_large"
