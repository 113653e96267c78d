"""A file that a writer appends to, will, or did."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Literal

from pillarbox._native import SegmentCounters
from pillarbox.store import layout
from pillarbox.store.directory import LockedFile

if TYPE_CHECKING:
    from pillarbox.store.filesystem import Filesystem

_TAIL_READ_BYTES: Final = 64 * 1024  # how much is read at a time to find the last whole line

SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]


class Segment(SegmentCounters):
    """A file that this writer appends to, will, or did, and what is in it."""

    __slots__ = (
        "has_leftover",
        "is_counted",
        "is_sealed",
        "locked_file",
        "name_durable",
        "number",
        "seal_reason",
        "sync_lock",
        "sync_unknown",
        "synced_bytes",
        "truncated",
    )

    def __init__(self, locked_file: LockedFile, *, name_durable: bool = False) -> None:
        self.locked_file = locked_file
        self.fd = locked_file.fd
        self.number = layout.active_sort_key(locked_file.name)[1]  # a writer's files are filled in this order
        self.sync_lock = threading.Lock()  # held while it is synced, replaced, or closed, by its last user
        self.synced_bytes = 0  # bytes that are known to be durable
        self.truncated = False  # something behind them was cut off since: without a sync it may be there again
        self.name_durable = name_durable  # its name is durable
        self.sync_unknown = False  # a sync of it has begun, and nobody knows yet that it was good
        self.has_leftover = False  # behind its bytes there are more, of a call that was refused
        self.is_sealed = False  # its name is another, its descriptor closed
        self.bytes = 0
        self.events = 0
        self.attend_at = 1  # number of events at which the hot path calls `_attend`
        self.is_counted = False  # among the pending files
        self.seal_reason: SealReason = "manual"  # why it was retired


NO_FILE: Final = LockedFile("", -1)


def end_of_last_line(filesystem: Filesystem, fd: int, size: int) -> int:
    """Where the last whole line of a file of so many bytes ends."""
    while size:
        start = max(0, size - _TAIL_READ_BYTES)
        found = filesystem.read_at(fd, start, size - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0
