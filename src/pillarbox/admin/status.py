"""What `pillarbox status` and the exporters show of an outbox, from directory listings and heartbeats.

Reading the status takes no lock, and creates and changes no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.admin.backlog import DropTotal, EventCounter, LedgerFacts, PendingEvents
from pillarbox.admin.text import counted, format_duration, format_time
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S, Heartbeat, read_heartbeat
from pillarbox.errors import DirectoryUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory
    from pillarbox.store.usage import DiskUsage


RECENT_LOSS_S: Final = 86_400.0
_NEARLY_FULL: Final = 0.8  # of `max_bytes`


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One sink of an outbox with several sinks."""

    name: str  # name of the sink
    backlog_bytes: int  # bytes of batches that this sink has not delivered yet
    backlog_events: int  # events of batches that this sink has not delivered yet, as exact as those of the outbox
    backlog_files: int  # number of these batches
    oldest_age_s: float | None  # seconds since the oldest of them was sealed
    dead_files: int  # number of batches with dead letters
    dead_bytes: int  # bytes of their dead-letter files
    quarantine_files: int  # number of batches with damaged byte ranges
    quarantine_bytes: int  # bytes of their quarantine files
    delivered_files: int  # number of retained batches
    delivered_bytes: int  # bytes of retained batches
    heartbeat: Heartbeat | None  # last heartbeat of its delivery worker
    heartbeat_age_s: float | None  # seconds since that heartbeat was written


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The output of `pillarbox status --json`."""

    directory: str  # the outbox directory
    pending_bytes: int  # bytes of segments and batches
    pending_files: int  # number of segments and batches
    pending_events: int  # events in these files
    pending_events_exact: bool  # false: a part of them is estimated from sizes
    max_bytes: int  # limit of the pending bytes, by the settings; 0 if it is unknown
    full_in_s: float | None  # seconds until the limit is reached, at the rate of the last minutes; None if it is not nearing
    dropped: dict[str, DropTotal]  # events that `enqueue` did not store, by reason, in all processes, from the ledger
    advice: list[str]  # what to do, the most important first; empty if there is nothing to do
    active_files: int  # number of segments that writers append to
    active_bytes: int  # bytes of these segments
    sealed_files: int  # number of pending batches
    oldest_age_s: float | None  # seconds since the oldest pending batch was sealed
    quarantine_files: int  # number of batches with damaged byte ranges
    quarantine_bytes: int  # bytes of their quarantine files
    dead_files: int  # number of batches with dead letters
    dead_bytes: int  # bytes of their dead-letter files
    delivered_files: int  # number of retained batches
    delivered_bytes: int  # bytes of retained batches
    durability: str  # durability of the outbox in the delivering process; if there is none, that of the settings
    heartbeat: Heartbeat | None  # last heartbeat of the delivery worker
    heartbeat_age_s: float | None  # seconds since that heartbeat was written
    sinks: list[SinkStatus]  # the status of each sink; empty for a single one


def _sealed_batches(directory: Directory) -> dict[str, int]:
    """Bytes by batch id. A batch may have two files while it is compressed."""
    listing = directory.filesystem.list_files(directory.path)
    return {layout.batch_id(name): size for name, size in listing if layout.kind_of(name) is Kind.SEALED}


def read_status(directory: Directory, clock: Clock, durability: str, max_bytes: int = 0) -> OutboxStatus:
    """Read the status of an outbox directory.

    Args:
        directory: The outbox directory, or a sink's queue.
        clock: For the ages.
        durability: The durability of the settings, for an outbox whose heartbeat does not tell it.
        max_bytes: The limit of the settings; 0 if it is unknown.

    Raises:
        DirectoryUnusableError: The directory cannot be listed.
    """
    try:
        queues = directory.queues()
        # Listed before the queues: a batch that is fanned out in between is then in each queue.
        shared = _sealed_batches(directory) if queues else {}
        now = clock.micros()
        facts = LedgerFacts(directory, now)
        queue_facts = [LedgerFacts(queue, now) for queue in queues]
        counter = EventCounter([facts, *queue_facts])
        unshared = [directory] if queues else []
        sinks = [_sink_status(queue, shared, clock, counter.count([queue, *unshared])) for queue in queues]
        pending = counter.count([directory, *queues])
        usage = directory.disk_usage()
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
        raise DirectoryUnusableError(directory.path, problem, "name an outbox directory") from None
    heartbeat = read_heartbeat(directory)
    status = OutboxStatus(
        directory=directory.path,
        pending_bytes=usage.pending_bytes,
        pending_files=usage.pending_files,
        pending_events=pending.events,
        pending_events_exact=pending.is_exact,
        max_bytes=max_bytes,
        full_in_s=_full_in_s(facts, queue_facts, usage, max_bytes),
        dropped=facts.dropped,
        advice=[],
        active_files=usage.active_files,
        active_bytes=usage.active_bytes,
        sealed_files=usage.sealed_files,
        oldest_age_s=_age_s(clock, usage.oldest_sealed_at),
        quarantine_files=usage.corrupt_files,
        quarantine_bytes=usage.corrupt_bytes,
        dead_files=usage.dead_files,
        dead_bytes=usage.dead_bytes,
        delivered_files=usage.delivered_files,
        delivered_bytes=usage.delivered_bytes,
        durability=heartbeat.durability if heartbeat is not None and heartbeat.durability else durability,
        heartbeat=heartbeat,
        heartbeat_age_s=heartbeat_age_s(heartbeat, clock),
        sinks=sinks,
    )
    return msgspec.structs.replace(status, advice=advice_for(status, clock))


def _full_in_s(facts: LedgerFacts, queue_facts: list[LedgerFacts], usage: DiskUsage, max_bytes: int) -> float | None:
    """Seconds until the limit is reached at the rate of the last minutes. Of several sinks the slowest one counts."""
    in_rate = facts.in_bytes_per_s(usage.active_bytes)
    if not max_bytes or in_rate is None:
        return None
    growth = in_rate - min(one.out_bytes_per_s for one in queue_facts or [facts])
    return max(0.0, max_bytes - usage.pending_bytes) / growth if growth > 0 else None


def advice_for(status: OutboxStatus, clock: Clock) -> list[str]:
    """What to do about the state of an outbox, the most important first."""
    advice = []
    heartbeats = {sink.name: (sink.heartbeat, sink.heartbeat_age_s) for sink in status.sinks} or {
        "": (status.heartbeat, status.heartbeat_age_s)
    }
    for name, (heartbeat, age_s) in heartbeats.items():
        label = f"{name}: " if name else ""
        if heartbeat is None or age_s is None or age_s > HEARTBEAT_STALE_AFTER_S:
            if status.pending_files:
                advice.append(f"{label}no process delivers: run pillarbox deliver, or an application with a sink")
        elif heartbeat.state.name == "waiting":
            advice.append(f"{label}events stay pending: check the destination with pillarbox check, then run pillarbox doctor")
        elif heartbeat.state.name in ("stopped", "degraded"):
            advice.append(f"{label}correct the problem that the state names; delivery then continues by itself")
    if status.max_bytes and status.pending_bytes >= _NEARLY_FULL * status.max_bytes:
        advice.append("nearly full, and then when_full applies: have the backlog delivered, or raise max_bytes")
    recent = [reason for reason, dropped in status.dropped.items() if is_recent_loss(reason, dropped, clock.micros())]
    if recent:
        advice.append(f"events were dropped in the last day ({', '.join(recent)}): pillarbox doctor says what to do")
    if status.dead_files or status.quarantine_files:
        advice.append("not everything was delivered: see pillarbox dead list and pillarbox quarantine list")
    return advice


def is_recent_loss(reason: str, dropped: DropTotal, now_micros: int) -> bool:
    """Whether events were dropped in the last day, except those that `before_send` filtered."""
    return reason != "filtered" and now_micros - dropped.last_at_micros < RECENT_LOSS_S * 1e6


def describe_dropped(dropped: dict[str, DropTotal], now_micros: int) -> str:
    """How many events were dropped, why, and how long ago the last of them."""
    reasons = ", ".join(f"{reason} {one.events:,}" for reason, one in sorted(dropped.items()))
    last_s = max(0.0, (now_micros - max(one.last_at_micros for one in dropped.values())) / 1e6)
    total = counted(sum(one.events for one in dropped.values()), "event")
    return f"{total} ({reasons}), the last {format_duration(last_s)} ago"


def _sink_status(queue: Directory, shared: dict[str, int], clock: Clock, pending: PendingEvents) -> SinkStatus:
    usage = queue.disk_usage()
    backlog = _sealed_batches(queue) | shared  # every sink still has to deliver what has not been fanned out
    stamps = [stamp for stamp in map(layout.sealed_at, backlog) if stamp is not None]
    heartbeat = read_heartbeat(queue)
    return SinkStatus(
        name=queue.sink,
        backlog_bytes=sum(backlog.values()),
        backlog_events=pending.events,
        backlog_files=len(backlog),
        oldest_age_s=_age_s(clock, min(stamps, default=None)),
        dead_files=usage.dead_files,
        dead_bytes=usage.dead_bytes,
        quarantine_files=usage.corrupt_files,
        quarantine_bytes=usage.corrupt_bytes,
        delivered_files=usage.delivered_files,
        delivered_bytes=usage.delivered_bytes,
        heartbeat=heartbeat,
        heartbeat_age_s=heartbeat_age_s(heartbeat, clock),
    )


def _age_s(clock: Clock, stamp: int | None) -> float | None:
    return None if stamp is None else max(0.0, (clock.micros() - stamp) / 1e6)


def heartbeat_age_s(heartbeat: Heartbeat | None, clock: Clock) -> float | None:
    """Seconds since a heartbeat was written; None where there is none."""
    return None if heartbeat is None else heartbeat.age_s(clock)


def describe_state(heartbeat: Heartbeat | None, age_s: float | None) -> str:
    """The state of delivery, and when it is tried again."""
    if heartbeat is None or age_s is None:
        return "no delivery worker yet"
    retry = ""
    if heartbeat.state.retry_at_micros is not None:
        left_s = (heartbeat.state.retry_at_micros - heartbeat.at_micros) / 1e6 - age_s
        retry = f", next try in {max(0.0, left_s):,.0f} s"
    failing = ""
    if heartbeat.failing_since_micros is not None:
        failing_s = (heartbeat.at_micros - heartbeat.failing_since_micros) / 1e6 + age_s
        failing = f", failing for {format_duration(max(0.0, failing_s))}, since {format_time(heartbeat.failing_since_micros)}"
    silent = f"no heartbeat for {age_s:,.0f} s; last state " if age_s > HEARTBEAT_STALE_AFTER_S else ""
    return f"{silent}{heartbeat.state}{failing}{retry}"


def describe_worker(heartbeat: Heartbeat | None, age_s: float | None) -> str:
    """The process that delivers, or delivered last, and its state, in one line."""
    if heartbeat is None or age_s is None:
        return "no delivery worker yet"
    state = describe_state(heartbeat, age_s)
    delivered = counted(heartbeat.delivered, "event")
    return f"process {heartbeat.pid}, sink {heartbeat.sink}: {state}; {delivered} delivered"
