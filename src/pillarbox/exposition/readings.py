"""What the process that delivers can tell beside its counters: the directory's files, its volume, and who holds the lease."""

from __future__ import annotations

import threading
from importlib.metadata import version
from os import getpid
from platform import python_version
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.delivery.lease import last_heartbeat
from pillarbox.telemetry import PENDING, Metric, of_sink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Account, Directory
    from pillarbox.store.filesystem import Space
    from pillarbox.telemetry import Reading

_LISTING_SHARE: Final = 10  # a directory of many files is listed for a tenth of the time at most, whoever asks how often


class Queue(NamedTuple):
    """What waits for one sink, and the process that has its lease, as it last said itself."""

    sink: str
    files: int
    bytes: int
    oldest_age_s: float  # 0 where nothing waits
    silent_s: float | None  # None: no process has delivered yet
    held: bool  # by this process


class Ground(NamedTuple):
    """A directory at one moment."""

    pending_bytes: int
    pending_files: int
    dead: tuple[int, int]  # bytes, files
    quarantine: tuple[int, int]
    queues: list[Queue]
    space: Space
    settings: Settings


class Surveyor:
    """Looks at a directory for whoever asks; takes no lock, and creates and adopts nothing."""

    def __init__(self, place: Directory, settings: Settings, clock: Clock) -> None:
        self._place = place
        self._settings = settings
        self._clock = clock
        self._looking = threading.Lock()
        self._found: Ground | None = None
        self._next = 0.0

    def look(self) -> list[tuple[str, Ground]]:
        """The directory by its name; nothing where it cannot be listed: the deliverer's state says why."""
        with self._looking:
            began = self._clock.monotonic()
            if self._found is None or began >= self._next:
                try:
                    self._found = self._survey()
                except OSError:
                    self._found = None
                now = self._clock.monotonic()
                self._next = now + _LISTING_SHARE * (now - began)
            return [] if self._found is None else [(self._settings.directory, self._found)]

    def _survey(self) -> Ground:
        place = self._place
        account = place.account()
        return Ground(
            account.pending_bytes,
            account.pending_files,
            (account.dead_bytes, account.dead_files),
            (account.corrupt_bytes, account.corrupt_files),
            [self._queue("", place, account)],
            place.filesystem.space(place.path),
            self._settings,
        )

    def _queue(self, sink: str, place: Directory, account: Account) -> Queue:
        now = self._clock.micros()
        beat = last_heartbeat(place)
        return Queue(
            sink,
            account.sealed_files,
            account.sealed_bytes,
            0.0 if account.oldest_stamp is None else max(0.0, (now - account.oldest_stamp) / 1e6),
            None if beat is None else max(0.0, (now - beat.at_micros) / 1e6),
            beat is not None and beat.pid == getpid(),
        )


def _beats(ground: Ground) -> Iterator[Reading]:
    return ((queue.silent_s, of_sink(queue.sink)) for queue in ground.queues if queue.silent_s is not None)


def _kept(ground: Ground, index: int) -> Iterator[Reading]:
    return ((kept[index], {"kind": kind}) for kind, kept in (("dead", ground.dead), ("quarantine", ground.quarantine)))


def _kept_limits(ground: Ground) -> Iterator[Reading]:
    kept = ground.settings.kept
    return (
        (limit, {"kind": kind}) for kind, limit in (("dead", kept.max_dead_bytes), ("quarantine", kept.max_quarantine_bytes))
    )


def _build(_ground: Ground) -> Iterator[Reading]:
    yield 1, {"version": version("pillarbox"), "python": python_version()}


# Of a `Ground`.
STANDING: Final = (
    *PENDING,
    Metric("limit.bytes", "By", "max_bytes as set here", "gauge", lambda g: [(g.settings.max_bytes, {})]),
    Metric("limit.files", "{file}", "max_files as set here", "gauge", lambda g: [(g.settings.max_files, {})]),
    Metric("queue.bytes", "By", "Bytes of sealed files", "gauge", lambda g: ((q.bytes, of_sink(q.sink)) for q in g.queues)),
    Metric("queue.files", "{file}", "Sealed files", "gauge", lambda g: ((q.files, of_sink(q.sink)) for q in g.queues)),
    Metric(
        "oldest.age",
        "s",
        "Since the oldest file that waits was sealed; 0 where none does",
        "gauge",
        lambda g: ((q.oldest_age_s, of_sink(q.sink)) for q in g.queues),
    ),
    Metric("heartbeat.age", "s", "Since the process that delivers last said so", "gauge", _beats),
    Metric(
        "lease.held",
        "{lease}",
        "1 where this process is the one that delivers",
        "gauge",
        lambda g: ((int(q.held), of_sink(q.sink)) for q in g.queues),
    ),
    Metric("kept.bytes", "By", "Bytes set aside in the directory", "gauge", lambda g: _kept(g, 0)),
    Metric("kept.files", "{file}", "Files set aside in the directory", "gauge", lambda g: _kept(g, 1)),
    Metric("kept.limit", "By", "Where setting aside ends", "gauge", _kept_limits),
    Metric("volume.free", "By", "Free on the volume", "gauge", lambda g: [(g.space.free_bytes, {})]),
    Metric("volume.size", "By", "Size of the volume", "gauge", lambda g: [(g.space.total_bytes, {})]),
    Metric("build.info", "{build}", "1, with the versions", "gauge", _build),
)
