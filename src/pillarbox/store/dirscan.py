"""What is asked of the files of a directory but each by itself: names, sums, and the first in order. Pure.

`_listing.c` does the same while it reads a directory, without the interpreter lock; here it is said in Python, for where that
is not compiled, and for file systems that are simulated.
"""

from __future__ import annotations

import re
from heapq import nsmallest
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STAMP = re.compile(r"(\d{16})-", re.ASCII)


class Entry(NamedTuple):
    """A regular file in a directory."""

    name: str
    size: int


class Pattern(NamedTuple):
    """Names that begin and end so; with `end` None those that are `begin`, no more and no less."""

    begin: str
    end: str | None


Patterns = tuple[Pattern, ...]
ALL: Final[Patterns] = (Pattern("", ""),)


class Sum(NamedTuple):
    """The files whose names follow a pattern; bytes."""

    files: int = 0
    bytes: int = 0
    empty: int = 0  # files
    oldest: int | None = None  # of the stamps behind the beginning: 16 digits and a hyphen
    newest: int | None = None

    def plus(self, other: Sum) -> Sum:
        """Both together."""
        stamps = [stamp for stamp in (self.oldest, self.newest, other.oldest, other.newest) if stamp is not None]
        files, size, empty = self.files + other.files, self.bytes + other.bytes, self.empty + other.empty
        return Sum(files, size, empty, min(stamps, default=None), max(stamps, default=None))


class First(NamedTuple):
    """The first names in order, of those that were asked for."""

    names: list[str]
    last: str  # of all, also beyond the first; empty where there is none
    files: int  # how many there are in all


def follows(name: str, pattern: Pattern) -> bool:
    """Whether a name is one of those."""
    begin, end = pattern
    return name == begin if end is None else name.startswith(begin) and name.endswith(end)


def names(entries: Iterable[Entry], patterns: Patterns) -> Iterator[str]:
    """The names that follow one of the patterns."""
    return (name for name, _ in entries if any(follows(name, pattern) for pattern in patterns))


def sums(entries: Iterable[Entry], patterns: Patterns) -> list[Sum]:
    """What files add up to; each counts for the first of the patterns that its name follows."""
    files, sizes, empty = ([0] * len(patterns) for _ in range(3))
    stamps: list[list[int]] = [[] for _ in patterns]  # the least and the greatest
    for name, size in entries:
        for index, pattern in enumerate(patterns):
            if follows(name, pattern):
                files[index] += 1
                sizes[index] += size
                empty[index] += size == 0
                if match := _STAMP.match(name, len(pattern.begin)):
                    both = [int(match[1]), *stamps[index]]
                    stamps[index] = [min(both), max(both)]
                break
    found = zip(files, sizes, empty, stamps, strict=True)
    return [Sum(number, size, none, *(ends or (None, None))) for number, size, none, ends in found]


def first(names: Iterable[str], after: str, until: str, most: int) -> First:
    """The first `most` names behind `after` and up to `until`, where that is not empty."""
    low, high = _bytes(after), _bytes(until)
    count, last = 0, b""

    def wanted() -> Iterator[bytes]:
        nonlocal count, last
        for key in map(_bytes, names):
            if low < key and (not high or key <= high):
                count += 1
                last = max(last, key)
                yield key

    found = nsmallest(most, wanted()) if most else [key for key in wanted() if not key]
    return First(list(map(_text, found)), _text(last), count)


def _bytes(name: str) -> bytes:
    """What names are compared by, for they may be any bytes; of text, the order is that of its characters."""
    return name.encode(errors="surrogateescape")


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


class _Lists(Protocol):
    def listing(self, path: str) -> Iterator[Entry]: ...


class ByListing:
    """Answers all of it from its own listing, as a file system does that is simulated."""

    def names(self: _Lists, path: str, patterns: Patterns) -> Iterator[str]:
        """The names of the regular files in a directory that follow one of the patterns."""
        return names(self.listing(path), patterns)

    def sums(self: _Lists, path: str, patterns: Patterns) -> list[Sum]:
        """What the files in a directory add up to; each counts for the first of the patterns that its name follows."""
        return sums(self.listing(path), patterns)

    def first(self: _Lists, path: str, patterns: Patterns, after: str = "", until: str = "", most: int = 0) -> First:
        """Of the names that follow one of the patterns, the first `most` behind `after` and up to `until`."""
        return first(names(self.listing(path), patterns), after, until, most)
