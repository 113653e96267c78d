"""What a server's answer to a call means: a total function from (status, headers, text) to an `Answer`. Pure.

Tried on standalone servers 1.2.0 and 2.8.3; the table is in docs/how-to/spacetimedb.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.sinks.base import Answer, Delivered, Misconfigured, Partly, Refusal, Refused, Retry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.sinks.spacetimedb.schema import Returns

_TEXT_MAX: Final = 500  # characters of a server's text that are shown
_NAMED = re.compile(r"event\[(\d+)\](?:\.(\w+))?: ")
_NEXT = re.compile(r"; (?=event\[)")
_ARGUMENT = re.compile(r"\[0\]\[(\d+)\]")
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class Reply(NamedTuple):
    """An answer to a call, as far as it matters."""

    status: int
    content_type: str
    retry_after: str
    body: bytes
    timed: bool  # says how long the function ran, as SpacetimeDB does wherever it has called one

    @property
    def whole(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    @property
    def text(self) -> str:
        """The beginning of the body, for people."""
        return " ".join(self.whole.split())[:_TEXT_MAX]

    @property
    def is_html(self) -> bool:
        """Whether something else than SpacetimeDB seems to have answered."""
        return "html" in self.content_type or self.body.lstrip()[:1] == b"<"


def version_of(health: Reply) -> str | None:
    """The version that a server says it has; None where it is not said as SpacetimeDB says it."""
    try:
        return str(msgspec.json.decode(health.body)["version"]) if health.status == 200 else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def classify(reply: Reply, function: str, indexes: Sequence[int], returns: Returns) -> Answer:
    """The answer for a call with the events that stand at `indexes` of a batch, to a function that `returns` this."""
    status = reply.status
    if reply.is_html and status not in _PASSING and status != 530:
        return Misconfigured(
            f"something that is no SpacetimeDB answered with HTML and status {status}: "
            f"is there a proxy in between, or another server at this address? ({_title(reply)})"
        )
    if status in (200, 530) and not reply.timed:
        # 530 is also what a large proxy operator answers where the server behind it is away.
        words = f"{status} came without spacetime-execution-duration-micros ({reply.text or 'no text'})"
        return (
            Retry(f"the server is away: {words}") if status == 530 else Misconfigured(f"{words}: is there a proxy in between?")
        )
    if status == 200:
        return Delivered(len(indexes)) if returns == "nothing" else _returned(reply, indexes, returns)
    if status == 530 or (status == 500 and returns != "nothing" and _is_panic(reply)):
        return _refused_by_function(reply.whole, indexes)
    if status == 400:
        return _bad_request(reply, function, indexes)
    if status == 413:
        return Refused(Refusal("too_large", f"the server takes no call of {len(indexes)} such events: {reply.text}"))
    if status in _PASSING:
        return Retry(f"the server answered {status}: {reply.text or 'no text'}", _seconds(reply.retry_after))
    return Misconfigured(_advice(reply, function))


def _returned(reply: Reply, indexes: Sequence[int], returns: Returns) -> Answer:
    """A procedure's value: a count, or a Result as `[0, value]` or `[1, error]`; anything else is not looked at."""
    try:
        value = msgspec.json.decode(reply.body)
    except msgspec.DecodeError:
        return Misconfigured(f"the procedure's answer is not JSON: {reply.text}")
    if returns == "result":
        match value:
            case [1, error] | {"err": error}:
                text = error if isinstance(error, str) else msgspec.json.encode(error).decode()
                return _refused_by_function(text, indexes)
            case [0, inner] | {"ok": inner}:
                value = inner
            case _:
                return Misconfigured(f"the procedure's answer is no Result: {reply.text}")
    elif returns == "count" and type(value) is not int:
        return Misconfigured(f"the procedure's answer is no number: {reply.text}")
    fresh = value if type(value) is int and 0 <= value <= len(indexes) else len(indexes)
    return Delivered(len(indexes), len(indexes) - fresh)


def _refused_by_function(text: str, indexes: Sequence[int]) -> Answer:
    """The function said no and all of the call was rolled back: to the events that its text begins with, or to all."""
    refused: dict[int, Refusal] = {}
    for part in _NEXT.split(text.strip()) if text.strip().startswith("event[") else ():
        named = _NAMED.match(part)
        if named is not None and int(named[1]) < len(indexes):
            reason = part[named.end() :][:_TEXT_MAX]
            refusal = Refusal("refused_by_function", f"{named[2]}: {reason}" if named[2] else reason)
            refused.setdefault(indexes[int(named[1])], refusal)
    if refused:
        return Partly(refused)
    return Refused(Refusal("refused_by_function", text.strip()[:_TEXT_MAX] or "the function gave no reason"))


def _bad_request(reply: Reply, function: str, indexes: Sequence[int]) -> Answer:
    """The server could not read the arguments. They fit the schema, so that only a value can be at fault, or a proxy."""
    named = _ARGUMENT.search(reply.whole)
    if "invalid arguments for" in reply.text and named and int(named[1]) < len(indexes):
        return Partly({indexes[int(named[1])]: Refusal("bad_value", reply.text)})
    return Misconfigured(
        f"the server does not take the arguments of {function} ({reply.text}): compare the event type with the module: "
        "pillarbox check"
    )


def _advice(reply: Reply, function: str) -> str:
    text = f" ({reply.text})" if reply.text else ""
    match reply.status:
        case 401:
            return (
                f"401: the server does not accept the token{text}: "
                "it must be one that this server gave, unchanged; pillarbox spacetimedb publish makes one"
            )
        case 402:
            return f"402: the database has no energy left{text}: its owner must add some"
        case 403:
            return f"403: the module's client_connected function rejects this token's identity{text}: let it in, or use another"
        case 404 if "reducer" in reply.text or "procedure" in reply.text.lower():
            return f"404: the module has no function {function}{text}: publish one that has, or name another with ?function="
        case 404:
            return f"404: the server has no such database{text}: pillarbox spacetimedb publish makes it, or mend the URL"
        case 415:
            return f"415: the server did not see Content-Type: application/json{text}: a proxy in between must not change it"
        case _:
            return f"the server answered {reply.status}{text}, which is none of SpacetimeDB's answers: mend the URL"


def _is_panic(reply: Reply) -> bool:
    return "panic" in reply.text.lower() or "fatal error" in reply.text.lower()


def _title(reply: Reply) -> str:
    found = re.search(rb"<title>([^<]*)</title>", reply.body, re.IGNORECASE)
    return " ".join(found[1].decode(errors="replace").split())[:100] if found else "no title"


def _seconds(retry_after: str) -> float | None:
    return float(retry_after) if retry_after.isdigit() else None
