"""What a listing of a directory adds up to, in bytes and numbers of files. Opens no file.

Of several sinks, each queue may have a name of the same file: waiting, or delivered and kept. It counts once, and as waiting
as long as it does for one of them. A compressed copy that a queue has made is a file of its own, even of the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.store.filesystem import Filesystem


class Account(NamedTuple):
    """What a listing adds up to; bytes and numbers of files. What waits for several sinks counts once."""

    active_files: int
    active_bytes: int
    sealed_files: int
    sealed_bytes: int
    corrupt_files: int
    corrupt_bytes: int
    dead_files: int
    dead_bytes: int
    delivered_files: int
    delivered_bytes: int
    oldest_stamp: int | None  # microseconds since 1970, of the oldest sealed file that has a stamp
    newest_stamp: int | None

    @property
    def pending_bytes(self) -> int:
        """What still waits to be delivered."""
        return self.active_bytes + self.sealed_bytes

    @property
    def pending_files(self) -> int:
        """How many files that is."""
        return self.active_files + self.sealed_files


def tally(filesystem: Filesystem, path: str, queues: Sequence[str]) -> Account:
    """List a directory and its queues, and add up."""
    files = dict.fromkeys(Kind, 0)
    sizes = dict.fromkeys(Kind, 0)
    stamps: list[int] = []  # of the oldest sealed file that has a stamp, and of the newest
    seen = _Seen(filesystem)
    kept: list[tuple[str, str, int]] = []
    for place in (path, *queues):
        for name, size in filesystem.listing(place):
            kind = layout.kind_of(name)
            if kind is Kind.ACTIVE and size == 0:
                continue  # a spare, or not yet written to
            if queues and kind is Kind.DELIVERED:
                kept.append((place, name, size))
                continue
            if queues and kind is Kind.SEALED and seen.has(place, name):
                continue
            files[kind] += 1
            sizes[kind] += size
            if kind is Kind.SEALED and (stamp := layout.stamp_of(name)) is not None:
                stamps = [min(stamp, *stamps), max(stamp, *stamps)] if stamps else [stamp, stamp]
    for place, name, size in kept:
        if not seen.has(place, name):
            files[Kind.DELIVERED] += 1
            sizes[Kind.DELIVERED] += size
    return Account(
        active_files=files[Kind.ACTIVE] + files[Kind.LEGACY_ACTIVE],
        active_bytes=sizes[Kind.ACTIVE] + sizes[Kind.LEGACY_ACTIVE],
        sealed_files=files[Kind.SEALED],
        sealed_bytes=sizes[Kind.SEALED],
        corrupt_files=files[Kind.CORRUPT],
        corrupt_bytes=sizes[Kind.CORRUPT],
        dead_files=files[Kind.DEAD],
        dead_bytes=sizes[Kind.DEAD],
        delivered_files=files[Kind.DELIVERED],
        delivered_bytes=sizes[Kind.DELIVERED],
        oldest_stamp=stamps[0] if stamps else None,
        newest_stamp=stamps[1] if stamps else None,
    )


class _Seen:
    """The files that were come by, each under one of its names."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._paths: dict[str, list[str]] = {}  # by what they were called when they were sealed

    def has(self, place: str, name: str) -> bool:
        """Whether a file was come by under another name; from now on it was."""
        packed = name.endswith(layout.COMPRESSED)
        path, batch = f"{place}/{name}", layout.batch_id(name)
        known = self._paths.setdefault(batch + layout.COMPRESSED if packed else batch, [])
        if known and not (packed and not any(self._filesystem.is_one(path, other) for other in known)):
            return True
        known.append(path)
        return False
