"""A file that a writer appends to, will, or did."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Literal

from pillarbox.store import layout
from pillarbox.store.directory import Taken
from pillarbox.store.speed import Counts

if TYPE_CHECKING:
    from pillarbox.store.filesystem import Filesystem

_TAIL_BYTES: Final = 64 * 1024  # how much is read at a time to find the last whole line

SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]


class ActiveFile(Counts):
    """A file that this writer appends to, will, or did, and what is in it."""

    __slots__ = (
        "counted",
        "cut",
        "doubtful",
        "entered",
        "number",
        "reason",
        "sealed",
        "spoilt",
        "synced",
        "syncing",
        "taken",
    )

    def __init__(self, taken: Taken, *, entered: bool = False) -> None:
        self.taken = taken
        self.fd = taken.fd
        self.number = layout.by_writer(taken.name)[1]  # a writer's files are filled in this order
        self.syncing = threading.Lock()  # held while it is synced, replaced, or closed, by its last user
        self.synced = 0  # bytes that are known to be durable
        self.cut = False  # something behind them was cut off since: without a sync it may be there again
        self.entered = entered  # its name is durable
        self.doubtful = False  # a sync of it has begun, and nobody knows yet that it was good
        self.spoilt = False  # behind its bytes there are more, of a call that was refused
        self.sealed = False  # its name is another, its descriptor closed
        self.bytes = 0
        self.events = 0
        self.attend_at = 1  # number of events at which the hot path calls `_attend`
        self.counted = False  # among the pending files
        self.reason: SealReason = "manual"  # why it was retired


NOWHERE: Final = Taken("", -1)


def end_of_lines(filesystem: Filesystem, fd: int, size: int) -> int:
    """Where the last whole line of a file of so many bytes ends."""
    while size:
        start = max(0, size - _TAIL_BYTES)
        found = filesystem.read_at(fd, start, size - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0
