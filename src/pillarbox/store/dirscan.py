"""Directory scans: names, totals, and the first names in order. Pure.

`src/speedups/dirscan.c` does the same while it reads a directory, without the GIL. This is the version in Python, for simulated
file systems and where there is no C extension.
"""

from __future__ import annotations

import re
from heapq import nsmallest
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TIMESTAMP = re.compile(r"(\d{16})-", re.ASCII)
# 1 January 2101, in microseconds since 1970. A later timestamp in a name is ignored: it is forged, or the clock was very wrong.
# The bound is absolute, because a clock that starts years in the past must not disqualify correct names.
TIMESTAMP_MAX_MICROS: Final = 4_133_980_800_000_000


class FileEntry(NamedTuple):
    """A regular file in a directory."""

    name: str
    size: int


class NamePattern(NamedTuple):
    """Names with this beginning and end; if `end` is None, only the name `begin`."""

    begin: str
    end: str | None


NamePatterns = tuple[NamePattern, ...]
ALL_NAMES: Final[NamePatterns] = (NamePattern("", ""),)


class FileTotals(NamedTuple):
    """Totals of the files whose names match a pattern."""

    files: int = 0
    bytes: int = 0
    empty: int = 0  # number of files without content
    oldest_micros: int | None = None  # timestamps in the names, after `begin`: 16 digits and a hyphen
    newest_micros: int | None = None

    def combined_with(self, other: FileTotals) -> FileTotals:
        """The totals of both together."""
        times = [
            micros
            for micros in (self.oldest_micros, self.newest_micros, other.oldest_micros, other.newest_micros)
            if micros is not None
        ]
        files, size, empty = self.files + other.files, self.bytes + other.bytes, self.empty + other.empty
        return FileTotals(files, size, empty, min(times, default=None), max(times, default=None))


class NamePage(NamedTuple):
    """The first of some names, in order."""

    names: list[str]
    last: str  # the last of all names; empty if there is none
    total_files: int  # how many names there are in all


def matches(name: str, pattern: NamePattern) -> bool:
    """Whether a name matches a pattern."""
    begin, end = pattern
    return name == begin if end is None else name.startswith(begin) and name.endswith(end)


def matching_names(entries: Iterable[FileEntry], patterns: NamePatterns) -> Iterator[str]:
    """The names that match one of the patterns."""
    return (name for name, _ in entries if any(matches(name, pattern) for pattern in patterns))


def totals_by_pattern(entries: Iterable[FileEntry], patterns: NamePatterns) -> list[FileTotals]:
    """The totals of files; each file counts for the first pattern that its name matches."""
    files, sizes, empty = ([0] * len(patterns) for _ in range(3))
    times: list[list[int]] = [[] for _ in patterns]  # the lowest and the highest
    for name, size in entries:
        for index, pattern in enumerate(patterns):
            if matches(name, pattern):
                files[index] += 1
                sizes[index] += size
                empty[index] += size == 0
                match = _TIMESTAMP.match(name, len(pattern.begin))
                if match and int(match[1]) <= TIMESTAMP_MAX_MICROS:
                    both = [int(match[1]), *times[index]]
                    times[index] = [min(both), max(both)]
                break
    columns = zip(files, sizes, empty, times, strict=True)
    return [FileTotals(number, size, none, *(ends or (None, None))) for number, size, none, ends in columns]


def first_names(names: Iterable[str], after: str, until: str, limit: int) -> NamePage:
    """The first `limit` names after `after` and, if it is not empty, up to `until`."""
    low, high = _bytes(after), _bytes(until)
    count, last = 0, b""

    def keys_in_range() -> Iterator[bytes]:
        nonlocal count, last
        for key in map(_bytes, names):
            if low < key and (not high or key <= high):
                count += 1
                last = max(last, key)
                yield key

    first = nsmallest(limit, keys_in_range()) if limit else [key for key in keys_in_range() if not key]
    return NamePage(list(map(_text, first)), _text(last), count)


def _bytes(name: str) -> bytes:
    """A name as bytes. Names are ordered by their bytes, which is the order of their characters, and may be any bytes."""
    return name.encode(errors="surrogateescape")


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


class _FileLister(Protocol):
    def list_files(self, path: str) -> Iterator[FileEntry]: ...


class PortableScanOps:
    """The scans in terms of `list_files`, for simulated file systems."""

    def list_names(self: _FileLister, path: str, patterns: NamePatterns, *, counted: bool = False) -> Iterator[str]:  # noqa: ARG002 - all count
        """The names of the regular files in a directory that match one of the patterns."""
        return matching_names(self.list_files(path), patterns)

    def file_totals(self: _FileLister, path: str, patterns: NamePatterns) -> list[FileTotals]:
        """The totals of the files in a directory; each file counts for the first pattern that its name matches."""
        return totals_by_pattern(self.list_files(path), patterns)

    def first_names(
        self: _FileLister, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0
    ) -> NamePage:
        """Of the names that match one of the patterns, the first `limit` after `after` and up to `until`."""
        return first_names(matching_names(self.list_files(path), patterns), after, until, limit)
