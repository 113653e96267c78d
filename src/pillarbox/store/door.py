"""The types of the hot path: what it is given, and what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.outcome import Durability, Outcome


class Door(NamedTuple):
    """How the hot path gets from an event to its line, and whom it calls where that does not go straight on."""

    encode: Callable[[Any], bytes]
    event_type: type
    event_bytes_max: int
    is_power: Callable[[str], bool]  # raises: there is no such durability
    refuse: Callable[[Any, bytes], None]  # raises: the event is of the wrong type or too large
    invalid: Callable[[Any, Exception], Outcome]
    begin: Callable[[bytes, int], Outcome]  # this writer does not accept: it has not begun, or is a forked parent's
    durably: Callable[[bytes], Outcome]  # instead of appending
    power: bool  # whether that is what a call gets that does not say


class Enqueue(Protocol):
    """What `Writer.build_enqueue` builds."""

    def __call__(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event."""
