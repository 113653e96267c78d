"""What can be seen of a directory from outside: listings and heartbeats. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pillarbox.delivery.lease import read_heartbeat
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S, Heartbeat
from pillarbox.errors import DirectoryUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of several destinations; bytes, numbers of files, seconds."""

    name: str
    waiting_bytes: int  # sealed, and not settled at this destination
    waiting_files: int
    oldest_age_s: float | None
    dead_files: int
    dead_bytes: int
    corrupt_files: int
    corrupt_bytes: int
    delivered_files: int
    delivered_bytes: int
    deliverer: Heartbeat | None
    deliverer_silent_s: float | None


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox status --json`; bytes, numbers of files, seconds."""

    directory: str
    pending_bytes: int
    pending_files: int
    active_files: int
    active_bytes: int
    sealed_files: int
    oldest_age_s: float | None
    corrupt_files: int
    corrupt_bytes: int
    dead_files: int
    dead_bytes: int
    delivered_files: int  # kept for a while
    delivered_bytes: int
    durability: str  # of the outbox that delivers, or where none does, as it is set here
    deliverer: Heartbeat | None
    deliverer_silent_s: float | None
    sinks: list[SinkStatus]  # empty where there is one destination


def _sealed_batches(directory: Directory) -> dict[str, int]:
    """Bytes by batch, whose file may be compressed meanwhile."""
    listing = directory.filesystem.list_files(directory.path)
    return {layout.batch_id(name): size for name, size in listing if layout.kind_of(name) is Kind.SEALED}


def read_status(directory: Directory, clock: Clock, durability: str) -> OutboxStatus:
    """How a directory stands now; raises `DirectoryUnusableError` where it cannot be listed."""
    try:
        queues = directory.queues()
        shared = _sealed_batches(directory) if queues else {}  # before the queues: what leaves it is in each of them by then
        sinks = [_sink_status(queue, shared, clock) for queue in queues]
        account = directory.disk_usage()
    except OSError as error:
        raise DirectoryUnusableError(
            directory.path, f"cannot be listed: {error.strerror}", "name an outbox directory"
        ) from None
    beat = read_heartbeat(directory)
    return OutboxStatus(
        directory=directory.path,
        pending_bytes=account.pending_bytes,
        pending_files=account.pending_files,
        active_files=account.active_files,
        active_bytes=account.active_bytes,
        sealed_files=account.sealed_files,
        oldest_age_s=_age_s(clock, account.oldest_sealed_at),
        corrupt_files=account.corrupt_files,
        corrupt_bytes=account.corrupt_bytes,
        dead_files=account.dead_files,
        dead_bytes=account.dead_bytes,
        delivered_files=account.delivered_files,
        delivered_bytes=account.delivered_bytes,
        durability=beat.durability if beat is not None and beat.durability else durability,
        deliverer=beat,
        deliverer_silent_s=heartbeat_age_s(beat, clock),
        sinks=sinks,
    )


def _sink_status(queue: Directory, shared: dict[str, int], clock: Clock) -> SinkStatus:
    own = queue.disk_usage()
    waiting = _sealed_batches(queue) | shared  # what is not yet in any queue waits for all of them
    stamps = [stamp for stamp in map(layout.sealed_at, waiting) if stamp is not None]
    beat = read_heartbeat(queue)
    return SinkStatus(
        name=queue.sink,
        waiting_bytes=sum(waiting.values()),
        waiting_files=len(waiting),
        oldest_age_s=_age_s(clock, min(stamps, default=None)),
        dead_files=own.dead_files,
        dead_bytes=own.dead_bytes,
        corrupt_files=own.corrupt_files,
        corrupt_bytes=own.corrupt_bytes,
        delivered_files=own.delivered_files,
        delivered_bytes=own.delivered_bytes,
        deliverer=beat,
        deliverer_silent_s=heartbeat_age_s(beat, clock),
    )


def _age_s(clock: Clock, stamp: int | None) -> float | None:
    return None if stamp is None else max(0.0, (clock.micros() - stamp) / 1e6)


def heartbeat_age_s(beat: Heartbeat | None, clock: Clock) -> float | None:
    """How long a deliverer has said nothing; None where there never was one."""
    return None if beat is None else max(0.0, (clock.micros() - beat.at_micros) / 1e6)


def describe_state(beat: Heartbeat | None, silent: float | None) -> str:
    """The state of a delivery, and when the destination is asked again."""
    if beat is None or silent is None:
        return "none so far"
    again = ""
    if beat.state.retry_at_micros is not None:
        left = (beat.state.retry_at_micros - beat.at_micros) / 1e6 - silent
        again = f", next try in {max(0.0, left):,.0f} s"
    gone = f"silent for {silent:,.0f} s (gone, or it hangs); it was " if silent > HEARTBEAT_STALE_AFTER_S else ""
    return f"{gone}{beat.state}{again}"


def describe_worker(beat: Heartbeat | None, silent: float | None) -> str:
    """Who delivers, or did, and how that goes, in a line."""
    if beat is None or silent is None:
        return "none so far"
    return f"process {beat.pid} to {beat.sink}, {describe_state(beat, silent)}; {beat.delivered:,} delivered"
