"""How a delivered file goes: the order in which things become durable before it does, and what happens where they cannot.

Quarantine and dead letters first, each written aside, synced and renamed over; then the ledger; then the unlink, or, where
delivered files are kept, the rename. Killed anywhere in between, the batch is sent again under the same ids, the same two files
are written over with the same content, and the ledger's entry is replaced: nothing is kept or counted twice.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.delivery.backoff import jitter
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.reconciliation import PurgedKind, SettledEntry
from pillarbox.store.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import Rules
    from pillarbox.delivery.shipment import Job
    from pillarbox.delivery.status import Standing
    from pillarbox.stats import DeliveryCounters
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.reader import DamagedRange

log = logging.getLogger("pillarbox")

GROUP_MAX: Final = 32  # files let go together: each holds a descriptor, and is sent again after a kill
GROUP_S: Final = 0.2  # how long a file waits for others to be let go with
_REMOVED_S: Final = 1.0  # how long a removal may wait for its sync: what power loss brings back is sent again
_HELD_S: Final = 10.0  # between two listings of what is set aside, while there is room
_FULL_S: Final = 1.0  # the same while there is none
_TELL_EVERY_S: Final = 10.0
_DISCARDING: Final = "what is set aside"


class DeadLetter(msgspec.Struct, frozen=True):
    """A well-formed record that the destination refuses for good; one line of a `dead-` file."""

    event: msgspec.Raw
    code: str
    reason: str
    sink: str
    index: int  # among the good records of the batch, from 0
    attempts: int
    first_at_micros: int
    last_at_micros: int


def keep_damaged(directory: Directory, batch: str, data: bytes, spans: Sequence[DamagedRange]) -> None:
    """Set damaged bytes aside, unchanged, with where they stood and why they are there."""
    index = b"[\n" + b",\n".join(msgspec.json.encode(span) for span in spans) + b"\n]\n"
    directory.write_atomically(layout.ranges_name(batch), index)
    directory.write_atomically(
        layout.corrupt_name(batch), b"".join(data[span.offset : span.offset + span.length] for span in spans)
    )


def keep_dead(directory: Directory, batch: str, dead: Mapping[int, DeadLetter]) -> None:
    """Set refused records aside, in the order in which they stood."""
    directory.write_atomically(
        layout.dead_name(batch), b"".join(msgspec.json.encode(dead[index]) + b"\n" for index in sorted(dead))
    )


class Callbacks(NamedTuple):
    """Whom to tell: of bytes that no longer wait, of how long a file took, of each dead letter once it is durable.

    Where another process delivers, the last is told there, and here how often the hook has raised. `on_shrunk` hears how many
    bytes compressing has saved.
    """

    on_gone: Callable[[int], None] = lambda _bytes: None
    on_duration: Callable[[float, str], None] = lambda _seconds, _sink: None  # of several sinks, which
    on_dead: Callable[[DeadLetter], None] = lambda _record: None
    on_hook_failures: Callable[[int], None] = lambda _count: None
    on_shrunk: Callable[[int], None] = lambda _bytes: None


NOBODY: Final = Callbacks()


class Kept(NamedTuple):
    """How much may be set aside, in bytes, and what happens beyond it."""

    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    discards: bool = False  # beyond the limits; otherwise the file concerned waits until somebody makes room
    keep_delivered_s: float | None = None  # for how long delivered files stay; None: they go
    max_delivered_bytes: int = 2**30  # of those: beyond it the first delivered go


class _Full(Exception):  # noqa: N818 - no error: the file waits
    """What would be set aside is more than may be; the message names the limit and the way out."""


KEPT: Final = Kept()


def shelf_for(directory: Directory, clock: Clock, kept: Kept) -> Retention | None:
    """Where delivered files stay, if they do."""
    return (
        None if kept.keep_delivered_s is None else Retention(directory, clock, kept.keep_delivered_s, kept.max_delivered_bytes)
    )


class Settler:
    """Lets delivered files go, in the order that the module describes; those of which something cannot be kept are parked.

    With a ledger, files are let go in groups: one sync of it answers for all of them. `on_gone(bytes)` is called for each file
    that is gone, `on_duration(seconds, sink)` likewise, `on_dead(record)` for each dead letter once it is durable.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        sink_name: str,
        rules: Rules,
        counters: DeliveryCounters,
        standing: Standing,
        kept: Kept,
        ledger: LedgerWriter | None,
        callbacks: Callbacks,
        *,
        groups: bool,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._sink_name = sink_name
        self._rules = rules
        self._counters = counters
        self._standing = standing
        self._kept = kept
        self._shelf = shelf_for(directory, clock, kept)
        self._ledger = ledger
        self._groups = groups  # whether several files may be let go together
        self._callbacks = callbacks
        self._group: list[Job] = []
        self._group_since = 0.0
        self._parked: dict[str, _Parked] = {}  # sent and not settled
        self._removed_since: float | None = None  # the first removal that is not synced yet
        self._held: dict[Kind, int] = {}  # bytes that are set aside, by kind
        self._held_at = -_HELD_S
        self._full_at = -_FULL_S
        self._told_at = -_TELL_EVERY_S
        self._told = (0, 0)
        self.failures_in_row = 0  # to settle: not the files are at fault then, but the disk
        self.settled = threading.Condition()  # notified after each group of settled files

    def settle(self, job: Job) -> None:
        """Make durable what is kept of a file, then let it go, at the latest with the next `finish`."""
        try:
            self._set_aside(job)
        except _Full as full:
            self._park(job, str(full), self._rules.recheck_s, full=True)
            return
        except Exception as error:  # noqa: BLE001 - a defect must not keep the file's lock for ever
            self._trouble(job, error)
            return
        if self._ledger is not None:
            self._ledger.add(
                SettledEntry(
                    self._clock.micros(),
                    job.id,
                    self._sink_name,
                    job.accepted,
                    job.duplicates,
                    len(job.dead),
                    len(job.spans),
                    len(job.dead) if "dead" in job.discards else 0,
                    len(job.spans) if "quarantine" in job.discards else 0,
                )
            )
        if not self._group:
            self._group_since = self._clock.monotonic()
        self._group.append(job)
        self.let_go_in_time()

    def let_go_in_time(self) -> None:
        """Let the group go once it is large or old enough."""
        if not self._groups or len(self._group) >= GROUP_MAX or self._clock.monotonic() - self._group_since >= GROUP_S:
            self.let_go()

    def let_go(self) -> None:
        """Remove the files of the group, or keep them as delivered, once the ledger has them."""
        group, self._group = self._group, []
        if group and self._ledger is not None:
            self._ledger.write(sync=True)  # without room it keeps the entries for later, and what makes room goes ahead
        for job in group:
            try:
                with self.settled:  # whoever sees that the file is gone finds it counted
                    waits_on = self._remove(job)
                    if self._removed_since is None:
                        self._removed_since = self._clock.monotonic()
                    self._count(job, waits_on=waits_on)
            except Exception as error:  # noqa: BLE001 - as above
                self._trouble(job, error)
                continue
            self._directory.filesystem.close(job.file.fd)
            self.failures_in_row = 0
            if self._parked.pop(job.name, None) is not None:
                self._standing.withdraw(job.name)
        if group:
            with self.settled:  # once for all: each time, who waits takes the interpreter
                self.settled.notify_all()
        if self._removed_since is not None and self._clock.monotonic() - self._removed_since >= _REMOVED_S:
            self.sync_removals()
        if self._shelf is not None:
            self._shelf.prune()

    def _remove(self, job: Job) -> bool:
        """Remove a file, or keep it as delivered; whether it waits on, for another sink."""
        with self._directory.release_lock:  # or of two threads that let go of the last names each would be the last
            if self._shelf is None or not self._shelf.retain(job.file):
                self._directory.remove(job.name)
            return self._directory.is_queued_elsewhere(job.file)

    def finish(self) -> None:
        """Let everything go, and have what is gone not come back with the power."""
        self.let_go()
        self.sync_removals()
        self._tell()

    def sync_removals(self) -> None:
        """Sync the names, where some were removed since the last time."""
        if self._removed_since is not None:
            self.sync_names()

    def sync_names(self) -> None:
        """Also before sending: a file whose sealed name the power takes away comes back as another batch."""
        self._removed_since = None
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            log.warning("%s: names are not synced, power loss may bring files back: %s", self._directory.path, error)

    # Files that are sent and cannot be settled.

    @property
    def has_parked(self) -> bool:
        """Whether some files are to be settled at another time."""
        return bool(self._parked)

    def is_parked(self, name: str) -> bool:
        """Whether this one is."""
        return name in self._parked

    @property
    def parked(self) -> Iterable[str]:
        """These files."""
        return self._parked

    def waiting(self, found: Iterable[str]) -> set[str]:
        """The files in `found` whose time to be sent again has not come; the others that are gone are forgotten."""
        if not self._parked:
            return {job.name for job in self._group}
        there, now = set(found), self._clock.monotonic()
        for name in [name for name in self._parked if name not in there]:
            del self._parked[name]
            self._standing.withdraw(name)
        due = [(name, parked) for name, parked in self._parked.items() if parked.full and parked.at <= now]
        if due:
            self._held, self._held_at = self._set_aside_bytes(""), now
        for name, parked in due:
            if self._exceeded(parked.needs) and not self._has_left_something(parked.needs.batch):
                self._parked[name] = parked._replace(at=now + self._rules.recheck_s)  # sent again only once there is room
        return {job.name for job in self._group} | {name for name, parked in self._parked.items() if parked.at > now}

    def _trouble(self, job: Job, error: Exception) -> None:
        """What is wrong may concern this file alone, and holds up no other."""
        if not isinstance(error, OSError):
            log.error("%s: a defect in Pillarbox or in a hook", job.name, exc_info=error)
        self.failures_in_row += 1
        before = self._parked.get(job.name)
        wait = self._rules.backoff.delay(1 if before is None else before.failures + 1, jitter())
        self._park(job, f"delivered, but what is kept of it cannot be written, or it cannot be removed: {error}", wait)

    def _park(self, job: Job, trouble: str, wait: float, *, full: bool = False) -> None:
        before = self._parked.get(job.name)
        failures = 1 if before is None else before.failures + 1
        self._parked[job.name] = _Parked(self._clock.monotonic() + wait, failures, _Needs.of(job), full)
        self._directory.filesystem.close(job.file.fd)
        self._counters.failed_flushes += 1
        if self._standing.complain(job.name, trouble):
            log.error("%s: %s", job.name, trouble)
        self._standing.well("draining")

    # What is kept.

    def _set_aside(self, job: Job) -> None:
        if not job.spans and not job.dead:
            return
        full = self._full(_Needs.of(job))
        if full and not self._kept.discards:
            raise _Full("; ".join(full.values()))
        if full:
            job.discards = set(full)
            if self._standing.complain(_DISCARDING, "; ".join(full.values())):
                log.error("%s: what cannot be kept is discarded: %s", job.id, "; ".join(full.values()))
        if job.spans and "quarantine" not in full:
            keep_damaged(self._directory, job.id, job.data, job.spans)
        if job.dead and "dead" not in full:
            keep_dead(self._directory, job.id, job.dead)
            for index in sorted(job.dead):
                self._callbacks.on_dead(job.dead[index])
        self._tell()

    def _full(self, needs: _Needs) -> dict[PurgedKind, str]:
        """Which kinds have no room for what a file is about to set aside, and how that is said."""
        moment = self._clock.monotonic()
        if moment - self._held_at >= _HELD_S:
            self._held, self._held_at = self._set_aside_bytes(""), moment
        # Somebody may have made room, and what an earlier try with this batch has left is written over.
        if self._exceeded(needs) and (moment - self._full_at >= _FULL_S or self._has_left_something(needs.batch)):
            self._held, self._held_at = self._set_aside_bytes(needs.batch), moment
            self._full_at = moment
        full = self._exceeded(needs)
        if not full or self._kept.discards:
            self._held[Kind.DEAD] += 0 if "dead" in full else needs.dead_bytes
            self._held[Kind.CORRUPT] += 0 if "quarantine" in full else needs.damaged_bytes
        return full

    def _exceeded(self, needs: _Needs) -> dict[PurgedKind, str]:
        """The limits that would be exceeded, as far as is known."""
        kept = self._kept
        limits: tuple[tuple[PurgedKind, Kind, int, int], ...] = (
            ("dead", Kind.DEAD, needs.dead_bytes, kept.max_dead_bytes),
            ("quarantine", Kind.CORRUPT, needs.damaged_bytes, kept.max_quarantine_bytes),
        )
        return {
            word: f"max_{word}_bytes = {limit} is reached; pillarbox {word} list shows what is kept, {word} purge removes it"
            for word, kind, size, limit in limits
            if size and self._held[kind] + size > limit
        }

    def _has_left_something(self, batch: str) -> bool:
        return any(self._directory.read_small_file(name) for name in (layout.dead_name(batch), layout.corrupt_name(batch)))

    def _set_aside_bytes(self, batch: str) -> dict[Kind, int]:
        """What is kept, but for what an earlier try with this batch has left: that is written over."""
        own = {layout.dead_name(batch), layout.corrupt_name(batch)}
        held = dict.fromkeys(Kind, 0)
        for name, size in self._directory.filesystem.list_files(self._directory.path):
            if name not in own:
                held[layout.kind_of(name)] += size
        return held

    def _count(self, job: Job, *, waits_on: bool) -> None:
        counters = self._counters
        counters.delivered += job.accepted
        counters.duplicates += job.duplicates
        counters.dead += len(job.dead)
        counters.quarantined += len(job.spans)
        counters.discarded += len(job.dead) if "dead" in job.discards else 0
        counters.discarded += len(job.spans) if "quarantine" in job.discards else 0
        counters.flushed_files += 1
        counters.flushed_bytes += job.stored
        # Not while it waits for another sink. Which of several compressed copies is the last one, the next listing shows.
        if self._directory.parent is None or not (waits_on or job.name.endswith(layout.COMPRESSED_SUFFIX)):
            self._callbacks.on_gone(job.stored)
        with contextlib.suppress(Exception):  # the application's metrics are not worth an event
            self._callbacks.on_duration(self._clock.monotonic() - job.started, self._directory.sink)

    def _tell(self) -> None:
        """A log line for what is set aside, but not for each batch."""
        counters, moment = self._counters, self._clock.monotonic()
        totals = (counters.dead, counters.quarantined)
        if totals != self._told and moment - self._told_at >= _TELL_EVERY_S:
            self._told, self._told_at = totals, moment
            log.warning("%s: %d dead letters and %d damaged lines set aside so far", self._sink_name, *totals)


class _Needs(NamedTuple):
    """The room that a batch takes where things are set aside."""

    batch: str
    dead_bytes: int
    damaged_bytes: int

    @classmethod
    def of(cls, job: Job) -> _Needs:
        dead = sum(len(msgspec.json.encode(letter)) + 1 for letter in job.dead.values())
        return cls(job.id, dead, sum(span.length for span in job.spans))


class _Parked(NamedTuple):
    """When to try again, and how often it was tried."""

    at: float  # monotonic seconds
    failures: int
    needs: _Needs
    full: bool  # there is no room to set aside what it needs
