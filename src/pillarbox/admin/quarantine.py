"""Quarantine: the damaged bytes of a batch, span by span; which changes it takes to repair or purge them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.admin import dead_letters
from pillarbox.admin.again import HELD
from pillarbox.admin.changes import Change
from pillarbox.admin.dead_letters import Trouble
from pillarbox.admin.salvage import Salvage, salvage
from pillarbox.store import layout, ledger
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.changes import Report
    from pillarbox.admin.filters import Selection
    from pillarbox.admin.mend import Gate
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory


class KeptSpan(msgspec.Struct, frozen=True, omit_defaults=True):
    """Damaged bytes: `reader.Span`, and once events were had from them, when and how many."""

    offset: int  # in the sealed file
    length: int
    reason: str
    repaired_at_micros: int | None = None
    repaired_events: int = 0


class Quarantined(NamedTuple):
    """What is kept of one batch."""

    batch: str
    spans: list[KeptSpan]
    pieces: list[bytes]  # the bytes of each span
    trouble: Trouble | None  # the two files do not fit together: what is there is shown, and nothing is repaired
    readable: bool = True

    @property
    def sealed_at_micros(self) -> int | None:
        """When the batch was sealed, where its name says so."""
        return layout.stamp_of(self.batch)

    @property
    def unrepaired(self) -> int:
        """How many spans nothing was had from so far."""
        return sum(span.repaired_at_micros is None for span in self.spans)


_decode_spans = msgspec.json.Decoder(list[KeptSpan]).decode


def encode_spans(spans: Iterable[KeptSpan]) -> bytes:
    """The content of a file of spans, one a line."""
    return b"[\n" + b",\n".join(msgspec.json.encode(span) for span in spans) + b"\n]\n"


def parse(batch: str, spans: bytes | None, data: bytes | None) -> Quarantined:
    """The contents of a batch's two files -> its spans; `trouble` where they do not fit together."""
    name, spans_name = layout.corrupt_name(batch), layout.spans_name(batch)
    if data is None:
        return Quarantined(batch, [], [], Trouble(spans_name, f"{name}, the bytes that it speaks of, is gone"))
    whole = KeptSpan(0, len(data), "unknown")
    if spans is None:
        return Quarantined(batch, [whole], [data], Trouble(name, f"{spans_name}, which says what it holds, is missing"))
    try:
        found = _decode_spans(spans)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Quarantined(batch, [whole], [data], Trouble(spans_name, f"is no list of spans ({error})"))
    if sum(span.length for span in found) != len(data) or any(span.length < 0 for span in found):
        problem = f"speaks of {sum(span.length for span in found)} bytes, and {name} has {len(data)}"
        return Quarantined(batch, [whole], [data], Trouble(spans_name, problem))
    pieces: list[bytes] = []
    place = 0
    for span in found:
        pieces.append(data[place : place + span.length])
        place += span.length
    return Quarantined(batch, found, pieces, None)


def read(directory: Directory, batch: str) -> Quarantined | None:
    """What is kept of a batch; None where it has gone meanwhile."""
    data = dead_letters.content(directory, layout.corrupt_name(batch))
    spans = dead_letters.content(directory, layout.spans_name(batch))
    for answer in (data, spans):
        if isinstance(answer, Trouble):
            return Quarantined(batch, [], [], answer, readable=False)
    if data is None and spans is None:
        return None
    return parse(batch, spans, data)  # type: ignore[arg-type]  # no Trouble any more


class Seen(NamedTuple):
    """What repair finds in one span."""

    batch: str
    number: int  # from 1
    span: KeptSpan
    salvage: Salvage


class Keeper:
    """What is kept of the chosen batches, and the changes that a command asks for; what cannot be done is reported."""

    def __init__(self, directory: Directory, clock: Clock, selection: Selection, report: Report) -> None:
        self._directory = directory
        self._clock = clock
        self._selection = selection
        self._report = report

    def chosen(self, *, to_change: bool = False, to_purge: bool = False) -> Iterator[Quarantined]:
        """The batches that are meant, oldest first; only those that may be changed, or purged, where that is asked for."""
        found = dead_letters.find(self._directory, Kind.CORRUPT, self._selection)
        for batch in found.batches:
            if not self._selection.takes_moment(layout.stamp_of(batch)):
                continue
            held = batch in found.held
            kept = read(self._directory, batch)
            if kept is None or (held and not kept.pieces):
                continue  # gone meanwhile, or about to be written
            if not any(self._selection.takes_reason(span.reason) for span in kept.spans) and kept.trouble is None:
                continue
            if held and (to_change or to_purge):
                self._report.trouble(layout.corrupt_name(batch), f"stays: {HELD}")
                continue
            if kept.trouble is not None and not (to_purge and kept.readable):
                self._report.add(kept.trouble)
                if to_change or to_purge:
                    continue
            yield kept

    def repairs(self, gate: Gate, see: Callable[[Seen], None], *, checked: bool) -> Iterator[Change]:
        """Send what can be had from the chosen spans; `checked`: only what a checksum vouches for. Not again, once repaired."""
        for kept in self.chosen(to_change=True):
            sends: list[bytes] = []
            by_span: dict[int, range] = {}
            for number, (span, piece) in enumerate(zip(kept.spans, kept.pieces, strict=True)):
                if span.repaired_at_micros is not None or not self._selection.takes_reason(span.reason):
                    continue
                found = salvage(piece, gate)
                see(Seen(kept.batch, number + 1, span, found))
                if found.events and (not checked or all(event.sure for event in found.events)):
                    by_span[number] = range(len(sends), len(sends) + len(found.events))
                    sends += [event.payload for event in found.events]
            if sends:
                entry = partial(self._repaired, kept.batch)
                yield Change(layout.corrupt_name(kept.batch), sends, 0, entry, partial(self._mark, kept, by_span))

    def purges(self, see: Callable[[Quarantined], None], *, repaired: bool) -> Iterator[Change]:
        """Give the chosen batches' bytes up, as a whole; `repaired`: only where each span is."""
        for kept in self.chosen(to_purge=True):
            if repaired and (kept.unrepaired or kept.trouble is not None):
                continue
            see(kept)
            entry = partial(self._purged, kept.batch)
            yield Change(layout.corrupt_name(kept.batch), [], kept.unrepaired, entry, partial(self._remove, kept.batch))

    def _mark(self, kept: Quarantined, by_span: dict[int, range], accepted: set[int]) -> None:
        """Write down which spans are repaired; the bytes stay as they are."""
        now = self._clock.micros()
        spans = [
            msgspec.structs.replace(span, repaired_at_micros=now, repaired_events=len(by_span[number]))
            if number in by_span and accepted.issuperset(by_span[number])
            else span
            for number, span in enumerate(kept.spans)
        ]
        self._directory.put(layout.spans_name(kept.batch), encode_spans(spans))

    def _remove(self, batch: str, _accepted: set[int]) -> None:
        # The bytes first: without them what the other file says is of no use, and the other way round it would be.
        self._directory.remove(layout.corrupt_name(batch))
        self._directory.remove(layout.spans_name(batch))

    def _repaired(self, batch: str, events: int) -> ledger.Repaired:
        return ledger.Repaired(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged(self, batch: str, spans: int) -> ledger.Purged:
        return ledger.Purged(at_micros=self._clock.micros(), batch=batch, kind="quarantine", events=spans)
