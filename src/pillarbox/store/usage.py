"""Disk usage by kind of file, from a listing. Opens no file.

With several sinks, a batch file has hard links in several queues, waiting or retained. It counts once, and as waiting while it
waits for one of them. A compressed copy that one queue has made is a file of its own, even under the same name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pillarbox.store import layout
from pillarbox.store.dirscan import FileTotals
from pillarbox.store.dirscan import totals_by_pattern as sums_of
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pillarbox.store.dirscan import FileEntry
    from pillarbox.store.filesystem import Filesystem


class DiskUsage(NamedTuple):
    """Bytes and numbers of files, by kind. A batch that waits for several sinks counts once."""

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
    oldest_sealed_at: int | None  # microseconds since 1970; None where no batch file has a timestamp in its name
    newest_sealed_at: int | None

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait to be delivered."""
        return self.active_bytes + self.sealed_bytes

    @property
    def pending_files(self) -> int:
        """Files that wait to be delivered."""
        return self.active_files + self.sealed_files


def measure_usage(filesystem: Filesystem, path: str, queues: Sequence[str]) -> DiskUsage:
    """List a directory and its queues, and add up their files."""
    sums = _by_kind(
        _totals_without_duplicates(filesystem, (path, *queues)) if queues else filesystem.file_totals(path, layout.PATTERNS)
    )
    active, legacy, sealed = sums[Kind.ACTIVE], sums[Kind.LEGACY_ACTIVE], sums[Kind.SEALED]
    return DiskUsage(
        active_files=active.files - active.empty + legacy.files,  # an empty one is a spare, or was not written to yet
        active_bytes=active.bytes + legacy.bytes,
        sealed_files=sealed.files,
        sealed_bytes=sealed.bytes,
        corrupt_files=sums[Kind.CORRUPT].files,
        corrupt_bytes=sums[Kind.CORRUPT].bytes + sums[Kind.RANGES].bytes,
        dead_files=sums[Kind.DEAD].files,
        dead_bytes=sums[Kind.DEAD].bytes,
        delivered_files=sums[Kind.DELIVERED].files,
        delivered_bytes=sums[Kind.DELIVERED].bytes,
        oldest_sealed_at=sealed.oldest_micros,
        newest_sealed_at=sealed.newest_micros,
    )


def _by_kind(sums: Iterable[FileTotals]) -> dict[Kind, FileTotals]:
    totals = dict.fromkeys(Kind, FileTotals())
    for kind, more in zip(layout.KINDS, sums, strict=True):
        totals[kind] = totals[kind].combined_with(more)
    return totals


def _totals_without_duplicates(filesystem: Filesystem, paths: Sequence[str]) -> list[FileTotals]:
    """The totals of several directories; a file that has names in several counts once."""
    seen = _CountedFiles(filesystem)
    retained: list[tuple[str, FileEntry]] = []  # counted last: a file that still waits anywhere counts as waiting

    def entries() -> Iterator[FileEntry]:
        for path in paths:
            for entry in filesystem.list_files(path):
                kind = layout.kind_of(entry.name)
                if kind is Kind.DELIVERED:
                    retained.append((path, entry))
                elif kind is not Kind.SEALED or not seen.is_counted(path, entry.name):
                    yield entry
        yield from (entry for path, entry in retained if not seen.is_counted(path, entry.name))

    return sums_of(entries(), layout.PATTERNS)


class _CountedFiles:
    """The files that were counted, each under one of its names."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._paths: dict[str, list[str]] = {}  # by the name at the time of sealing

    def is_counted(self, directory: str, name: str) -> bool:
        """Whether the file was counted under another name. It counts as counted from now on."""
        packed = name.endswith(layout.COMPRESSED_SUFFIX)
        path, batch = f"{directory}/{name}", layout.batch_id(name)
        known = self._paths.setdefault(batch + layout.COMPRESSED_SUFFIX if packed else batch, [])
        if known and not (packed and not any(self._filesystem.is_same_file(path, other) for other in known)):
            return True
        known.append(path)
        return False
