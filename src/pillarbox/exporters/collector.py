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
    from collections.abc import Callable, Iterator

    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory
    from pillarbox.store.filesystem import Space
    from pillarbox.store.usage import Account
    from pillarbox.telemetry import Reading

_LISTING_SHARE: Final = 10  # a directory of many files is listed for a tenth of the time at most, whoever asks how often


class Queue(NamedTuple):
    """What waits for one sink, and the process that has its lease, as it last said itself."""

    sink: str
    bytes: int
    files: int
    oldest_age_s: float  # 0 where nothing waits
    silent_s: float | None  # None: no process has delivered yet
    held: bool  # by this process


class Aside(NamedTuple):
    """What was set aside of one kind: for one sink, or where there are several, for none of them."""

    sink: str
    kind: str
    bytes: int
    files: int


class Ground(NamedTuple):
    """A directory at one moment."""

    pending_bytes: int
    pending_files: int
    queues: list[Queue]
    kept: list[Aside]
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
        queues = [(queue, queue.account()) for queue in place.queues()]
        rest = _set_aside(account)
        for _, of_queue in queues:  # the account of the directory has them too
            rest = [
                (kind, max(0, size - theirs[1]), max(0, files - theirs[2]))
                for (kind, size, files), theirs in zip(rest, _set_aside(of_queue), strict=True)
            ]
        kept = [Aside("", *one) for one in rest]
        kept += [Aside(queue.sink, *one) for queue, of_queue in queues for one in _set_aside(of_queue)]
        return Ground(
            account.pending_bytes,
            account.pending_files,
            [self._queue(queue, of_queue) for queue, of_queue in queues or [(place, account)]],
            kept,
            place.filesystem.space(place.path),
            self._settings,
        )

    def _queue(self, queue: Directory, account: Account) -> Queue:
        now = self._clock.micros()
        beat = last_heartbeat(queue)
        return Queue(
            queue.sink,
            account.sealed_bytes,
            account.sealed_files,
            0.0 if account.oldest_stamp is None else max(0.0, (now - account.oldest_stamp) / 1e6),
            None if beat is None else max(0.0, (now - beat.at_micros) / 1e6),
            beat is not None and beat.pid == getpid(),
        )


def _set_aside(account: Account) -> list[tuple[str, int, int]]:
    return [
        ("dead", account.dead_bytes, account.dead_files),
        ("quarantine", account.corrupt_bytes, account.corrupt_files),
        ("delivered", account.delivered_bytes, account.delivered_files),
    ]


def _beats(ground: Ground) -> Iterator[Reading]:
    return ((queue.silent_s, of_sink(queue.sink)) for queue in ground.queues if queue.silent_s is not None)


def _kept(ground: Ground, of: Callable[[Aside], int]) -> Iterator[Reading]:
    return ((of(aside), {"kind": aside.kind, **of_sink(aside.sink)}) for aside in ground.kept)


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
    Metric("kept.bytes", "By", "Bytes set aside in the directory", "gauge", lambda g: _kept(g, lambda aside: aside.bytes)),
    Metric("kept.files", "{file}", "Files set aside in the directory", "gauge", lambda g: _kept(g, lambda aside: aside.files)),
    Metric("kept.limit", "By", "Where setting aside ends", "gauge", _kept_limits),
    Metric("volume.free", "By", "Free on the volume", "gauge", lambda g: [(g.space.free_bytes, {})]),
    Metric("volume.size", "By", "Size of the volume", "gauge", lambda g: [(g.space.total_bytes, {})]),
    Metric("build.info", "{build}", "1, with the versions", "gauge", _build),
)
