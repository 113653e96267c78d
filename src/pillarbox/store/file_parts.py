"""Reads a file in parts, so that a file of any size can be copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pillarbox.store.filesystem import Filesystem

PART_BYTES: Final = 1 << 20  # in memory at a time
_TAIL_READ_BYTES: Final = 64 * 1024  # read at a time to find the last whole line


def parts_of(
    filesystem: Filesystem, fd: int, size: int | None = None, in_memory: Iterable[tuple[int, bytes]] = ()
) -> Iterator[bytes]:
    """The first `size` bytes of an open file, or all of it, overwritten by `in_memory`: pairs of an offset and bytes.

    Raises `OSError`.
    """
    overlays = list(in_memory)
    end = filesystem.size(fd) if size is None else min(size, filesystem.size(fd))
    end = max([end, *(offset + len(data) for offset, data in overlays)])
    for start in range(0, end, PART_BYTES):
        stop = min(end, start + PART_BYTES)
        part = bytearray(filesystem.read_at(fd, start, stop - start))
        part.extend(bytes(stop - start - len(part)))
        for offset, data in overlays:
            first, last = max(start, offset), min(stop, offset + len(data))
            if first < last:
                part[first - start : last - start] = data[first - offset : last - offset]
        yield bytes(part)


def end_of_last_line(filesystem: Filesystem, fd: int, size: int) -> int:
    """The offset after the last line feed in a file of `size` bytes; 0 if it has none."""
    while size:
        start = max(0, size - _TAIL_READ_BYTES)
        line_feed = filesystem.read_at(fd, start, size - start).rfind(b"\n")
        if line_feed >= 0:
            return start + line_feed + 1
        size = start
    return 0
