"""From an event to the record that is stored: `before_send`, the checks, JSON, and the log line for an invalid event."""

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

_LOGGED_REASONS_MAX: Final = 32  # reasons for invalid events that are logged, each once; all invalid events are counted
_UINT64_MAX: Final = 2**64 - 1


def _encode_str_subclass(value: object) -> str:
    """Encode a subclass of `str`, as template engines and translations return: msgspec encodes only `str` itself."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encode: Final = msgspec.json.Encoder(enc_hook=_encode_str_subclass).encode
_JSON_WHITE_SPACE: Final = b" \t\r\n"  # RFC 8259, section 2
# Numbers that JSON cannot represent leave a trace in the encoded bytes: NaN is null, and large integers have many digits.
_MAY_HOLD_BAD_NUMBER = re.compile(rb"null|\d{19}")


class Codec:
    """Encodes and checks events of one type.

    `encode(event)` returns JSON as bytes. It is msgspec's own encoder if the type checks itself or is trusted; otherwise it
    also decodes what it encoded, which checks the types of the fields.

    Args:
        event_type: A subclass of `msgspec.Struct` with a field `event_id`.
        trusted: Do not check events of this type.

    Raises:
        UsageError: The type is not such a subclass.
    """

    __slots__ = ("_decode", "_generated_fields", "checks_itself", "encode", "event_type")

    def __init__(self, event_type: type[msgspec.Struct], *, trusted: bool = False) -> None:
        if not (isinstance(event_type, type) and issubclass(event_type, msgspec.Struct)):
            raise UsageError(f"event_type is {event_type!r}; use a subclass of msgspec.Struct")
        if "event_id" not in event_type.__struct_fields__:
            raise UsageError(f"event_type {event_type.__name__} has no field event_id; add one: sinks deduplicate by it")
        self.event_type = event_type
        self.checks_itself = trusted or event_type is TrackingEvent
        self.encode: Callable[[Any], bytes] = _encode
        if event_type is not TrackingEvent:
            self.encode = _single_line_encoder(_encode if trusted else _checking_encoder(event_type))
        self._decode = msgspec.json.Decoder(event_type).decode
        self._generated_fields = _generated_fields(event_type)

    def check_json(self, payload: object) -> bytes:
        """Check an event that is JSON already.

        Unknown fields are checked too, because a destination may read them.

        Returns:
            The payload without surrounding white space and line feeds, otherwise unchanged.

        Raises:
            InvalidEventError: It is not a valid event.
            msgspec.DecodeError: It is not JSON of the event type.
        """
        if not isinstance(payload, bytes):
            raise InvalidEventError("event", f"has the type {type(payload).__name__}; use bytes of JSON")
        value = payload.strip(_JSON_WHITE_SPACE)
        if len(value) > EVENT_BYTES_MAX:
            raise InvalidEventError("event", f"has {len(value)} bytes as JSON; the limit is {EVENT_BYTES_MAX}")
        self._decode(value)
        fields = msgspec.json.decode(value)
        if _MAY_HOLD_BAD_NUMBER.search(value):
            _check_numbers(fields, "event")
        if isinstance(fields, dict):
            for name in self._generated_fields:
                if name not in fields:
                    raise InvalidEventError(name, "is missing; its default would be a different value at each decoding")
        # JSON has no line feed within a string, and between two tokens it has no meaning.
        return value.replace(b"\n", b"")

    def describe_error(self, event: object, error: Exception) -> str:
        """Why `encode` failed, with the field that is wrong if it can be found."""
        if isinstance(error, (InvalidEventError, msgspec.ValidationError)):
            return str(error)
        if isinstance(event, msgspec.Struct):
            for field in event.__struct_fields__:
                try:
                    _encode(getattr(event, field))
                except Exception as cause:  # noqa: BLE001 - a value may raise anything when encoded
                    return f"{field}: {cause}"
        return str(error)


def _generated_fields(event_type: type[msgspec.Struct]) -> list[str]:
    """The fields whose default is generated, as ids and times are; an empty list by default does not count."""
    constant = (msgspec.NODEFAULT, list, dict, set, frozenset, tuple, bytearray)
    return [field.encode_name for field in msgspec.structs.fields(event_type) if field.default_factory not in constant]


def _single_line_encoder(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """`encode`, but it rejects line feeds: msgspec copies a `msgspec.Raw` field unchanged, and a record is one line."""

    def encode_line(event: Any) -> bytes:
        payload = encode(event)
        if b"\n" in payload:
            raise InvalidEventError("event", "a msgspec.Raw field has a line feed; write its JSON on one line")
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
            raise InvalidEventError(path, f"is {value}, which JSON cannot represent")
    elif isinstance(value, int):
        if not INT64_MIN <= value <= _UINT64_MAX:
            raise InvalidEventError(path, "is an integer of more than 64 bits")
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
    """No event has this type, so `encode_records` hands every event to its fallback."""


class EventEncoder:
    """Turns events into records for one outbox in one process: `before_send`, checks, encoding.

    Drops are counted by the writer, and reported once the outbox has started: `start` is called before a drop. Why an event is
    invalid is logged, once for each reason.
    """

    def __init__(self, settings: Settings, codec: Codec, writer: Writer, hooks: Hooks, start: Callable[[], object]) -> None:
        self._name = settings.directory
        self._enabled = settings.enabled
        self._raises_on_invalid = settings.on_invalid == "raise"
        self._event_type = settings.event_type
        self._codec = codec
        self._writer = writer
        self._hooks = hooks
        self._start = start
        self.encode = codec.encode
        self._logged_reasons: set[str] = set()

    def apply_before_send(self, event: Any) -> Any:
        """The event that `before_send` returns for an event, or a `Dropped`.

        An event of the wrong type and one for a disabled outbox pass unchanged; a later step drops them.
        """
        if type(event) is not self._event_type or not self._enabled:
            return event
        replacement = self._hooks.before_send(event)
        if replacement is None:
            self._start()
            return self._writer.drop("filtered")
        if type(replacement) is not self._event_type:
            problem = f"returned a {type(replacement).__name__}; it must return a {self._event_type.__name__} or None"
            return self.drop_invalid(replacement, InvalidEventError("before_send", problem))
        return replacement

    def with_before_send(self, enqueue: EnqueueFunction) -> EnqueueFunction:
        """`enqueue` with `before_send` applied first."""

        def enqueue_filtered(event: Any, *, durability: Durability | None = None) -> Outcome:
            """Store the event that `before_send` returns."""
            filtered = self.apply_before_send(event)
            return filtered if type(filtered) is Dropped else enqueue(filtered, durability=durability)

        return enqueue_filtered

    def encode_many(self, events: Iterable[Any]) -> tuple[bytes, list[Dropped | None]]:
        """The records of events after `before_send`, and for each event None or why it was dropped."""
        fast_type = _NoEventType if self._hooks.has_before_send else self._event_type
        return encode_records(events, self.encode, fast_type, EVENT_BYTES_MAX, self._filter_and_encode)

    def encode_many_json(self, payloads: Iterable[Any]) -> tuple[bytes, list[Dropped | None]]:
        """The records of events that are JSON already, and for each None or why it was dropped. No `before_send`."""
        return encode_records(payloads, self.encode, _NoEventType, EVENT_BYTES_MAX, self._encode_json)

    def _filter_and_encode(self, event: Any) -> bytes | Dropped:
        filtered = self.apply_before_send(event)
        return filtered if type(filtered) is Dropped else self._encode_event(filtered)

    def _encode_event(self, event: Any) -> bytes | Dropped:
        try:
            payload = self.encode(event)
            if type(event) is not self._event_type or len(payload) > EVENT_BYTES_MAX:
                self.raise_invalid(event, payload)
        except Exception as error:  # noqa: BLE001 - an event may raise anything when encoded; its caller continues
            return self.drop_invalid(event, error)
        return record.line(payload)

    def _encode_json(self, payload: Any) -> bytes | Dropped:
        try:
            return record.line(self._codec.check_json(payload))
        except Exception as error:  # noqa: BLE001 - as above
            return self.drop_invalid(payload, error)

    def raise_invalid(self, event: object, payload: bytes) -> None:
        """Raise for an event that could be encoded: it has the wrong type or is too large."""
        if type(event) is not self._event_type:
            raise InvalidEventError("event", f"has the type {type(event).__name__}, not {self._event_type.__name__}")
        raise InvalidEventError("event", f"has {len(payload)} bytes as JSON; the limit is {EVENT_BYTES_MAX}")

    def drop_invalid(self, event: object, error: Exception) -> Dropped:
        """Drop an invalid event and log why, or raise with `on_invalid="raise"`."""
        if not self._enabled:
            return self._writer.drop("disabled")
        text = self._codec.describe_error(event, error)
        if self._raises_on_invalid:
            raise error if isinstance(error, InvalidEventError) else InvalidEventError("event", text) from None
        self.log_invalid(text)
        self._start()
        return self._writer.drop("invalid")

    def log_invalid(self, reason: str) -> None:
        """Log why an event was dropped as invalid; each reason once."""
        if reason not in self._logged_reasons and len(self._logged_reasons) < _LOGGED_REASONS_MAX:
            self._logged_reasons.add(reason)
            log.warning("%s: dropped an invalid event: %s (further ones with this reason are only counted)", self._name, reason)
