"""What a follower never saw, for it came and went between two looks: the ledger tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.ledger_entries import AdoptedEntry, SealedEntry, parse_ledger
from pillarbox.store.os_filesystem import open_file_identity

if TYPE_CHECKING:
    from collections.abc import Container

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

_SCANS_MAX: Final = 5  # in which a batch of which the ledger has heard must turn up
_LATE_MICROS: Final = 60_000_000  # an entry that is written later than this is taken for one of a batch that was seen
_FILES_READ_MAX: Final = 1000  # files that were read without their batch's name; the ledger tells it within moments


class Gap(NamedTuple):
    """A batch that was in no file any more when it was looked for."""

    batch: str
    writer: str
    events: int | None  # None where nobody counted


class _UnseenBatch:
    """An entry whose batch was not seen."""

    def __init__(self, entry: SealedEntry | AdoptedEntry) -> None:
        self.entry = entry
        self.scans = 0


class GapDetector:
    """Reads the ledger along, from `start` on."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self.gaps: list[Gap] = []  # for the caller to take
        self._directory = directory
        self._clock = clock
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._since_micros = 0
        self._unseen: dict[str, _UnseenBatch] = {}  # batches that were not known so far
        self._decided: dict[str, int] = {}  # gaps that were told, and when their entries were written
        self._files_read: list[tuple[str, int]] = []  # (writer, bytes) of files that were read under their active name only

    def start(self) -> None:
        """From now on."""
        self._since_micros = self._clock.micros()
        self._read_new_entries()

    def note_file_read(self, writer: str, size: int) -> None:
        """An active file was read to its end, and is gone; its batch is not known."""
        self._files_read = [*self._files_read[-_FILES_READ_MAX:], (writer, size)]

    def update(self, known: Container[str]) -> None:
        """Which batches of the ledger are not `known`, and stay away for some looks. Never raises `OSError`."""
        for entry in self._read_new_entries():
            if entry.at_micros >= self._since_micros and entry.batch not in known and entry.batch not in self._decided:
                self._unseen.setdefault(entry.batch, _UnseenBatch(entry))
        for batch, entered in list(self._unseen.items()):
            entered.scans += 1
            entry = entered.entry
            size = entry.bytes if isinstance(entry, SealedEntry) else None
            read = next((one for one in self._files_read if one[0] == entry.writer and size in (one[1], None)), None)
            if batch in known:
                del self._unseen[batch]
            elif read is not None:
                del self._unseen[batch]
                self._files_read.remove(read)
                self._decided[batch] = entry.at_micros
            elif entered.scans >= _SCANS_MAX:
                del self._unseen[batch]
                self._decided[batch] = entry.at_micros
                self.gaps.append(Gap(batch, entry.writer, entry.events if isinstance(entry, SealedEntry) else None))
        # What is older than that is known no more to the follower either.
        self._since_micros = max(self._since_micros, self._clock.micros() - _LATE_MICROS)
        self._decided = {batch: at for batch, at in self._decided.items() if at >= self._since_micros}

    def _read_new_entries(self) -> list[SealedEntry | AdoptedEntry]:
        """What was appended since the last time; all of it where the ledger was written anew, shorter."""
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.path_of(layout.LEDGER))
        except (OSError, FileUnusableError):
            return []
        try:
            file, size = open_file_identity(fd), filesystem.size(fd)
            if file != self._file or size < self._offset:
                self._file, self._offset = file, 0
            data = filesystem.read_at(fd, self._offset, size - self._offset) if size > self._offset else b""
        except OSError:
            return []
        finally:
            filesystem.close(fd)
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return [entry for entry in parse_ledger(data)[0] if isinstance(entry, (SealedEntry, AdoptedEntry))]
