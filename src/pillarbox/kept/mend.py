"""Events put right: by setting members, or by hand in an editor; and what an event needs to go in again. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.errors import InvalidEvent, UsageError
from pillarbox.event import EVENT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pillarbox.kept.dead import Record

_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NO_VALUE: Final = msgspec.Raw(b"null")


class Unfit(Exception):  # noqa: N818 - reads as the sentence it is
    """The event cannot go in again as it is; the message says why, and what would help."""


class Gate:
    """What an event's JSON must be to go in again: of the event type, with its id, small enough, on one line.

    `id_member` is the name of the member that holds the id.
    """

    def __init__(self, event_type: type[msgspec.Struct], id_member: str) -> None:
        self.event_type = event_type
        self.id_member = id_member
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(event_type).decode

    def check(self, payload: bytes) -> None:
        """Raise `Unfit` for what the front door would refuse, or would let in under another id each time."""
        if len(payload) > EVENT_BYTES_MAX:
            raise Unfit(f"has {len(payload)} bytes as JSON, more than {EVENT_BYTES_MAX}")
        if b"\n" in payload:
            raise Unfit("has a line feed outside of a text: write it on one line")
        members = self.members(payload)
        try:
            payload.decode()
            self._decode(payload)
        except (msgspec.DecodeError, InvalidEvent, UnicodeDecodeError, RecursionError) as error:
            raise Unfit(f"is no {self.event_type.__name__}: {error}") from None
        if not isinstance(_value(members.get(self.id_member, _NO_VALUE)), str):
            raise Unfit(f"has no {self.id_member}, which is what makes a repeat harmless")

    def members(self, payload: bytes) -> dict[str, msgspec.Raw]:
        """The members of an event's JSON, each as it stands; raises `Unfit` where it is no JSON object."""
        try:
            return _decode_members(payload)
        except (msgspec.DecodeError, RecursionError):
            raise Unfit("is no JSON object") from None

    def same_id(self, old: bytes, new: bytes) -> None:
        """Raise `Unfit` where an event has lost its id or got another; one that had none may get one."""
        try:
            before = _value(self.members(old).get(self.id_member, _NO_VALUE))
        except Unfit:
            return
        after = _value(self.members(new).get(self.id_member, _NO_VALUE))
        if isinstance(before, str) and before != after:
            raise Unfit(f"must keep its {self.id_member} {before}: under another it may be delivered twice")


def _value(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None


def assignments(texts: Iterable[str], event_type: type[msgspec.Struct]) -> dict[str, msgspec.Raw]:
    """`member=value` as typed -> member -> JSON. The value is JSON where the member takes that, and text otherwise.

    Raises `UsageError` for what is no assignment, no member, or no value of it.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(event_type)}
    by_name = {field.name: field for field in fields.values()} | fields
    found: dict[str, msgspec.Raw] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        field = by_name.get(name)
        if not equals or field is None:
            raise UsageError(f"--set {text}: write member=value; the members of {event_type.__name__} are {', '.join(fields)}")
        found[field.encode_name] = msgspec.Raw(_as_json(text, value, field.type))
    return found


def _as_json(text: str, value: str, kind: Any) -> bytes:
    try:
        msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError):
        pass
    else:
        return value.encode()
    try:
        quoted = msgspec.json.encode(value)
        msgspec.json.decode(quoted, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"--set {text}: {error}") from None
    return quoted


def with_members(gate: Gate, payload: bytes, values: Mapping[str, msgspec.Raw]) -> bytes:
    """An event's JSON with some members set, the others as they stood, byte for byte; raises `Unfit`."""
    new = msgspec.json.encode({**gate.members(payload), **values}).replace(b"\n", b" ")
    gate.same_id(payload, new)
    return new


class _Line(msgspec.Struct):
    """What a line in the editor looks like."""

    letter: str  # which dead letter it is: see `Record.name`
    why: str
    event: msgspec.Raw


_decode_line = msgspec.json.Decoder(_Line).decode


def editable(record: Record) -> bytes:
    """A dead letter as a line to edit; what stands in `event` goes in again."""
    letter = record.letter
    return msgspec.json.encode(_Line(record.name, f"{letter.code}: {letter.reason}", letter.event)) + b"\n"


class Edited(NamedTuple):
    """What came back from the editor: events by their dead letters, and (line from 1, problem) of what is no such line."""

    events: dict[str, bytes]
    problems: list[tuple[int, str]]


def edited(text: bytes) -> Edited:
    """The lines of an edited file."""
    events: dict[str, bytes] = {}
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line or line.isspace():
            continue
        try:
            line.decode()
            found = _decode_line(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problems.append((number, f"is no dead letter to send again: {error}"))
            continue
        if found.letter in events:
            problems.append((number, f"{found.letter} is there twice; the first one counts"))
        else:
            events[found.letter] = bytes(found.event)
    return Edited(events, problems)
