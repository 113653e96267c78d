"""Delivered files that are kept, sent again, to a destination that lost what it had acknowledged.

By one rename a file waits again, under a new batch id and with the same event ids in it; the deliverer does the rest. Then the
names are synced, and then the ledger says so. Killed anywhere, each file is either kept or waits; where the ledger has no word
of one that waits, only the number of what was sent again is too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin import dead_letters
from pillarbox.admin.dead_letters import FileProblem
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import RedeliveredEntry
from pillarbox.store.quota import SLACK_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_GROUP_FILES_MAX: Final = 100  # files that one sync and one entry of the ledger serve


class RetainedFile(NamedTuple):
    """A file that is kept after its delivery."""

    sink: str  # "" where there are not several
    name: str
    size: int

    @property
    def batch(self) -> str:
        """What it was while it waited."""
        return layout.batch_id(self.name)


class PendingLimits(NamedTuple):
    """How much may wait in the directory."""

    max_bytes: int
    max_files: int


class Redelivery:
    """Makes retained files wait again; reports those that cannot, and passes each other one to `on_file`."""

    def __init__(
        self,
        directory: Directory,
        queues: Mapping[str, Directory],
        clock: Clock,
        record_filter: RecordFilter,
        report: ChangeReport,
        on_file: Callable[
            [RetainedFile, int, str | None], None
        ],  # with the number of its events, and the batch that it becomes
    ) -> None:
        self._directory = directory
        self._queues = queues
        self._clock = clock
        self._filter = record_filter
        self._report = report
        self._on_file = on_file
        every = [RetainedFile(sink, file.name, file.size) for sink, place in queues.items() for file in place.delivered_files()]
        stamps = [stamp for file in every if (stamp := layout.delivered_at(file.name)) is not None]
        self.retained_count = len(every)
        self.oldest_delivered_at_micros = min(stamps, default=None)  # when the first of all that is kept was delivered
        chosen = (file for file in every if self._is_selected(file))
        # In the order in which the events came in the first place.
        self.selected = sorted(chosen, key=lambda file: (file.sink, layout.sealed_at(file.name) or 0, file.name))

    def _is_selected(self, file: RetainedFile) -> bool:
        return self._filter.matches_batch(file.batch) and self._filter.matches_time(layout.delivered_at(file.name))

    def preview(self, on_progress: Callable[[int], None]) -> None:
        """Count what would be sent again."""
        for file in self.selected:
            events = self._event_count(file)
            if events is not None:
                self._add_to_report(file, events, None)
                on_progress(events)

    def execute(self, limits: PendingLimits, should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> None:
        """Have them wait again, as far as the limits of what may wait allow."""
        for place in self._queues.values():
            place.seal_after(place.disk_usage().newest_sealed_at)
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
            for begin in range(0, len(files), _GROUP_FILES_MAX):
                yield files[begin : begin + _GROUP_FILES_MAX]

    def _that_fit(self, group: list[RetainedFile], limits: PendingLimits) -> list[RetainedFile]:
        """Those for which there is room, beside some for new events: none of these is to be refused or evicted for them."""
        account = self._directory.disk_usage()
        room = limits.max_bytes - limits.max_bytes // SLACK_SHARE - account.pending_bytes
        files = limits.max_files - limits.max_files // SLACK_SHARE - account.pending_files
        for number, file in enumerate(group):
            room -= file.size
            if room < 0 or number >= files:
                self._report.drop_reason = "max_bytes" if room < 0 else "max_files"
                return group[:number]
        return group

    def _redeliver(self, group: Iterable[RetainedFile], on_progress: Callable[[int], None]) -> None:
        entries: list[RedeliveredEntry] = []
        for file in group:
            events = self._event_count(file)
            if events is None:
                continue
            place = self._queues[file.sink]
            try:
                new_name = place.reseal(file.name)
            except OSError as error:
                self._report.add_problem(file.name, f"stays: it cannot be renamed: {error.strerror}")
                continue
            if new_name is None:
                continue  # it was too old meanwhile, or in the way
            entries.append(RedeliveredEntry(self._clock.micros(), layout.batch_id(new_name), file.batch, events))
            self._add_to_report(file, events, layout.batch_id(new_name))
            on_progress(events)
        if entries:
            self._record_in_ledger(place, entries)

    def _record_in_ledger(self, directory: Directory, entries: list[RedeliveredEntry]) -> None:
        try:
            directory.filesystem.sync_directory(directory.path)
        except OSError as error:
            # What the ledger names must be there.
            problem = f"cannot be synced ({error.strerror}): the ledger has no word of what waits, power loss may undo it"
            self._report.add_problem(".", f"the directory {problem}")
            return
        ledger = LedgerWriter(directory, self._clock)
        ledger.add(*entries)
        self._report.ledger_behind |= not ledger.write(sync=True)

    def _event_count(self, file: RetainedFile) -> int | None:
        """How many records it holds; None where it has gone, or cannot be read and stays."""
        data = dead_letters.try_read_file(self._queues[file.sink], file.name)
        if data is None:
            return None
        if isinstance(data, FileProblem):
            self._report.add_problems(data)
            return None
        try:
            contents, _ = reader.read_file(file.name, data, lambda: None)
        except FileUnusableError as error:
            self._report.add_problem(file.name, error.problem)
            return None
        return len(contents.payloads)

    def _add_to_report(self, file: RetainedFile, events: int, anew: str | None) -> None:
        self._report.files += 1
        self._report.events += events
        self._on_file(file, events, anew)
