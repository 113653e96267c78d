"""What a server's answer to a call means: a total function from (status, headers, text) to an `DeliveryResult`. Pure.

Tried on standalone servers 1.2.0 and 2.8.3; the table is in docs/how-to/spacetimedb.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.sinks.spacetimedb.schema import ReturnKind

_EXCERPT_CHARS_MAX: Final = 500  # characters of a server's text that are shown
_EVENT_ERROR = re.compile(r"event\[(\d+)\](?:\.(\w+))?: ")
_EVENT_ERROR_SEPARATOR = re.compile(r"; (?=event\[)")
_ARGUMENT_INDEX = re.compile(r"\[0\]\[(\d+)\]")
_RETRYABLE: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class SpacetimeDbResponse(NamedTuple):
    """An answer to a call, as far as it matters."""

    status: int
    content_type: str
    retry_after: str
    body: bytes
    has_execution_time: bool  # says how long the function ran, as SpacetimeDB does wherever it has called one

    @property
    def full_text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    @property
    def excerpt(self) -> str:
        """The beginning of the body, for people."""
        return " ".join(self.full_text.split())[:_EXCERPT_CHARS_MAX]

    @property
    def is_html(self) -> bool:
        """Whether something else than SpacetimeDB seems to have answered."""
        return "html" in self.content_type or self.body.lstrip()[:1] == b"<"


def parse_version(response: SpacetimeDbResponse) -> str | None:
    """The version that a server says it has; None where it is not said as SpacetimeDB says it."""
    try:
        return str(msgspec.json.decode(response.body)["version"]) if response.status == 200 else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def classify_response(
    response: SpacetimeDbResponse, function: str, indexes: Sequence[int], returns: ReturnKind
) -> DeliveryResult:
    """The answer for a call with the events that stand at `indexes` of a batch, to a function that `returns` this."""
    status = response.status
    if response.is_html and status not in _RETRYABLE and status != 530:
        return Misconfigured(
            f"something that is no SpacetimeDB answered with HTML and status {status}: "
            f"is there a proxy in between, or another server at this address? ({_html_title(response)})"
        )
    if status in (200, 530) and not response.has_execution_time:
        # 530 is also what a large proxy operator answers where the server behind it is away.
        words = f"{status} came without spacetime-execution-duration-micros ({response.excerpt or 'no text'})"
        return (
            Retry(f"the server is away: {words}") if status == 530 else Misconfigured(f"{words}: is there a proxy in between?")
        )
    if status == 200:
        return Delivered(len(indexes)) if returns == "nothing" else _classify_return_value(response, indexes, returns)
    if status == 530 or (status == 500 and returns != "nothing" and _is_panic(response)):
        return _classify_function_error(response.full_text, indexes)
    if status == 400:
        return _classify_bad_request(response, function, indexes)
    if status == 413:
        return Rejected(Rejection("too_large", f"the server takes no call of {len(indexes)} such events: {response.excerpt}"))
    if status in _RETRYABLE:
        return Retry(f"the server answered {status}: {response.excerpt or 'no text'}", _parse_retry_after(response.retry_after))
    return Misconfigured(_explain_misconfiguration(response, function))


def _classify_return_value(response: SpacetimeDbResponse, indexes: Sequence[int], returns: ReturnKind) -> DeliveryResult:
    """A procedure's value: a count, or a Result as `[0, value]` or `[1, error]`; anything else is not looked at."""
    try:
        value = msgspec.json.decode(response.body)
    except msgspec.DecodeError:
        return Misconfigured(f"the procedure's answer is not JSON: {response.excerpt}")
    if returns == "result":
        match value:
            case [1, error] | {"err": error}:
                text = error if isinstance(error, str) else msgspec.json.encode(error).decode()
                return _classify_function_error(text, indexes)
            case [0, inner] | {"ok": inner}:
                value = inner
            case _:
                return Misconfigured(f"the procedure's answer is no Result: {response.excerpt}")
    elif returns == "count" and type(value) is not int:
        return Misconfigured(f"the procedure's answer is no number: {response.excerpt}")
    inserted = value if type(value) is int and 0 <= value <= len(indexes) else len(indexes)
    return Delivered(len(indexes), len(indexes) - inserted)


def _classify_function_error(text: str, indexes: Sequence[int]) -> DeliveryResult:
    """The function said no and all of the call was rolled back: to the events that its text begins with, or to all."""
    rejected: dict[int, Rejection] = {}
    for part in _EVENT_ERROR_SEPARATOR.split(text.strip()) if text.strip().startswith("event[") else ():
        named = _EVENT_ERROR.match(part)
        if named is not None and int(named[1]) < len(indexes):
            reason = part[named.end() :][:_EXCERPT_CHARS_MAX]
            refusal = Rejection("refused_by_function", f"{named[2]}: {reason}" if named[2] else reason)
            rejected.setdefault(indexes[int(named[1])], refusal)
    if rejected:
        return PartialFailure(rejected)
    return Rejected(Rejection("refused_by_function", text.strip()[:_EXCERPT_CHARS_MAX] or "the function gave no reason"))


def _classify_bad_request(response: SpacetimeDbResponse, function: str, indexes: Sequence[int]) -> DeliveryResult:
    """The server could not read the arguments. They fit the schema, so that only a value can be at fault, or a proxy."""
    named = _ARGUMENT_INDEX.search(response.full_text)
    if "invalid arguments for" in response.excerpt and named and int(named[1]) < len(indexes):
        return PartialFailure({indexes[int(named[1])]: Rejection("bad_value", response.excerpt)})
    return Misconfigured(
        f"the server does not take the arguments of {function} ({response.excerpt}): compare the event type with the module: "
        "pillarbox check"
    )


def _explain_misconfiguration(response: SpacetimeDbResponse, function: str) -> str:
    text = f" ({response.excerpt})" if response.excerpt else ""
    match response.status:
        case 401:
            return (
                f"401: the server does not accept the token{text}: "
                "it must be one that this server gave, unchanged; pillarbox spacetimedb publish makes one"
            )
        case 402:
            return f"402: the database has no energy left{text}: its owner must add some"
        case 403:
            return f"403: the module's client_connected function rejects this token's identity{text}: let it in, or use another"
        case 404 if "reducer" in response.excerpt or "procedure" in response.excerpt.lower():
            return f"404: the module has no function {function}{text}: publish one that has, or name another with ?function="
        case 404:
            return f"404: the server has no such database{text}: pillarbox spacetimedb publish makes it, or mend the URL"
        case 415:
            return f"415: the server did not see Content-Type: application/json{text}: a proxy in between must not change it"
        case _:
            return f"the server answered {response.status}{text}, which is none of SpacetimeDB's answers: mend the URL"


def _is_panic(response: SpacetimeDbResponse) -> bool:
    return "panic" in response.excerpt.lower() or "fatal error" in response.excerpt.lower()


def _html_title(response: SpacetimeDbResponse) -> str:
    found = re.search(rb"<title>([^<]*)</title>", response.body, re.IGNORECASE)
    return " ".join(found[1].decode(errors="replace").split())[:100] if found else "no title"


def _parse_retry_after(retry_after: str) -> float | None:
    return float(retry_after) if retry_after.isdigit() else None
