"""Settlement: the durable bookkeeping of a delivered batch, before its file is deleted.

The order is: dead letters and damaged bytes, each written to a temporary file, synced and renamed; then the ledger entry,
synced; then the file is deleted, or renamed if delivered batches are retained. If the process is killed in between, the batch
is sent again under the same ids. The same files are then written again with the same content, and the ledger entry is
replaced: nothing is stored or counted twice.

A file that cannot be settled is held: its lock is released, and it is sent and settled again later. The others do not wait.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.delivery.config import jitter
from pillarbox.delivery.rejects import FileRejects, RequiredSpace, encode_index, encode_letters, quarantine_bytes
from pillarbox.errors import FileUnusableError, PicklableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LOCKED_PROBLEM, LedgerWrite
from pillarbox.store.ledger_entries import PurgedKind, SettledEntry
from pillarbox.store.retention import Retention
from pillarbox.store.state_log import StateLog
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pillarbox.clock import Clock
    from pillarbox.delivery.batch import DeliveredFile, SentBatch
    from pillarbox.delivery.config import SettlementLimits
    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.dead_letter import DeadLetter
    from pillarbox.delivery.retry import PoisonTracker
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.reader import DamagedRange
    from pillarbox.store.windows import Window

log = logging.getLogger("pillarbox")

GROUP_FILES_MAX: Final = 32  # files settled with one sync: each holds a descriptor, and is sent again after a kill
GROUP_S: Final = 0.2  # how long a file waits for others that are settled with it
_REMOVAL_SYNC_S: Final = 1.0  # how long a deletion may stay unsynced; a file that a power loss brings back is sent again
_MEASURE_EVERY_S: Final = 10.0  # between two listings of dead letters and quarantine, while there is space
_MEASURE_WHEN_FULL_S: Final = 1.0  # the same while there is none
_LOG_EVERY_S: Final = 10.0
_DISCARD_WARNING: Final = "discarding"  # the subject of the warning


def write_quarantine(directory: Directory, batch: str, data: bytes, ranges: Sequence[DamagedRange]) -> None:
    """Store damaged bytes unchanged, with their byte ranges and what is wrong with each."""
    damaged_bytes = b"".join(data[damaged.offset : damaged.offset + damaged.length] for damaged in ranges)
    directory.write_atomically(layout.ranges_name(batch), encode_index(ranges))
    directory.write_atomically(layout.corrupt_name(batch), damaged_bytes)


def write_dead_letters(directory: Directory, batch: str, dead_letters: Mapping[int, DeadLetter]) -> None:
    """Store rejected records, in the order of the batch."""
    directory.write_atomically(layout.dead_name(batch), encode_letters(dead_letters))


class DeliveryCallbacks(NamedTuple):
    """Functions through which delivery reports to the outbox or the command that started it."""

    on_bytes_released: Callable[[int], None] = lambda _bytes: None  # of a file that no longer waits
    on_duration: Callable[[float, str], None] = lambda _seconds, _sink: None  # from reading a file to its settlement
    on_dead_letter: Callable[[DeadLetter], None] = lambda _letter: (
        None
    )  # once it is durable; in a child process if that delivers
    on_hook_failures: Callable[[int], None] = lambda _count: None  # how often the child process's `on_dead_letter` hook raised
    on_bytes_saved: Callable[[int], None] = lambda _bytes: None  # by compressing a batch
    is_busy: Callable[[], bool] = lambda: False  # whether the application stores events, and so waits for the GIL


NO_CALLBACKS: Final = DeliveryCallbacks()


class QuarantineFullError(PicklableError):
    """Dead letters or damaged bytes would exceed a limit; the message names the limit and what to do."""

    def __init__(self, reasons: str, required: RequiredSpace) -> None:
        super().__init__(reasons)
        self.required = required


def retention_for(directory: Directory, clock: Clock, limits: SettlementLimits) -> Retention | None:
    """Build the `Retention` of delivered batches; None if they are deleted at once."""
    if limits.keep_delivered_s is None:
        return None
    return Retention(directory, clock, limits.keep_delivered_s, limits.max_delivered_bytes)


class Settler:
    """Settles delivered files in the order that the docstring of the module describes, and holds those that cannot be settled.

    With a ledger, files are settled in groups: one sync of it answers for all of them.
    """

    def __init__(
        self,
        context: DeliveryContext,
        poison_tracker: PoisonTracker,
        ledger: LedgerWriter | None,
        callbacks: DeliveryCallbacks,
    ) -> None:
        self._directory = context.directory
        self._clock = context.clock
        self._sink_name = context.sink_name
        self._config = context.config
        self._limits = context.config.limits
        self._counters = context.counters
        self._status = context.status
        self._poison_tracker = poison_tracker
        self._retention = retention_for(context.directory, context.clock, context.config.limits)
        self._ledger = ledger
        # After a kill a whole group is sent again, which is harmless only if the destination deduplicates.
        self._uses_groups = ledger is not None and context.sink.capabilities.deduplicates_by != "nothing"
        self._callbacks = callbacks
        self._group: list[_Settling] = []
        self._group_started_s = 0.0
        self._held_files: dict[str, _HeldFile] = {}  # sent and not settled
        self._unsynced_since: float | None = None  # time of the first deletion that is not synced yet
        self._used_bytes: dict[Kind, int] = {}  # of dead letters and quarantine
        # what is written of files that are being sent in windows, by batch id; not among the used bytes until they are settled
        self._in_progress: dict[str, RequiredSpace] = {}
        self._measured_at = -_MEASURE_EVERY_S
        self._measured_full_at = -_MEASURE_WHEN_FULL_S
        self._sync_log = StateLog(context.clock)
        self._held_log = StateLog(context.clock)
        self._discard_log = StateLog(context.clock)
        self._logged_at = -_LOG_EVERY_S
        self._logged_totals = (0, 0)
        self.waits_for_ledger = False  # the group waits until another process releases `ledger.lock`; nothing more is sent
        self.failures_in_row = 0  # several in a row are a fault of the disk, not of the files
        self.settlement_done = threads.Condition()  # notified after each group of settled files

    def settle_batch(self, sent: SentBatch) -> None:
        """Settle the files of a batch that needs no confirmation any more. Removes each from the batch first."""
        while sent.files:
            delivered = sent.files.pop(0)  # from here on the settler must close the file
            self._poison_tracker.forget_batch(delivered.file.name)
            self._settle_file(delivered)

    def _settle_file(self, delivered: DeliveredFile) -> None:
        """Store the dead letters and damaged bytes of a file, then add it to the group."""
        try:
            discarded = self._directory.with_room(lambda: self._write_rejects(delivered), lambda: delivered.rejects is None)
        except QuarantineFullError as full:
            self.hold_without_space(delivered, full)
            return
        except Exception as error:  # noqa: BLE001 - a defect must not keep the file locked forever
            self.hold_failed(delivered, error)
            return
        settling = _Settling(delivered, discarded)
        if self._ledger is not None:
            self._ledger.add(settling.ledger_entry(self._clock.micros(), self._sink_name))
        if not self._group:
            self._group_started_s = self._clock.monotonic()
        self._group.append(settling)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Settle the group once it is large or old enough."""
        is_full = not self._uses_groups or len(self._group) >= GROUP_FILES_MAX
        if is_full or self._clock.monotonic() - self._group_started_s >= GROUP_S:
            self.flush_group()

    def flush_group(self) -> None:
        """Write the group's ledger entries, then delete or retain its files.

        While another process holds the ledger's lock, the group waits: see `waits_for_ledger`.
        """
        group, self._group = self._group, []
        is_rejected = False  # the disk is full: entries wait in memory until a deletion frees space
        try:
            if self._ledger is not None and (group or self._ledger.problem):
                outcome = self._write_ledger(self._ledger)
                is_rejected = outcome is LedgerWrite.REFUSED
                self.waits_for_ledger = bool(group) and outcome is LedgerWrite.LOCKED
        except Exception as error:  # noqa: BLE001 - a defect must not keep the files locked forever
            while group:
                self.hold_failed(group.pop().delivered, error)
        if self.waits_for_ledger:
            self._group = group + self._group
            return
        for settling in group:
            file = settling.delivered.file
            try:
                with self.settlement_done.lock:  # counted before the deletion: nobody sees the file gone and not counted
                    has_other_links = self._remove_file(file.locked_file)
                    if self._unsynced_since is None:
                        self._unsynced_since = self._clock.monotonic()
                    self._count_file(settling, has_other_links=has_other_links)
            except Exception as error:  # noqa: BLE001 - as above
                self.hold_failed(settling.delivered, error)
                continue
            self._directory.filesystem.close(file.locked_file.fd)
            self.failures_in_row = 0
            if self._held_files.pop(file.name, None) is not None:
                self._status.clear_warning(file.name)
            if is_rejected and self._ledger is not None:  # a kill would lose the entries that wait
                is_rejected = self._write_ledger(self._ledger) is LedgerWrite.REFUSED
        if group:
            with self.settlement_done.lock:  # once for the group: each notification can give the GIL to a waiting thread
                self.settlement_done.notify_all()
        if self._unsynced_since is not None and self._clock.monotonic() - self._unsynced_since >= _REMOVAL_SYNC_S:
            self.sync_removals()
        if self._retention is not None:
            self._retention.prune()

    def _remove_file(self, locked_file: LockedFile) -> bool:
        """Delete a file, or retain it; return whether it still waits for another sink."""
        with self._directory.release_lock:  # or of two threads that remove the last two links, both would be the last
            if self._retention is None or not self._retention.retain(locked_file):
                self._directory.remove(locked_file.name)
            return self._directory.is_queued_elsewhere(locked_file)

    def _write_ledger(self, ledger: LedgerWriter) -> LedgerWrite:
        """Write what is buffered, and show in the state whether that fails."""
        outcome = ledger.write(sync=True)
        if ledger.problem:
            self._status.warn(layout.LEDGER, ledger.problem)
        else:
            self._status.clear_warning(layout.LEDGER)
        return outcome

    def abandon_group(self) -> None:
        """Release the files of a group that still waits for the ledger at the end. They stay on disk, and are sent again."""
        group, self._group, self.waits_for_ledger = self._group, [], False
        for settling in group:
            settling.delivered.close(self._directory.filesystem)
        if group:
            files = "1 delivered batch stays" if len(group) == 1 else f"{len(group)} delivered batches stay"
            advice = "the next delivery worker sends them again, under the same batch ids"
            log.error("%s: %s on disk, because %s; %s", self._directory.path, files, LOCKED_PROBLEM, advice)

    def flush_all(self) -> None:
        """Settle the group and make the deletions durable."""
        self.flush_group()
        self.sync_removals()
        self._log_totals()

    def sync_removals(self) -> None:
        """Sync the directory if files were deleted since the last sync."""
        if self._unsynced_since is not None:
            self.sync_names()

    def sync_names(self) -> None:
        """Sync the directory. Also called before sending: a batch whose name a power loss removes would get another id."""
        self._unsynced_since = None
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            path = self._directory.path
            if self._sync_log.is_new_problem(str(error)):
                log.warning(
                    "%s: directory fsync failed (%s); a power loss may undo the last renames and deletions", path, error
                )
        else:
            self._sync_log.is_over()

    # Files that are sent and cannot be settled.

    @property
    def has_held_files(self) -> bool:
        """Whether any file is held."""
        return bool(self._held_files)

    def is_held(self, name: str) -> bool:
        """Whether a file is held."""
        return name in self._held_files

    @property
    def held_names(self) -> Iterable[str]:
        """The files that are held."""
        return self._held_files

    def unavailable(self, existing: Iterable[str]) -> set[str]:
        """The files that must not be sent now: those in the group, and held ones that are not due yet.

        Held files that are not among the `existing` ones are forgotten.
        """
        settling = {settling.delivered.file.name for settling in self._group}
        if not self._held_files:
            return settling
        names, now = set(existing), self._clock.monotonic()
        for name in [name for name in self._held_files if name not in names]:
            del self._held_files[name]
            self._status.clear_warning(name)
        due = [(name, held) for name, held in self._held_files.items() if held.needs_space and held.retry_at_s <= now]
        if due:
            self._used_bytes, self._measured_at = self._measure_used_bytes(""), now
        for name, held in due:
            if self._exceeded_limits(held.required) and not self._has_earlier_files(held.required.batch):
                self._held_files[name] = held._replace(retry_at_s=now + self._config.recheck_s)  # not sent without space
        return settling | {name for name, held in self._held_files.items() if held.retry_at_s > now}

    def hold_failed(self, delivered: DeliveredFile, error: Exception) -> None:
        """Hold a file after an error, which may concern only this file."""
        name = delivered.file.name
        if delivered.rejects is not None and isinstance(error, OSError):
            self._directory.make_room(error)  # for the next attempt
        if not isinstance(error, (OSError, FileUnusableError, MemoryError)):
            log.error("%s: a defect in Pillarbox or in a hook", name, exc_info=error)
        self.failures_in_row += 1
        before = self._held_files.get(name)
        wait = self._config.backoff.delay(1 if before is None else before.failures + 1, jitter())
        problem = f"delivered, but its dead letters or damaged bytes could not be written, or its file not deleted: {error}"
        self._hold_file(delivered, problem, wait, needs_space=False)

    def hold_without_space(self, delivered: DeliveredFile, full: QuarantineFullError) -> None:
        """Hold a file for whose dead letters or damaged bytes there is no space."""
        self._hold_file(delivered, str(full), self._config.recheck_s, needs_space=True, required=full.required)

    def _hold_file(
        self, delivered: DeliveredFile, problem: str, wait: float, *, needs_space: bool, required: RequiredSpace | None = None
    ) -> None:
        name = delivered.file.name
        before = self._held_files.get(name)
        failures = 1 if before is None else before.failures + 1
        retry_at_s = self._clock.monotonic() + wait
        self._held_files[name] = _HeldFile(retry_at_s, failures, required or _required_space(delivered), needs_space)
        self._in_progress.pop(delivered.file.batch_id, None)
        delivered.close(self._directory.filesystem)
        self._counters.failed_flushes += 1
        self._status.warn(name, problem)
        if self._held_log.is_new_problem(problem):
            log.error("%s: %s", name, problem)
        self._status.set_healthy("draining")

    # Dead letters and quarantine.

    def _write_rejects(self, delivered: DeliveredFile) -> set[PurgedKind]:
        """Write a file's dead letters and damaged bytes; return the kinds that are discarded for lack of space."""
        if delivered.rejects is not None:
            return self._publish_rejects(delivered.rejects)
        file = delivered.file
        if not file.damaged_ranges and not delivered.dead_letters:
            return set()
        required = _required_space(delivered)
        full = self._check_space(required)
        self._count_as_used(required, full)
        if file.damaged_ranges and "quarantine" not in full:
            write_quarantine(self._directory, file.batch_id, file.data, file.damaged_ranges)
        if delivered.dead_letters and "dead" not in full:
            write_dead_letters(self._directory, file.batch_id, delivered.dead_letters)
            for index in sorted(delivered.dead_letters):
                self._callbacks.on_dead_letter(delivered.dead_letters[index])
        self._log_totals()
        return set(full)

    def write_window(self, rejects: FileRejects, window: Window, dead_letters: Mapping[int, DeadLetter]) -> None:
        """Write the dead letters and damaged bytes of a window, until the whole file is settled.

        Raises `QuarantineFullError` where there is no space for them, and `OSError`.
        """
        if not window.contents.damaged and not dead_letters:
            return
        required = rejects.required_with(window, dead_letters)
        for kind in self._check_space(required):
            rejects.discard(kind)
        rejects.add_window(window, dead_letters)
        self._in_progress[required.batch] = rejects.required

    def _publish_rejects(self, rejects: FileRejects) -> set[PurgedKind]:
        """Rename the files that `write_window` wrote to their names. Returns the kinds discarded for lack of space."""
        if not rejects.dead_letters and not rejects.damaged_ranges:
            return set()
        rejects.publish()
        self._count_as_used(rejects.required, rejects.discarded)
        self._in_progress.pop(rejects.required.batch, None)
        for letter in rejects.published_letters():
            self._callbacks.on_dead_letter(letter)
        self._log_totals()
        return set(rejects.discarded)

    def abandon_rejects(self, rejects: FileRejects) -> None:
        """Remove the files that `write_window` wrote: the batch is sent again from its beginning."""
        self._in_progress.pop(rejects.required.batch, None)
        rejects.abandon()

    def _check_space(self, required: RequiredSpace) -> set[PurgedKind]:
        """The kinds to discard because there is no space for them. Raises `QuarantineFullError` where they must be kept."""
        full = self._kinds_without_space(required)
        reasons = "; ".join(full.values())
        if full and not self._limits.discard_when_full:
            raise QuarantineFullError(reasons, required)
        if full:
            self._status.warn(_DISCARD_WARNING, reasons)
        if full and self._discard_log.is_new_problem(reasons):
            log.error("%s: discarding rejected or damaged records for lack of space: %s", required.batch, reasons)
        return set(full)

    def _kinds_without_space(self, required: RequiredSpace) -> dict[PurgedKind, str]:
        """The kinds of records that lack space for a file, with a message for each."""
        now_s = self._clock.monotonic()
        if now_s - self._measured_at >= _MEASURE_EVERY_S:
            self._used_bytes, self._measured_at = self._measure_used_bytes(""), now_s
        # Measure again: somebody may have freed space, and the files of an earlier attempt with this batch are overwritten.
        if self._exceeded_limits(required) and (
            now_s - self._measured_full_at >= _MEASURE_WHEN_FULL_S or self._has_earlier_files(required.batch)
        ):
            self._used_bytes, self._measured_at = self._measure_used_bytes(required.batch), now_s
            self._measured_full_at = now_s
        return self._exceeded_limits(required)

    def _count_as_used(self, required: RequiredSpace, discarded: set[PurgedKind]) -> None:
        self._used_bytes[Kind.DEAD] += 0 if "dead" in discarded else required.dead_letter_bytes
        self._used_bytes[Kind.CORRUPT] += 0 if "quarantine" in discarded else required.damaged_bytes

    def _exceeded_limits(self, required: RequiredSpace) -> dict[PurgedKind, str]:
        """The limits that a file would exceed, going by the last measurement."""
        limits: tuple[tuple[PurgedKind, Kind, int, int], ...] = (
            ("dead", Kind.DEAD, required.dead_letter_bytes, self._limits.max_dead_bytes),
            ("quarantine", Kind.CORRUPT, required.damaged_bytes, self._limits.max_quarantine_bytes),
        )
        others = [in_progress for batch, in_progress in self._in_progress.items() if batch != required.batch]
        in_progress_bytes = {
            Kind.DEAD: sum(other.dead_letter_bytes for other in others),
            Kind.CORRUPT: sum(other.damaged_bytes for other in others),
        }
        return {
            word: f"max_{word}_bytes = {limit} is reached; see pillarbox {word} list, free space with pillarbox {word} purge"
            for word, kind, size, limit in limits
            if size and self._used_bytes[kind] + in_progress_bytes[kind] + size > limit
        }

    def _has_earlier_files(self, batch: str) -> bool:
        return any(self._directory.read_small_file(name, 1) for name in (layout.dead_name(batch), layout.corrupt_name(batch)))

    def _measure_used_bytes(self, batch: str) -> dict[Kind, int]:
        """Bytes by kind of file, without those of an earlier attempt with this batch, which are overwritten."""
        own = {layout.dead_name(batch), layout.corrupt_name(batch), layout.ranges_name(batch)}
        used = dict.fromkeys(Kind, 0)
        for name, size in self._directory.filesystem.list_files(self._directory.path):
            if name not in own:
                kind = layout.kind_of(name)
                used[Kind.CORRUPT if kind is Kind.RANGES else kind] += size  # the index of damaged bytes takes space too
        return used

    def _count_file(self, settling: _Settling, *, has_other_links: bool) -> None:
        counters, delivered, file = self._counters, settling.delivered, settling.delivered.file
        counters.delivered += delivered.accepted
        counters.duplicates += delivered.duplicates
        counters.dead += delivered.dead_count
        counters.quarantined += delivered.damaged_count
        counters.discarded += settling.discarded_dead_letters + settling.discarded_ranges
        counters.flushed_files += 1
        counters.flushed_bytes += file.stored_bytes
        # A file that waits for another sink is not released. If there are several compressed copies, only a listing shows which
        # is the last one.
        if self._directory.parent is None or not (has_other_links or file.name.endswith(layout.COMPRESSED_SUFFIX)):
            self._callbacks.on_bytes_released(file.stored_bytes)
        with contextlib.suppress(Exception):  # an error in a metric must not affect an event
            self._callbacks.on_duration(self._clock.monotonic() - file.started_s, self._directory.sink)

    def _log_totals(self) -> None:
        """Log the totals of dead letters and quarantine, but not for each batch."""
        counters, now_s = self._counters, self._clock.monotonic()
        totals = (counters.dead, counters.quarantined)
        if totals != self._logged_totals and now_s - self._logged_at >= _LOG_EVERY_S:
            self._logged_totals, self._logged_at = totals, now_s
            log.warning("%s: %d dead-lettered, %d quarantined so far", self._sink_name, *totals)


class _Settling(NamedTuple):
    """A delivered file whose dead letters and damaged bytes are durable, and the numbers of discarded ones."""

    delivered: DeliveredFile
    discarded: set[PurgedKind]

    @property
    def discarded_dead_letters(self) -> int:
        return self.delivered.dead_count if "dead" in self.discarded else 0

    @property
    def discarded_ranges(self) -> int:
        return self.delivered.damaged_count if "quarantine" in self.discarded else 0

    def ledger_entry(self, now_micros: int, sink_name: str) -> SettledEntry:
        delivered = self.delivered
        return SettledEntry(
            now_micros,
            delivered.file.batch_id,
            sink_name,
            delivered.accepted,
            delivered.duplicates,
            delivered.dead_count,
            delivered.damaged_count,
            self.discarded_dead_letters,
            self.discarded_ranges,
        )


def _required_space(delivered: DeliveredFile) -> RequiredSpace:
    if delivered.rejects is not None:
        return delivered.rejects.required
    dead_letter_bytes = len(encode_letters(delivered.dead_letters))
    return RequiredSpace(delivered.file.batch_id, dead_letter_bytes, quarantine_bytes(delivered.file.damaged_ranges))


class _HeldFile(NamedTuple):
    """When to send and settle a file again, and how often settling it has failed."""

    retry_at_s: float  # monotonic seconds
    failures: int
    required: RequiredSpace
    needs_space: bool  # it waits for space for its dead letters or damaged bytes
