"""From what an application hands over to the line that is stored: `before_send`, the checks, and what is said of bad events."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from pillarbox.errors import InvalidEventError
from pillarbox.event import EVENT_BYTES_MAX, Codec
from pillarbox.outcome import Dropped
from pillarbox.store import record, speed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.hooks import Hooks
    from pillarbox.outcome import Durability, Outcome
    from pillarbox.settings import Settings
    from pillarbox.store.door import Enqueue
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

_LOGGED_REASONS_MAX: Final = 32  # different reasons for invalid events that are logged; all are counted


class _NoEventType:
    """The type of no event: all of them go the long way."""


class EventEncoder:
    """The entrance of one outbox. Refusals are counted by the writer of the process: `attach` it, in a forked child too."""

    def __init__(self, settings: Settings) -> None:
        self._name = settings.directory
        self._enabled = settings.enabled
        self._raises_on_invalid = settings.on_invalid == "raise"
        self._event_type = settings.event_type
        self._codec = Codec(settings.event_type, trusted=settings.trusted)
        self.encode = self._codec.encode
        self._logged_reasons: set[str] = set()
        self._writer: Writer
        self._hooks: Hooks

    def attach(self, writer: Writer, hooks: Hooks) -> None:
        """Let in for this writer."""
        self._writer = writer
        self._hooks = hooks

    def apply_before_send(self, event: Any) -> Any:
        """What is to be stored instead of an event: what `before_send` makes of it; `Dropped` where that is nothing.

        A disabled outbox has it refused as that, and what is no event is refused further on.
        """
        if type(event) is not self._event_type or not self._enabled:
            return event
        kept = self._hooks.before_send(event)
        if kept is None:
            return self._writer.refuse("filtered")
        if type(kept) is not self._event_type:
            wanted, found = self._event_type.__name__, type(kept).__name__
            return self.drop_invalid(kept, InvalidEventError("before_send", f"must return a {wanted} or None, not {found}"))
        return kept

    def filter_enqueue(self, enqueue: Enqueue) -> Enqueue:
        """`enqueue`, for what `before_send` lets through."""

        def enqueue_admitted(event: Any, *, durability: Durability | None = None) -> Outcome:
            """Store one event, as `before_send` has it."""
            admitted = self.apply_before_send(event)
            return admitted if type(admitted) is Dropped else enqueue(admitted, durability=durability)

        return enqueue_admitted

    def encode_record(self, event: Any) -> bytes | Dropped:
        """An event's record, or why it has none."""
        try:
            payload = self.encode(event)
            if type(event) is not self._event_type or len(payload) > EVENT_BYTES_MAX:
                self.raise_invalid(event, payload)
        except Exception as error:  # noqa: BLE001 - whatever an event does when encoded, the caller goes on
            return self.drop_invalid(event, error)
        return record.line(payload)

    def filter_and_encode(self, event: Any) -> bytes | Dropped:
        """The record of what `before_send` makes of an event."""
        admitted = self.apply_before_send(event)
        return admitted if type(admitted) is Dropped else self.encode_record(admitted)

    def encode_records(self, events: Iterable[Any]) -> tuple[bytes, list[Dropped | None]]:
        """The records of what `before_send` makes of events, and for each None, or why it has none."""
        simple = _NoEventType if self._hooks.has_before_send else self._event_type
        return speed.pack(events, self.encode, simple, EVENT_BYTES_MAX, self.filter_and_encode)

    def encode_json_records(self, payloads: Iterable[Any]) -> tuple[bytes, list[Dropped | None]]:
        """The records of events that are JSON already; `before_send` has seen them, or it was not there then."""
        return speed.pack(payloads, self.encode, _NoEventType, EVENT_BYTES_MAX, self.encode_json_record)

    def encode_json_record(self, payload: Any) -> bytes | Dropped:
        """The record of an event that is JSON already; `before_send` has seen it, or it was not there then."""
        try:
            return record.line(self._codec.check_json(payload))
        except Exception as error:  # noqa: BLE001 - as above
            return self.drop_invalid(payload, error)

    def raise_invalid(self, event: object, payload: bytes) -> None:
        """Raise what is wrong with an event that encodes."""
        if type(event) is not self._event_type:
            raise InvalidEventError("event", f"must be a {self._event_type.__name__}, not {type(event).__name__}")
        raise InvalidEventError("event", f"has {len(payload)} bytes as JSON, more than {EVENT_BYTES_MAX}")

    def drop_invalid(self, event: object, error: Exception) -> Dropped:
        """What becomes of an event that is not one."""
        if not self._enabled:
            return self._writer.refuse("disabled")
        text = self._codec.describe_error(event, error)
        if self._raises_on_invalid:
            raise error if isinstance(error, InvalidEventError) else InvalidEventError("event", text) from None
        self.log_invalid(text)
        return self._writer.refuse("invalid")

    def log_invalid(self, text: str) -> None:
        """Log why an event is dropped, once."""
        if text not in self._logged_reasons and len(self._logged_reasons) < _LOGGED_REASONS_MAX:
            self._logged_reasons.add(text)
            log.warning("%s: dropped an invalid event, and will drop others like it silently: %s", self._name, text)
