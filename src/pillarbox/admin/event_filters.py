"""Which events are meant, and what of an event every line shows. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.admin.dead_letters import partial_decoder, scalar_text
from pillarbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER_FIELDS: Final = ("event_id", "event_key", "scope_kind", "scope_id", "user_id", "occurred_at_micros")
_decode = msgspec.json.Decoder().decode


class EventHeader(NamedTuple):
    """What tells an event from others at a glance; None for what it does not have as text or a whole number."""

    event_id: str | None
    event_key: str | None
    scope_kind: str | None
    scope_id: str | None
    user_id: str | None
    occurred_at_micros: int | None


class EventHeaderDecoder:
    """Event's JSON -> `EventHeader`, by the names that the members of an event type have in JSON."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        self._decode = partial_decoder(event_type, _HEADER_FIELDS)

    def decode(self, payload: bytes) -> EventHeader:
        """What can be seen of an event; nothing where it is no JSON object."""
        try:
            found = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return EventHeader(None, None, None, None, None, None)
        at = found.occurred_at_micros
        return EventHeader(
            scalar_text(found.event_id),
            scalar_text(found.event_key),
            scalar_text(found.scope_kind),
            scalar_text(found.scope_id),
            scalar_text(found.user_id),
            at if type(at) is int else None,
        )


class EventFilter(NamedTuple):
    """What is asked for. Several of one kind: any of them; several kinds: all of them; nothing: everything."""

    event_keys: tuple[str, ...] = ()
    event_ids: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()  # a kind, or kind:id
    users: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # in the event's JSON as it stands
    conditions: tuple[tuple[tuple[str, ...], str], ...] = ()  # (path, value as text)
    since_micros: int | None = None  # of the event's own time, or of the file's sealing where it has none
    until_micros: int | None = None

    def matches(self, payload: bytes, header: EventHeader, sealed_micros: int | None) -> bool:
        """Whether an event is meant."""
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
        if micros is None:  # an active file's: it is as new as can be
            return self.until_micros is None
        return (self.since_micros is None or micros >= self.since_micros) and (
            self.until_micros is None or micros < self.until_micros
        )

    def _matches_conditions(self, payload: bytes) -> bool:
        wanted: dict[tuple[str, ...], set[str]] = {}
        for path, value in self.conditions:
            wanted.setdefault(path, set()).add(value)
        event = _decode(payload)
        return all(_value_text(_value_at(event, path)) in values for path, values in wanted.items())


def parse_conditions(texts: Iterable[str]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """`member.member=value` as typed -> (path, value); raises `UsageError`."""
    conditions = []
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--where {text}: write MEMBER=VALUE, or MEMBER.MEMBER=VALUE for what is inside")
        conditions.append((tuple(path.split(".")), value))
    return tuple(conditions)


def _value_at(value: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path; JSON text is looked into as well. `...` where there is nothing."""
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
    """Text as it is, all else as JSON: `3`, `true`, `null`."""
    if value is ...:
        return None
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
