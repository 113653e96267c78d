"""Filters that operators choose records and events with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.admin.dead_letters import partial_decoder, scalar_text
from pillarbox.errors import UsageError
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.admin.dead_letters import DeadLetterRecord

_HEADER_FIELDS: Final = ("event_id", "event_key", "scope_kind", "scope_id", "user_id", "occurred_at_micros")
_decode = msgspec.json.Decoder().decode


class RecordFilter(NamedTuple):
    """Selects dead letters, quarantined byte ranges and retained batches.

    An empty field matches everything. If a field has several values, one of them must match; all fields must match.
    """

    records: tuple[str, ...] = ()  # names of dead letters: `<batch>#<index>`
    batches: tuple[str, ...] = ()  # batch ids or their prefixes
    reasons: tuple[str, ...] = ()  # texts that the reason contains
    codes: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()  # texts that the sink's URL contains
    event_keys: tuple[str, ...] = ()
    event_ids: tuple[str, ...] = ()
    since_micros: int | None = None  # inclusive; compared with the time of the last attempt, the seal or the delivery
    until_micros: int | None = None  # exclusive; compared with the same time

    @property
    def matches_all(self) -> bool:
        """Whether every field is empty."""
        return self == RecordFilter()

    def matches_batch(self, batch: str) -> bool:
        """Whether records of a batch can match."""
        if self.records and not any(name.rpartition("#")[0] == batch for name in self.records):
            return False
        return not self.batches or batch.startswith(self.batches)

    def matches(self, record: DeadLetterRecord) -> bool:
        """Whether a dead letter matches."""
        letter = record.letter
        return (
            self.matches_batch(record.batch)
            and (not self.records or record.name in self.records)
            and _contains_any(self.reasons, letter.reason)
            and _contains_any(self.sinks, letter.sink)
            and (not self.codes or letter.code in self.codes)
            and (not self.event_keys or record.event_key in self.event_keys)
            and (not self.event_ids or record.event_id in self.event_ids)
            and self.matches_time(letter.last_at_micros)
        )

    def matches_time(self, micros: int | None) -> bool:
        """Whether a time matches; an unknown one matches only if the filter has no time."""
        if micros is None:
            return self.since_micros is None and self.until_micros is None
        return _in_period(micros, self.since_micros, self.until_micros)

    def matches_reason(self, reason: str) -> bool:
        """Whether the reason of a quarantined byte range matches."""
        return _contains_any(self.reasons, reason)


def _contains_any(parts: tuple[str, ...], text: str) -> bool:
    return not parts or any(part in text for part in parts)


def _in_period(micros: int, since_micros: int | None, until_micros: int | None) -> bool:
    return (since_micros is None or micros >= since_micros) and (until_micros is None or micros < until_micros)


def parse_batch_id(text: str) -> str:
    """A batch id, from the id itself or from the name or path of one of the batch's files."""
    name = text.rpartition("/")[2]
    for prefix in ("dead-", "corrupt-"):
        name = name.removeprefix(prefix)
    return layout.batch_id(name.removesuffix(".spans.json"))


class EventHeader(NamedTuple):
    """The fields of an event that tables show; None for a value that is neither text nor a whole number."""

    event_id: str | None
    event_key: str | None
    scope_kind: str | None
    scope_id: str | None
    user_id: str | None
    occurred_at_micros: int | None


class EventHeaderDecoder:
    """Decodes the header of an event's JSON, by the field names of an event type."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        self._decode = partial_decoder(event_type, _HEADER_FIELDS)

    def decode(self, payload: bytes) -> EventHeader:
        """The header of an event; an empty one if the payload is not a JSON object."""
        try:
            fields = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return EventHeader(None, None, None, None, None, None)
        at = fields.occurred_at_micros
        return EventHeader(
            scalar_text(fields.event_id),
            scalar_text(fields.event_key),
            scalar_text(fields.scope_kind),
            scalar_text(fields.scope_id),
            scalar_text(fields.user_id),
            at if type(at) is int else None,
        )


class EventFilter(NamedTuple):
    """Selects events.

    An empty field matches everything. If a field has several values, one of them must match; all fields must match.
    """

    event_keys: tuple[str, ...] = ()
    event_ids: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()  # kind, or kind:id
    users: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # texts that the event's JSON contains
    conditions: tuple[tuple[tuple[str, ...], str], ...] = ()  # (path, value as text), see `parse_conditions`
    since_micros: int | None = None  # inclusive; compared with the event's own time, or the seal time if it has none
    until_micros: int | None = None  # exclusive; compared with the same time

    def matches(self, payload: bytes, header: EventHeader, sealed_micros: int | None) -> bool:
        """Whether an event matches; `sealed_micros` is None while it is in an active segment."""
        return (
            (not self.event_keys or header.event_key in self.event_keys)
            and (not self.event_ids or header.event_id in self.event_ids)
            and (not self.users or header.user_id in self.users)
            and (not self.scopes or not {header.scope_kind, f"{header.scope_kind}:{header.scope_id}"}.isdisjoint(self.scopes))
            and (not self.texts or any(text.encode() in payload for text in self.texts))
            and self._matches_time(sealed_micros if header.occurred_at_micros is None else header.occurred_at_micros)
            and (not self.conditions or self._matches_conditions(payload))
        )

    def _matches_time(self, micros: int | None) -> bool:
        if micros is None:  # an event in an active segment counts as new
            return self.until_micros is None
        return _in_period(micros, self.since_micros, self.until_micros)

    def _matches_conditions(self, payload: bytes) -> bool:
        values_by_path: dict[tuple[str, ...], set[str]] = {}
        for path, value in self.conditions:
            values_by_path.setdefault(path, set()).add(value)
        event = _decode(payload)
        return all(_value_text(_value_at(event, path)) in values for path, values in values_by_path.items())


def parse_conditions(texts: Iterable[str]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Parse conditions of the form `FIELD=VALUE` or `FIELD.FIELD=VALUE` into (path, value).

    Raises:
        UsageError: A text has another form.
    """
    conditions = []
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--where {text}: write FIELD=VALUE, or FIELD.FIELD=VALUE for a nested field")
        conditions.append((tuple(path.split(".")), value))
    return tuple(conditions)


def _value_at(value: Any, path: tuple[str, ...]) -> Any:
    """The value at a path, also within text that is JSON; `...` if there is none."""
    for name in path:
        if isinstance(value, str):
            try:
                value = _decode(value)
            except (msgspec.DecodeError, RecursionError):
                return ...
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return ...
    return value


def _value_text(value: Any) -> str | None:
    """Text as it is, any other value as JSON: `3`, `true`, `null`."""
    if value is ...:
        return None
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
