"""What an answer means: a table over all statuses, and a reading of the bodies that say more. Pure.

| status | meaning |
| --- | --- |
| 2xx | accepted, but for the records that the body names |
| 400, 422 | the records that the body names are refused, or all |
| 413 | too many, or too large |
| 408, 409, 425, 429, 5xx | not now |
| 501, 505, 511, 1xx, 3xx and every other 4xx | the set-up is at fault |

Only statuses that speak of the body's content may make dead letters. An unknown 4xx does not: nobody can say that an event was
at fault, so nothing is given up, and somebody is told.
"""

from __future__ import annotations

import re
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESPONSE_BYTES_MAX: Final = 2**20  # read of one answer: enough to name and explain 5,000 refused records
RETRY_AFTER_MAX_S: Final = 1e11  # three thousand years: longer than any process lives, and still a date
_EXCERPT_CHARS_MAX: Final = 200  # characters of an answer that are shown
_CODE_CHARS_MAX: Final = 64
_RETRYABLE: Final = frozenset({408, 409, 425, 429})
_PERMANENT_5XX: Final = frozenset({501, 505, 511})  # of the 5xx, those that waiting does not mend
_REJECTING: Final = frozenset({400, 422})
_STATUS_ONLY_HINT: Final = "; where the status alone is to count, add answer=status to the sink's options"
_SECONDS_FORM = re.compile(r"[+-]?\d+(\.\d*)?")


class HttpResponse(NamedTuple):
    """The parts of an answer that matter."""

    status: int
    content_type: str = ""  # content type
    retry_after: str = ""
    date: str = ""
    location: str = ""
    allow: str = ""
    body: bytes = b""
    is_complete: bool = True  # whether all of the body was read and can be

    @property
    def is_json(self) -> bool:
        """Whether it says of itself that it is JSON."""
        kind = self.content_type.partition(";")[0].strip().lower()
        return kind == "application/json" or kind.endswith("+json")


class _BatchReport(NamedTuple):
    """What a body says of the events, or why that cannot be understood."""

    rejected: dict[int, Rejection]
    accepted: int | None
    duplicates: int
    problem: str = ""


def _unredacted(text: str) -> str:
    return text


def classify_response(
    response: HttpResponse,
    indexes: Sequence[int],
    now_s: float,
    redact: Callable[[str], str] = _unredacted,
    *,
    reads_body: bool = True,
) -> DeliveryResult:
    """The answer that a reply amounts to.

    `indexes` are the batch's records in the order of the call, `now_s` is Unix time, `redact` takes our secrets out of a text;
    without `reads_body` the body is not looked at.
    """
    status = response.status
    if 200 <= status < 300:
        return _classify_success(response, indexes, redact) if reads_body else Delivered(len(indexes))
    if status in _REJECTING:
        return _classify_rejection(response, indexes, redact)
    after = parse_retry_after(response.retry_after, response.date, now_s)
    if status == 413 and after is None:
        return Rejected(
            Rejection("too_large", _with_excerpt(f"the server takes no call of {len(indexes)} such events", response, redact))
        )
    if status == 413 or status in _RETRYABLE or (500 <= status < 600 and status not in _PERMANENT_5XX):
        return Retry(_with_excerpt(f"the server answered {status}", response, redact), after)
    return Misconfigured(_explain_misconfiguration(response, redact))


def needs_body(status: int) -> bool:
    """Whether an answer with this status means nothing before its body was read."""
    return 200 <= status < 300 or status in _REJECTING


def _classify_success(response: HttpResponse, indexes: Sequence[int], redact: Callable[[str], str]) -> DeliveryResult:
    if not response.is_complete and response.is_json:
        return Misconfigured(
            f"{response.status}: the answer is compressed, or longer than {RESPONSE_BYTES_MAX} bytes: one cannot see whether "
            f"it refuses events: have it answer less, or lower records_max{_STATUS_ONLY_HINT}"
        )
    value = _decode_json(response.body)
    if value is msgspec.UNSET and response.is_json and response.body.strip():
        return Retry(
            _with_excerpt(f"{response.status}, but the answer is no whole JSON, and may have refused events", response, redact)
            + _STATUS_ONLY_HINT
        )
    report = _parse_report(value, indexes, redact)
    if report is None:
        if response.status == 207:
            return Misconfigured(
                "207: the server speaks of each event on its own, in a form that is not known: "
                f"let it answer as docs/how-to/http.md says{_STATUS_ONLY_HINT}"
            )
        return Delivered(len(indexes))
    accepted = len(indexes) - len(report.rejected)
    problem = report.problem
    if not problem and report.accepted is not None and report.accepted + report.duplicates < accepted:
        problem = f"counts {report.accepted} accepted of {len(indexes)}, and does not say what became of the others"
    if problem:
        return Misconfigured(f"{response.status}: the answer {problem}{_STATUS_ONLY_HINT}")
    duplicates = min(report.duplicates, accepted)
    return PartialFailure(report.rejected, accepted, duplicates) if report.rejected else Delivered(accepted, duplicates)


def _classify_rejection(response: HttpResponse, indexes: Sequence[int], redact: Callable[[str], str]) -> DeliveryResult:
    report = _parse_report(_decode_json(response.body), indexes, redact)
    if report is not None:
        accepted = len(indexes) - len(report.rejected)
        if report.accepted or report.duplicates:
            # Kept in part although it refuses: to send anew what it kept would show it twice.
            if report.problem or (report.accepted or 0) + report.duplicates < accepted:
                problem = report.problem or "does not say what became of each event"
                return Misconfigured(
                    f"{response.status}: the answer kept events, but {problem}: let it answer as docs/how-to/http.md says"
                )
            return PartialFailure(report.rejected, accepted, min(report.duplicates, accepted))
        if report.rejected and not report.problem:
            return PartialFailure(report.rejected)
    return Rejected(
        Rejection("refused_by_destination", _with_excerpt(f"the server answered {response.status}", response, redact))
    )


def _decode_json(body: bytes) -> Any:
    """The value of a body in JSON, `UNSET` for any other."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET


def _parse_report(value: Any, indexes: Sequence[int], redact: Callable[[str], str]) -> _BatchReport | None:
    """What the body says of the events; None where it is about something else."""
    if not isinstance(value, dict):
        return None
    accepted, duplicates = _as_count(value.get("accepted")), _as_count(value.get("duplicates"))
    entries = value.get("refused") or value.get("rejected")
    if not entries:
        return None if accepted is None else _BatchReport({}, accepted, duplicates or 0)
    if not isinstance(entries, list):
        return _BatchReport({}, accepted, duplicates or 0, "refuses events without naming them")
    rejected: dict[int, Rejection] = {}
    for entry in entries:
        index = _as_count(entry.get("index") if isinstance(entry, dict) else entry)
        if index is None or index >= len(indexes):
            return _BatchReport({}, accepted, duplicates or 0, f"refuses an event that is none of the {len(indexes)}")
        rejected[indexes[index]] = _parse_rejection(entry if isinstance(entry, dict) else {}, redact)
    return _BatchReport(rejected, accepted, duplicates or 0)


def _as_count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _parse_rejection(entry: dict[str, Any], redact: Callable[[str], str]) -> Rejection:
    code, reason = entry.get("code"), entry.get("reason") or entry.get("message") or entry.get("error")
    return Rejection(
        _one_line(redact(str(code)), _CODE_CHARS_MAX) if isinstance(code, (str, int)) and code else "refused_by_destination",
        _one_line(redact(reason), _EXCERPT_CHARS_MAX) if isinstance(reason, str) else "the server gave no reason",
    )


def parse_retry_after(text: str, date: str, now_s: float) -> float | None:
    """Seconds until the moment that `Retry-After` names, never less; None where it names none.

    A date counts from the answer's own `Date`, where it has one: the two clocks may differ.
    """
    text = text.strip()
    if _SECONDS_FORM.fullmatch(text):
        seconds = float(text)
    else:
        then, now = _parse_http_date(text), _parse_http_date(date)
        if then is None:
            return None
        seconds = then - (now_s if now is None else now)
    return min(max(0.0, seconds), RETRY_AFTER_MAX_S)


def _parse_http_date(text: str) -> float | None:
    """A date as HTTP writes it, in its three forms, as Unix time."""
    try:
        parts = parsedate_tz(text)
        return None if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def _one_line(text: str, most: int) -> str:
    return " ".join(text.split())[:most]


def _with_excerpt(sentence: str, response: HttpResponse, redact: Callable[[str], str]) -> str:
    """A sentence, and what the answer's body says."""
    title = re.search(rb"<title[^>]*>([^<]*)</title>", response.body, re.IGNORECASE)
    text = _one_line(redact((title[1] if title else response.body).decode(errors="replace")), _EXCERPT_CHARS_MAX)
    return f"{sentence}: {text}" if text else sentence


def _explain_misconfiguration(response: HttpResponse, redact: Callable[[str], str]) -> str:
    status = response.status
    if 300 <= status < 400:
        return f"{status}: {_explain_redirect(response.location)}"
    remedy = REMEDIES.get(
        status, "Pillarbox does not know this answer, and gives no event up for it: mend the URL, or the server"
    )
    return _with_excerpt(str(status), response, redact) + f": {remedy}"


def _explain_redirect(location: str) -> str:
    try:
        host = urlsplit(location).hostname
    except ValueError:
        host = None
    if not location:
        return "the server leads elsewhere and does not say where: mend the sink's URL"
    where = f"another address at {host}" if host else "another path of the same server"
    return f"the server leads to {where}; redirects are not followed: put the address that is meant into the sink's URL"


REMEDIES: Final = {
    101: "the server changes to another protocol: mend the URL",
    401: "the server does not accept the credentials: give it others by token_env, header_env, or user and password",
    402: "the server wants to be paid",
    403: "these credentials may not post here: have them let in, or use others",
    404: "the server has nothing at this path: mend the URL",
    405: "the server takes no POST at this path: mend the URL",
    406: "the server cannot answer in JSON: let it answer with any text, or none",
    407: "the proxy wants credentials: put them into the address that proxy_env names",
    410: "what was at this path is gone for good: mend the URL",
    411: "something in between took Content-Length away: mend the proxy",
    414: "the URL is longer than the server takes: mend it",
    415: "the server does not take this format or compression: choose others by format= and compress=",
    421: "this server does not serve that host: mend the URL, or the proxy",
    426: "the server wants another protocol: mend the URL",
    428: "the server wants a condition that Pillarbox does not send: mend the URL",
    431: "the headers are larger than the server takes: mend header_env and token_env",
    451: "the server may not take them for legal reasons",
    501: "the server knows no POST: mend the URL",
    505: "the server does not speak HTTP/1.1: put a proxy in front that does",
    511: "the network wants a login first: log this machine in",
}
