"""Reads a ledger of any size in parts.

A ledger is compacted at 4 MiB. One that could not be compacted for a long time, or that another program wrote, may be larger
than the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.ledger_entries import LedgerEntry, parse_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.store.filesystem import Filesystem

PART_BYTES: Final = 1 << 20  # in memory at a time
LINE_BYTES_MAX: Final = 1 << 20  # a longer line is no entry


class LedgerPart(NamedTuple):
    """The entries of a part of a ledger, and the number of its lines that are damaged or of a later version."""

    entries: list[LedgerEntry]
    unread: int


def read_parts(filesystem: Filesystem, fd: int, start: int = 0, end: int | None = None) -> Iterator[LedgerPart]:
    """The entries of an open ledger between two offsets, a part at a time. Raises `OSError`."""
    rest, is_rest_of_line = b"", False
    while part := filesystem.read_at(fd, start, PART_BYTES if end is None else min(PART_BYTES, end - start)):
        start += len(part)
        lines, line_feed, rest_of_part = part.rpartition(b"\n")
        if line_feed:
            yield LedgerPart(*parse_ledger(lines.partition(b"\n")[2] if is_rest_of_line else rest + lines))
            rest, is_rest_of_line = rest_of_part, False
        elif not is_rest_of_line:
            rest += part
        if len(rest) > LINE_BYTES_MAX:
            yield LedgerPart([], 1)
            rest, is_rest_of_line = b"", True
    yield LedgerPart(*parse_ledger(rest))
