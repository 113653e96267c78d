"""Where `import` takes events from: lines of JSON, rows of CSV, another outbox directory."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.admin.replay import InvalidReplayError, ReplayValidator
from pillarbox.cli.input import strict_decoder
from pillarbox.codec import Codec
from pillarbox.errors import InvalidEventError, UsageError
from pillarbox.event import EVENT_BYTES_MAX
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.export import ExportedEvent

_RECORD_FIELDS: Final = ({"event"}, {"event", "crc"})  # the members of a line of ours
_BYTE_ORDER_MARK: Final = "\ufeff"  # at the beginning of a file, as spreadsheets write it
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ImportItem(NamedTuple):
    """One event to be, or what is none."""

    number: int  # of its line or row, from 1
    raw: bytes  # as it stood, with its line feed
    payload: bytes
    problem: str  # why it is none; "" where it is one


class ImportReader:
    """Makes items of what stands in a source, for one event type."""

    def __init__(self, event_type: type[msgspec.Struct], gate: ReplayValidator) -> None:
        self._gate = gate
        self._strict = strict_decoder(event_type)
        self._encode = Codec(event_type).encode
        self._type = event_type
        self._fields = {field.encode_name: field for field in msgspec.structs.fields(event_type)}

    def read_lines(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[ImportItem]:
        """(number, line): an event by itself, or a record with its checksum."""
        for number, line in lines:
            raw = line if line.endswith(b"\n") else line + b"\n"
            yield self._item(number, raw, line)

    def read_outbox(self, events: Iterable[ExportedEvent]) -> Iterator[ImportItem]:
        """What another outbox holds."""
        for number, event in enumerate(events, 1):
            yield self._item(number, event.payload + b"\n", event.payload)

    def read_rows(self, lines: Iterable[bytes]) -> Iterator[ImportItem]:
        """CSV whose first row names members; raises `UsageError` where it does not."""
        csv.field_size_limit(EVENT_BYTES_MAX)
        rows = csv.reader(line.decode("utf-8", "surrogateescape") for line in lines)
        header = [name.removeprefix(_BYTE_ORDER_MARK) for name in next(rows, [])]
        unknown = [name for name in header if name not in self._fields]
        if not header or unknown or len(set(header)) < len(header):
            what = f"has {unknown[0]!r}, which is none" if unknown else "is missing, or names one twice"
            raise UsageError(
                f"the first row must name members of {self._type.__name__}, and {what}; they are {', '.join(self._fields)}"
            )
        number = 0
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield ImportItem(number, b"", b"", str(error))
                continue
            if not row:
                continue
            raw = encode_row(row)
            if len(row) != len(header):
                yield ImportItem(number, raw, b"", f"has {len(row)} cells, and the first row {len(header)}")
                continue
            cells = dict(zip(header, row, strict=True))
            try:
                members = {name: self._value(name, cell) for name, cell in cells.items() if cell or self._is_needed(name)}
                payload = msgspec.json.encode(members)
            except (UnicodeEncodeError, msgspec.DecodeError) as error:
                yield ImportItem(number, raw, b"", str(error))
                continue
            yield self._item(number, raw, payload, self._with_defaults)

    def _item(self, number: int, raw: bytes, line: bytes, event: Callable[[bytes], bytes] | None = None) -> ImportItem:
        try:
            return ImportItem(number, raw, (event or self._event)(line), "")
        except (InvalidReplayError, record.DamagedRecordError) as error:
            return ImportItem(number, raw, b"", str(error))

    def _event(self, line: bytes) -> bytes:
        """The event's JSON as it is stored: as it stands, or with an id and a time where it has none."""
        value = line.strip()
        if self._is_record(value):
            value = record.payload(value)
        try:
            self._gate.validate(value)
        except InvalidReplayError:
            return self._with_defaults(value)
        return value

    def _with_defaults(self, value: bytes) -> bytes:
        """All members of the event type; further ones are refused, for they may be meant for others."""
        try:
            event = self._encode(self._strict(value))
        except (InvalidEventError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidReplayError(str(error)) from None
        self._gate.validate(event)
        return event

    def _is_record(self, value: bytes) -> bool:
        if not value.startswith(b'{"event"'):
            return False
        try:
            return _decode_fields(value).keys() in _RECORD_FIELDS
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False

    def _is_needed(self, name: str) -> bool:
        field = self._fields[name]
        return field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT

    def _value(self, name: str, cell: str) -> msgspec.Raw:
        """Text where the member takes text, otherwise JSON."""
        text = msgspec.json.encode(cell)
        kind: Any = self._fields[name].type
        try:
            msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError:
            try:
                msgspec.json.decode(cell)
            except msgspec.DecodeError:
                raise msgspec.ValidationError(f"{name}: {cell!r} is no value of it") from None
            return msgspec.Raw(cell.encode())
        return msgspec.Raw(text)


def encode_row(cells: Iterable[str]) -> bytes:
    """A row of CSV with its line feed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")
