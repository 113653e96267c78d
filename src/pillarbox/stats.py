"""What `Outbox.stats()` returns, and the counters behind it.

`telemetry.py` makes OpenTelemetry instruments of them; `status`, logs and the exporters use the same states.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

StateName = Literal["idle", "draining", "waiting", "degraded", "stopped", "standby"]


class State(msgspec.Struct, frozen=True):
    """The state of delivery, and the reason.

    Attributes:
        name: "idle": nothing is pending. "draining": delivering. "waiting": the destination is unavailable; it is retried.
            "degraded": delivering, but something needs attention. "stopped": nothing is delivered until the configuration is
            fixed. "standby": another process delivers.
        reason: Why; empty if there is nothing to say.
        retry_at_micros: When the next attempt is due, in microseconds since 1970.
    """

    name: StateName
    reason: str = ""
    retry_at_micros: int | None = None

    def is_same_state(self, other: State) -> bool:
        """Whether name and reason are equal, so that there is nothing to log; the time of the retry does not count."""
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
    """Counters of one sink. Only the delivery worker's thread writes them; any thread may read them."""

    __slots__ = (*COUNTER_FIELDS, "rate")

    def __init__(self) -> None:
        self.delivered = 0  # events that the destination has accepted, including duplicates
        self.duplicates = 0  # events that the destination already had
        self.dead = 0  # events that were dead-lettered
        self.quarantined = 0  # damaged byte ranges
        self.discarded = 0  # dead letters and byte ranges that were discarded because of `on_quarantine_full="discard"`
        self.flushed_files = 0  # delivered batch files
        self.flushed_bytes = 0
        self.failed_flushes = 0  # attempts that the destination did not accept
        self.rate: float | None = None  # current limit in events/s; None: no limit

    def to_stats(self, state: State, last_error: str) -> SinkStats:
        """A snapshot for `Outbox.stats`."""
        counts = {name: getattr(self, name) for name in COUNTER_FIELDS}
        return SinkStats(state=state, last_error=last_error, rate=self.rate, **counts)


class SinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the delivery to one sink. The counts began when this process opened the outbox.

    Attributes:
        state: State of the delivery.
        delivered: Events that the destination accepted.
        duplicates: How many of them the destination already had.
        dead: Events that became dead letters.
        quarantined: Damaged byte ranges that were quarantined.
        discarded: Dead letters and damaged byte ranges that were discarded at a limit.
        flushed_files: Batch files that were settled.
        flushed_bytes: Bytes of these files.
        failed_flushes: Calls that the destination did not accept.
        rate: Current limit in events/s; None: no limit.
        last_error: The last failure of a call; "" if there was none.
    """

    state: State
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    rate: float | None
    last_error: str

    def as_degraded(self, reason: str) -> SinkStats:
        """A copy with the state "degraded", for a problem that is not the sink's."""
        return msgspec.structs.replace(self, state=State("degraded", reason), last_error=reason)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an outbox. The counts began when this process opened the outbox.

    The counts of delivery, from `delivered` to `failed_flushes`, are sums over all sinks; `SinkStats` describes them.

    Attributes:
        state: State of the delivery; with several sinks, the worst one.
        durability: The setting `durability`.
        pending_bytes: Bytes of segments and batches in the directory, whichever process wrote them.
        pending_files: Number of these files.
        accepted: Events that `enqueue` stored.
        dropped: Events that were not stored, by reason.
        sealed: Batches that this process sealed, by reason.
        evicted: Events deleted to make room for newer ones (`when_full="drop_oldest"`).
        rate: Current limit of the delivery in events/s; None: no limit.
        last_error: The last failure of a call; "" if there was none.
        hook_failures: How often each hook raised.
        unwritten_ledger_entries: Entries of the ledger that wait in memory; after `close` they are lost.
        sinks: The stats of each sink by name; empty unless there are several sinks.
    """

    state: State
    durability: str
    pending_bytes: int
    pending_files: int
    accepted: int
    dropped: dict[str, int]
    sealed: dict[str, int]
    evicted: int
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    rate: float | None
    last_error: str
    hook_failures: dict[str, int]
    unwritten_ledger_entries: int
    sinks: dict[str, SinkStats]
