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

LOOK_EVERY_S: Final = 0.25  # how long a request may lie unseen while a writer has something to seal
_BYTES_MAX: Final = 4096  # of the file are looked at


class Request(msgspec.Struct, frozen=True):
    """What `seal.request` holds: who asked, and when."""

    id: str
    at_micros: int


class Requests:
    """What a writer's sealer knows of the requests of others."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._next_look = 0.0
        self._found: bytes | None = None
        self._answered: bytes | None = None

    def has_new(self) -> bool:
        """Whether somebody has asked since the last one was answered; looks seldom, and the first look tells what is old."""
        now = self._clock.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY_S
            self._look()
        return self._found != self._answered

    def _look(self) -> None:
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.at(layout.SEAL_REQUEST))
        except FileNotFoundError:
            self._found = b""
        except (OSError, FileUnusableError):
            return  # whoever asks is told so
        else:
            try:
                self._found = filesystem.read_at(fd, 0, _BYTES_MAX)
            except OSError:
                return
            finally:
                filesystem.close(fd)
        if self._answered is None:
            self._answered = self._found

    def answer(self) -> None:
        """What was asked for is under way."""
        self._answered = self._found


def ask(directory: Directory, clock: Clock) -> None:
    """Have all writers of the directory seal what they hold. Raises `FileUnusableError`, or the `OSError` of the disk."""
    filesystem = directory.filesystem
    request = Request(directory.new_id(), clock.micros())
    fd = filesystem.open_lock(directory.at(layout.SEAL_REQUEST))
    try:
        filesystem.replace_all(fd, msgspec.json.encode(request) + b"\n")
    finally:
        filesystem.close(fd)
