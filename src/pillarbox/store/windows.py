"""Reads a batch file of any size in windows, so that only a part of it is in memory.

A window ends with a line, so that its records are the same at every attempt. Most files are one window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.store import compression, layout, reader
from pillarbox.store.file_parts import end_of_last_line
from pillarbox.store.reader import DamagedRange, FileContents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.store.filesystem import Filesystem

# A batch of the usual size is one window. Decoded events may take ten times the memory of their lines, and two windows may be
# in memory: the one that is being sent and the next.
WINDOW_BYTES: Final = 2 * 2**20
# The longest record that an outbox accepts has an eighth of a window. Older writers accepted longer ones: a line of up to so
# many windows is a window of its own.
LINE_WINDOWS: Final = 4
TOO_LONG: Final = "too_long"  # the reason for a longer line


class Window(NamedTuple):
    """A part of a file: whole lines, or a part of a line that is longer than any record."""

    contents: FileContents  # offsets of damaged ranges are those in the file
    data: bytes  # the lines
    offset: int  # of `data` in the file
    is_last: bool

    def damaged_bytes(self) -> bytes:
        """The bytes of the damaged ranges, one after another."""
        starts = [damaged.offset - self.offset for damaged in self.contents.damaged]
        return b"".join(
            self.data[start : start + damaged.length] for start, damaged in zip(starts, self.contents.damaged, strict=True)
        )


def no_yield() -> None:
    """Do nothing: no other thread waits for the GIL."""


def read_windows(
    filesystem: Filesystem,
    name: str,
    fd: int,
    yield_gil: Callable[[], None] = no_yield,
    *,
    window_bytes: int = WINDOW_BYTES,
    size: int | None = None,
) -> Iterator[Window]:
    """The windows of an open file, compressed or not, or of its first `size` bytes. An empty file has one window.

    A compressed file is decompressed as a whole, because its size is limited. The rest of it after damage is unknown, so the
    last range is the whole compressed file. Raises `OSError`, and `FileUnusableError` if zstd is missing.
    """
    size = filesystem.size(fd) if size is None else size
    if not name.endswith(layout.COMPRESSED_SUFFIX):
        yield from _line_windows(lambda offset, count: filesystem.read_at(fd, offset, count), size, yield_gil, window_bytes)
    elif size > compression.PLAIN_BYTES_MAX:
        yield from _damaged_windows(filesystem, fd, size, window_bytes)
    else:
        yield from _decompressed_windows(name, filesystem.read_all(fd), yield_gil, window_bytes)


def count_records(
    filesystem: Filesystem, name: str, fd: int, yield_gil: Callable[[], None] = no_yield, *, is_growing: bool = False
) -> tuple[int, int]:
    """The numbers of good records and of damaged ranges in an open file. Raises the errors of `read_windows`.

    In a growing file, only whole lines count.
    """
    records = ranges = 0
    end = end_of_last_line(filesystem, fd, filesystem.size(fd)) if is_growing else None
    for window in read_windows(filesystem, name, fd, yield_gil, size=end):
        records += len(window.contents.payloads)
        ranges += len(window.contents.damaged)
    return records, ranges


def _line_windows(
    read_at: Callable[[int, int], bytes], size: int, yield_gil: Callable[[], None], window_bytes: int
) -> Iterator[Window]:
    offset, is_rest_of_line = 0, False
    while True:
        data = read_at(offset, min(window_bytes, size - offset)) if offset < size else b""
        if len(data) < size - offset and not is_rest_of_line and b"\n" not in data and b"\0" not in data:
            data = _long_line(read_at, offset, min(LINE_WINDOWS * window_bytes, size - offset)) or data
        is_last = not data or offset + len(data) >= size
        end = len(data) if is_last else data.rfind(b"\n") + 1
        if end:
            contents = reader.read_lines(data[:end], yield_gil, is_rest_of_line=is_rest_of_line)
            is_rest_of_line = False
        else:
            # A record after NUL bytes is valid, so a window may begin after them.
            end = data.rfind(b"\0") + 1
            is_rest_of_line, end = not end, end or len(data)
            contents = FileContents([], [DamagedRange(0, end, TOO_LONG)])
        yield Window(_with_file_offsets(contents, offset), data[:end], offset, is_last)
        if is_last:
            return
        offset += end


def _long_line(read_at: Callable[[int, int], bytes], offset: int, count: int) -> bytes:
    """The line at `offset`, with its line feed; empty if it has more than `count` bytes."""
    data = read_at(offset, count)
    return data[: data.find(b"\n") + 1]


def _with_file_offsets(contents: FileContents, offset: int) -> FileContents:
    """The contents of a window that begins at `offset`, with the offsets of damaged ranges in the file."""
    if not offset or not contents.damaged:
        return contents
    damaged = [msgspec.structs.replace(damaged, offset=offset + damaged.offset) for damaged in contents.damaged]
    return FileContents(contents.payloads, damaged)


def _decompressed_windows(name: str, data: bytes, yield_gil: Callable[[], None], window_bytes: int) -> Iterator[Window]:
    plain, problem = compression.decompress(name, data)
    if len(plain) <= window_bytes:
        contents, all_bytes = reader.read_decompressed(plain, problem, data, yield_gil)
        yield Window(contents, all_bytes, 0, is_last=True)
        return
    for window in _line_windows(lambda offset, count: plain[offset : offset + count], len(plain), yield_gil, window_bytes):
        yield window._replace(is_last=window.is_last and not problem)
    if problem:
        yield Window(FileContents([], [reader.compression_damage(plain, problem, data)]), data, len(plain), is_last=True)


def _damaged_windows(filesystem: Filesystem, fd: int, size: int, window_bytes: int) -> Iterator[Window]:
    """The windows of a compressed file that is larger than any that Pillarbox writes."""
    reason = f"{reader.BAD_COMPRESSION}has more than {compression.PLAIN_BYTES_MAX} bytes"
    for offset in range(0, size, window_bytes):
        data = filesystem.read_at(fd, offset, window_bytes)
        is_last = offset + window_bytes >= size
        yield Window(FileContents([], [DamagedRange(offset, len(data), reason)]), data, offset, is_last)
