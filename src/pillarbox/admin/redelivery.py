"""Redelivery: delivering retained batches again, to a destination that lost what it had acknowledged.

One rename makes a retained file a pending batch with a new id and the same events; the delivery worker does the rest. Then the
directory is fsynced, and then the ledger is written. If the process is killed anywhere, each file is either retained or
pending; if the ledger lacks an entry for a pending one, only its count of redelivered events is too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin.scan import FileProblem, try_count_records
from pillarbox.store import layout
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import RedeliveredEntry
from pillarbox.store.quota import SLACK_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_GROUP_FILES_MAX: Final = 100  # files that share an fsync and a write of the ledger


class RetainedFile(NamedTuple):
    """A delivered batch that is retained."""

    sink: str  # name of the sink that retained it; "" with a single sink
    name: str
    size: int  # bytes

    @property
    def batch(self) -> str:
        """The id of the batch when it was delivered."""
        return layout.batch_id(self.name)


class PendingLimits(NamedTuple):
    """How much may be pending in the directory."""

    max_bytes: int
    max_files: int


class Redelivery:
    """Selects retained files and makes them pending. Files that must stay are added to the report.

    Args:
        directory: The outbox directory, whose limits count.
        queues: The directories of the retained files by sink name; with a single sink the outbox directory, under "".
        clock: The clock for ledger entries.
        record_filter: Selects batches by id and by the time of their delivery.
        report: Receives what was changed and what was not.
        on_file: Called with each file, its number of events, and its new batch id; None in a preview.
    """

    def __init__(
        self,
        directory: Directory,
        queues: Mapping[str, Directory],
        clock: Clock,
        record_filter: RecordFilter,
        report: ChangeReport,
        on_file: Callable[[RetainedFile, int, str | None], None],
    ) -> None:
        self._directory = directory
        self._queues = queues
        self._clock = clock
        self._filter = record_filter
        self._report = report
        self._on_file = on_file
        files = [RetainedFile(sink, file.name, file.size) for sink, queue in queues.items() for file in queue.delivered_files()]
        delivery_times = [at for file in files if (at := layout.delivered_at(file.name)) is not None]
        self.retained_count = len(files)
        self.oldest_delivered_at_micros = min(delivery_times, default=None)
        selected = (file for file in files if self._is_selected(file))
        # In the order in which the batches were sealed.
        self.selected = sorted(selected, key=lambda file: (file.sink, layout.sealed_at(file.name) or 0, file.name))

    def _is_selected(self, file: RetainedFile) -> bool:
        return self._filter.matches_batch(file.batch) and self._filter.matches_time(layout.delivered_at(file.name))

    def preview(self, on_progress: Callable[[int], None]) -> None:
        """Count what would be redelivered, and change nothing."""
        for file in self.selected:
            events = self._event_count(file)
            if events is not None:
                self._add_to_report(file, events, None)
                on_progress(events)

    def execute(self, limits: PendingLimits, should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> None:
        """Make the selected files pending, as far as the limits allow.

        Args:
            limits: How much may be pending.
            should_stop: Called between groups of files; once it returns True, no further group is started.
            on_progress: Called with the number of events of each file.
        """
        for queue in self._queues.values():
            queue.seal_after(queue.disk_usage().newest_sealed_at)
        for group in self._groups():
            self._report.interrupted = self._report.interrupted or should_stop()
            if self._report.interrupted:
                return
            self._redeliver(self._that_fit(group, limits), on_progress)
            if self._report.drop_reason:
                return

    def _groups(self) -> Iterator[list[RetainedFile]]:
        for sink in self._queues:
            files = [file for file in self.selected if file.sink == sink]
            for start in range(0, len(files), _GROUP_FILES_MAX):
                yield files[start : start + _GROUP_FILES_MAX]

    def _that_fit(self, group: list[RetainedFile], limits: PendingLimits) -> list[RetainedFile]:
        """The files that fit into the limits with room to spare, so that new events are not dropped or evicted for them."""
        usage = self._directory.disk_usage()
        bytes_left = limits.max_bytes - limits.max_bytes // SLACK_SHARE - usage.pending_bytes
        files_left = limits.max_files - limits.max_files // SLACK_SHARE - usage.pending_files
        for number, file in enumerate(group):
            bytes_left -= file.size
            if bytes_left < 0 or number >= files_left:
                self._report.drop_reason = "max_bytes" if bytes_left < 0 else "max_files"
                return group[:number]
        return group

    def _redeliver(self, group: Iterable[RetainedFile], on_progress: Callable[[int], None]) -> None:
        entries: list[RedeliveredEntry] = []
        for file in group:
            events = self._event_count(file)
            if events is None:
                continue
            queue = self._queues[file.sink]
            try:
                new_name = queue.reseal(file.name)
            except OSError as error:
                self._report.add_problem(file.name, f"left as is, renaming it failed: {error.strerror}")
                continue
            if new_name is None:
                continue  # it was deleted meanwhile: its retention time was over, or its space was needed
            new_batch = layout.batch_id(new_name)
            entries.append(RedeliveredEntry(self._clock.micros(), new_batch, file.batch, events))
            self._add_to_report(file, events, new_batch)
            on_progress(events)
        if entries:
            self._record_in_ledger(queue, entries)

    def _record_in_ledger(self, queue: Directory, entries: list[RedeliveredEntry]) -> None:
        try:
            queue.filesystem.sync_directory(queue.path)
        except OSError as error:
            # The ledger must not name batches that a power loss can undo.
            consequence = "the redelivered batches are not in the ledger, and a power loss may undo the redelivery"
            self._report.add_problem(".", f"fsync of the directory failed ({error.strerror}): {consequence}")
            return
        ledger = LedgerWriter(queue, self._clock)
        ledger.add(*entries)
        self._report.ledger_behind |= not ledger.write(sync=True)

    def _event_count(self, file: RetainedFile) -> int | None:
        """The number of records in a file; None if it does not exist any more, or cannot be read and has to stay."""
        records = try_count_records(self._queues[file.sink], file.name)
        if isinstance(records, FileProblem):
            self._report.add_problems(records)
            return None
        return records

    def _add_to_report(self, file: RetainedFile, events: int, new_batch: str | None) -> None:
        self._report.files += 1
        self._report.events += events
        self._on_file(file, events, new_batch)
