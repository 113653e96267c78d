"""The sources of `pillarbox import`: lines of JSON, rows of CSV, another outbox directory."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.admin.replay import InvalidReplayError, ReplayValidator
from pillarbox.cli.csv_cells import unescape_cell
from pillarbox.cli.input import strict_decoder
from pillarbox.codec import Codec
from pillarbox.errors import InvalidEventError, UsageError
from pillarbox.event import EVENT_BYTES_MAX
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.export import ExportedEvent

_RECORD_FIELDS: Final = ({"event"}, {"event", "crc"})  # the fields of a record of an outbox
_BYTE_ORDER_MARK: Final = "\ufeff"  # spreadsheets write it at the beginning of a file
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ImportItem(NamedTuple):
    """A line or row of the source: a valid event, or a problem."""

    number: int  # of its line or row, from 1
    raw: bytes  # unchanged, with its line feed
    payload: bytes
    problem: str  # why it is not a valid event; "" if it is one


class ImportReader:
    """Turns lines, rows and exported events into items, for one event type."""

    def __init__(self, event_type: type[msgspec.Struct], validator: ReplayValidator, *, raw_cells: bool) -> None:
        self._unescape: Callable[[str], str] = str if raw_cells else unescape_cell
        self._validator = validator
        self._strict = strict_decoder(event_type)
        self._encode = Codec(event_type).encode
        self._type = event_type
        self._fields = {field.encode_name: field for field in msgspec.structs.fields(event_type)}

    def read_lines(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[ImportItem]:
        """Items of (number, line); a line is an event, or a record with its checksum."""
        for number, line in lines:
            raw = line if line.endswith(b"\n") else line + b"\n"
            yield self._item(number, raw, line)

    def read_outbox(self, events: Iterable[ExportedEvent]) -> Iterator[ImportItem]:
        """Items of the events of another outbox."""
        for number, event in enumerate(events, 1):
            yield self._item(number, event.payload + b"\n", event.payload)

    def read_rows(self, lines: Iterable[bytes]) -> Iterator[ImportItem]:
        """Items of the rows of CSV; raises `UsageError` if the first row does not name fields of the event type."""
        csv.field_size_limit(EVENT_BYTES_MAX)
        rows = csv.reader(line.decode("utf-8", "surrogateescape") for line in lines)
        header = [self._unescape(name.removeprefix(_BYTE_ORDER_MARK)) for name in next(rows, [])]
        unknown = [name for name in header if name not in self._fields]
        if not header or unknown or len(set(header)) < len(header):
            if unknown:
                problem = f"{self._type.__name__} has no field {unknown[0]!r}"
            else:
                problem = "it names a field twice" if header else "it is missing"
            raise UsageError(f"the first row must name the fields: {problem}; the fields are {', '.join(self._fields)}")
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
                yield ImportItem(number, raw, b"", f"{len(row)} cells, but the first row has {len(header)}")
                continue
            cells = dict(zip(header, map(self._unescape, row), strict=True))
            try:
                fields = {name: self._value(name, cell) for name, cell in cells.items() if cell or self._is_required(name)}
                payload = msgspec.json.encode(fields)
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
        """The event's JSON, byte for byte, or with an id and a time added if it has none."""
        value = line.strip()
        if self._is_record(value):
            value = record.payload(value)
        try:
            self._validator.validate(value)
        except InvalidReplayError:
            return self._with_defaults(value)
        return value

    def _with_defaults(self, value: bytes) -> bytes:
        """The event's JSON with defaults filled in; unknown fields are an error, for they may be misspelt."""
        try:
            event = self._encode(self._strict(value))
        except (InvalidEventError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidReplayError(str(error)) from None
        self._validator.validate(event)
        return event

    def _is_record(self, value: bytes) -> bool:
        if not value.startswith(b'{"event"'):
            return False
        try:
            return _decode_fields(value).keys() in _RECORD_FIELDS
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False

    def _is_required(self, name: str) -> bool:
        field = self._fields[name]
        return field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT

    def _value(self, name: str, cell: str) -> msgspec.Raw:
        """A cell as JSON: a string if the field accepts one, otherwise the cell must be JSON."""
        text = msgspec.json.encode(cell)
        kind: Any = self._fields[name].type
        try:
            msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError:
            try:
                msgspec.json.decode(cell)
            except msgspec.DecodeError:
                raise msgspec.ValidationError(f"{name}: {cell!r} is not a value of this field") from None
            return msgspec.Raw(cell.encode())
        return msgspec.Raw(text)


def encode_row(cells: Iterable[str]) -> bytes:
    """Encode a row of CSV, with its line feed."""
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # it quotes cells that contain a character of its line end, `\r\n`
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"
