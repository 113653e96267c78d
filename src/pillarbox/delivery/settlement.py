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
from pillarbox.store.ledger_entries import PurgedKind, SettledEntry
from pillarbox.store.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import DeliveryConfig
    from pillarbox.delivery.request import BatchFile
    from pillarbox.delivery.status import StatusReporter
    from pillarbox.stats import DeliveryCounters
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.reader import DamagedRange

log = logging.getLogger("pillarbox")

GROUP_FILES_MAX: Final = 32  # files let go together: each holds a descriptor, and is sent again after a kill
GROUP_S: Final = 0.2  # how long a file waits for others to be let go with
_REMOVAL_SYNC_S: Final = 1.0  # how long a removal may wait for its sync: what power loss brings back is sent again
_MEASURE_EVERY_S: Final = 10.0  # between two listings of what is set aside, while there is room
_MEASURE_WHEN_FULL_S: Final = 1.0  # the same while there is none
_LOG_EVERY_S: Final = 10.0
_DISCARD_WARNING: Final = "what is set aside"


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


def write_quarantine(directory: Directory, batch: str, data: bytes, ranges: Sequence[DamagedRange]) -> None:
    """Set damaged bytes aside, unchanged, with where they stood and why they are there."""
    index = b"[\n" + b",\n".join(msgspec.json.encode(span) for span in ranges) + b"\n]\n"
    directory.write_atomically(layout.ranges_name(batch), index)
    directory.write_atomically(
        layout.corrupt_name(batch), b"".join(data[damaged.offset : damaged.offset + damaged.length] for damaged in ranges)
    )


def write_dead_letters(directory: Directory, batch: str, dead_letters: Mapping[int, DeadLetter]) -> None:
    """Set refused records aside, in the order in which they stood."""
    directory.write_atomically(
        layout.dead_name(batch), b"".join(msgspec.json.encode(dead_letters[index]) + b"\n" for index in sorted(dead_letters))
    )


class DeliveryCallbacks(NamedTuple):
    """Whom to tell: of bytes that no longer wait, of how long a file took, of each dead letter once it is durable.

    Where another process delivers, the last is told there, and here how often the hook has raised. `on_bytes_saved` hears how
    many bytes compressing has saved.
    """

    on_bytes_released: Callable[[int], None] = lambda _bytes: None
    on_duration: Callable[[float, str], None] = lambda _seconds, _sink: None  # of several sinks, which
    on_dead_letter: Callable[[DeadLetter], None] = lambda _record: None
    on_hook_failures: Callable[[int], None] = lambda _count: None
    on_bytes_saved: Callable[[int], None] = lambda _bytes: None


NO_CALLBACKS: Final = DeliveryCallbacks()


class SettlementLimits(NamedTuple):
    """How much may be set aside, in bytes, and what happens beyond it."""

    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    discard_when_full: bool = False  # beyond the limits; otherwise the file concerned waits until somebody makes room
    keep_delivered_s: float | None = None  # for how long delivered files stay; None: they go
    max_delivered_bytes: int = 2**30  # of those: beyond it the first delivered go


class _QuarantineFullError(Exception):
    """What would be set aside is more than may be; the message names the limit and the way out."""


DEFAULT_LIMITS: Final = SettlementLimits()


def retention_for(directory: Directory, clock: Clock, limits: SettlementLimits) -> Retention | None:
    """Where delivered files stay, if they do."""
    return (
        None
        if limits.keep_delivered_s is None
        else Retention(directory, clock, limits.keep_delivered_s, limits.max_delivered_bytes)
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
        config: DeliveryConfig,
        counters: DeliveryCounters,
        status: StatusReporter,
        limits: SettlementLimits,
        ledger: LedgerWriter | None,
        callbacks: DeliveryCallbacks,
        *,
        uses_groups: bool,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._sink_name = sink_name
        self._config = config
        self._counters = counters
        self._status = status
        self._limits = limits
        self._retention = retention_for(directory, clock, limits)
        self._ledger = ledger
        self._uses_groups = uses_groups  # whether several files may be let go together
        self._callbacks = callbacks
        self._group: list[BatchFile] = []
        self._group_started_s = 0.0
        self._held_files: dict[str, _HeldFile] = {}  # sent and not settled
        self._unsynced_since: float | None = None  # the first removal that is not synced yet
        self._used_bytes: dict[Kind, int] = {}  # bytes that are set aside, by kind
        self._measured_at = -_MEASURE_EVERY_S
        self._measured_full_at = -_MEASURE_WHEN_FULL_S
        self._logged_at = -_LOG_EVERY_S
        self._logged_totals = (0, 0)
        self.failures_in_row = 0  # to settle: not the files are at fault then, but the disk
        self.settlement_done = threading.Condition()  # notified after each group of settled files

    def settle_file(self, file: BatchFile) -> None:
        """Make durable what is kept of a file, then let it go, at the latest with the next `flush_all`."""
        try:
            self._write_rejects(file)
        except _QuarantineFullError as full:
            self._hold_file(file, str(full), self._config.recheck_s, full=True)
            return
        except Exception as error:  # noqa: BLE001 - a defect must not keep the file's lock for ever
            self._hold_failed(file, error)
            return
        if self._ledger is not None:
            self._ledger.add(
                SettledEntry(
                    self._clock.micros(),
                    file.batch_id,
                    self._sink_name,
                    file.accepted,
                    file.duplicates,
                    len(file.dead_letters),
                    len(file.damaged_ranges),
                    len(file.dead_letters) if "dead" in file.discarded_kinds else 0,
                    len(file.damaged_ranges) if "quarantine" in file.discarded_kinds else 0,
                )
            )
        if not self._group:
            self._group_started_s = self._clock.monotonic()
        self._group.append(file)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Let the group go once it is large or old enough."""
        if (
            not self._uses_groups
            or len(self._group) >= GROUP_FILES_MAX
            or self._clock.monotonic() - self._group_started_s >= GROUP_S
        ):
            self.flush_group()

    def flush_group(self) -> None:
        """Remove the files of the group, or keep them as delivered, once the ledger has them."""
        group, self._group = self._group, []
        if group and self._ledger is not None:
            self._ledger.write(sync=True)  # without room it keeps the entries for later, and what makes room goes ahead
        for file in group:
            try:
                with self.settlement_done:  # whoever sees that the file is gone finds it counted
                    has_other_links = self._remove_file(file)
                    if self._unsynced_since is None:
                        self._unsynced_since = self._clock.monotonic()
                    self._count_file(file, has_other_links=has_other_links)
            except Exception as error:  # noqa: BLE001 - as above
                self._hold_failed(file, error)
                continue
            self._directory.filesystem.close(file.locked_file.fd)
            self.failures_in_row = 0
            if self._held_files.pop(file.name, None) is not None:
                self._status.clear_warning(file.name)
        if group:
            with self.settlement_done:  # once for all: each time, who waits takes the interpreter
                self.settlement_done.notify_all()
        if self._unsynced_since is not None and self._clock.monotonic() - self._unsynced_since >= _REMOVAL_SYNC_S:
            self.sync_removals()
        if self._retention is not None:
            self._retention.prune()

    def _remove_file(self, file: BatchFile) -> bool:
        """Remove a file, or keep it as delivered; whether it waits on, for another sink."""
        with self._directory.release_lock:  # or of two threads that let go of the last names each would be the last
            if self._retention is None or not self._retention.retain(file.locked_file):
                self._directory.remove(file.name)
            return self._directory.is_queued_elsewhere(file.locked_file)

    def flush_all(self) -> None:
        """Let everything go, and have what is gone not come back with the power."""
        self.flush_group()
        self.sync_removals()
        self._log_totals()

    def sync_removals(self) -> None:
        """Sync the names, where some were removed since the last time."""
        if self._unsynced_since is not None:
            self.sync_names()

    def sync_names(self) -> None:
        """Also before sending: a file whose sealed name the power takes away comes back as another batch."""
        self._unsynced_since = None
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            log.warning("%s: names are not synced, power loss may bring files back: %s", self._directory.path, error)

    # Files that are sent and cannot be settled.

    @property
    def has_held_files(self) -> bool:
        """Whether some files are to be settled at another time."""
        return bool(self._held_files)

    def is_held(self, name: str) -> bool:
        """Whether this one is."""
        return name in self._held_files

    @property
    def held_names(self) -> Iterable[str]:
        """These files."""
        return self._held_files

    def unavailable(self, names: Iterable[str]) -> set[str]:
        """The files in `names` whose time to be sent again has not come; the others that are gone are forgotten."""
        if not self._held_files:
            return {job.name for job in self._group}
        there, now = set(names), self._clock.monotonic()
        for name in [name for name in self._held_files if name not in there]:
            del self._held_files[name]
            self._status.clear_warning(name)
        due = [(name, parked) for name, parked in self._held_files.items() if parked.needs_space and parked.retry_at_s <= now]
        if due:
            self._used_bytes, self._measured_at = self._measure_used_bytes(""), now
        for name, parked in due:
            if self._exceeded_limits(parked.required) and not self._has_earlier_files(parked.required.batch):
                self._held_files[name] = parked._replace(
                    retry_at_s=now + self._config.recheck_s
                )  # sent again only once there is room
        return {job.name for job in self._group} | {
            name for name, parked in self._held_files.items() if parked.retry_at_s > now
        }

    def _hold_failed(self, file: BatchFile, error: Exception) -> None:
        """What is wrong may concern this file alone, and holds up no other."""
        if not isinstance(error, OSError):
            log.error("%s: a defect in Pillarbox or in a hook", file.name, exc_info=error)
        self.failures_in_row += 1
        before = self._held_files.get(file.name)
        wait = self._config.backoff.delay(1 if before is None else before.failures + 1, jitter())
        self._hold_file(file, f"delivered, but what is kept of it cannot be written, or it cannot be removed: {error}", wait)

    def _hold_file(self, file: BatchFile, problem: str, wait: float, *, full: bool = False) -> None:
        before = self._held_files.get(file.name)
        failures = 1 if before is None else before.failures + 1
        self._held_files[file.name] = _HeldFile(self._clock.monotonic() + wait, failures, _RequiredSpace.for_file(file), full)
        self._directory.filesystem.close(file.locked_file.fd)
        self._counters.failed_flushes += 1
        if self._status.warn(file.name, problem):
            log.error("%s: %s", file.name, problem)
        self._status.set_healthy("draining")

    # What is kept.

    def _write_rejects(self, file: BatchFile) -> None:
        if not file.damaged_ranges and not file.dead_letters:
            return
        full = self._kinds_without_space(_RequiredSpace.for_file(file))
        if full and not self._limits.discard_when_full:
            raise _QuarantineFullError("; ".join(full.values()))
        if full:
            file.discarded_kinds = set(full)
            if self._status.warn(_DISCARD_WARNING, "; ".join(full.values())):
                log.error("%s: what cannot be kept is discarded: %s", file.batch_id, "; ".join(full.values()))
        if file.damaged_ranges and "quarantine" not in full:
            write_quarantine(self._directory, file.batch_id, file.data, file.damaged_ranges)
        if file.dead_letters and "dead" not in full:
            write_dead_letters(self._directory, file.batch_id, file.dead_letters)
            for index in sorted(file.dead_letters):
                self._callbacks.on_dead_letter(file.dead_letters[index])
        self._log_totals()

    def _kinds_without_space(self, required: _RequiredSpace) -> dict[PurgedKind, str]:
        """Which kinds have no room for what a file is about to set aside, and how that is said."""
        now_s = self._clock.monotonic()
        if now_s - self._measured_at >= _MEASURE_EVERY_S:
            self._used_bytes, self._measured_at = self._measure_used_bytes(""), now_s
        # Somebody may have made room, and what an earlier try with this batch has left is written over.
        if self._exceeded_limits(required) and (
            now_s - self._measured_full_at >= _MEASURE_WHEN_FULL_S or self._has_earlier_files(required.batch)
        ):
            self._used_bytes, self._measured_at = self._measure_used_bytes(required.batch), now_s
            self._measured_full_at = now_s
        full = self._exceeded_limits(required)
        if not full or self._limits.discard_when_full:
            self._used_bytes[Kind.DEAD] += 0 if "dead" in full else required.dead_letter_bytes
            self._used_bytes[Kind.CORRUPT] += 0 if "quarantine" in full else required.damaged_bytes
        return full

    def _exceeded_limits(self, required: _RequiredSpace) -> dict[PurgedKind, str]:
        """The limits that would be exceeded, as far as is known."""
        kept = self._limits
        limits: tuple[tuple[PurgedKind, Kind, int, int], ...] = (
            ("dead", Kind.DEAD, required.dead_letter_bytes, kept.max_dead_bytes),
            ("quarantine", Kind.CORRUPT, required.damaged_bytes, kept.max_quarantine_bytes),
        )
        return {
            word: f"max_{word}_bytes = {limit} is reached; pillarbox {word} list shows what is kept, {word} purge removes it"
            for word, kind, size, limit in limits
            if size and self._used_bytes[kind] + size > limit
        }

    def _has_earlier_files(self, batch: str) -> bool:
        return any(self._directory.read_small_file(name) for name in (layout.dead_name(batch), layout.corrupt_name(batch)))

    def _measure_used_bytes(self, batch: str) -> dict[Kind, int]:
        """What is kept, but for what an earlier try with this batch has left: that is written over."""
        own = {layout.dead_name(batch), layout.corrupt_name(batch)}
        used = dict.fromkeys(Kind, 0)
        for name, size in self._directory.filesystem.list_files(self._directory.path):
            if name not in own:
                used[layout.kind_of(name)] += size
        return used

    def _count_file(self, file: BatchFile, *, has_other_links: bool) -> None:
        counters = self._counters
        counters.delivered += file.accepted
        counters.duplicates += file.duplicates
        counters.dead += len(file.dead_letters)
        counters.quarantined += len(file.damaged_ranges)
        counters.discarded += len(file.dead_letters) if "dead" in file.discarded_kinds else 0
        counters.discarded += len(file.damaged_ranges) if "quarantine" in file.discarded_kinds else 0
        counters.flushed_files += 1
        counters.flushed_bytes += file.stored_bytes
        # Not while it waits for another sink. Which of several compressed copies is the last one, the next listing shows.
        if self._directory.parent is None or not (has_other_links or file.name.endswith(layout.COMPRESSED_SUFFIX)):
            self._callbacks.on_bytes_released(file.stored_bytes)
        with contextlib.suppress(Exception):  # the application's metrics are not worth an event
            self._callbacks.on_duration(self._clock.monotonic() - file.started_s, self._directory.sink)

    def _log_totals(self) -> None:
        """A log line for what is set aside, but not for each batch."""
        counters, now_s = self._counters, self._clock.monotonic()
        totals = (counters.dead, counters.quarantined)
        if totals != self._logged_totals and now_s - self._logged_at >= _LOG_EVERY_S:
            self._logged_totals, self._logged_at = totals, now_s
            log.warning("%s: %d dead letters and %d damaged lines set aside so far", self._sink_name, *totals)


class _RequiredSpace(NamedTuple):
    """The room that a batch takes where things are set aside."""

    batch: str
    dead_letter_bytes: int
    damaged_bytes: int

    @classmethod
    def for_file(cls, file: BatchFile) -> _RequiredSpace:
        dead = sum(len(msgspec.json.encode(letter)) + 1 for letter in file.dead_letters.values())
        return cls(file.batch_id, dead, sum(span.length for span in file.damaged_ranges))


class _HeldFile(NamedTuple):
    """When to try again, and how often it was tried."""

    retry_at_s: float  # monotonic seconds
    failures: int
    required: _RequiredSpace
    needs_space: bool  # there is no room to set aside what it needs
