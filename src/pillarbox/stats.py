"""What `Outbox.stats()` returns, and the counters behind it.

`telemetry.py` makes OpenTelemetry instruments of them; `status`, logs and the exporters use the same states.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

StateName = Literal["idle", "draining", "waiting", "degraded", "stopped", "standby"]


class State(msgspec.Struct, frozen=True):
    """One state and why.

    `idle`: nothing waits. `draining`: sending. `waiting`: the destination said not now. `degraded`: delivering, but something
    here needs a person. `stopped`: nothing can be delivered until somebody mends the set-up. `standby`: another process
    delivers.
    """

    name: StateName
    reason: str = ""
    retry_at_micros: int | None = None  # when the destination is asked again

    def is_same_state(self, other: State) -> bool:
        """Whether nobody need be told of the change; another time of retry is none."""
        return (self.name, self.reason) == (other.name, other.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


COUNTER_FIELDS: Final = (
    "dead",
    "delivered",
    "discarded",
    "duplicates",
    "failed_flushes",
    "flushed_bytes",
    "flushed_files",
    "quarantined",
)


class DeliveryCounters:
    """Written by the deliverer's thread only; read by anyone."""

    __slots__ = (*COUNTER_FIELDS, "rate")

    def __init__(self) -> None:
        self.delivered = 0  # events that a destination has, `duplicates` of which it had before
        self.duplicates = 0
        self.dead = 0  # events kept as dead letters
        self.quarantined = 0  # spans of damaged bytes set aside
        self.discarded = 0  # of these two, those that were not kept for want of room
        self.flushed_files = 0
        self.flushed_bytes = 0
        self.failed_flushes = 0  # answers that were not an acceptance
        self.rate: float | None = None  # events a second that are sent at most; None: as many as the destination takes

    def to_stats(self, state: State, last_error: str) -> SinkStats:
        """What `stats()` shows of them."""
        counts = {name: getattr(self, name) for name in COUNTER_FIELDS}
        return SinkStats(state=state, last_error=last_error, rate=self.rate, **counts)


class SinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the delivery to one sink. Counts are of this process since it opened the outbox."""

    state: State
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    rate: float | None  # events a second that are sent at most, while that is bounded
    last_error: str

    def as_degraded(self, reason: str) -> SinkStats:
        """The same, where something is wrong that is not the sink's."""
        return msgspec.structs.replace(self, state=State("degraded", reason), last_error=reason)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an outbox. Counts are of this process since it opened the outbox; pending is the directory's."""

    state: State
    durability: str
    pending_bytes: int
    pending_files: int
    accepted: int
    dropped: dict[str, int]  # by reason
    sealed: dict[str, int]  # files, by reason
    evicted: int  # events given up for newer ones
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    rate: float | None  # events a second that are sent at most, while that is bounded
    last_error: str
    hook_failures: dict[str, int]  # how often each of the application's functions raised
    sinks: dict[str, SinkStats]  # by name, where there are several; what is counted above is the sum of them
