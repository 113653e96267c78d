"""Compresses sealed files that have waited, while there is nothing better to do: then more of an outage fits into the limits.

One file at a time, and no longer than the pauses between them. The newest first, and never the next few: these go out once the
destination is back. `Directory.replace_with_compressed` has the order in which a file becomes another.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.errors import FileUnusableError
from pillarbox.store import compression, layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile

log = logging.getLogger("pillarbox")

SOON: Final = 8  # files at the head of the queue that stay as they are
WORTH_IT: Final = 0.9  # of its size: what stays larger is left as it is
_LOOK_S: Final = 1.0  # between two listings at least
_LOOK_SHARE: Final = 20  # listing may take a twentieth of the time
_AGAIN_S: Final = 30.0  # after the disk has refused


class Compressor:
    """Compresses the files of a directory that were sealed `after_s` seconds ago, but those that are `in_use`.

    `on_shrunk(bytes)` hears how much less waits.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        after_s: float,
        in_use: Callable[[str], bool],
        on_shrunk: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._after_s = after_s
        self._in_use = in_use
        self._on_shrunk = on_shrunk
        self._due: list[str] = []  # the next one last
        self._left: set[str] = set()  # looked at, and better left as they are
        self._not_before = 0.0
        self._trouble = ""

    def work(self) -> tuple[bool, float]:
        """Compress the next file, where one is due: whether one was, and the seconds until the next. Raises no `OSError`."""
        began = self._clock.monotonic()
        if began < self._not_before:
            return False, self._not_before - began
        try:
            done = self._next(began)
            self._report("")
        except (OSError, FileUnusableError) as error:
            self._report(str(error))
            self._not_before = began + _AGAIN_S
            return False, _AGAIN_S
        rest = max(self._not_before - self._clock.monotonic(), self._clock.monotonic() - began if done else 0.0)
        return done, rest

    def _next(self, now: float) -> bool:
        if not self._due:
            self._look()
            took = self._clock.monotonic() - now
            if not self._due:
                self._not_before = now + max(_LOOK_S, _LOOK_SHARE * took)
        while self._due:
            name = self._due.pop()
            taken = None if self._in_use(name) else self._directory.lock_existing(name, exclusive=True)
            if taken is None:
                continue
            try:
                if self._compress(taken):
                    return True
            finally:
                self._directory.filesystem.close(taken.fd)
        return False

    def _look(self) -> None:
        """List what is due."""
        found = self._directory.batch_names()
        self._left &= set(found)
        before = self._clock.micros() - int(self._after_s * 1e6)
        for name in found[SOON:]:
            stamp = layout.sealed_at(name)
            if stamp is not None and stamp <= before and name.endswith(layout.SUFFIX) and name not in self._left:
                self._due.append(name)

    def _compress(self, file: LockedFile) -> bool:
        """Whether it was worth it."""
        filesystem = self._directory.filesystem
        if filesystem.size(file.fd) > compression.PLAIN_BYTES_MAX:
            self._left.add(file.name)
            return False
        plain = filesystem.read_all(file.fd)
        name = layout.compressed_name(file.name)
        packed = compression.compress(name, plain)
        if len(packed) > WORTH_IT * len(plain) or compression.decompressed_lines(name, packed) != plain:
            self._left.add(file.name)
            return False
        self._directory.replace_with_compressed(file, name, packed)
        if not filesystem.has_name(file.fd):  # otherwise the plain file waits on, for another sink
            self._on_shrunk(len(plain) - len(packed))
        return True

    def _report(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("%s: what waits is not compressed: %s", self._directory.path, trouble)
        self._trouble = trouble
