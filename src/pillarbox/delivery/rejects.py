"""The dead letters and damaged bytes of a file that is delivered in windows.

They are written to temporary files, window by window. These get their final names once the whole file is sent. If the process
dies before that, recovery removes them, and the file is sent again from its beginning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.ledger_entries import PurgedKind
    from pillarbox.store.reader import DamagedRange
    from pillarbox.store.windows import Window

_READ_BYTES: Final = 1 << 20  # of dead letters in memory at a time
_INDEX_BEGIN: Final = b"[\n"
_INDEX_SEPARATOR: Final = b",\n"
_INDEX_END: Final = b"\n]\n"
_INDEX_FRAME_BYTES: Final = len(_INDEX_BEGIN) + len(_INDEX_END)

_decode_letter = msgspec.json.Decoder(DeadLetter).decode


def encode_letters(dead_letters: Mapping[int, DeadLetter]) -> bytes:
    """The lines of dead letters, in the order of the batch."""
    return b"".join(msgspec.json.encode(dead_letters[index]) + b"\n" for index in sorted(dead_letters))


def encode_ranges(ranges: Sequence[DamagedRange]) -> bytes:
    """The elements of the index of damaged ranges, without its brackets."""
    return _INDEX_SEPARATOR.join(msgspec.json.encode(damaged) for damaged in ranges)


def encode_index(ranges: Sequence[DamagedRange]) -> bytes:
    """The whole index of damaged ranges."""
    return _INDEX_BEGIN + encode_ranges(ranges) + _INDEX_END


class RequiredSpace(NamedTuple):
    """The space that a batch needs for its dead letters and damaged bytes."""

    batch: str
    dead_letter_bytes: int
    damaged_bytes: int  # including their index


def quarantine_bytes(ranges: Sequence[DamagedRange]) -> int:
    """The bytes that damaged ranges need in the quarantine, including their index."""
    return sum(damaged.length for damaged in ranges) + len(encode_index(ranges)) if ranges else 0


class FileRejects:
    """The rejected records and damaged ranges of one file so far."""

    def __init__(self, directory: Directory, batch: str) -> None:
        self._directory = directory
        self._batch = batch
        self._files: dict[str, LockedFile] = {}  # temporary files, by their final names
        self.dead_letters = self.damaged_ranges = 0
        self.discarded: set[PurgedKind] = set()  # kinds for which there is no space
        self._dead_letter_bytes = self._damaged_bytes = 0

    @property
    def required(self) -> RequiredSpace:
        """The space that is required so far."""
        return RequiredSpace(self._batch, self._dead_letter_bytes, self._damaged_bytes)

    def required_with(self, window: Window, dead_letters: Mapping[int, DeadLetter]) -> RequiredSpace:
        """The space that is required with one more window."""
        letters = self._dead_letter_bytes + len(encode_letters(dead_letters))
        damaged = self._damaged_bytes + self._index_bytes(window) + sum(item.length for item in window.contents.damaged)
        return RequiredSpace(
            self._batch, 0 if "dead" in self.discarded else letters, 0 if "quarantine" in self.discarded else damaged
        )

    def _index_bytes(self, window: Window) -> int:
        ranges = window.contents.damaged
        if not ranges:
            return 0
        return len(encode_ranges(ranges)) + (len(_INDEX_SEPARATOR) if self.damaged_ranges else _INDEX_FRAME_BYTES)

    def add_window(self, window: Window, dead_letters: Mapping[int, DeadLetter]) -> None:
        """Write the rejected records and damaged ranges of the next window. After an `OSError` no window may be added."""
        required, ranges = self.required_with(window, dead_letters), window.contents.damaged
        if dead_letters and "dead" not in self.discarded:
            self._append(layout.dead_name(self._batch), encode_letters(dead_letters))
        if ranges and "quarantine" not in self.discarded:
            separator = _INDEX_SEPARATOR if self.damaged_ranges else _INDEX_BEGIN
            self._append(layout.ranges_name(self._batch), separator + encode_ranges(ranges))
            self._append(layout.corrupt_name(self._batch), window.damaged_bytes())
        self.dead_letters += len(dead_letters)
        self.damaged_ranges += len(ranges)
        _, self._dead_letter_bytes, self._damaged_bytes = required

    def discard(self, kind: PurgedKind) -> None:
        """Discard all rejects of a kind, because there is no space for all of them."""
        self.discarded.add(kind)
        names = (
            [layout.dead_name(self._batch)]
            if kind == "dead"
            else [layout.ranges_name(self._batch), layout.corrupt_name(self._batch)]
        )
        for name in names:
            self._remove(name)

    def publish(self) -> None:
        """Rename the files to their final names, durably. Raises `OSError`."""
        index = layout.ranges_name(self._batch)
        if index in self._files:
            self._append(index, _INDEX_END)
        for name in (index, layout.corrupt_name(self._batch), layout.dead_name(self._batch)):
            file = self._files.pop(name, None)
            if file is not None:
                self._directory.filesystem.close(self._directory.publish_temporary(file, name).fd)
                self._directory.filesystem.sync_directory(self._directory.path)

    def published_letters(self) -> Iterator[DeadLetter]:
        """The dead letters, read from the published file: they may not fit into memory."""
        if not self.dead_letters or "dead" in self.discarded:
            return
        filesystem = self._directory.filesystem
        fd = self._directory.open_existing(layout.dead_name(self._batch))
        try:
            unfinished_line, offset = b"", 0
            while part := filesystem.read_at(fd, offset, _READ_BYTES):
                offset += len(part)
                *lines, unfinished_line = (unfinished_line + part).split(b"\n")
                yield from map(_decode_letter, lines)
        finally:
            filesystem.close(fd)

    def abandon(self) -> None:
        """Remove the temporary files. Idempotent."""
        for name in list(self._files):
            self._remove(name)

    def _append(self, name: str, data: bytes) -> None:
        if name not in self._files:
            self._files[name] = self._directory.create_temporary(name)
        self._directory.filesystem.write_all(self._files[name].fd, data)

    def _remove(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            self._directory.remove_temporary(file)
