"""Quarantine: the damaged bytes of a batch, span by span; which changes it takes to repair or purge them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.admin import dead_letters
from pillarbox.admin.changes import BatchChange
from pillarbox.admin.dead_letters import FileProblem
from pillarbox.admin.replay import BATCH_PENDING
from pillarbox.admin.salvage import SalvageResult, salvage
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import PurgedEntry, RepairedEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.admin.mend import ReplayValidator
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory


class QuarantinedRange(msgspec.Struct, frozen=True, omit_defaults=True):
    """Damaged bytes: `reader.Span`, and once events were had from them, when and how many."""

    offset: int  # in the sealed file
    length: int
    reason: str
    repaired_at_micros: int | None = None
    repaired_events: int = 0


class QuarantinedBatch(NamedTuple):
    """What is kept of one batch."""

    batch: str
    ranges: list[QuarantinedRange]
    pieces: list[bytes]  # the bytes of each span
    problem: FileProblem | None  # the two files do not fit together: what is there is shown, and nothing is repaired
    readable: bool = True

    @property
    def sealed_at_micros(self) -> int | None:
        """When the batch was sealed, where its name says so."""
        return layout.sealed_at(self.batch)

    @property
    def unrepaired_count(self) -> int:
        """How many spans nothing was had from so far."""
        return sum(span.repaired_at_micros is None for span in self.ranges)


_decode_ranges = msgspec.json.Decoder(list[QuarantinedRange]).decode


def encode_ranges(ranges: Iterable[QuarantinedRange]) -> bytes:
    """The content of a file of spans, one a line."""
    return b"[\n" + b",\n".join(msgspec.json.encode(span) for span in ranges) + b"\n]\n"


def parse(batch: str, ranges_json: bytes | None, data: bytes | None) -> QuarantinedBatch:
    """The contents of a batch's two files -> its spans; `trouble` where they do not fit together."""
    name, spans_name = layout.corrupt_name(batch), layout.ranges_name(batch)
    if data is None:
        return QuarantinedBatch(batch, [], [], FileProblem(spans_name, f"{name}, the bytes that it speaks of, is gone"))
    whole = QuarantinedRange(0, len(data), "unknown")
    if ranges_json is None:
        return QuarantinedBatch(
            batch, [whole], [data], FileProblem(name, f"{spans_name}, which says what it holds, is missing")
        )
    try:
        found = _decode_ranges(ranges_json)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return QuarantinedBatch(batch, [whole], [data], FileProblem(spans_name, f"is no list of spans ({error})"))
    if sum(span.length for span in found) != len(data) or any(span.length < 0 for span in found):
        problem = f"speaks of {sum(span.length for span in found)} bytes, and {name} has {len(data)}"
        return QuarantinedBatch(batch, [whole], [data], FileProblem(spans_name, problem))
    pieces: list[bytes] = []
    place = 0
    for span in found:
        pieces.append(data[place : place + span.length])
        place += span.length
    return QuarantinedBatch(batch, found, pieces, None)


def read_batch(directory: Directory, batch: str) -> QuarantinedBatch | None:
    """What is kept of a batch; None where it has gone meanwhile."""
    data = dead_letters.try_read_file(directory, layout.corrupt_name(batch))
    spans = dead_letters.try_read_file(directory, layout.ranges_name(batch))
    for answer in (data, spans):
        if isinstance(answer, FileProblem):
            return QuarantinedBatch(batch, [], [], answer, readable=False)
    if data is None and spans is None:
        return None
    return parse(batch, spans, data)  # type: ignore[arg-type]  # no Trouble any more


class RangeRepair(NamedTuple):
    """What repair finds in one span."""

    batch: str
    number: int  # from 1
    range: QuarantinedRange
    salvage: SalvageResult


class QuarantineRepairer:
    """What is kept of the chosen batches, and the changes that a command asks for; what cannot be done is reported."""

    def __init__(self, directory: Directory, clock: Clock, record_filter: RecordFilter, report: ChangeReport) -> None:
        self._directory = directory
        self._clock = clock
        self._filter = record_filter
        self._report = report

    def selected_batches(self, *, to_change: bool = False, to_purge: bool = False) -> Iterator[QuarantinedBatch]:
        """The batches that are meant, oldest first; only those that may be changed, or purged, where that is asked for."""
        found = dead_letters.list_batches(self._directory, Kind.CORRUPT, self._filter)
        for batch in found.batches:
            if not self._filter.matches_time(layout.sealed_at(batch)):
                continue
            held = batch in found.pending
            kept = read_batch(self._directory, batch)
            if kept is None or (held and not kept.pieces):
                continue  # gone meanwhile, or about to be written
            if not any(self._filter.matches_reason(span.reason) for span in kept.ranges) and kept.problem is None:
                continue
            if held and (to_change or to_purge):
                self._report.add_problem(layout.corrupt_name(batch), f"stays: {BATCH_PENDING}")
                continue
            if kept.problem is not None and not (to_purge and kept.readable):
                self._report.add_problems(kept.problem)
                if to_change or to_purge:
                    continue
            yield kept

    def repair_changes(
        self, validator: ReplayValidator, on_range: Callable[[RangeRepair], None], *, only_verified: bool
    ) -> Iterator[BatchChange]:
        """Salvage the selected ranges that are not repaired yet; `only_verified`: only what a checksum vouches for."""
        for kept in self.selected_batches(to_change=True):
            payloads: list[bytes] = []
            payloads_of_range: dict[int, range] = {}
            for number, (span, piece) in enumerate(zip(kept.ranges, kept.pieces, strict=True)):
                if span.repaired_at_micros is not None or not self._filter.matches_reason(span.reason):
                    continue
                found = salvage(piece, validator)
                on_range(RangeRepair(kept.batch, number + 1, span, found))
                if found.events and (not only_verified or all(event.verified for event in found.events)):
                    payloads_of_range[number] = range(len(payloads), len(payloads) + len(found.events))
                    payloads += [event.payload for event in found.events]
            if payloads:
                entry = partial(self._repaired_entry, kept.batch)
                yield BatchChange(
                    layout.corrupt_name(kept.batch), payloads, 0, entry, partial(self._mark_repaired, kept, payloads_of_range)
                )

    def purge_changes(self, on_batch: Callable[[QuarantinedBatch], None], *, only_repaired: bool) -> Iterator[BatchChange]:
        """Give the chosen batches' bytes up, as a whole; `only_repaired`: only where each span is."""
        for kept in self.selected_batches(to_purge=True):
            if only_repaired and (kept.unrepaired_count or kept.problem is not None):
                continue
            on_batch(kept)
            entry = partial(self._purged_entry, kept.batch)
            yield BatchChange(
                layout.corrupt_name(kept.batch), [], kept.unrepaired_count, entry, partial(self._remove_files, kept.batch)
            )

    def _mark_repaired(self, kept: QuarantinedBatch, payloads_of_range: dict[int, range], accepted: set[int]) -> None:
        """Write down which spans are repaired; the bytes stay as they are."""
        now = self._clock.micros()
        spans = [
            msgspec.structs.replace(span, repaired_at_micros=now, repaired_events=len(payloads_of_range[number]))
            if number in payloads_of_range and accepted.issuperset(payloads_of_range[number])
            else span
            for number, span in enumerate(kept.ranges)
        ]
        self._directory.write_atomically(layout.ranges_name(kept.batch), encode_ranges(spans))

    def _remove_files(self, batch: str, _accepted: set[int]) -> None:
        # The bytes first: without them what the other file says is of no use, and the other way round it would be.
        self._directory.remove(layout.corrupt_name(batch))
        self._directory.remove(layout.ranges_name(batch))

    def _repaired_entry(self, batch: str, events: int) -> RepairedEntry:
        return RepairedEntry(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged_entry(self, batch: str, spans: int) -> PurgedEntry:
        return PurgedEntry(at_micros=self._clock.micros(), batch=batch, kind="quarantine", events=spans)
