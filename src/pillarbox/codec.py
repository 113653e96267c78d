"""From what an application hands over to the line that is stored: `before_send`, the checks, and what is said of bad events."""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pillarbox._native import encode_records
from pillarbox.errors import InvalidEventError, UsageError
from pillarbox.event import EVENT_BYTES_MAX, INT64_MIN, TrackingEvent
from pillarbox.outcome import Dropped
from pillarbox.store import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.hooks import Hooks
    from pillarbox.outcome import Durability, Outcome
    from pillarbox.settings import Settings
    from pillarbox.store.append_hooks import EnqueueFunction
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

_LOGGED_REASONS_MAX: Final = 32  # different reasons for invalid events that are logged; all are counted
_UINT64_MAX: Final = 2**64 - 1


def _encode_str_subclass(value: object) -> str:
    """A subclass of `str`, as templates and translations have, which msgspec does not take as it is."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encode: Final = msgspec.json.Encoder(enc_hook=_encode_str_subclass).encode
_WHITE_SPACE: Final = b" \t\r\n"  # of JSON
# Numbers that JSON cannot carry as they are show in the encoded bytes: NaN as null, large integers by their length.
_MAY_HOLD_BAD_NUMBER = re.compile(rb"null|\d{19}")


class Codec:
    """One event type at the door: event -> JSON bytes, or `InvalidEventError`.

    `encode(event)` is bound once: msgspec's own encoder where the type checks itself or is trusted, otherwise the checking
    way through it. `event_type` must be a `msgspec.Struct` with an `event_id`; raises `UsageError` if not.
    """

    __slots__ = ("_decode", "_generated_fields", "checks_itself", "encode", "event_type")

    def __init__(self, event_type: type[msgspec.Struct], *, trusted: bool = False) -> None:
        if not (isinstance(event_type, type) and issubclass(event_type, msgspec.Struct)):
            raise UsageError(f"event_type must be a msgspec.Struct, not {event_type!r}")
        if "event_id" not in event_type.__struct_fields__:
            raise UsageError(f"event_type {event_type.__name__} must have a field event_id: it is what makes repeats harmless")
        self.event_type = event_type
        self.checks_itself = trusted or event_type is TrackingEvent
        self.encode: Callable[[Any], bytes] = _encode
        if event_type is not TrackingEvent:
            self.encode = _single_line_encoder(_encode if trusted else _checking_encoder(event_type))
        self._decode = msgspec.json.Decoder(event_type).decode
        self._generated_fields = _generated_fields(event_type)

    def check_json(self, payload: object) -> bytes:
        """An event that is JSON already, as it is stored: byte for byte but for white space around it and line feeds.

        Raises `InvalidEventError` or what msgspec does where it is not JSON of the event type. Unknown members are looked into
        too: a destination may want to read them.
        """
        if not isinstance(payload, bytes):
            raise InvalidEventError("event", f"must be bytes of JSON, not {type(payload).__name__}")
        value = payload.strip(_WHITE_SPACE)
        if len(value) > EVENT_BYTES_MAX:
            raise InvalidEventError("event", f"has {len(value)} bytes as JSON, more than {EVENT_BYTES_MAX}")
        self._decode(value)
        members = msgspec.json.decode(value)
        if _MAY_HOLD_BAD_NUMBER.search(value):
            _check_numbers(members, "event")
        if isinstance(members, dict):
            for name in self._generated_fields:
                if name not in members:
                    raise InvalidEventError(name, "is missing: it would be another one each time the event is read")
        # Within a text there is none, for that is no JSON; between two values it means nothing.
        return value.replace(b"\n", b"")

    def describe_error(self, event: object, error: Exception) -> str:
        """Why `encode` refused: the field at fault where one can be named."""
        if isinstance(error, (InvalidEventError, msgspec.ValidationError)):
            return str(error)
        if isinstance(event, msgspec.Struct):
            for field in event.__struct_fields__:
                try:
                    _encode(getattr(event, field))
                except Exception as cause:  # noqa: BLE001 - whatever a value does when encoded is its answer
                    return f"{field}: {cause}"
        return str(error)


def _generated_fields(event_type: type[msgspec.Struct]) -> list[str]:
    """The members that get a new value where they are left out: ids and times. An empty list is no such thing."""
    constant = (msgspec.NODEFAULT, list, dict, set, frozenset, tuple, bytearray)
    return [field.encode_name for field in msgspec.structs.fields(event_type) if field.default_factory not in constant]


def _single_line_encoder(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A `msgspec.Raw` member goes as it is, line feeds and all; a record is a line."""

    def encode_line(event: Any) -> bytes:
        payload = encode(event)
        if b"\n" in payload:
            raise InvalidEventError("event", "has a line feed outside of a text, in a msgspec.Raw: write that JSON on one line")
        return payload

    return encode_line


def _checking_encoder(event_type: type[msgspec.Struct]) -> Callable[[Any], bytes]:
    decode = msgspec.json.Decoder(event_type).decode

    def encode_checked(event: Any) -> bytes:
        payload = _encode(event)
        decode(payload)
        if _MAY_HOLD_BAD_NUMBER.search(payload):
            _check_numbers(event, "event")
        return payload

    return encode_checked


def _check_numbers(value: object, path: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidEventError(path, f"is {value}, which JSON cannot carry")
    elif isinstance(value, int):
        if not INT64_MIN <= value <= _UINT64_MAX:
            raise InvalidEventError(path, "is an integer beyond 64 bits")
    else:
        for name, inner in _child_values(value):
            _check_numbers(inner, f"{path}.{name}")


def _child_values(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, msgspec.Struct):
        return ((name, getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, dict):
        return iter([*value.items(), *((f"{key!r} (key)", key) for key in value)])
    if isinstance(value, (list, tuple, set, frozenset)):
        return iter(enumerate(value))
    fields = getattr(value, "__dataclass_fields__", None)
    return iter(()) if fields is None else ((name, getattr(value, name)) for name in fields)


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
            return self._writer.drop("filtered")
        if type(kept) is not self._event_type:
            wanted, found = self._event_type.__name__, type(kept).__name__
            return self.drop_invalid(kept, InvalidEventError("before_send", f"must return a {wanted} or None, not {found}"))
        return kept

    def filter_enqueue(self, enqueue: EnqueueFunction) -> EnqueueFunction:
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
        return encode_records(events, self.encode, simple, EVENT_BYTES_MAX, self.filter_and_encode)

    def encode_json_records(self, payloads: Iterable[Any]) -> tuple[bytes, list[Dropped | None]]:
        """The records of events that are JSON already; `before_send` has seen them, or it was not there then."""
        return encode_records(payloads, self.encode, _NoEventType, EVENT_BYTES_MAX, self.encode_json_record)

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
            return self._writer.drop("disabled")
        text = self._codec.describe_error(event, error)
        if self._raises_on_invalid:
            raise error if isinstance(error, InvalidEventError) else InvalidEventError("event", text) from None
        self.log_invalid(text)
        return self._writer.drop("invalid")

    def log_invalid(self, text: str) -> None:
        """Log why an event is dropped, once."""
        if text not in self._logged_reasons and len(self._logged_reasons) < _LOGGED_REASONS_MAX:
            self._logged_reasons.add(text)
            log.warning("%s: dropped an invalid event, and will drop others like it silently: %s", self._name, text)
