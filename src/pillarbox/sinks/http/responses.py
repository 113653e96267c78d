"""Maps an HTTP response to a delivery result, by its status and, where the body says more, by its body. Pure.

| status | result |
| --- | --- |
| 2xx | accepted, except for the records that the body names |
| 400, 422 | the records that the body names are rejected, or all of them |
| 413 | too many records, or too large |
| 408, 409, 425, 429, 5xx | try again later |
| 501, 505, 511, 1xx, 3xx and every other 4xx | the configuration is wrong |

Only statuses that are about the content of the request may create dead letters. An unknown 4xx does not, because it does not
show that an event was at fault: delivery stops instead, and a person decides.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from pillarbox.redaction import NO_SECRETS, TEXT_BYTES_MAX, excerpt
from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry
from pillarbox.sinks.retry_after import RETRY_AFTER_MAX_S, parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "REMEDIES",
    "RESPONSE_BYTES_MAX",
    "RETRY_AFTER_MAX_S",
    "HttpResponse",
    "classify_response",
    "needs_body",
    "parse_retry_after",
]

RESPONSE_BYTES_MAX: Final = 2**20  # bytes read of one response; enough to name and explain 5,000 rejected records
_EXCERPT_CHARS_MAX: Final = 200  # characters of a response that a message quotes
_CODE_CHARS_MAX: Final = 64
_ENTRIES_PER_RECORD_MAX: Final = 16  # the fields in which a response may describe one record
_RETRYABLE: Final = frozenset({408, 409, 425, 429})
_PERMANENT_5XX: Final = frozenset({501, 505, 511})  # the 5xx that a retry does not resolve
_REJECTING: Final = frozenset({400, 422})
_STATUS_ONLY_HINT: Final = "; to judge responses by their status only, add answer=status to the sink's options"
_TITLE = re.compile(
    rb"<title[^<>]{0,200}>([^<]{0,1000})<", re.IGNORECASE
)  # bounded: a server may send `<title` a thousand times


class HttpResponse(NamedTuple):
    """The parts of a response that decide its meaning."""

    status: int
    content_type: str = ""
    retry_after: str = ""
    date: str = ""
    location: str = ""
    allow: str = ""
    body: bytes = b""
    is_complete: bool = True  # whether the whole body was read, and it is not compressed

    @property
    def is_json(self) -> bool:
        """Whether its content type is JSON."""
        kind = self.content_type.partition(";")[0].strip().lower()
        return kind == "application/json" or kind.endswith("+json")


class _BatchReport(NamedTuple):
    """The content of a response body about the events; `problem` says why it is not usable."""

    rejected: dict[int, Rejection]
    accepted: int | None
    duplicates: int
    problem: str = ""


def classify_response(
    response: HttpResponse,
    indexes: Sequence[int],
    now_s: float,
    redact: Callable[[str], str] = NO_SECRETS,
    *,
    reads_body: bool = True,
) -> DeliveryResult:
    """Map a response to a delivery result.

    Args:
        response: the response to the request that carried the records.
        indexes: the batch indexes of the records, in the order of the request.
        now_s: the current Unix time in seconds.
        redact: removes secrets from a text that comes from the response.
        reads_body: whether the body may name rejected events; if not, only the status counts.
    """
    status = response.status
    if 200 <= status < 300:
        return _classify_success(response, indexes, redact) if reads_body else Delivered(len(indexes))
    if status in _REJECTING:
        return _classify_rejection(response, indexes, redact)
    after = parse_retry_after(response.retry_after, response.date, now_s)
    if status == 413 and after is None:
        sentence = f"the request is too large for the server; events in it: {len(indexes)}"
        return Rejected(Rejection("too_large", _with_excerpt(sentence, response, redact)))
    if status == 413 or status in _RETRYABLE or (500 <= status < 600 and status not in _PERMANENT_5XX):
        return Retry(_with_excerpt(f"the server responded with {status}", response, redact), after)
    return Misconfigured(_explain_misconfiguration(response, redact))


def needs_body(status: int) -> bool:
    """Whether a response with this status has no meaning until its body was read."""
    return 200 <= status < 300 or status in _REJECTING


def _classify_success(response: HttpResponse, indexes: Sequence[int], redact: Callable[[str], str]) -> DeliveryResult:
    if not response.is_complete and response.is_json:
        return Misconfigured(
            f"{response.status}: the response is compressed or longer than {RESPONSE_BYTES_MAX} bytes, so it may reject events "
            f"that cannot be seen: make the server respond with less, or lower records_max{_STATUS_ONLY_HINT}"
        )
    value = _decode_json(response.body)
    if value is msgspec.UNSET and response.is_json and response.body.strip():
        return Retry(
            _with_excerpt(f"{response.status}, but the response is not complete JSON and may reject events", response, redact)
            + _STATUS_ONLY_HINT
        )
    report = _parse_report(value, indexes, redact)
    if report is None:
        if response.status == 207:
            return Misconfigured(
                "207: the server reports on each event in a format that Pillarbox does not know: "
                f"make it respond as docs/how-to/http.md describes{_STATUS_ONLY_HINT}"
            )
        return Delivered(len(indexes))
    accepted = len(indexes) - len(report.rejected)
    problem = report.problem
    if not problem and report.accepted is not None and report.accepted + report.duplicates < accepted:
        problem = f"accepts {report.accepted} of {len(indexes)} and does not account for the others"
    if problem:
        return Misconfigured(f"{response.status}: the response {problem}{_STATUS_ONLY_HINT}")
    duplicates = min(report.duplicates, accepted)
    return PartialFailure(report.rejected, accepted, duplicates) if report.rejected else Delivered(accepted, duplicates)


def _classify_rejection(response: HttpResponse, indexes: Sequence[int], redact: Callable[[str], str]) -> DeliveryResult:
    report = _parse_report(_decode_json(response.body), indexes, redact)
    if report is not None:
        accepted = len(indexes) - len(report.rejected)
        if report.accepted or report.duplicates:
            # The server stored some events although it responded with an error; sending these again would duplicate them.
            if report.problem or (report.accepted or 0) + report.duplicates < accepted:
                problem = report.problem or "does not account for each event"
                return Misconfigured(
                    f"{response.status}: the server stored events, but its response {problem}: "
                    "make it respond as docs/how-to/http.md describes"
                )
            return PartialFailure(report.rejected, accepted, min(report.duplicates, accepted))
        if report.rejected and not report.problem:
            return PartialFailure(report.rejected)
    return Rejected(
        Rejection("refused_by_destination", _with_excerpt(f"the server responded with {response.status}", response, redact))
    )


def _decode_json(body: bytes) -> Any:
    """Return the value of a JSON body, `UNSET` for any other body."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET


def _parse_report(value: Any, indexes: Sequence[int], redact: Callable[[str], str]) -> _BatchReport | None:
    """Parse what a body says about the events; None if it says nothing about them."""
    if not isinstance(value, dict):
        return None
    accepted, duplicates = _as_count(value.get("accepted")), _as_count(value.get("duplicates"))
    entries = value.get("refused") or value.get("rejected")
    if not entries:
        return None if accepted is None else _BatchReport({}, accepted, duplicates or 0)
    if not isinstance(entries, list):
        return _BatchReport({}, accepted, duplicates or 0, "rejects events without naming them")
    if len(entries) > _ENTRIES_PER_RECORD_MAX * len(indexes):
        problem = f"names {len(entries)} rejected events; the request had {len(indexes)}"
        return _BatchReport({}, accepted, duplicates or 0, problem)
    rejected: dict[int, Rejection] = {}
    for entry in entries:
        index = _as_count(entry.get("index") if isinstance(entry, dict) else entry)
        if index is None or index >= len(indexes):
            problem = f"rejects an event whose index is not one of the {len(indexes)} in the request"
            return _BatchReport({}, accepted, duplicates or 0, problem)
        rejected[indexes[index]] = _parse_rejection(entry if isinstance(entry, dict) else {}, redact)
    return _BatchReport(rejected, accepted, duplicates or 0)


def _as_count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _parse_rejection(entry: dict[str, Any], redact: Callable[[str], str]) -> Rejection:
    code, reason = entry.get("code"), entry.get("reason") or entry.get("message") or entry.get("error")
    return Rejection(
        excerpt(str(code), _CODE_CHARS_MAX, redact) if isinstance(code, (str, int)) and code else "refused_by_destination",
        excerpt(reason, _EXCERPT_CHARS_MAX, redact) if isinstance(reason, str) else "the server gave no reason",
    )


def _with_excerpt(sentence: str, response: HttpResponse, redact: Callable[[str], str]) -> str:
    """Append an excerpt of the response's body to a sentence."""
    title = _TITLE.search(response.body[:TEXT_BYTES_MAX])
    text = excerpt(title[1] if title else response.body, _EXCERPT_CHARS_MAX, redact)
    return f"{sentence}: {text}" if text else sentence


def _explain_misconfiguration(response: HttpResponse, redact: Callable[[str], str]) -> str:
    status = response.status
    if 300 <= status < 400:
        return f"{status}: {_explain_redirect(response.location, redact)}"
    remedy = REMEDIES.get(
        status, "Pillarbox does not know this status, and rejects no event because of it: correct the URL or the server"
    )
    return _with_excerpt(str(status), response, redact) + f": {remedy}"


def _explain_redirect(location: str, redact: Callable[[str], str]) -> str:
    try:
        host = urlsplit(location).hostname
    except ValueError:
        host = None
    if not location:
        return "the server redirects without a location: correct the sink's URL"
    destination = f"a URL at {excerpt(host, _EXCERPT_CHARS_MAX, redact)}" if host else "another path of the same server"
    return f"the server redirects to {destination}; redirects are not followed: put the final URL into the sink's URL"


REMEDIES: Final = {
    101: "the server switched to another protocol: correct the URL",
    401: "the server does not accept the credentials: correct token_env, header_env, or user and password",
    402: "the server requires payment: settle it with its operator",
    403: "these credentials may not post here: give them access, or use others",
    404: "the server has nothing at this path: correct the URL",
    405: "the server does not accept POST at this path: correct the URL",
    406: "the server cannot respond in JSON: make it respond with any text, or with none",
    407: "the proxy requires credentials: put them into the URL in the variable that proxy_env names",
    410: "the resource at this path was removed for good: correct the URL",
    411: "a proxy removed Content-Length: correct the proxy",
    414: "the URL is too long for the server: shorten it",
    415: "the server does not accept this format or compression: choose others with format= and compress=",
    421: "the server does not serve this host: correct the URL or the proxy",
    426: "the server requires another protocol: correct the URL",
    428: "the server requires conditional requests, which Pillarbox does not send: correct the URL",
    431: "the headers are too large for the server: shorten what header_env and token_env name",
    451: "the server may not accept the events for legal reasons: ask its operator",
    501: "the server does not support POST: correct the URL",
    505: "the server does not support HTTP/1.1: put a proxy that does in front of it",
    511: "the network requires a login: log this machine in",
}
