"""How a command reaches the writers of a directory: `seal.request`, which holds a fresh id with each request, and nothing else.

A writer's sealer compares it with what it saw last, and seals its active file where the two differ. Nothing rests on the file:
one that is torn, lost or planted has a file sealed early, and whoever asked asks again. It is written over, and never removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

REQUEST_POLL_S: Final = 0.25  # how long a request may lie unseen while a writer has something to seal
_REQUEST_BYTES_MAX: Final = 4096  # of the file are looked at


class SealRequest(msgspec.Struct, frozen=True):
    """What `seal.request` holds: who asked, and when."""

    id: str
    at_micros: int


class SealRequestReader:
    """What a writer's sealer knows of the requests of others."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._next_poll = 0.0
        self._latest: bytes | None = None
        self._handled: bytes | None = None

    def has_new(self) -> bool:
        """Whether somebody has asked since the last one was answered; looks seldom, and the first look tells what is old."""
        now = self._clock.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + REQUEST_POLL_S
            self._read_request()
        return self._latest != self._handled

    def _read_request(self) -> None:
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.path_of(layout.SEAL_REQUEST))
        except FileNotFoundError:
            self._latest = b""
        except (OSError, FileUnusableError):
            return  # whoever asks is told so
        else:
            try:
                self._latest = filesystem.read_at(fd, 0, _REQUEST_BYTES_MAX)
            except OSError:
                return
            finally:
                filesystem.close(fd)
        if self._handled is None:
            self._handled = self._latest

    def mark_handled(self) -> None:
        """What was asked for is under way."""
        self._handled = self._latest


def request_seal(directory: Directory, clock: Clock) -> None:
    """Have all writers of the directory seal what they hold. Raises `FileUnusableError`, or the `OSError` of the disk."""
    filesystem = directory.filesystem
    request = SealRequest(directory.new_id(), clock.micros())
    fd = filesystem.open_lock_file(directory.path_of(layout.SEAL_REQUEST))
    try:
        filesystem.overwrite(fd, msgspec.json.encode(request) + b"\n")
    finally:
        filesystem.close(fd)
