"""Delivered files that are kept, sent again, to a destination that lost what it had acknowledged.

By one rename a file waits again, under a new batch id and with the same event ids in it; the deliverer does the rest. Then the
names are synced, and then the ledger says so. Killed anywhere, each file is either kept or waits; where the ledger has no word
of one that waits, only the number of what was sent again is too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin import dead_letters
from pillarbox.admin.dead_letters import Trouble
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.ledger import Ledger, Resent
from pillarbox.store.quota import SLACK_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pillarbox.admin.changes import Report
    from pillarbox.admin.filters import Selection
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_TOGETHER_MAX: Final = 100  # files that one sync and one entry of the ledger serve


class Delivered(NamedTuple):
    """A file that is kept after its delivery."""

    sink: str  # "" where there are not several
    name: str
    size: int

    @property
    def batch(self) -> str:
        """What it was while it waited."""
        return layout.batch_id(self.name)


class Limits(NamedTuple):
    """How much may wait in the directory."""

    bytes: int
    files: int


class Resend:
    """What a command is to send again; what cannot be is reported, and each file that is, or would be, is passed to `see`."""

    def __init__(
        self,
        directory: Directory,
        places: Mapping[str, Directory],
        clock: Clock,
        selection: Selection,
        report: Report,
        see: Callable[[Delivered, int, str | None], None],  # with the number of its events, and the batch that it becomes
    ) -> None:
        self._directory = directory
        self._places = places
        self._clock = clock
        self._selection = selection
        self._report = report
        self._see = see
        every = [Delivered(sink, file.name, file.size) for sink, place in places.items() for file in place.delivered()]
        stamps = [stamp for file in every if (stamp := layout.delivered_at(file.name)) is not None]
        self.kept = len(every)
        self.kept_since_micros = min(stamps, default=None)  # when the first of all that is kept was delivered
        chosen = (file for file in every if self._is_meant(file))
        # In the order in which the events came in the first place.
        self.chosen = sorted(chosen, key=lambda file: (file.sink, layout.stamp_of(file.name) or 0, file.name))

    def _is_meant(self, file: Delivered) -> bool:
        return self._selection.takes_batch(file.batch) and self._selection.takes_moment(layout.delivered_at(file.name))

    def preview(self, progress: Callable[[int], None]) -> None:
        """Count what would be sent again."""
        for file in self.chosen:
            events = self._events(file)
            if events is not None:
                self._count(file, events, None)
                progress(events)

    def carry_out(self, limits: Limits, stop: Callable[[], bool], progress: Callable[[int], None]) -> None:
        """Have them wait again, as far as the limits of what may wait allow."""
        for place in self._places.values():
            place.note_stamp(place.account().newest_stamp)
        for group in self._groups():
            self._report.interrupted = self._report.interrupted or stop()
            if self._report.interrupted:
                return
            self._do(self._fitting(group, limits), progress)
            if self._report.refused:
                return

    def _groups(self) -> Iterator[list[Delivered]]:
        for sink in self._places:
            files = [file for file in self.chosen if file.sink == sink]
            for begin in range(0, len(files), _TOGETHER_MAX):
                yield files[begin : begin + _TOGETHER_MAX]

    def _fitting(self, group: list[Delivered], limits: Limits) -> list[Delivered]:
        """Those for which there is room, beside some for new events: none of these is to be refused or evicted for them."""
        account = self._directory.account()
        room = limits.bytes - limits.bytes // SLACK_SHARE - account.pending_bytes
        files = limits.files - limits.files // SLACK_SHARE - account.pending_files
        for number, file in enumerate(group):
            room -= file.size
            if room < 0 or number >= files:
                self._report.refused = "max_bytes" if room < 0 else "max_files"
                return group[:number]
        return group

    def _do(self, group: Iterable[Delivered], progress: Callable[[int], None]) -> None:
        entries: list[Resent] = []
        for file in group:
            events = self._events(file)
            if events is None:
                continue
            place = self._places[file.sink]
            try:
                anew = place.reseal(file.name)
            except OSError as error:
                self._report.trouble(file.name, f"stays: it cannot be renamed: {error.strerror}")
                continue
            if anew is None:
                continue  # it was too old meanwhile, or in the way
            entries.append(Resent(self._clock.micros(), layout.batch_id(anew), file.batch, events))
            self._count(file, events, layout.batch_id(anew))
            progress(events)
        if entries:
            self._enter(place, entries)

    def _enter(self, place: Directory, entries: list[Resent]) -> None:
        try:
            place.filesystem.sync_directory(place.path)
        except OSError as error:
            # What the ledger names must be there.
            problem = f"cannot be synced ({error.strerror}): the ledger has no word of what waits, power loss may undo it"
            self._report.trouble(".", f"the directory {problem}")
            return
        ledger = Ledger(place, self._clock)
        ledger.note(*entries)
        self._report.ledger_behind |= not ledger.write(sync=True)

    def _events(self, file: Delivered) -> int | None:
        """How many records it holds; None where it has gone, or cannot be read and stays."""
        data = dead_letters.content(self._places[file.sink], file.name)
        if data is None:
            return None
        if isinstance(data, Trouble):
            self._report.add(data)
            return None
        try:
            contents, _ = reader.read_file(file.name, data, lambda: None)
        except FileUnusableError as error:
            self._report.trouble(file.name, error.problem)
            return None
        return len(contents.payloads)

    def _count(self, file: Delivered, events: int, anew: str | None) -> None:
        self._report.files += 1
        self._report.events += events
        self._see(file, events, anew)
