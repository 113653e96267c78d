"""What `pillarbox status` and the exporters show of an outbox, from directory listings and heartbeats.

Reading the status takes no lock, and creates and changes no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pillarbox.admin.text import counted
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S, Heartbeat, read_heartbeat
from pillarbox.errors import DirectoryUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One sink of an outbox with several sinks."""

    name: str  # name of the sink
    backlog_bytes: int  # bytes of batches that this sink has not delivered yet
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


def read_status(directory: Directory, clock: Clock, durability: str) -> OutboxStatus:
    """Read the status of an outbox directory.

    Args:
        directory: The outbox directory, or a sink's queue.
        clock: For the ages.
        durability: The durability of the settings, for an outbox whose heartbeat does not tell it.

    Raises:
        DirectoryUnusableError: The directory cannot be listed.
    """
    try:
        queues = directory.queues()
        # Listed before the queues: a batch that is fanned out in between is then in each queue.
        shared = _sealed_batches(directory) if queues else {}
        sinks = [_sink_status(queue, shared, clock) for queue in queues]
        usage = directory.disk_usage()
    except OSError as error:
        problem = f"cannot be listed: {error.strerror}"
        raise DirectoryUnusableError(directory.path, problem, "name an outbox directory") from None
    heartbeat = read_heartbeat(directory)
    return OutboxStatus(
        directory=directory.path,
        pending_bytes=usage.pending_bytes,
        pending_files=usage.pending_files,
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


def _sink_status(queue: Directory, shared: dict[str, int], clock: Clock) -> SinkStatus:
    usage = queue.disk_usage()
    backlog = _sealed_batches(queue) | shared  # every sink still has to deliver what has not been fanned out
    stamps = [stamp for stamp in map(layout.sealed_at, backlog) if stamp is not None]
    heartbeat = read_heartbeat(queue)
    return SinkStatus(
        name=queue.sink,
        backlog_bytes=sum(backlog.values()),
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
    silent = f"no heartbeat for {age_s:,.0f} s; last state " if age_s > HEARTBEAT_STALE_AFTER_S else ""
    return f"{silent}{heartbeat.state}{retry}"


def describe_worker(heartbeat: Heartbeat | None, age_s: float | None) -> str:
    """The process that delivers, or delivered last, and its state, in one line."""
    if heartbeat is None or age_s is None:
        return "no delivery worker yet"
    state = describe_state(heartbeat, age_s)
    delivered = counted(heartbeat.delivered, "event")
    return f"process {heartbeat.pid}, sink {heartbeat.sink}: {state}; {delivered} delivered"
