"""Events put right: by setting members, or by hand in an editor; and what an event needs to go in again. Pure."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pillarbox.codec import Codec
from pillarbox.errors import InvalidEventError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pillarbox.admin.dead_letters import DeadLetterRecord

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class InvalidReplayError(Exception):
    """The event cannot go in again as it is; the message says why, and what would help."""


class ReplayValidator:
    """What an event's JSON must be to go in again: what the front door takes, with its id.

    `id_field` is the name of the member that holds the id.
    """

    def __init__(self, event_type: type[msgspec.Struct], id_field: str) -> None:
        self.event_type = event_type
        self.id_field = id_field
        self._id_type: Any = next(field.type for field in msgspec.structs.fields(event_type) if field.name == "event_id")
        self._check_json = Codec(event_type).check_json

    def validate(self, payload: bytes) -> None:
        """Raise `InvalidReplayError` for what the front door would refuse."""
        self.parse_fields(payload)
        try:
            self._check_json(payload)
        except (msgspec.DecodeError, InvalidEventError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidReplayError(f"is no {self.event_type.__name__}: {error}") from None

    def parse_fields(self, payload: bytes) -> dict[str, msgspec.Raw]:
        """The members of an event's JSON, each as it stands; raises `InvalidReplayError` where it is no JSON object."""
        try:
            return _decode_fields(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidReplayError("is no JSON object") from None

    def check_same_id(self, old: bytes, new: bytes) -> None:
        """Raise `InvalidReplayError` where an event lost its valid id or has another one; without a valid id it may get one."""
        try:
            before = self._read_id(old)
        except InvalidReplayError:
            return
        after = None
        with contextlib.suppress(InvalidReplayError):
            after = self._read_id(new)
        if before != after:
            raise InvalidReplayError(f"must keep its {self.id_field} {before}: under another it may be delivered twice")

    def _read_id(self, payload: bytes) -> Any:
        """Raises `InvalidReplayError` where there is none of the type that it must have."""
        try:
            return msgspec.json.decode(self.parse_fields(payload).get(self.id_field, b""), type=self._id_type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidReplayError(f"has no {self.id_field}") from None


def parse_assignments(texts: Iterable[str], event_type: type[msgspec.Struct]) -> dict[str, msgspec.Raw]:
    """`member=value` as typed -> member -> JSON. The value is JSON where the member takes that, and text otherwise.

    Raises `UsageError` for what is no assignment, no member, or no value of it.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(event_type)}
    by_name = {field.name: field for field in fields.values()} | fields
    values: dict[str, msgspec.Raw] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        field = by_name.get(name)
        if not equals or field is None:
            raise UsageError(f"--set {text}: write member=value; the members of {event_type.__name__} are {', '.join(fields)}")
        values[field.encode_name] = msgspec.Raw(_as_json(text, value, field.type))
    return values


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


def with_fields(validator: ReplayValidator, payload: bytes, values: Mapping[str, msgspec.Raw]) -> bytes:
    """An event's JSON with some members set, the others as they stood, byte for byte; raises `InvalidReplayError`."""
    new = msgspec.json.encode({**validator.parse_fields(payload), **values}).replace(b"\n", b" ")
    validator.check_same_id(payload, new)
    return new


class _EditableLine(msgspec.Struct):
    """What a line in the editor looks like."""

    letter: str  # which dead letter it is: see `DeadLetterRecord.name`
    why: str
    event: msgspec.Raw


_decode_line = msgspec.json.Decoder(_EditableLine).decode


def to_editable_line(record: DeadLetterRecord) -> bytes:
    """A dead letter as a line to edit; what stands in `event` goes in again."""
    letter = record.letter
    return msgspec.json.encode(_EditableLine(record.name, f"{letter.code}: {letter.reason}", letter.event)) + b"\n"


class EditedFile(NamedTuple):
    """What came back from the editor: events by their dead letters, and (line from 1, problem) of what is no such line."""

    events: dict[str, bytes]
    problems: list[tuple[int, str]]


def parse_edited_file(text: bytes) -> EditedFile:
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
    return EditedFile(events, problems)
