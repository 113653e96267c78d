"""The types of the hot path: the callbacks that it needs, and the function that `Writer.build_enqueue` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.outcome import Durability, Outcome


class AppendHooks(NamedTuple):
    """How the hot path encodes an event, and the functions that it calls if it cannot simply append."""

    encode: Callable[[Any], bytes]
    event_type: type
    event_bytes_max: int
    is_power: Callable[[str], bool]  # raises `ConfigurationError` for an unknown durability
    raise_invalid: Callable[[Any, bytes], None]  # raises `InvalidEventError`: the event has the wrong type or is too large
    drop_invalid: Callable[[Any, Exception], Outcome]
    # for a writer that is not started, or that belongs to the parent of a forked process
    append_unstarted: Callable[[bytes, int], Outcome]
    commit: Callable[[bytes], Outcome]  # called instead of appending where the event must be durable
    power_by_default: bool  # whether a call without `durability` asks for "power"


class EnqueueFunction(Protocol):
    """What `Writer.build_enqueue` returns."""

    def __call__(self, event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
        """Store one event."""
