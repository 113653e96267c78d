"""Maps any response of a SpacetimeDB server to a delivery result. Pure.

Verified against standalone servers 1.2.0 and 2.8.3; the table is in `docs/how-to/spacetimedb.md`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.redaction import NO_SECRETS, TEXT_BYTES_MAX, Redactor, excerpt
from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry
from pillarbox.sinks.retry_after import parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.sinks.spacetimedb.schema import ReturnKind

_PARTS_PER_EVENT_MAX: Final = 16  # parts of a function's error: it may name several fields of an event
_EXCERPT_CHARS_MAX: Final = 500  # characters of a response that a message quotes
_FUNCTION_ERROR_BYTES_MAX: Final = 2**20  # bytes of a function's error: it may name every event of a call
_EVENT_ERROR = re.compile(r"event\[([0-9]{1,9})\](?:\.(\w{1,64}))?: ")
_EVENT_ERROR_SEPARATOR = re.compile(r"; (?=event\[)")
_ARGUMENT_INDEX = re.compile(r"\[0\]\[([0-9]{1,9})\]")
_TITLE = re.compile(rb"<title>([^<]{0,1000})<", re.IGNORECASE)
_VERSION_CHARS_MAX: Final = 40
_RETRYABLE: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class SpacetimeDbResponse(NamedTuple):
    """The parts of a response that decide its meaning."""

    status: int
    content_type: str
    retry_after: str
    body: bytes
    has_execution_time: bool  # SpacetimeDB sends it whenever it has run a function
    redact: Redactor = NO_SECRETS  # removes the token from a text
    date: str = ""

    @property
    def function_error(self) -> str:
        """The body as the text of a function's error, without the token."""
        text = self.body[:_FUNCTION_ERROR_BYTES_MAX].decode(errors="replace")
        return self.redact.redact_beginning(text) if len(self.body) > _FUNCTION_ERROR_BYTES_MAX else self.redact(text)

    @property
    def excerpt(self) -> str:
        """The beginning of the body on one line, for messages, without the token."""
        return excerpt(self.body, _EXCERPT_CHARS_MAX, self.redact)

    @property
    def is_html(self) -> bool:
        """Whether the response is HTML, which SpacetimeDB never sends."""
        return "html" in self.content_type or self.body[:TEXT_BYTES_MAX].lstrip()[:1] == b"<"

    def decode(self) -> Any:
        """Return the JSON value of the body; raises `msgspec.DecodeError` for any other body."""
        try:
            return msgspec.json.decode(self.body)
        except (RecursionError, ValueError) as error:  # msgspec's own errors are ValueErrors too
            raise msgspec.DecodeError(str(error)) from None


def parse_version(response: SpacetimeDbResponse) -> str | None:
    """Return the server's version from its health response; None where that is not SpacetimeDB's format."""
    try:
        return (
            excerpt(str(response.decode()["version"]), _VERSION_CHARS_MAX, response.redact) if response.status == 200 else None
        )
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def classify_response(
    response: SpacetimeDbResponse, function: str, indexes: Sequence[int], returns: ReturnKind
) -> DeliveryResult:
    """Map the response to a call to a delivery result.

    Args:
        response: the response to the call.
        function: the name of the called function.
        indexes: the batch indexes of the events in the call.
        returns: what the function returns.
    """
    status = response.status
    if response.is_html and status not in _RETRYABLE and status != 530:
        return Misconfigured(
            f"the response is HTML with status {status} ({_html_title(response)}), so it is not from SpacetimeDB: "
            "check the URL, and whether a proxy is in between"
        )
    if status in (200, 530) and not response.has_execution_time:
        # A large proxy operator also responds with 530 when the server behind it is down.
        problem = f"{status} without the header spacetime-execution-duration-micros ({response.excerpt or 'no text'})"
        return (
            Retry(f"the server is down: {problem}")
            if status == 530
            else Misconfigured(f"{problem}: check whether a proxy is in between")
        )
    if status == 200:
        return Delivered(len(indexes)) if returns == "nothing" else _classify_return_value(response, indexes, returns)
    if status == 530 or (status == 500 and returns != "nothing" and _is_panic(response)):
        return _classify_function_error(response.function_error, indexes)
    if status == 400:
        return _classify_bad_request(response, function, indexes)
    if status == 413:
        return Rejected(
            Rejection("too_large", f"the call is too large for the server; events in it: {len(indexes)}: {response.excerpt}")
        )
    if status in _RETRYABLE:
        after = parse_retry_after(response.retry_after, response.date, None)
        return Retry(f"the server responded with {status}: {response.excerpt or 'no text'}", after)
    return Misconfigured(_explain_misconfiguration(response, function))


def _classify_return_value(response: SpacetimeDbResponse, indexes: Sequence[int], returns: ReturnKind) -> DeliveryResult:
    """Classify a procedure's value: a count, or a Result as `[0, value]` or `[1, error]`; another value is ignored."""
    try:
        value = response.decode()
    except msgspec.DecodeError:
        return Misconfigured(f"the procedure returned a value that is not JSON: {response.excerpt}; correct the procedure")
    if returns == "result":
        match value:
            case [1, error] | {"err": error}:
                text = error if isinstance(error, str) else msgspec.json.encode(error).decode()
                return _classify_function_error(response.redact(text), indexes)
            case [0, inner] | {"ok": inner}:
                value = inner
            case _:
                return Misconfigured(
                    f"the procedure returned a value that is not a Result: {response.excerpt}; correct the procedure"
                )
    elif returns == "count" and type(value) is not int:
        return Misconfigured(f"the procedure returned a value that is not a number: {response.excerpt}; correct the procedure")
    inserted = value if type(value) is int and 0 <= value <= len(indexes) else len(indexes)
    return Delivered(len(indexes), len(indexes) - inserted)


def _classify_function_error(text: str, indexes: Sequence[int]) -> DeliveryResult:
    """Classify a function's error, which rolled back the whole call: it rejects the events it names, or all events."""
    rejected: dict[int, Rejection] = {}
    parts_max = _PARTS_PER_EVENT_MAX * len(indexes)
    for part in _EVENT_ERROR_SEPARATOR.split(text.strip(), parts_max) if text.strip().startswith("event[") else ():
        named = _EVENT_ERROR.match(part)
        if named is not None and int(named[1]) < len(indexes):
            reason = part[named.end() :][:_EXCERPT_CHARS_MAX]
            rejection = Rejection("refused_by_function", f"{named[2]}: {reason}" if named[2] else reason)
            rejected.setdefault(indexes[int(named[1])], rejection)
    if rejected:
        return PartialFailure(rejected)
    return Rejected(Rejection("refused_by_function", text.strip()[:_EXCERPT_CHARS_MAX] or "the function gave no reason"))


def _classify_bad_request(response: SpacetimeDbResponse, function: str, indexes: Sequence[int]) -> DeliveryResult:
    """Classify a 400: the arguments match the schema, so the cause is a single value or a proxy."""
    named = _ARGUMENT_INDEX.search(response.body[:TEXT_BYTES_MAX].decode(errors="replace"))
    if "invalid arguments for" in response.excerpt and named and int(named[1]) < len(indexes):
        return PartialFailure({indexes[int(named[1])]: Rejection("bad_value", response.excerpt)})
    return Misconfigured(
        f"the server does not accept the arguments of {function} ({response.excerpt}): compare the event type with the module; "
        "run pillarbox check"
    )


def _explain_misconfiguration(response: SpacetimeDbResponse, function: str) -> str:
    text = f" ({response.excerpt})" if response.excerpt else ""
    match response.status:
        case 401:
            return (
                f"401: the server does not accept the token{text}: "
                "use a token that this server issued, unchanged; pillarbox spacetimedb publish creates one"
            )
        case 402:
            return f"402: the database has no energy left{text}: its owner must add energy"
        case 403:
            return f"403: the module's client_connected function rejects the token's identity{text}: use another token"
        case 404 if "reducer" in response.excerpt or "procedure" in response.excerpt.lower():
            return f"404: the module has no function {function}{text}: publish a module that has it, or correct ?function="
        case 404:
            return (
                f"404: the server has no such database{text}: create it with pillarbox spacetimedb publish, or correct the URL"
            )
        case 415:
            return f"415: the server did not receive Content-Type: application/json{text}: make the proxy in between keep it"
        case _:
            return f"the server responded with {response.status}{text}, which SpacetimeDB never does: correct the URL"


def _is_panic(response: SpacetimeDbResponse) -> bool:
    return "panic" in response.excerpt.lower() or "fatal error" in response.excerpt.lower()


def _html_title(response: SpacetimeDbResponse) -> str:
    title = _TITLE.search(response.body[:TEXT_BYTES_MAX])
    return excerpt(title[1], 100, response.redact) if title else "no title"
