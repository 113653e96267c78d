"""What the process that delivers can tell beside its counters: the directory's files, its volume, and who holds the lease."""

from __future__ import annotations

import threading
from importlib.metadata import version
from os import getpid
from platform import python_version
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.delivery.lease import read_heartbeat
from pillarbox.telemetry import PENDING_METRICS, Metric, sink_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory
    from pillarbox.store.filesystem import DiskSpace
    from pillarbox.store.usage import DiskUsage
    from pillarbox.telemetry import Measurement

_PAUSE_FACTOR: Final = 10  # a directory of many files is listed for a tenth of the time at most, whoever asks how often


class QueueMetrics(NamedTuple):
    """What waits for one sink, and the process that has its lease, as it last said itself."""

    sink: str
    bytes: int
    files: int
    oldest_age_s: float  # 0 where nothing waits
    heartbeat_age_s: float | None  # None: no process has delivered yet
    holds_lease: bool  # by this process


class FileKindMetrics(NamedTuple):
    """What was set aside of one kind: for one sink, or where there are several, for none of them."""

    sink: str
    kind: str
    bytes: int
    files: int


class DirectoryMetrics(NamedTuple):
    """A directory at one moment."""

    pending_bytes: int
    pending_files: int
    queues: list[QueueMetrics]
    file_kinds: list[FileKindMetrics]
    space: DiskSpace
    settings: Settings


class DirectoryCollector:
    """Looks at a directory for whoever asks; takes no lock, and creates and adopts nothing."""

    def __init__(self, directory: Directory, settings: Settings, clock: Clock) -> None:
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._metrics: DirectoryMetrics | None = None
        self._next_read_s = 0.0

    def collect(self) -> list[tuple[str, DirectoryMetrics]]:
        """The directory by its name; nothing where it cannot be listed: the deliverer's state says why."""
        with self._lock:
            began = self._clock.monotonic()
            if self._metrics is None or began >= self._next_read_s:
                try:
                    self._metrics = self._read_directory()
                except OSError:
                    self._metrics = None
                now = self._clock.monotonic()
                self._next_read_s = now + _PAUSE_FACTOR * (now - began)
            return [] if self._metrics is None else [(self._settings.directory, self._metrics)]

    def _read_directory(self) -> DirectoryMetrics:
        directory = self._directory
        account = directory.disk_usage()
        queues = [(queue, queue.disk_usage()) for queue in directory.queues()]
        rest = _usage_by_kind(account)
        for _, of_queue in queues:  # the account of the directory has them too
            rest = [
                (kind, max(0, size - theirs[1]), max(0, files - theirs[2]))
                for (kind, size, files), theirs in zip(rest, _usage_by_kind(of_queue), strict=True)
            ]
        file_kinds = [FileKindMetrics("", *one) for one in rest]
        file_kinds += [FileKindMetrics(queue.sink, *one) for queue, of_queue in queues for one in _usage_by_kind(of_queue)]
        return DirectoryMetrics(
            account.pending_bytes,
            account.pending_files,
            [self._read_queue(queue, of_queue) for queue, of_queue in queues or [(directory, account)]],
            file_kinds,
            directory.filesystem.disk_space(directory.path),
            self._settings,
        )

    def _read_queue(self, queue: Directory, account: DiskUsage) -> QueueMetrics:
        now = self._clock.micros()
        beat = read_heartbeat(queue)
        return QueueMetrics(
            queue.sink,
            account.sealed_bytes,
            account.sealed_files,
            0.0 if account.oldest_sealed_at is None else max(0.0, (now - account.oldest_sealed_at) / 1e6),
            None if beat is None else max(0.0, (now - beat.at_micros) / 1e6),
            beat is not None and beat.pid == getpid(),
        )


def _usage_by_kind(account: DiskUsage) -> list[tuple[str, int, int]]:
    return [
        ("dead", account.dead_bytes, account.dead_files),
        ("quarantine", account.corrupt_bytes, account.corrupt_files),
        ("delivered", account.delivered_bytes, account.delivered_files),
    ]


def _heartbeat_ages(directory: DirectoryMetrics) -> Iterator[Measurement]:
    return (
        (queue.heartbeat_age_s, sink_attributes(queue.sink)) for queue in directory.queues if queue.heartbeat_age_s is not None
    )


def _by_kind(directory: DirectoryMetrics, of: Callable[[FileKindMetrics], int]) -> Iterator[Measurement]:
    return ((of(aside), {"kind": aside.kind, **sink_attributes(aside.sink)}) for aside in directory.file_kinds)


def _kind_limits(directory: DirectoryMetrics) -> Iterator[Measurement]:
    kept = directory.settings.settlement_limits
    return (
        (limit, {"kind": kind}) for kind, limit in (("dead", kept.max_dead_bytes), ("quarantine", kept.max_quarantine_bytes))
    )


def _build_info(_directory: DirectoryMetrics) -> Iterator[Measurement]:
    yield 1, {"version": version("pillarbox"), "python": python_version()}


# Of a `DirectoryMetrics`.
DIRECTORY_METRICS: Final = (
    *PENDING_METRICS,
    Metric("limit.bytes", "By", "max_bytes as set here", "gauge", lambda g: [(g.settings.max_bytes, {})]),
    Metric("limit.files", "{file}", "max_files as set here", "gauge", lambda g: [(g.settings.max_files, {})]),
    Metric(
        "queue.bytes", "By", "Bytes of sealed files", "gauge", lambda g: ((q.bytes, sink_attributes(q.sink)) for q in g.queues)
    ),
    Metric("queue.files", "{file}", "Sealed files", "gauge", lambda g: ((q.files, sink_attributes(q.sink)) for q in g.queues)),
    Metric(
        "oldest.age",
        "s",
        "Since the oldest file that waits was sealed; 0 where none does",
        "gauge",
        lambda g: ((q.oldest_age_s, sink_attributes(q.sink)) for q in g.queues),
    ),
    Metric("heartbeat.age", "s", "Since the process that delivers last said so", "gauge", _heartbeat_ages),
    Metric(
        "lease.held",
        "{lease}",
        "1 where this process is the one that delivers",
        "gauge",
        lambda g: ((int(q.held), sink_attributes(q.sink)) for q in g.queues),
    ),
    Metric("kept.bytes", "By", "Bytes set aside in the directory", "gauge", lambda g: _by_kind(g, lambda aside: aside.bytes)),
    Metric(
        "kept.files", "{file}", "Files set aside in the directory", "gauge", lambda g: _by_kind(g, lambda aside: aside.files)
    ),
    Metric("kept.limit", "By", "Where setting aside ends", "gauge", _kind_limits),
    Metric("volume.free", "By", "Free on the volume", "gauge", lambda g: [(g.space.free_bytes, {})]),
    Metric("volume.size", "By", "Size of the volume", "gauge", lambda g: [(g.space.total_bytes, {})]),
    Metric("build.info", "{build}", "1, with the versions", "gauge", _build_info),
)
