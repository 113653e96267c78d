"""Dead letters that go in again, or go for good: which changes that takes, file by file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from pillarbox.admin import dead_letters
from pillarbox.admin.changes import Change
from pillarbox.admin.mend import Unfit
from pillarbox.store import layout, ledger
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.admin.changes import Report
    from pillarbox.admin.dead_letters import DeadFile, Heading, Record
    from pillarbox.admin.filters import Selection
    from pillarbox.admin.mend import Gate
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

HELD: Final = "its sealed file is still there, so the deliverer is not done with this batch; try again once it is"


def as_it_is(record: Record) -> bytes:
    """The event as it stands."""
    return bytes(record.letter.event)


class Again:
    """The changes that a command asks for; what cannot be done goes into the report, and what is chosen past `see`."""

    def __init__(self, directory: Directory, heading: Heading, clock: Clock, selection: Selection, report: Report) -> None:
        self._directory = directory
        self._heading = heading
        self._clock = clock
        self._selection = selection
        self._report = report

    def _files(self) -> Iterator[tuple[DeadFile, list[Record]]]:
        """The files that hold chosen records and may be changed."""
        found = dead_letters.find(self._directory, Kind.DEAD, self._selection)
        for file in dead_letters.files(self._directory, found.batches, self._heading):
            self._report.add(*file.troubles)
            chosen = [record for record in file.records if self._selection.takes(record)]
            if not chosen:
                continue
            if file.batch in found.held:
                self._report.trouble(layout.dead_name(file.batch), f"{len(chosen)} dead letters stay: {HELD}")
            else:
                yield file, chosen

    def replays(
        self, gate: Gate, mend: Callable[[Record], bytes | None], see: Callable[[Record, bytes], None]
    ) -> Iterator[Change]:
        """Send again what `mend` makes of the chosen records; where it is None, or raises `Unfit`, they stay."""
        for file, chosen in self._files():
            lines: list[int] = []
            sends: list[bytes] = []
            for record in chosen:
                try:
                    payload = mend(record)
                    if payload is None:
                        continue
                    gate.check(payload)
                except Unfit as unfit:
                    self._report.trouble(record.name, f"stays: the event {unfit}")
                    continue
                see(record, payload)
                lines.append(record.line)
                sends.append(payload)
            if sends:
                entry = partial(self._replayed, file.batch)
                yield Change(layout.dead_name(file.batch), sends, 0, entry, partial(self._take_out, file, lines))

    def purges(self, see: Callable[[Record, bytes], None]) -> Iterator[Change]:
        """Give the chosen records up."""
        for file, chosen in self._files():
            for record in chosen:
                see(record, bytes(record.letter.event))
            lines = [record.line for record in chosen]
            finish = partial(self._give_up, file, lines)
            yield Change(layout.dead_name(file.batch), [], len(lines), partial(self._purged, file.batch), finish)

    def _take_out(self, file: DeadFile, lines: list[int], accepted: set[int]) -> None:
        self._rewrite(file, {lines[index] for index in accepted})

    def _give_up(self, file: DeadFile, lines: list[int], _accepted: set[int]) -> None:
        self._rewrite(file, set(lines))

    def _rewrite(self, file: DeadFile, gone: set[int]) -> None:
        rest, name = file.without(gone), layout.dead_name(file.batch)
        if rest and not rest.isspace():
            self._directory.put(name, rest)
        else:
            self._directory.remove(name)

    def _replayed(self, batch: str, events: int) -> ledger.Replayed:
        return ledger.Replayed(at_micros=self._clock.micros(), batch=batch, events=events)

    def _purged(self, batch: str, events: int) -> ledger.Purged:
        return ledger.Purged(at_micros=self._clock.micros(), batch=batch, kind="dead", events=events)
