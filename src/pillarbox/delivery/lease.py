"""One process delivers at a time: the lock that says which, and the heartbeat in it that says how it is doing."""

from __future__ import annotations

import contextlib
from os import getpid
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.delivery.state import Heartbeat
from pillarbox.store import layout

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.stats import State
    from pillarbox.store.directory import Directory

HEARTBEAT_INTERVAL_S: Final = 1.0
_READ_ATTEMPTS: Final = 3  # of one that cannot be read: it may be just being written


class Lease:
    """`deliver.lock` of a directory. The kernel releases it when the process dies; the file is never removed."""

    def __init__(self, directory: Directory, sink: str, clock: Clock, durability: str = "") -> None:
        self._directory = directory
        self._sink = sink
        self._clock = clock
        self._durability = durability
        self._fd = -1
        self._next_heartbeat = 0.0

    @property
    def is_held(self) -> bool:
        """Whether this process delivers."""
        return self._fd >= 0

    def is_valid(self) -> bool:
        """Whether it is still the lock that others see; one that somebody removed is let go."""
        if self.is_held and not self._directory.filesystem.is_file_at(self._fd, self._directory.path_of(layout.DELIVER_LOCK)):
            self.release()
        return self.is_held

    def acquire(self) -> bool:
        """Become the one that delivers; False where another process is."""
        locked_file = self._directory.acquire_lock_file(layout.DELIVER_LOCK)
        if locked_file is not None:
            self._fd = locked_file.fd
        return self.is_held

    def write_heartbeat(self, state: State, delivered: int, last_error: str, *, now: bool = False) -> None:
        """Write down how it goes, at most once a second unless it must be `now`."""
        now_s = self._clock.monotonic()
        if not self.is_held or (now_s < self._next_heartbeat and not now):
            return
        self._next_heartbeat = now_s + HEARTBEAT_INTERVAL_S
        if not self.is_valid():
            return
        beat = Heartbeat(getpid(), self._sink, state, self._clock.micros(), delivered, last_error, self._durability)
        try:
            self._directory.filesystem.overwrite(self._fd, msgspec.json.encode(beat) + b"\n")
        except (OSError, ValueError):
            return  # a full disk: whoever asks sees that the heartbeat is old

    def release(self) -> None:
        """Let another process deliver."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._directory.filesystem.close(fd)


def read_heartbeat(directory: Directory) -> Heartbeat | None:
    """What the process that delivers, or did, wrote last. Takes no lock."""
    for _ in range(_READ_ATTEMPTS):
        # It is written over in place: behind its end, there may be the rest of a longer one for a moment.
        line = directory.read_small_file(layout.DELIVER_LOCK).partition(b"\n")[0]
        if not line:
            break
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=Heartbeat)
    return None
