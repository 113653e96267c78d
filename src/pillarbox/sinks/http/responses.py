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

from pillarbox.sinks.base import Answer, Delivered, Misconfigured, Partly, Refusal, Refused, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ANSWER_BYTES_MAX: Final = 2**20  # read of one answer: enough to name and explain 5,000 refused records
RETRY_AFTER_MAX_S: Final = 1e11  # three thousand years: longer than any process lives, and still a date
_TEXT_MAX: Final = 200  # characters of an answer that are shown
_CODE_MAX: Final = 64
_NOT_NOW: Final = frozenset({408, 409, 425, 429})
_NEVER: Final = frozenset({501, 505, 511})  # of the 5xx, those that waiting does not mend
_SPEAKING: Final = frozenset({400, 422})
_WAY_OUT: Final = "; where the status alone is to count, add answer=status to the sink's options"
_SECONDS = re.compile(r"[+-]?\d+(\.\d*)?")


class Reply(NamedTuple):
    """The parts of an answer that matter."""

    status: int
    kind: str = ""  # content type
    retry_after: str = ""
    date: str = ""
    location: str = ""
    allow: str = ""
    body: bytes = b""
    whole: bool = True  # whether all of the body was read and can be

    @property
    def is_json(self) -> bool:
        """Whether it says of itself that it is JSON."""
        kind = self.kind.partition(";")[0].strip().lower()
        return kind == "application/json" or kind.endswith("+json")


class _Said(NamedTuple):
    """What a body says of the events, or why that cannot be understood."""

    refused: dict[int, Refusal]
    accepted: int | None
    duplicates: int
    problem: str = ""


def _as_it_is(text: str) -> str:
    return text


def classify(
    reply: Reply, indexes: Sequence[int], now_s: float, hide: Callable[[str], str] = _as_it_is, *, counts: bool = True
) -> Answer:
    """The answer that a reply amounts to.

    `indexes` are the batch's records in the order of the call, `now_s` is Unix time, `hide` takes our secrets out of a text;
    without `counts` the body is not looked at.
    """
    status = reply.status
    if 200 <= status < 300:
        return _accepted(reply, indexes, hide) if counts else Delivered(len(indexes))
    if status in _SPEAKING:
        return _refused(reply, indexes, hide)
    after = retry_after(reply.retry_after, reply.date, now_s)
    if status == 413 and after is None:
        return Refused(Refusal("too_large", _words(f"the server takes no call of {len(indexes)} such events", reply, hide)))
    if status == 413 or status in _NOT_NOW or (500 <= status < 600 and status not in _NEVER):
        return Retry(_words(f"the server answered {status}", reply, hide), after)
    return Misconfigured(_advice(reply, hide))


def needs_body(status: int) -> bool:
    """Whether an answer with this status means nothing before its body was read."""
    return 200 <= status < 300 or status in _SPEAKING


def _accepted(reply: Reply, indexes: Sequence[int], hide: Callable[[str], str]) -> Answer:
    if not reply.whole and reply.is_json:
        return Misconfigured(
            f"{reply.status}: the answer is compressed, or longer than {ANSWER_BYTES_MAX} bytes: one cannot see whether "
            f"it refuses events: have it answer less, or lower records_max{_WAY_OUT}"
        )
    value = _decoded(reply.body)
    if value is msgspec.UNSET and reply.is_json and reply.body.strip():
        return Retry(
            _words(f"{reply.status}, but the answer is no whole JSON, and may have refused events", reply, hide) + _WAY_OUT
        )
    said = _said(value, indexes, hide)
    if said is None:
        if reply.status == 207:
            return Misconfigured(
                "207: the server speaks of each event on its own, in a form that is not known: "
                f"let it answer as docs/how-to/http.md says{_WAY_OUT}"
            )
        return Delivered(len(indexes))
    taken = len(indexes) - len(said.refused)
    problem = said.problem
    if not problem and said.accepted is not None and said.accepted + said.duplicates < taken:
        problem = f"counts {said.accepted} accepted of {len(indexes)}, and does not say what became of the others"
    if problem:
        return Misconfigured(f"{reply.status}: the answer {problem}{_WAY_OUT}")
    duplicates = min(said.duplicates, taken)
    return Partly(said.refused, taken, duplicates) if said.refused else Delivered(taken, duplicates)


def _refused(reply: Reply, indexes: Sequence[int], hide: Callable[[str], str]) -> Answer:
    said = _said(_decoded(reply.body), indexes, hide)
    if said is not None:
        taken = len(indexes) - len(said.refused)
        if said.accepted or said.duplicates:
            # Kept in part although it refuses: to send anew what it kept would show it twice.
            if said.problem or (said.accepted or 0) + said.duplicates < taken:
                problem = said.problem or "does not say what became of each event"
                return Misconfigured(
                    f"{reply.status}: the answer kept events, but {problem}: let it answer as docs/how-to/http.md says"
                )
            return Partly(said.refused, taken, min(said.duplicates, taken))
        if said.refused and not said.problem:
            return Partly(said.refused)
    return Refused(Refusal("refused_by_destination", _words(f"the server answered {reply.status}", reply, hide)))


def _decoded(body: bytes) -> Any:
    """The value of a body in JSON, `UNSET` for any other."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.UNSET


def _said(value: Any, indexes: Sequence[int], hide: Callable[[str], str]) -> _Said | None:
    """What the body says of the events; None where it is about something else."""
    if not isinstance(value, dict):
        return None
    accepted, duplicates = _count(value.get("accepted")), _count(value.get("duplicates"))
    named = value.get("refused") or value.get("rejected")
    if not named:
        return None if accepted is None else _Said({}, accepted, duplicates or 0)
    if not isinstance(named, list):
        return _Said({}, accepted, duplicates or 0, "refuses events without naming them")
    refused: dict[int, Refusal] = {}
    for entry in named:
        index = _count(entry.get("index") if isinstance(entry, dict) else entry)
        if index is None or index >= len(indexes):
            return _Said({}, accepted, duplicates or 0, f"refuses an event that is none of the {len(indexes)}")
        refused[indexes[index]] = _refusal(entry if isinstance(entry, dict) else {}, hide)
    return _Said(refused, accepted, duplicates or 0)


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _refusal(entry: dict[str, Any], hide: Callable[[str], str]) -> Refusal:
    code, reason = entry.get("code"), entry.get("reason") or entry.get("message") or entry.get("error")
    return Refusal(
        _line(hide(str(code)), _CODE_MAX) if isinstance(code, (str, int)) and code else "refused_by_destination",
        _line(hide(reason), _TEXT_MAX) if isinstance(reason, str) else "the server gave no reason",
    )


def retry_after(text: str, date: str, now_s: float) -> float | None:
    """Seconds until the moment that `Retry-After` names, never less; None where it names none.

    A date counts from the answer's own `Date`, where it has one: the two clocks may differ.
    """
    text = text.strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        then, now = _unix(text), _unix(date)
        if then is None:
            return None
        seconds = then - (now_s if now is None else now)
    return min(max(0.0, seconds), RETRY_AFTER_MAX_S)


def _unix(text: str) -> float | None:
    """A date as HTTP writes it, in its three forms, as Unix time."""
    try:
        parts = parsedate_tz(text)
        return None if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def _line(text: str, most: int) -> str:
    return " ".join(text.split())[:most]


def _words(said: str, reply: Reply, hide: Callable[[str], str]) -> str:
    """A sentence, and what the answer's body says."""
    title = re.search(rb"<title[^>]*>([^<]*)</title>", reply.body, re.IGNORECASE)
    text = _line(hide((title[1] if title else reply.body).decode(errors="replace")), _TEXT_MAX)
    return f"{said}: {text}" if text else said


def _advice(reply: Reply, hide: Callable[[str], str]) -> str:
    status = reply.status
    if 300 <= status < 400:
        return f"{status}: {_redirect(reply.location)}"
    remedy = REMEDIES.get(
        status, "Pillarbox does not know this answer, and gives no event up for it: mend the URL, or the server"
    )
    return _words(str(status), reply, hide) + f": {remedy}"


def _redirect(location: str) -> str:
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
