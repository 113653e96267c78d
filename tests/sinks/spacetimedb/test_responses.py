"""Classification of responses that a real server cannot be made to send here, and of proxies' responses."""

from __future__ import annotations

from typing import Any

import pytest

from pillarbox.sinks.base import Delivered, Misconfigured, PartialFailure, Rejected, Retry
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse, classify_response
from pillarbox.sinks.spacetimedb.schema import ReturnKind

HTML = b"<html><head><title>Bad\n Gateway</title></head></html>"


def classify(
    status: int,
    body: bytes = b"",
    content_type: str = "text/plain",
    retry_after: str = "",
    returns: ReturnKind = "nothing",
    *,
    has_execution_time: bool = True,
) -> Any:
    return classify_response(
        SpacetimeDbResponse(status, content_type, retry_after, body, has_execution_time), "f", [3, 5, 8], returns
    )


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
def test_a_200_is_an_acceptance(body: bytes, returns: ReturnKind, expected: Delivered) -> None:
    """With the number of duplicates, where the function returns a count."""
    assert classify(200, body, returns=returns) == expected


@pytest.mark.parametrize("body", [b'[1,"no"]', b'[1,{"Invalid":[]}]', b"[1,[]]", b'{"err":{"code":5}}'])
def test_an_error_of_any_type_in_a_result_rejects_the_batch(body: bytes) -> None:
    """The call was rolled back."""
    assert isinstance(classify(200, body, returns="result"), Rejected)


@pytest.mark.parametrize(("body", "returns"), [(b"[2,1]", "result"), (b'"x"', "count"), (b"{", "value")])
def test_a_value_that_does_not_match_the_schema_is_not_an_acceptance(body: bytes, returns: ReturnKind) -> None:
    """No batch may be deleted because of it."""
    assert isinstance(classify(200, body, returns=returns), Misconfigured)


def test_a_response_without_the_execution_time_is_a_proxys() -> None:
    """SpacetimeDB sends the header with each 200 and 530."""
    assert isinstance(classify(200, b"maintenance", has_execution_time=False), Misconfigured)
    assert isinstance(classify(530, b"error code: 1033", has_execution_time=False), Retry)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_temporary_status_is_retried(status: int) -> None:
    """Also if a proxy sends it as HTML."""
    assert isinstance(classify(status, b"busy"), Retry)
    assert isinstance(classify(status, HTML, "text/html"), Retry)
    assert classify(status, b"busy", retry_after="7").after_s == 7.0


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"TokenError(Error(InvalidToken))", "token"),
        (402, b"Module energy budget exhausted.", "energy"),
        (403, b"not you", "client_connected"),
        (404, b"no such reducer", "no function f"),
        (404, b"No such procedure", "no function f"),
        (404, b"", "no such database"),
        (415, b"Expected request with `Content-Type: application/json`", "proxy"),
        (301, b"", "correct the URL"),
        (418, b"teapot", "correct the URL"),
        (400, b"no idea", "pillarbox check"),
    ],
)
def test_a_misconfiguration_says_what_to_do(status: int, body: bytes, message: str) -> None:
    """No event is rejected."""
    result = classify(status, body)
    assert isinstance(result, Misconfigured)
    assert message in result.reason


@pytest.mark.parametrize("status", [200, 301, 400, 401, 404, 413])
def test_html_is_not_from_spacetimedb(status: int) -> None:
    """Whatever the status."""
    for content_type in ("text/html; charset=utf-8", ""):
        result = classify(status, HTML, content_type)
        assert isinstance(result, Misconfigured)
        assert "proxy" in result.reason
        assert "Bad Gateway" in result.reason


def test_an_error_may_name_several_events() -> None:
    """By their index in the call; the result names them by their index in the batch."""
    result = classify(530, b"event[0].event_id: must not be empty; event[2]: too; loud")
    assert isinstance(result, PartialFailure)
    assert {index: rejection.reason for index, rejection in result.rejected.items()} == {
        3: "event_id: must not be empty",
        8: "too; loud",
    }
    assert result.accepted is None


def test_a_long_error_is_read_completely() -> None:
    """Only the quoted reason is shortened."""
    text = "; ".join(f"event[{index}].metadata_json: {'x' * 400}" for index in range(3))
    assert classify(530, text.encode()).rejected.keys() == {3, 5, 8}


@pytest.mark.parametrize("text", [b"no reason", b"", b"event[7].x: out of this call", b"he message event[0].x: no"])
def test_an_error_that_names_no_event_rejects_the_whole_batch(text: bytes) -> None:
    """Delivery then halves the batch."""
    assert isinstance(classify(530, text), Rejected)


def test_the_argument_path_in_a_400_names_the_event() -> None:
    """In the format of both versions."""
    result = classify(400, b"invalid arguments for reducer f: [0][1].user_id: [0][1].user_id: invalid type")
    assert isinstance(result, PartialFailure)
    assert result.rejected.keys() == {5}


def test_a_413_rejects_the_batch_for_its_size() -> None:
    """So that delivery halves it."""
    result = classify(413, b"Failed to buffer the request body: length limit exceeded")
    assert isinstance(result, Rejected)
    assert result.rejection.code == "too_large"
