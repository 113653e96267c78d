"""Dead letters that go in again, or go for good: which changes that takes, file by file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from pillarbox.admin import dead_letters
from pillarbox.admin.changes import BatchChange
from pillarbox.admin.mend import InvalidReplayError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import PurgedEntry, ReplayedEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.dead_letters import DeadLetterFile, DeadLetterRecord, IdentityDecoder
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.admin.mend import ReplayValidator
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

BATCH_PENDING: Final = "its sealed file is still there, so the deliverer is not done with this batch; try again once it is"


def unchanged_event(record: DeadLetterRecord) -> bytes:
    """The event as it stands."""
    return bytes(record.letter.event)


class DeadLetterReplayer:
    """The changes that a command asks for; what cannot be done goes into the report, and what is chosen past `on_record`."""

    def __init__(
        self,
        directory: Directory,
        identity_decoder: IdentityDecoder,
        clock: Clock,
        record_filter: RecordFilter,
        report: ChangeReport,
    ) -> None:
        self._directory = directory
        self._identity_decoder = identity_decoder
        self._clock = clock
        self._filter = record_filter
        self._report = report

    def _selected_files(self) -> Iterator[tuple[DeadLetterFile, list[DeadLetterRecord]]]:
        """The files that hold chosen records and may be changed."""
        listing = dead_letters.list_batches(self._directory, Kind.DEAD, self._filter)
        for file in dead_letters.read_files(self._directory, listing.batches, self._identity_decoder):
            self._report.add_problems(*file.problems)
            selected = [record for record in file.records if self._filter.matches(record)]
            if not selected:
                continue
            if file.batch in listing.pending:
                self._report.add_problem(layout.dead_name(file.batch), f"{len(selected)} dead letters stay: {BATCH_PENDING}")
            else:
                yield file, selected

    def replay_changes(
        self,
        validator: ReplayValidator,
        edit: Callable[[DeadLetterRecord], bytes | None],
        on_record: Callable[[DeadLetterRecord, bytes], None],
    ) -> Iterator[BatchChange]:
        """Send again what `edit` makes of the chosen records; where it is None, or raises `InvalidReplayError`, they stay."""
        for file, chosen in self._selected_files():
            lines: list[int] = []
            payloads: list[bytes] = []
            for record in chosen:
                try:
                    payload = edit(record)
                    if payload is None:
                        continue
                    validator.validate(payload)
                except InvalidReplayError as unfit:
                    self._report.add_problem(record.name, f"stays: the event {unfit}")
                    continue
                on_record(record, payload)
                lines.append(record.line)
                payloads.append(payload)
            if payloads:
                entry = partial(self._replayed_entry, file.batch)
                yield BatchChange(layout.dead_name(file.batch), payloads, 0, entry, partial(self._remove_accepted, file, lines))

    def purge_changes(self, on_record: Callable[[DeadLetterRecord, bytes], None]) -> Iterator[BatchChange]:
        """Give the chosen records up."""
        for file, chosen in self._selected_files():
            for record in chosen:
                on_record(record, bytes(record.letter.event))
            lines = [record.line for record in chosen]
            finish = partial(self._remove_lines, file, lines)
            yield BatchChange(layout.dead_name(file.batch), [], len(lines), partial(self._purged_entry, file.batch), finish)

    def _remove_accepted(self, file: DeadLetterFile, lines: list[int], accepted: set[int]) -> None:
        self._rewrite(file, {lines[index] for index in accepted})

    def _remove_lines(self, file: DeadLetterFile, lines: list[int], _accepted: set[int]) -> None:
        self._rewrite(file, set(lines))

    def _rewrite(self, file: DeadLetterFile, removed: set[int]) -> None:
        rest, name = file.without_lines(removed), layout.dead_name(file.batch)
        if rest and not rest.isspace():
            self._directory.write_atomically(name, rest)
        else:
            self._directory.remove(name)

    def _replayed_entry(self, batch: str, events: int) -> ReplayedEntry:
        return ReplayedEntry(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged_entry(self, batch: str, events: int) -> PurgedEntry:
        return PurgedEntry(at_micros=self._clock.micros(), batch=batch, kind="dead", events=events)
