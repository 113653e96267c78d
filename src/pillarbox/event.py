"""What an application hands over: `TrackingEvent`, or any `msgspec.Struct` of its own that has an `event_id`.

`TrackingEvent` checks itself when it is built (msgspec checks types when decoding only), so that the hot path need not.
Other types are encoded and decoded again at the door: `Codec` is that door.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from enum import StrEnum
from os import register_at_fork, urandom
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pillarbox._native import COMPILED, speedups
from pillarbox.clock import wall_ns
from pillarbox.errors import InvalidEventError

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

EVENT_BYTES_MAX: Final = 256 * 1024  # one event as JSON; a larger one is a document, not an event
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


class ScopeKind(StrEnum):
    """What `scope_id` identifies. Any other text can be stored; a destination that does not know it refuses the event."""

    SITE = "Site"
    MODULE = "Module"
    USER = "User"
    PROFILE = "Profile"


def _random_seed() -> tuple[str, int]:
    """What is random in the ids to come: what stands in their middle, and the first number of the count behind it."""
    seed = int.from_bytes(urandom(9))
    bits = seed >> 46
    # The first of the 48 bits of the count is 0, for there to be room, and the next is 1, for all to have twelve digits.
    return f"-7{bits >> 14:03x}-{0x8000 | bits & 0x3FFF:04x}-", 0x4000_0000_0000 | seed & 0x3FFF_FFFF_FFFF


def _uuid7_generator() -> tuple[Callable[[], str], Callable[[str, int], None]]:
    """Makes ids after RFC 9562, section 5.7: 48 bits of Unix milliseconds, then 74 bits that start at random and count up.

    Within a process the last 48 bits count up, so that no two are equal and a thread's sort by making; across processes the 26
    random bits in the middle and the random start of the count keep them apart. The second function starts anew, which a forked
    child must. Safe to share between threads without a lock: the count is one call, and what is kept of the time one object.
    """
    count = itertools.count().__next__
    middle = ""
    moment = 0, 0, ""  # from this nanosecond on, and up to that, ids begin so

    def reseed(new_middle: str, first: int) -> None:
        nonlocal count, middle, moment
        count, middle, moment = itertools.count(first).__next__, new_middle, (0, 0, "")

    def make() -> str:
        nonlocal moment
        now = wall_ns()
        since, until, head = moment
        if not since <= now < until:
            millis = now // 1_000_000
            text = f"{millis:012x}"
            head = f"{text[:8]}-{text[8:]}{middle}"
            moment = millis * 1_000_000, (millis + 1) * 1_000_000, head
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
        raise InvalidEventError(field, f"must be text, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidEventError(field, f"has a lone surrogate at position {error.start}, which UTF-8 cannot hold") from None


def _check_event(event: TrackingEvent) -> None:
    for field in _TEXT_FIELDS:
        _check_text(field, getattr(event, field))
    for field in _OPTIONAL_TEXT_FIELDS:
        value = getattr(event, field)
        if value is not None:
            _check_text(field, value)
    if event.metadata_json != "{}":
        try:
            _check_json(str.encode(event.metadata_json))  # msgspec takes no subclass of str
        except msgspec.DecodeError as error:
            raise InvalidEventError("metadata_json", f"is not JSON text: {error}") from None
    micros = event.occurred_at_micros
    if type(micros) is not int:
        raise InvalidEventError("occurred_at_micros", f"must be a whole number, not {type(micros).__name__}")
    if not INT64_MIN <= micros <= INT64_MAX:
        raise InvalidEventError("occurred_at_micros", "does not fit into 64 bits")


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
register_at_fork(after_in_child=lambda reseed=_reseed: reseed(*_random_seed()))


class TrackingEvent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One thing that happened, in the shape that the SpacetimeDB table `tracking_event` has.

    `event_id`: text, unique (default: a UUIDv7). `event_key`: what happened. `scope_kind` and `scope_id`: to what.
    `metadata_json`: JSON text. `occurred_at_micros`: int64, microseconds since 1970 (default: now).
    Raises `InvalidEventError` where a member has the wrong type.

    What freezes Python's time in a test does not freeze that of the defaults where they are compiled: it has to set
    `occurred_at_micros`, or `PILLARBOX_PURE_PYTHON=1` in the environment.
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

    __post_init__ = _post_init  # type: ignore[misc] # compiled, it is no function


if COMPILED:
    with contextlib.suppress(TypeError):  # a msgspec that keeps members elsewhere: unbound, it leaves all to `_check_event`
        _post_init.bind(TrackingEvent, _TEXT_FIELDS, _OPTIONAL_TEXT_FIELDS, "metadata_json", "occurred_at_micros")


def without_post_init(event_type: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The type to decode stored events as: the same fields, without `__post_init__`, which ran before they were stored."""
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
    """`PageView` and `pageView` as `page_view`: how tables are named after event types."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
