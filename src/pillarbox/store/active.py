"""A file that a writer appends to, will, or did."""

from __future__ import annotations

import threading
from typing import Final, Literal

from pillarbox.store.directory import Taken

SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]


class ActiveFile:
    """A file that this writer appends to, will, or did, and what is in it."""

    __slots__ = ("attend_at", "bytes", "counted", "entered", "events", "fd", "reason", "sealed", "synced", "syncing", "taken")

    def __init__(self, taken: Taken, *, entered: bool = False) -> None:
        self.taken = taken
        self.fd = taken.fd
        self.syncing = threading.Lock()  # held while it is synced, replaced, or closed, by its last user
        self.synced = 0  # bytes that are known to be durable
        self.entered = entered  # its name is durable
        self.sealed = False  # its name is another, its descriptor closed
        self.bytes = 0
        self.events = 0
        self.attend_at = 1  # number of events at which the hot path calls `_attend`
        self.counted = False  # among the pending files
        self.reason: SealReason = "manual"  # why it was retired


NOWHERE: Final = Taken("", -1)
