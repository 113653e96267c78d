"""The format of dead letter files, and a summary of what their records have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.admin.scan import FileProblem, try_read_file
from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pillarbox.store.directory import Directory

# The values in a reason: quoted text, ids, and numbers. A number that is part of a name, or follows a ` or $, is not one:
# type names and field paths stay.
_VALUES: Final = re.compile(
    r"""(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"""|(?P<id>\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b)"""
    r"""|(?P<number>(?<![\w`$])[-+]?\d[\d.,_]*(?:e[-+]?\d+)?\b)"""
)

_decode_letter = msgspec.json.Decoder(DeadLetter).decode


class DeadLetterRecord(NamedTuple):
    """A dead letter, and its position in its file."""

    batch: str
    line: int  # number of the line in the file, from 0
    letter: DeadLetter
    event_id: str | None  # None unless the id is text or a number
    event_key: str | None

    @property
    def name(self) -> str:
        """A name that stays the same when other records leave the file: `<batch>#<index>`."""
        return f"{self.batch}#{self.letter.index}"


class DeadLetterFile(NamedTuple):
    """The content of a dead letter file."""

    batch: str
    lines: list[bytes]  # all lines, with their line feeds
    records: list[DeadLetterRecord]
    problems: list[FileProblem]

    def without_lines(self, removed: set[int]) -> bytes:
        """The file's content without some lines. Lines that are not dead letters stay as they are."""
        return b"".join(line for number, line in enumerate(self.lines) if number not in removed)


def partial_decoder(event_type: type[msgspec.Struct], fields: Sequence[str]) -> Callable[[bytes], Any]:
    """Make a decoder of some fields of an event's JSON, whatever their types; a missing field decodes as None.

    Args:
        event_type: The event type, which may give fields other names in JSON.
        fields: Names of the fields in Python, and of the attributes of the result.
    """
    json_names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
    members = [(field, Any, msgspec.field(default=None, name=json_names.get(field, field))) for field in fields]
    return msgspec.json.Decoder(msgspec.defstruct("_PartialEvent", members)).decode


class IdentityDecoder:
    """Decodes the id and the key of an event, which every table shows."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        json_names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
        self.id_field = json_names.get("event_id", "event_id")
        self._decode = partial_decoder(event_type, ("event_id", "event_key"))

    def decode(self, payload: bytes) -> tuple[str | None, str | None]:
        """Decode the id and the key of an event; None for a value that is neither text nor a whole number."""
        try:
            identity = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None, None
        return scalar_text(identity.event_id), scalar_text(identity.event_key)


def scalar_text(value: object) -> str | None:
    """Return text or a whole number as text; None for any other value."""
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def parse(batch: str, data: bytes, identity_decoder: IdentityDecoder) -> DeadLetterFile:
    """Parse the bytes of a dead letter file. Lines that are not dead letters are among the problems."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
    records: list[DeadLetterRecord] = []
    problems: list[FileProblem] = []
    for number, line in enumerate(lines):
        if line.isspace():
            continue
        try:
            line.decode()  # msgspec does not check the encoding within a `Raw`
            letter = _decode_letter(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problems.append(FileProblem(layout.dead_name(batch), f"not a dead letter, left as it is: {error}", number + 1))
            continue
        records.append(DeadLetterRecord(batch, number, letter, *identity_decoder.decode(bytes(letter.event))))
    return DeadLetterFile(batch, lines, records, problems)


def read_files(directory: Directory, batches: Iterable[str], identity_decoder: IdentityDecoder) -> Iterator[DeadLetterFile]:
    """Read the dead letter files of some batches, one at a time. An unreadable file yields only a problem."""
    for batch in batches:
        data = try_read_file(directory, layout.dead_name(batch))
        if isinstance(data, FileProblem):
            yield DeadLetterFile(batch, [], [], [data])
        elif data is not None:
            yield parse(batch, data, identity_decoder)


def mask_values(reason: str) -> str:
    """Remove the values from a reason, so that `occurred_at: 17 is too small` and `occurred_at: 18 is too small` are equal."""

    def placeholder(match: re.Match[str]) -> str:
        return {"quoted": '"..."', "id": "...", "number": "N"}[match.lastgroup or "id"]

    return _VALUES.sub(placeholder, reason)


class DeadLetterGroup(msgspec.Struct, frozen=True):
    """Dead letters that differ in their values only; times in microseconds since 1970."""

    code: str  # rejection code
    reason: str  # why the destination rejected them, without the values in it
    sink: str  # URL of the destination that rejected the events
    event_key: str | None  # key of the events; None if they have none
    queue: str  # name of the sink whose queue holds them; "" with a single sink
    count: int  # number of dead letters
    first_at_micros: int  # time of the earliest first attempt
    last_at_micros: int  # time of the latest last attempt


class DeadLetterGrouper:
    """Groups dead letters; memory grows with the groups, not with the records."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str, str | None, str], tuple[int, int, int]] = {}

    def add(self, record: DeadLetterRecord, queue: str = "") -> None:
        """Add a record to its group."""
        letter = record.letter
        key = (letter.code, mask_values(letter.reason), letter.sink, record.event_key, queue)
        count, first, last = self._counts.get(key, (0, letter.first_at_micros, letter.last_at_micros))
        self._counts[key] = (count + 1, min(first, letter.first_at_micros), max(last, letter.last_at_micros))

    def largest_first(self) -> list[DeadLetterGroup]:
        """The groups, sorted by size."""
        groups = [DeadLetterGroup(*key, *numbers) for key, numbers in self._counts.items()]
        return sorted(groups, key=lambda group: (-group.count, -group.last_at_micros, group.code, group.reason))
