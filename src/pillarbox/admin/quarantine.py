"""Quarantine: the damaged byte ranges of a batch, salvaging events from them, and the changes to repair or purge them."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

import msgspec

from pillarbox.admin.changes import BATCH_PENDING, BatchChange
from pillarbox.admin.replay import InvalidReplayError
from pillarbox.admin.scan import FileProblem, list_batches, try_read_file
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import PurgedEntry, RepairedEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.changes import ChangeReport
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.admin.replay import ReplayValidator
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_HEAD: Final = re.compile(rb'\s*\{\s*"event"\s*:\s*')
_CRC: Final = re.compile(rb'\s*,\s*"crc"\s*:\s*"([0-9a-f]{0,8})')
_RECORD_START: Final = b'{"event":'
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_STARTS_MAX: Final = 100  # positions in one piece where a record may begin; two lines that ran together have two
_scan_json = json.JSONDecoder().raw_decode


class QuarantinedRange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A damaged byte range of a batch; if events were salvaged from it, also when and how many."""

    offset: int  # offset in the batch file, in bytes
    length: int
    reason: str
    repaired_at_micros: int | None = None
    repaired_events: int = 0


class QuarantinedBatch(NamedTuple):
    """The quarantine of one batch."""

    batch: str
    ranges: list[QuarantinedRange]
    pieces: list[bytes]  # the bytes of each range
    problem: FileProblem | None  # why the two files contradict each other; then the bytes can be read but not repaired
    readable: bool = True

    @property
    def sealed_at_micros(self) -> int | None:
        """When the batch was sealed, if its id tells it."""
        return layout.sealed_at(self.batch)

    @property
    def unrepaired_count(self) -> int:
        """How many ranges are not repaired."""
        return sum(damage.repaired_at_micros is None for damage in self.ranges)


_decode_ranges = msgspec.json.Decoder(list[QuarantinedRange]).decode


def encode_ranges(ranges: Iterable[QuarantinedRange]) -> bytes:
    """The content of a file of byte ranges, one on each line."""
    return b"[\n" + b",\n".join(msgspec.json.encode(damage) for damage in ranges) + b"\n]\n"


def parse(batch: str, ranges_json: bytes | None, data: bytes | None) -> QuarantinedBatch:
    """Parse the contents of a batch's two quarantine files; None for a file that does not exist."""
    name, ranges_name = layout.corrupt_name(batch), layout.ranges_name(batch)
    if data is None:
        return QuarantinedBatch(batch, [], [], FileProblem(ranges_name, f"{name}, which has the bytes, does not exist"))
    whole = QuarantinedRange(0, len(data), "unknown")
    if ranges_json is None:
        problem = FileProblem(name, f"{ranges_name}, which describes the bytes, does not exist")
        return QuarantinedBatch(batch, [whole], [data], problem)
    try:
        ranges = _decode_ranges(ranges_json)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return QuarantinedBatch(batch, [whole], [data], FileProblem(ranges_name, f"is not a list of byte ranges: {error}"))
    total_bytes = sum(damage.length for damage in ranges)
    if total_bytes != len(data) or any(damage.length < 0 for damage in ranges):
        problem = FileProblem(ranges_name, f"describes {total_bytes} bytes, but {name} has {len(data)}")
        return QuarantinedBatch(batch, [whole], [data], problem)
    pieces: list[bytes] = []
    start = 0
    for damage in ranges:
        pieces.append(data[start : start + damage.length])
        start += damage.length
    return QuarantinedBatch(batch, ranges, pieces, None)


def read_batch(directory: Directory, batch: str) -> QuarantinedBatch | None:
    """Read the quarantine of a batch; None if it does not exist any more."""
    data = try_read_file(directory, layout.corrupt_name(batch))
    if isinstance(data, FileProblem):
        return QuarantinedBatch(batch, [], [], data, readable=False)
    ranges_json = try_read_file(directory, layout.ranges_name(batch))
    if isinstance(ranges_json, FileProblem):
        return QuarantinedBatch(batch, [], [], ranges_json, readable=False)
    if data is None and ranges_json is None:
        return None
    return parse(batch, ranges_json, data)


class SalvagedEvent(NamedTuple):
    """An event that was found in damaged bytes."""

    payload: bytes
    verified: bool  # its checksum matches
    how: str  # what is known of its integrity


class SalvageResult(NamedTuple):
    """The events in a damaged byte range, and for each piece without an event the reason."""

    events: list[SalvagedEvent]
    problems: list[str]


def salvage(data: bytes, validator: ReplayValidator) -> SalvageResult:
    """Find valid events in a damaged byte range, which NUL bytes may have torn into pieces."""
    events: list[SalvagedEvent] = []
    problems: list[str] = []
    for piece in data.split(b"\0"):
        if piece and not piece.isspace():
            salvaged, problem = _salvage_piece(piece.removeprefix(_BYTE_ORDER_MARK), validator)
            events += salvaged
            if not salvaged:
                problems.append(problem)
    if not events and not problems:
        problems.append("has only NUL bytes" if b"\0" in data else "is empty")
    return SalvageResult(events, problems)


def _salvage_piece(piece: bytes, validator: ReplayValidator) -> tuple[list[SalvagedEvent], str]:
    """The events in bytes that were one line, or why there is none."""
    events: list[SalvagedEvent] = []
    problem = ""
    salvaged_bytes = 0  # of the piece, from its start
    for start in islice(_candidate_offsets(piece), _STARTS_MAX):
        if start < salvaged_bytes:
            continue
        try:
            event, length = _event_at_start(piece[start:], validator)
            # Within a line, what looks like a record may be text inside an event; only a checksum rules that out.
            if start and not event.verified:
                continue
            validator.validate(event.payload)
        except InvalidReplayError as error:
            problem = problem or str(error)
            continue
        events.append(event)
        salvaged_bytes = start + length
    return events, problem


def _candidate_offsets(piece: bytes) -> Iterator[int]:
    yield 0
    start = piece.find(_RECORD_START, 1)
    while start > 0:
        yield start
        start = piece.find(_RECORD_START, start + 1)


def _event_at_start(piece: bytes, validator: ReplayValidator) -> tuple[SalvagedEvent, int]:
    """The event that a piece begins with, and its length in bytes; raises `InvalidReplayError`."""
    head = _HEAD.match(piece)
    if head is None:
        return _bare_event(piece, validator)
    payload = _json_object(piece[head.end() :])
    end = head.end() + len(payload)
    crc = _CRC.match(piece, end)
    digits, expected = (crc[1] if crc else b"").decode(), f"{crc32(payload):08x}"
    if digits == expected:
        return SalvagedEvent(payload, verified=True, how="complete, its checksum matches"), end
    is_cut = crc is None or piece[crc.end() : crc.end() + 1] in (b"", b"\n", b"{")
    if not (expected.startswith(digits) and is_cut):
        how = "its checksum does not match: the event may have been altered"
    elif digits:
        how = f"its checksum is cut off; the {len(digits)} digits that are left match"
    else:
        how = "it has no checksum"
    return SalvagedEvent(payload, verified=False, how=how), end


def _bare_event(piece: bytes, validator: ReplayValidator) -> tuple[SalvagedEvent, int]:
    """An event without an envelope, or in another one than a record's."""
    value = _json_object(piece.lstrip())
    inner = validator.parse_fields(value).get("event")
    if inner is not None:
        return SalvagedEvent(bytes(inner), verified=False, how="in another envelope than a record's, without a checksum"), len(
            value
        )
    return SalvagedEvent(value, verified=False, how="a bare event without a checksum"), len(value)


def _json_object(data: bytes) -> bytes:
    """The JSON object that some bytes begin with; raises `InvalidReplayError`."""
    text = data.decode("utf-8", "surrogateescape")  # the bytes after the object may be anything
    if not text.startswith("{"):
        raise InvalidReplayError("is not a JSON object")
    try:
        _, end = _scan_json(text)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        detail = f"{problem[0].lower()}{problem[1:]} at character {error.pos}"
        raise InvalidReplayError(f"is not complete JSON: {detail} of the event") from None
    except (ValueError, RecursionError):
        raise InvalidReplayError("is not readable as JSON") from None
    return text[:end].encode("utf-8", "surrogateescape")


class RangeRepair(NamedTuple):
    """What a repair finds in one damaged byte range."""

    batch: str
    number: int  # number of the range in its batch, from 1
    range: QuarantinedRange
    salvage: SalvageResult


class QuarantineRepairer:
    """Reads the quarantine of selected batches, and makes the changes to repair or purge it.

    Ranges and batches that must stay are added to the report.
    """

    def __init__(self, directory: Directory, clock: Clock, record_filter: RecordFilter, report: ChangeReport) -> None:
        self._directory = directory
        self._clock = clock
        self._filter = record_filter
        self._report = report

    def selected_batches(self, *, to_repair: bool = False, to_purge: bool = False) -> Iterator[QuarantinedBatch]:
        """The selected batches, the oldest first; with `to_repair` or `to_purge` only those that may be changed so."""
        listing = list_batches(self._directory, Kind.CORRUPT, self._filter.matches_batch)
        for batch in listing.batches:
            if not self._filter.matches_time(layout.sealed_at(batch)):
                continue
            is_pending = batch in listing.pending
            quarantined = read_batch(self._directory, batch)
            if quarantined is None or (is_pending and not quarantined.pieces):
                continue  # deleted meanwhile, or just being written
            has_reason = any(self._filter.matches_reason(damage.reason) for damage in quarantined.ranges)
            if not has_reason and quarantined.problem is None:
                continue
            if is_pending and (to_repair or to_purge):
                self._report.add_problem(layout.corrupt_name(batch), f"left as is: {BATCH_PENDING}")
                continue
            if quarantined.problem is not None and not (to_purge and quarantined.readable):
                self._report.add_problems(quarantined.problem)
                if to_repair or to_purge:
                    continue
            yield quarantined

    def repair_changes(
        self, validator: ReplayValidator, on_range: Callable[[RangeRepair], None], *, only_verified: bool
    ) -> Iterator[BatchChange]:
        """The changes that enqueue what can be salvaged from the selected ranges. Repaired ranges are skipped.

        Args:
            validator: Checks each event.
            on_range: Called with each range and what was found in it.
            only_verified: Repair a range only if the checksum of each event in it matches.
        """
        for quarantined in self.selected_batches(to_repair=True):
            batch = quarantined.batch
            payloads: list[bytes] = []
            payloads_of_range: dict[int, range] = {}
            for number, (damage, piece) in enumerate(zip(quarantined.ranges, quarantined.pieces, strict=True)):
                if damage.repaired_at_micros is not None or not self._filter.matches_reason(damage.reason):
                    continue
                result = salvage(piece, validator)
                on_range(RangeRepair(batch, number + 1, damage, result))
                if result.events and (not only_verified or all(event.verified for event in result.events)):
                    payloads_of_range[number] = range(len(payloads), len(payloads) + len(result.events))
                    payloads += [event.payload for event in result.events]
            if payloads:
                apply = partial(self._mark_repaired, quarantined, payloads_of_range)
                yield BatchChange(layout.corrupt_name(batch), payloads, 0, partial(self._repaired_entry, batch), apply)

    def purge_changes(self, on_batch: Callable[[QuarantinedBatch], None], *, only_repaired: bool) -> Iterator[BatchChange]:
        """The changes that delete the quarantine of the selected batches.

        Args:
            on_batch: Called with each batch.
            only_repaired: Skip batches with a range that is not repaired.
        """
        for quarantined in self.selected_batches(to_purge=True):
            if only_repaired and (quarantined.unrepaired_count or quarantined.problem is not None):
                continue
            on_batch(quarantined)
            batch = quarantined.batch
            make_entry, apply = partial(self._purged_entry, batch), partial(self._remove_files, batch)
            yield BatchChange(layout.corrupt_name(batch), [], quarantined.unrepaired_count, make_entry, apply)

    def _mark_repaired(self, quarantined: QuarantinedBatch, payloads_of_range: dict[int, range], accepted: set[int]) -> None:
        """Record which ranges are repaired. Their bytes stay."""
        now = self._clock.micros()
        ranges = [
            msgspec.structs.replace(damage, repaired_at_micros=now, repaired_events=len(payloads_of_range[number]))
            if number in payloads_of_range and accepted.issuperset(payloads_of_range[number])
            else damage
            for number, damage in enumerate(quarantined.ranges)
        ]
        self._directory.write_atomically(layout.ranges_name(quarantined.batch), encode_ranges(ranges))

    def _remove_files(self, batch: str, _accepted: set[int]) -> None:
        # The bytes are deleted first: a description without bytes does no harm, but bytes without one could not be explained.
        self._directory.remove(layout.corrupt_name(batch))
        self._directory.remove(layout.ranges_name(batch))

    def _repaired_entry(self, batch: str, events: int) -> RepairedEntry:
        return RepairedEntry(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged_entry(self, batch: str, ranges: int) -> PurgedEntry:
        return PurgedEntry(at_micros=self._clock.micros(), batch=batch, kind="quarantine", events=ranges)
