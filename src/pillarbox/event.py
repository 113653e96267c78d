"""Events: `TrackingEvent`, or any `msgspec.Struct` of the application that has a field `event_id`.

`TrackingEvent` checks its fields when it is made (msgspec checks types only when it decodes), so that `enqueue` does not have
to. Events of other types are checked by `codec.Codec`, which decodes what it has encoded.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from enum import StrEnum
from os import urandom
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pillarbox._native import COMPILED, speedups
from pillarbox.clock import wall_ns
from pillarbox.errors import InvalidEventError
from pillarbox.forks import after_fork_in_child, check_fork

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EVENT_BYTES_MAX",
    "INT64_MIN",
    "ScopeKind",
    "TrackingEvent",
    "new_event_id",
    "now_micros",
    "snake_case",
    "without_post_init",
]

EVENT_BYTES_MAX: Final = 256 * 1024  # bytes of one event as JSON; anything larger is a document and not an event
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


class ScopeKind(StrEnum):
    """What `scope_id` identifies. An event may have any other text, which the destination may reject."""

    SITE = "Site"
    MODULE = "Module"
    USER = "User"
    PROFILE = "Profile"


def _random_seed() -> tuple[str, int]:
    """The random parts of the ids of this process: their middle, and where the counter at their end starts."""
    seed = int.from_bytes(urandom(9))
    bits = seed >> 46
    # Of the 48 bits of the counter, the first starts as 0, so that it cannot overflow, and the second as 1, so that all values
    # have twelve hexadecimal digits.
    return f"-7{bits >> 14:03x}-{0x8000 | bits & 0x3FFF:04x}-", 0x4000_0000_0000 | seed & 0x3FFF_FFFF_FFFF


def _uuid7_generator() -> tuple[Callable[[], str], Callable[[str, int], None]]:
    """Return a generator of UUIDv7 (RFC 9562, section 5.7) and a function that reseeds it.

    An id is 48 bits of Unix milliseconds, then 26 random bits (RFC 9562, section 6.2, method 1), then a 48-bit counter that
    starts at a random value. Within a process the counter makes ids unique, and those of one thread sort by creation; between
    processes the random parts keep them apart. A forked child must reseed. Safe to share between threads without a lock: the
    counter is incremented by one call, and the cached time is replaced as one object.
    """
    count = itertools.count().__next__
    middle = ""
    cached = 0, 0, ""  # first nanosecond, end, and how an id of the time between starts

    def reseed(new_middle: str, first: int) -> None:
        nonlocal count, middle, cached
        count, middle, cached = itertools.count(first).__next__, new_middle, (0, 0, "")

    def make() -> str:
        nonlocal cached
        check_fork()
        now = wall_ns()
        since, until, head = cached
        if not since <= now < until:
            millis = now // 1_000_000
            text = f"{millis:012x}"
            head = f"{text[:8]}-{text[8:]}{middle}"
            cached = millis * 1_000_000, (millis + 1) * 1_000_000, head
        return f"{head}{count():x}"

    return make, reseed


def _now_micros() -> int:
    """Wall time in microseconds since 1970, the unit of `occurred_at_micros`."""
    return wall_ns() // 1000


_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_TEXT_FIELDS: Final = ("event_id", "event_key", "scope_kind", "scope_id", "metadata_json")
_OPTIONAL_TEXT_FIELDS: Final = ("user_id", "owner_user_id", "profile_id", "module_key")


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidEventError(field, f"has the type {type(value).__name__}, not str")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidEventError(
                field, f"has a lone surrogate at position {error.start}, which UTF-8 cannot encode"
            ) from None


def _check_event(event: TrackingEvent) -> None:
    for field in _TEXT_FIELDS:
        _check_text(field, getattr(event, field))
    for field in _OPTIONAL_TEXT_FIELDS:
        value = getattr(event, field)
        if value is not None:
            _check_text(field, value)
    if event.metadata_json != "{}":
        try:
            _check_json(str.encode(event.metadata_json))  # msgspec does not encode subclasses of str
        except msgspec.DecodeError as error:
            raise InvalidEventError("metadata_json", f"is not JSON: {error}") from None
    micros = event.occurred_at_micros
    if type(micros) is not int:
        raise InvalidEventError("occurred_at_micros", f"has the type {type(micros).__name__}, not int")
    if not INT64_MIN <= micros <= INT64_MAX:
        raise InvalidEventError("occurred_at_micros", "is an integer of more than 64 bits")


_post_init: Any = _check_event
if COMPILED:
    new_event_id = speedups.new_event_id
    now_micros = speedups.now_micros
    _reseed = speedups.reseed
    _post_init = speedups.EventCheck(_check_event, _check_json)
else:
    new_event_id, _reseed = _uuid7_generator()
    now_micros = _now_micros
_reseed(*_random_seed())
after_fork_in_child(lambda: _reseed(*_random_seed()))


class TrackingEvent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Something that happened. The fields are the columns of the SpacetimeDB table `tracking_event`.

    A library that freezes Python's time in tests does not freeze the defaults of a compiled Pillarbox: pass
    `occurred_at_micros`, or set `PILLARBOX_PURE_PYTHON=1` in the environment.

    Attributes:
        event_id: Unique id. Default: a UUIDv7.
        event_key: What happened, for example "page_view".
        scope_kind: What kind of thing it happened to; see `ScopeKind`.
        scope_id: Id of that thing.
        user_id: Id of the user who did it.
        owner_user_id: Id of the user who owns the thing.
        profile_id: Id of the user's profile.
        module_key: Module of the application in which it happened.
        metadata_json: Anything else, as JSON text.
        occurred_at_micros: When it happened, in microseconds since 1970, as an int64. Default: now.

    Raises:
        InvalidEventError: A field has the wrong type, or `metadata_json` is not JSON.
    """

    event_id: str = msgspec.field(default_factory=new_event_id)
    event_key: str
    scope_kind: str
    scope_id: str
    user_id: str | None = None
    owner_user_id: str | None = None
    profile_id: str | None = None
    module_key: str | None = None
    metadata_json: str = "{}"
    occurred_at_micros: int = msgspec.field(default_factory=now_micros)

    __post_init__ = _post_init  # type: ignore[misc] # a compiled one is not a function


if COMPILED:
    with contextlib.suppress(TypeError):  # a msgspec with another memory layout: unbound, `Check` calls `_check_event`
        _post_init.bind(TrackingEvent, _TEXT_FIELDS, _OPTIONAL_TEXT_FIELDS, "metadata_json", "occurred_at_micros")


def without_post_init(event_type: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """A type with the same fields but without `__post_init__`, to decode stored events: it ran before they were stored."""
    if not hasattr(event_type, "__post_init__"):
        return event_type
    config = event_type.__struct_config__
    fields = []
    for field in msgspec.structs.fields(event_type):
        if field.default_factory is not msgspec.NODEFAULT:
            default = msgspec.field(default_factory=field.default_factory, name=field.encode_name)
        else:
            default = msgspec.field(default=field.default, name=field.encode_name)
        fields.append((field.name, field.type, default))
    return msgspec.defstruct(
        event_type.__name__,
        fields,
        kw_only=True,
        frozen=True,
        gc=False,
        tag=config.tag,
        tag_field=config.tag_field,
        forbid_unknown_fields=config.forbid_unknown_fields,
    )


def snake_case(name: str) -> str:
    """`PageView` and `pageView` as `page_view`; the default table of an event type has such a name."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
