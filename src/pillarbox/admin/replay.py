"""Replay and purge of dead letters: validation, edits, and the changes that they take."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pillarbox.admin import dead_letters
from pillarbox.admin.changes import BATCH_PENDING, BatchChange
from pillarbox.admin.scan import list_batches
from pillarbox.admin.text import counted
from pillarbox.codec import Codec
from pillarbox.errors import InvalidEventError, UsageError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import PurgedEntry, ReplayedEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.dead_letters import DeadLetterFile, DeadLetterRecord, IdentityDecoder
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class InvalidReplayError(Exception):
    """An event cannot be enqueued as it is. The message completes the sentence "the event ..."."""


class ReplayValidator:
    """Checks that an event's JSON can be enqueued again.

    Args:
        event_type: The event type of the outbox.
        id_field: The name of the event id in JSON.
    """

    def __init__(self, event_type: type[msgspec.Struct], id_field: str) -> None:
        self.event_type = event_type
        self.id_field = id_field
        self._id_type: Any = next(field.type for field in msgspec.structs.fields(event_type) if field.name == "event_id")
        self._check_json = Codec(event_type).check_json

    def validate(self, payload: bytes) -> None:
        """Raise `InvalidReplayError` if the outbox would drop the event."""
        self.parse_fields(payload)
        try:
            self._check_json(payload)
        except (msgspec.DecodeError, InvalidEventError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidReplayError(f"is not a valid {self.event_type.__name__}: {error}") from None

    def parse_fields(self, payload: bytes) -> dict[str, msgspec.Raw]:
        """The fields of an event's JSON, byte for byte; raises `InvalidReplayError` if it is not a JSON object."""
        try:
            return _decode_fields(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidReplayError("is not a JSON object") from None

    def check_same_id(self, old: bytes, new: bytes) -> None:
        """Raise `InvalidReplayError` if an edit changed or removed a valid event id. An event without one may get one."""
        try:
            old_id = self._read_id(old)
        except InvalidReplayError:
            return
        new_id = None
        with contextlib.suppress(InvalidReplayError):
            new_id = self._read_id(new)
        if old_id != new_id:
            raise InvalidReplayError(f"must keep its {self.id_field} {old_id}; with another one it could be delivered twice")

    def _read_id(self, payload: bytes) -> Any:
        """The event id; raises `InvalidReplayError` if there is none of the right type."""
        try:
            return msgspec.json.decode(self.parse_fields(payload).get(self.id_field, b""), type=self._id_type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidReplayError(f"has no valid {self.id_field}") from None


def parse_assignments(texts: Iterable[str], event_type: type[msgspec.Struct]) -> dict[str, msgspec.Raw]:
    """Parse `FIELD=VALUE` into the field's name in JSON and its JSON value.

    The value is taken as JSON if it is JSON of the field's type, otherwise as text.

    Raises:
        UsageError: A text has another form, or the field does not exist or does not accept the value.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(event_type)}
    by_name = {field.name: field for field in fields.values()} | fields
    values: dict[str, msgspec.Raw] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        field = by_name.get(name)
        if not equals or field is None:
            raise UsageError(f"--set {text}: write FIELD=VALUE; the fields of {event_type.__name__} are {', '.join(fields)}")
        values[field.encode_name] = msgspec.Raw(_json_value(text, value, field.type))
    return values


def _json_value(text: str, value: str, field_type: Any) -> bytes:
    try:
        msgspec.json.decode(value, type=field_type)
    except (msgspec.DecodeError, UnicodeEncodeError):
        pass
    else:
        return value.encode()
    try:
        quoted = msgspec.json.encode(value)
        msgspec.json.decode(quoted, type=field_type)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"--set {text}: {error}") from None
    return quoted


def with_fields(validator: ReplayValidator, payload: bytes, values: Mapping[str, msgspec.Raw]) -> bytes:
    """Set some fields of an event's JSON; the others stay byte for byte. Raises `InvalidReplayError`."""
    new = msgspec.json.encode({**validator.parse_fields(payload), **values}).replace(b"\n", b" ")
    validator.check_same_id(payload, new)
    return new


class _EditableLine(msgspec.Struct):
    """A dead letter as a line in an editor."""

    letter: str  # name of the dead letter, `DeadLetterRecord.name`
    why: str
    event: msgspec.Raw


_decode_line = msgspec.json.Decoder(_EditableLine).decode


def to_editable_line(record: DeadLetterRecord) -> bytes:
    """A dead letter as a line to edit; its `event` is what is replayed."""
    letter = record.letter
    return msgspec.json.encode(_EditableLine(record.name, f"{letter.code}: {letter.reason}", letter.event)) + b"\n"


class EditedFile(NamedTuple):
    """The content of a file after editing."""

    events: dict[str, bytes]  # events by the names of their dead letters
    problems: list[tuple[int, str]]  # (line from 1, problem)


def parse_edited_file(text: bytes) -> EditedFile:
    """Parse a file of lines that `to_editable_line` made and that somebody edited."""
    events: dict[str, bytes] = {}
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line or line.isspace():
            continue
        try:
            line.decode()  # msgspec does not check the encoding within a `Raw`
            edited = _decode_line(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problems.append((number, f"not a dead letter that can be replayed: {error}"))
            continue
        if edited.letter in events:
            problems.append((number, f"{edited.letter} appears twice; the first line counts"))
        else:
            events[edited.letter] = bytes(edited.event)
    return EditedFile(events, problems)


def unchanged_event(record: DeadLetterRecord) -> bytes:
    """The event of a dead letter, without an edit."""
    return bytes(record.letter.event)


class DeadLetterReplayer:
    """Makes the changes that replay or purge selected dead letters. Those that must stay are added to the report."""

    def __init__(
        self,
        directory: Directory,
        identity_decoder: IdentityDecoder,
        clock: Clock,
        record_filter: RecordFilter,
        report: ChangeReport,
    ) -> None:
        self._directory = directory
        self._identity_decoder = identity_decoder
        self._clock = clock
        self._filter = record_filter
        self._report = report

    def _selected_files(self) -> Iterator[tuple[DeadLetterFile, list[DeadLetterRecord]]]:
        """The files that have selected records and may be changed."""
        listing = list_batches(self._directory, Kind.DEAD, self._filter.matches_batch)
        for file in dead_letters.read_files(self._directory, listing.batches, self._identity_decoder):
            self._report.add_problems(*file.problems)
            selected = [record for record in file.records if self._filter.matches(record)]
            if not selected:
                continue
            if file.batch in listing.pending:
                letters = counted(len(selected), "dead letter")
                self._report.add_problem(layout.dead_name(file.batch), f"{letters} left as is: {BATCH_PENDING}")
            else:
                yield file, selected

    def replay_changes(
        self,
        validator: ReplayValidator,
        edit: Callable[[DeadLetterRecord], bytes | None],
        on_record: Callable[[DeadLetterRecord, bytes], None],
    ) -> Iterator[BatchChange]:
        """The changes that replay the selected records.

        Args:
            validator: Checks each event; an invalid one stays.
            edit: Returns the event to enqueue; the record stays if that is None, or if it raises `InvalidReplayError`.
            on_record: Called with each record that is replayed, and its event.
        """
        for file, selected in self._selected_files():
            lines: list[int] = []
            payloads: list[bytes] = []
            for record in selected:
                try:
                    payload = edit(record)
                    if payload is None:
                        continue
                    validator.validate(payload)
                except InvalidReplayError as error:
                    self._report.add_problem(record.name, f"left as is: the event {error}")
                    continue
                on_record(record, payload)
                lines.append(record.line)
                payloads.append(payload)
            if payloads:
                make_entry = partial(self._replayed_entry, file.batch)
                apply = partial(self._remove_accepted, file, lines)
                yield BatchChange(layout.dead_name(file.batch), payloads, 0, make_entry, apply)

    def purge_changes(self, on_record: Callable[[DeadLetterRecord, bytes], None]) -> Iterator[BatchChange]:
        """The changes that delete the selected records; `on_record` is called with each of them and its event."""
        for file, selected in self._selected_files():
            for record in selected:
                on_record(record, bytes(record.letter.event))
            lines = [record.line for record in selected]
            make_entry = partial(self._purged_entry, file.batch)
            apply = partial(self._remove_lines, file, lines)
            yield BatchChange(layout.dead_name(file.batch), [], len(lines), make_entry, apply)

    def _remove_accepted(self, file: DeadLetterFile, lines: list[int], accepted: set[int]) -> None:
        self._rewrite(file, {lines[index] for index in accepted})

    def _remove_lines(self, file: DeadLetterFile, lines: list[int], _accepted: set[int]) -> None:
        self._rewrite(file, set(lines))

    def _rewrite(self, file: DeadLetterFile, removed: set[int]) -> None:
        remaining, name = file.without_lines(removed), layout.dead_name(file.batch)
        if remaining and not remaining.isspace():
            self._directory.write_atomically(name, remaining)
        else:
            self._directory.remove(name)

    def _replayed_entry(self, batch: str, events: int) -> ReplayedEntry:
        return ReplayedEntry(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged_entry(self, batch: str, events: int) -> PurgedEntry:
        return PurgedEntry(at_micros=self._clock.micros(), batch=batch, kind="dead", events=events)
