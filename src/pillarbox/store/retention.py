"""Retains delivered batch files for a while, under names that contain the time of delivery. The oldest are removed first.

Only the names say how old the files are, so that the next process continues. Other processes remove retained files too, for
lack of space, or redeliver them. So the directory is listed again, at most once a second, before files that exceed a limit are
removed. If the volume lacks space, the sealer of any process removes retained files of all sinks. A file that several sinks
retain is removed for all of them at once, because only the removal of its last name frees space.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.store import layout
from pillarbox.store.dirscan import FileEntry
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile

log = logging.getLogger("pillarbox")

FILES_MAX: Final = 100_000  # retained files; each listing of the directory includes all of them
_RELIST_S: Final = 1.0  # shortest time between two listings
_RELIST_SHARE: Final = 10  # listing may take a tenth of the time
_NOT_RETAINED: Final = "delivered files could not be retained"
_NOT_REMOVED: Final = "retained files could not be removed"
_STEP_MICROS: Final = 5_000_000  # how far the wall clock may be ahead of the monotonic one: clocks are adjusted all the time
_STEP_BELIEVED_AFTER_S: Final = 600.0  # a forward step of the wall clock that lasts for so long is a correction
_REMOVE_AT_ONCE_MAX: Final = 1000  # files per call, because deliveries wait for it


class _SteadyClock:
    """The wall clock without forward steps, until one has lasted for `believe_s` seconds.

    Otherwise a clock that is a day ahead for a second would remove files that must be retained for a day.
    """

    def __init__(self, clock: Clock, believe_s: float) -> None:
        self._clock = clock
        self._believe_s = believe_s
        self._wall_micros, self._monotonic_s = clock.micros(), clock.monotonic()  # times of both clocks when they agreed
        self._ahead_since: float | None = None  # monotonic seconds

    def micros(self) -> int:
        """Microseconds since 1970."""
        now, now_s = self._clock.micros(), self._clock.monotonic()
        expected = self._wall_micros + int((now_s - self._monotonic_s) * 1e6)
        if now <= expected + _STEP_MICROS:
            self._ahead_since = None
        elif self._ahead_since is None:
            self._ahead_since = now_s
        if self._ahead_since is not None and now_s - self._ahead_since < self._believe_s:
            return expected
        self._wall_micros, self._monotonic_s, self._ahead_since = now, now_s, None
        return now


class Retention:
    """Retains what one delivery worker has delivered, for `keep_s` seconds and up to `max_bytes`."""

    def __init__(self, directory: Directory, clock: Clock, keep_s: float, max_bytes: int) -> None:
        self._directory = directory
        self._clock = clock
        self._steady_clock = _SteadyClock(clock, min(keep_s, _STEP_BELIEVED_AFTER_S))
        self._keep_micros = int(keep_s * 1e6)
        self._max_bytes = max_bytes
        self._files: deque[FileEntry] = deque()
        self._bytes = 0
        self._list_at: float | None = None  # monotonic time of the earliest next listing; None before the first
        self._state_logs = {problem: StateLog(clock) for problem in (_NOT_RETAINED, _NOT_REMOVED)}

    def retain(self, file: LockedFile) -> bool:
        """Retain a delivered file that this process has locked. False if that fails; then the file must be removed."""
        try:
            size = self._directory.filesystem.size(file.fd)
            name = self._directory.retain(file.name)
        except OSError as error:
            self._log_once(_NOT_RETAINED, error)
            return False
        self._state_logs[_NOT_RETAINED].is_over()
        self._files.append(FileEntry(name, size))
        self._bytes += size
        return True

    def prune(self) -> None:
        """Remove files that are too old or exceed a limit. Files that cannot be removed are tried again at the next call."""
        not_removed: list[FileEntry] = []  # files that could not be removed
        problem: OSError | None = None
        try:
            if self._list_at is None or (self._is_over_limit() and self._clock.monotonic() >= self._list_at):
                self._relist()
        except OSError as error:
            problem = error
        oldest = self._steady_clock.micros() - self._keep_micros
        for _ in range(_REMOVE_AT_ONCE_MAX):
            if not self._files:
                break
            at = layout.delivered_at(self._files[0].name)
            if not self._is_over_limit() and (at is None or at > oldest):
                break
            file = self._files.popleft()
            try:
                self._directory.remove(file.name)
                self._bytes -= file.size
            except OSError as error:
                problem = error
                not_removed.append(file)
        self._files.extendleft(reversed(not_removed))
        if problem is None:
            self._state_logs[_NOT_REMOVED].is_over()
        else:
            self._log_once(_NOT_REMOVED, problem)

    def _is_over_limit(self) -> bool:
        return self._bytes > self._max_bytes or len(self._files) > FILES_MAX

    def _relist(self) -> None:
        began = self._clock.monotonic()
        self._files = deque(self._directory.delivered_files())
        self._bytes = sum(file.size for file in self._files)
        now = self._clock.monotonic()
        self._list_at = now + max(_RELIST_S, _RELIST_SHARE * (now - began))

    def _log_once(self, problem: str, error: OSError) -> None:
        if self._state_logs[problem].is_new_problem(str(error)):
            log.warning("%s: %s: %s", self._directory.path, problem, error)


def retention_directories(directory: Directory) -> dict[str, Directory]:
    """The directories with retained files, by sink; "" is the outbox directory."""
    return {queue.sink: queue for queue in (directory, *directory.queues())}


def evict_delivered(directory: Directory, enough: Callable[[int], bool]) -> int:
    """Remove retained files until `enough(bytes removed)` or none is left. Returns how many. Raises `OSError`."""
    retained = [(file, where) for where in retention_directories(directory).values() for file in where.delivered_files()]
    # Batches that are pending for another sink come last, because removing a retained link of theirs frees nothing.
    waiting = directory.waiting_batch_ids()
    retained.sort(key=lambda item: (layout.batch_id(item[0].name) in waiting, item[0]))
    names: dict[str, list[tuple[FileEntry, Directory]]] = {}  # by batch id
    for file, where in retained:
        names.setdefault(layout.batch_id(file.name), []).append((file, where))
    removed = size = 0
    problem: OSError | None = None
    for links in names.values():
        if enough(size):
            break
        try:
            for file, where in links:
                where.remove(file.name)
        except OSError as error:  # an error of this file; the next one may be removed
            problem = error
            continue
        removed += 1
        size += max(file.size for file, _ in links)
    if problem is not None and not removed:
        raise problem
    if removed:
        log.warning("%s: the volume lacks space; retained batches deleted: %d (%d bytes)", directory.path, removed, size)
    return removed
