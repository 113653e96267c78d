"""Collects the metrics of a directory: its files by kind and queue, its volume, and the lease."""

from __future__ import annotations

from importlib.metadata import version
from os import getpid
from platform import python_version
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin.backlog import DropTotal, EventCounter, LedgerFacts
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.outcome import DROP_REASONS
from pillarbox.system import threads
from pillarbox.telemetry import PENDING_METRICS, Metric, sink_attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.clock import Clock
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory
    from pillarbox.store.filesystem import DiskSpace
    from pillarbox.store.usage import DiskUsage
    from pillarbox.telemetry import Measurement

_PAUSE_FACTOR: Final = 10  # pauses ten times as long as a scan took, so that scans take a tenth of the time at most


class QueueMetrics(NamedTuple):
    """The pending batches of one sink, and the heartbeat of the process that delivers to it."""

    sink: str
    bytes: int
    files: int
    oldest_age_s: float  # 0 if there is none
    heartbeat_age_s: float | None  # None if no process has delivered yet
    holds_lease: bool  # by this process


class FileKindMetrics(NamedTuple):
    """The files of one kind (dead letters, quarantine, retained deliveries): of one sink, or of the outbox itself."""

    sink: str
    kind: str
    bytes: int
    files: int


class DirectoryMetrics(NamedTuple):
    """The state of a directory at one time."""

    pending_bytes: int
    pending_files: int
    queues: list[QueueMetrics]
    file_kinds: list[FileKindMetrics]
    space: DiskSpace
    settings: Settings
    pending_events: int
    dropped: dict[str, DropTotal]


class DirectoryCollector:
    """Reads a directory for the exporters. It locks, creates and adopts nothing."""

    def __init__(self, directory: Directory, settings: Settings, clock: Clock) -> None:
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._lock = threads.Lock()
        self._metrics: DirectoryMetrics | None = None
        self._next_read_s = 0.0

    def collect(self) -> list[tuple[str, DirectoryMetrics]]:
        """Return the directory's name and metrics; nothing if it cannot be listed, which the delivery state reports."""
        with self._lock:
            start_s = self._clock.monotonic()
            if self._metrics is None or start_s >= self._next_read_s:
                try:
                    self._metrics = self._read_directory()
                except OSError:
                    self._metrics = None
                now = self._clock.monotonic()
                self._next_read_s = now + _PAUSE_FACTOR * (now - start_s)
            return [] if self._metrics is None else [(self._settings.directory, self._metrics)]

    def _read_directory(self) -> DirectoryMetrics:
        directory = self._directory
        usage = directory.disk_usage()
        queues = [(queue, queue.disk_usage()) for queue in directory.queues()]
        now = self._clock.micros()
        facts = [LedgerFacts(one, now) for one in (directory, *(queue for queue, _ in queues))]
        rest = _usage_by_kind(usage)
        for _, queue_usage in queues:  # the directory's usage includes its queues
            rest = [
                (kind, max(0, size - of_queue[1]), max(0, files - of_queue[2]))
                for (kind, size, files), of_queue in zip(rest, _usage_by_kind(queue_usage), strict=True)
            ]
        file_kinds = [FileKindMetrics("", *of_kind) for of_kind in rest]
        file_kinds += [
            FileKindMetrics(queue.sink, *of_kind) for queue, queue_usage in queues for of_kind in _usage_by_kind(queue_usage)
        ]
        return DirectoryMetrics(
            usage.pending_bytes,
            usage.pending_files,
            [self._read_queue(queue, queue_usage) for queue, queue_usage in queues or [(directory, usage)]],
            file_kinds,
            directory.filesystem.disk_space(directory.path),
            self._settings,
            EventCounter(facts).count([directory, *(queue for queue, _ in queues)]).events,
            facts[0].dropped,
        )

    def _read_queue(self, queue: Directory, usage: DiskUsage) -> QueueMetrics:
        now = self._clock.micros()
        heartbeat = read_heartbeat(queue)
        return QueueMetrics(
            queue.sink,
            usage.sealed_bytes,
            usage.sealed_files,
            0.0 if usage.oldest_sealed_at is None else max(0.0, (now - usage.oldest_sealed_at) / 1e6),
            None if heartbeat is None else heartbeat.age_s(self._clock),
            heartbeat is not None and heartbeat.pid == getpid(),
        )


def _usage_by_kind(usage: DiskUsage) -> list[tuple[str, int, int]]:
    return [
        ("dead", usage.dead_bytes, usage.dead_files),
        ("quarantine", usage.corrupt_bytes, usage.corrupt_files),
        ("delivered", usage.delivered_bytes, usage.delivered_files),
    ]


def _dropped_by_reason(directory: DirectoryMetrics) -> Iterator[Measurement]:
    """All reasons, also those without a drop: a rate needs a first value."""
    for reason in dict.fromkeys((*DROP_REASONS, *directory.dropped)):
        yield directory.dropped[reason].events if reason in directory.dropped else 0, {"reason": reason}


def _heartbeat_ages(directory: DirectoryMetrics) -> Iterator[Measurement]:
    return (
        (queue.heartbeat_age_s, sink_attributes(queue.sink)) for queue in directory.queues if queue.heartbeat_age_s is not None
    )


def _by_kind(directory: DirectoryMetrics, of: Callable[[FileKindMetrics], int]) -> Iterator[Measurement]:
    return ((of(files), {"kind": files.kind, **sink_attributes(files.sink)}) for files in directory.file_kinds)


def _kind_limits(directory: DirectoryMetrics) -> Iterator[Measurement]:
    limits = directory.settings.settlement_limits
    return (
        (limit, {"kind": kind})
        for kind, limit in (("dead", limits.max_dead_bytes), ("quarantine", limits.max_quarantine_bytes))
    )


def _build_info(_directory: DirectoryMetrics) -> Iterator[Measurement]:
    yield 1, {"version": version("pillarbox"), "python": python_version()}


# Metrics of a `DirectoryMetrics`.
DIRECTORY_METRICS: Final = (
    *PENDING_METRICS,
    Metric("pending.events", "{event}", "Events pending delivery", "gauge", lambda d: [(d.pending_events, {})]),
    Metric(
        "directory.dropped",
        "{event}",
        "Events that no process stored in the directory, from the ledger",
        "counter",
        _dropped_by_reason,
    ),
    Metric("limit.bytes", "By", "max_bytes in this process", "gauge", lambda d: [(d.settings.max_bytes, {})]),
    Metric("limit.files", "{file}", "max_files in this process", "gauge", lambda d: [(d.settings.max_files, {})]),
    Metric(
        "queue.bytes",
        "By",
        "Bytes of batch files in the queue",
        "gauge",
        lambda d: ((q.bytes, sink_attributes(q.sink)) for q in d.queues),
    ),
    Metric(
        "queue.files",
        "{file}",
        "Batch files in the queue",
        "gauge",
        lambda d: ((q.files, sink_attributes(q.sink)) for q in d.queues),
    ),
    Metric(
        "oldest.age",
        "s",
        "Time since the oldest pending batch was sealed; 0 if there is none",
        "gauge",
        lambda d: ((q.oldest_age_s, sink_attributes(q.sink)) for q in d.queues),
    ),
    Metric("heartbeat.age", "s", "Time since the last heartbeat of the process that delivers", "gauge", _heartbeat_ages),
    Metric(
        "lease.held",
        "{lease}",
        "1 if this process delivers, 0 otherwise",
        "gauge",
        lambda d: ((int(q.holds_lease), sink_attributes(q.sink)) for q in d.queues),
    ),
    Metric(
        "kept.bytes",
        "By",
        "Bytes of dead letters, quarantine and retained files",
        "gauge",
        lambda d: _by_kind(d, lambda files: files.bytes),
    ),
    Metric(
        "kept.files",
        "{file}",
        "Files of dead letters, quarantine and retained files",
        "gauge",
        lambda d: _by_kind(d, lambda files: files.files),
    ),
    Metric("kept.limit", "By", "Limit of dead letters and quarantine", "gauge", _kind_limits),
    Metric("volume.free", "By", "Free bytes on the volume", "gauge", lambda d: [(d.space.free_bytes, {})]),
    Metric("volume.size", "By", "Bytes on the volume", "gauge", lambda d: [(d.space.total_bytes, {})]),
    Metric("build.info", "{build}", "Always 1; the labels hold the versions", "gauge", _build_info),
)
