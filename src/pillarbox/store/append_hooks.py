"""The types of the hot path: what it is given, and what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.outcome import Durability, Outcome


class AppendHooks(NamedTuple):
    """How the hot path gets from an event to its line, and whom it calls where that does not go straight on."""

    encode: Callable[[Any], bytes]
    event_type: type
    event_bytes_max: int
    is_power: Callable[[str], bool]  # raises: there is no such durability
    raise_invalid: Callable[[Any, bytes], None]  # raises: the event is of the wrong type or too large
    drop_invalid: Callable[[Any, Exception], Outcome]
    append_unstarted: Callable[[bytes, int], Outcome]  # this writer does not accept: it has not begun, or is a forked parent's
    commit: Callable[[bytes], Outcome]  # instead of appending
    power_by_default: bool  # whether that is what a call gets that does not say


class EnqueueFunction(Protocol):
    """What `Writer.build_enqueue` builds."""

    def __call__(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event."""
