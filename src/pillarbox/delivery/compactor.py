"""Compresses waiting batches while delivery pauses, so that a longer outage fits into `max_bytes`.

It compresses one batch at a time and then pauses for as long as that took. It begins with the newest and leaves the oldest few
as they are: these go out first once the destination is back. `Directory.replace_with_compressed` says in which durable order
the compressed file takes the place of the plain one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.errors import FileUnusableError
from pillarbox.store import compression, layout
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile

log = logging.getLogger("pillarbox")

PLAIN_FILES_AT_HEAD: Final = 8  # the oldest batches are not compressed
COMPRESSED_RATIO_MAX: Final = 0.9  # share of the plain size; a batch that does not become smaller than this stays plain
_LIST_INTERVAL_S: Final = 1.0  # shortest time between two listings of the directory
_LIST_TIME_FACTOR: Final = 20  # listing may take a twentieth of the time
_RETRY_AFTER_ERROR_S: Final = 30.0  # pause after an I/O error


class Compactor:
    """Compresses the batches of a directory that were sealed at least `after_s` seconds ago.

    Batches for which `in_use(name)` is true are left alone. `on_bytes_saved(bytes)` is called after each batch.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        after_s: float,
        in_use: Callable[[str], bool],
        on_bytes_saved: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._after_s = after_s
        self._in_use = in_use
        self._on_bytes_saved = on_bytes_saved
        self._due_names: list[str] = []  # the next one to compress is the last
        self._incompressible: set[str] = set()  # batches that are too large, or do not become smaller
        self._not_before = 0.0
        self._state_log = StateLog(clock)

    def compress_next(self) -> tuple[bool, float]:
        """Compress the next batch that is due. Logs I/O errors.

        Returns:
            Whether a batch was compressed, and the seconds until there may be another to compress.
        """
        began = self._clock.monotonic()
        if began < self._not_before:
            return False, self._not_before - began
        try:
            done = self._compress_due(began)
            self._log_problem("")
        except (OSError, FileUnusableError) as error:
            self._log_problem(str(error))
            self._not_before = began + _RETRY_AFTER_ERROR_S
            return False, _RETRY_AFTER_ERROR_S
        rest = max(self._not_before - self._clock.monotonic(), self._clock.monotonic() - began if done else 0.0)
        return done, rest

    def _compress_due(self, now: float) -> bool:
        if not self._due_names:
            self._list_due()
            took = self._clock.monotonic() - now
            if not self._due_names:
                self._not_before = now + max(_LIST_INTERVAL_S, _LIST_TIME_FACTOR * took)
        while self._due_names:
            name = self._due_names.pop()
            try:
                locked_file = None if self._in_use(name) else self._directory.lock_existing(name, exclusive=True)
            except FileUnusableError:  # delivery reports an unusable file
                continue
            if locked_file is None:
                continue
            try:
                if self._compress_file(locked_file):
                    return True
            finally:
                self._directory.filesystem.close(locked_file.fd)
        return False

    def _list_due(self) -> None:
        """List the batches that have waited long enough."""
        names = self._directory.batch_names()
        self._incompressible &= set(names)
        before = self._clock.micros() - int(self._after_s * 1e6)
        for name in names[PLAIN_FILES_AT_HEAD:]:
            stamp = layout.sealed_at(name)
            if stamp is not None and stamp <= before and name.endswith(layout.SUFFIX) and name not in self._incompressible:
                self._due_names.append(name)

    def _compress_file(self, file: LockedFile) -> bool:
        """Compress a file; False if it stays plain."""
        filesystem = self._directory.filesystem
        if filesystem.size(file.fd) > compression.PLAIN_BYTES_MAX:
            self._incompressible.add(file.name)
            return False
        plain = filesystem.read_all(file.fd)
        name = layout.compressed_name(file.name)
        packed = compression.compress(name, plain)
        if len(packed) > COMPRESSED_RATIO_MAX * len(plain) or compression.decompressed_lines(name, packed) != plain:
            self._incompressible.add(file.name)
            return False
        self._directory.replace_with_compressed(file, name, packed)
        if not filesystem.has_name(file.fd):  # otherwise the plain file still waits for another sink
            self._on_bytes_saved(len(plain) - len(packed))
        return True

    def _log_problem(self, problem: str) -> None:
        if not problem:
            self._state_log.is_over()
        elif self._state_log.is_new_problem(problem):
            log.warning("%s: cannot compress waiting batches: %s", self._directory.path, problem)
