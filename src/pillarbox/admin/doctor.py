"""The checks of `pillarbox doctor`: can this directory, its filesystem and its delivery keep what the settings promise?

The probes work on files of their own, `doctor-*.probe`, and delete them. Of everything else the checks read names, sizes,
owners and heartbeats: they take no lock, and create, change and delete no file of the store.

A finding says what was checked and what was found; where something is wrong, also what to do about it. Advice never deletes a
regular file that has one of the store's names, because such a file may hold the only copy of accepted events.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import statistics
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.admin.status import describe_dropped, is_recent_loss
from pillarbox.admin.text import counted, format_duration
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, os_filesystem
from pillarbox.store.directory import NETWORK_FILESYSTEMS, OTHERS_MASK, VOLATILE_FILESYSTEMS
from pillarbox.store.layout import Kind
from pillarbox.store.quota import SLACK_SHARE, least_free
from pillarbox.store.sealer import SealRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from pillarbox.admin.status import OutboxStatus
    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Heartbeat
    from pillarbox.store.directory import Directory
    from pillarbox.store.usage import DiskUsage

BACKLOG_OVERDUE_AFTER_S: Final = 300.0  # a pending batch this old needs a delivery worker; `deliver --once` may run by cron

_PREFIX: Final = "doctor-"
_FSYNCS_MAX: Final = 20  # measured for each kind; the median is reported
_FSYNCS_MAX_S: Final = 3.0  # fewer are measured on a slow disk
# No storage device answers faster. A shorter fsync was ignored by a mount option or by a preloaded library.
_FSYNC_MIN_S: Final = 5e-6
_LINE: Final = b"x" * 299 + b"\n"  # about as long as a record
# Stamps strictly increase even when files are sealed faster than the clock ticks, so the newest may be ahead of the clock.
_STAMP_AHEAD_MAX_MICROS: Final = 1_000_000
_HEARTBEAT_AHEAD_MAX_MICROS: Final = 1_000_000  # between clocks of one machine
_CONTROL_FILES: Final = (layout.DELIVER_LOCK, layout.EVICT_LOCK, layout.SEAL_REQUEST, layout.LEDGER, layout.LEDGER_LOCK)
_PREREQUISITES: Final = ("create", "lock")  # the later probes need them
_OPEN_FILES_MIN: Final = 256  # the writer's unsynced and spare segments, the delivery worker's files, and the application's
_FILES_NAMED_MAX: Final = 20  # unusable files are named up to here; all are counted
_REMEDIES: Final = {
    errno.ENOSPC: "free space on the volume",
    errno.EDQUOT: "raise the disk quota",
    errno.EROFS: "remount the filesystem writable; if the kernel made it read-only, its log says why",
    errno.EACCES: "change the owner or mode of the directory",
    errno.EPERM: "change the owner, mode or file attributes of the directory",
    errno.EIO: "replace the disk; the kernel log shows its errors",
    errno.EMFILE: "raise the limit of open files",
}
_CONTAINER_FILESYSTEMS: Final = frozenset({"overlay", "overlayfs", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs"})
_USE_LOCAL_DISK: Final = "use a directory on a local filesystem, such as ext4 or XFS"
_ROOM: Final = "have the backlog delivered, or raise the limit"
_SPACE: Final = "free space on the volume"
_DROP_REMEDIES: Final = {
    "max_bytes": _ROOM,
    "max_files": _ROOM,
    "timeout": _ROOM,
    "would_block": _ROOM,
    "disk_full": _SPACE,
    "disk_low": _SPACE,
    "disk_slow": "use a faster disk",
    "io_error": "see the log of the application",
    "closed": "the application enqueues after it has closed the outbox",
    "invalid": "the log of the application says which fields are wrong",
}
_ADD_WORKER: Final = "run pillarbox deliver, or an application with a sink"


class DoctorFinding(NamedTuple):
    """One line of `pillarbox doctor`."""

    ok: bool  # the check passed
    check: str  # the name of the check
    text: str  # what was found; if not `ok`, or with a warning, also what to do about it
    warning: bool = False  # the check passed, but `text` describes a risk


def passed(check: str, text: str) -> DoctorFinding:
    """A finding that needs no action."""
    return DoctorFinding(ok=True, check=check, text=text)


def failed(check: str, text: str) -> DoctorFinding:
    """A finding that needs action; `text` says which."""
    return DoctorFinding(ok=False, check=check, text=text)


def warning(check: str, text: str) -> DoctorFinding:
    """A finding that violates no setting but is a risk; `text` says what to do."""
    return DoctorFinding(ok=True, check=check, text=text, warning=True)


class DoctorLimits(NamedTuple):
    """The settings that a directory is checked against."""

    power: bool  # durability "power"
    max_bytes: int
    max_files: int
    min_free_bytes: int | None
    evicts: bool  # when_full="drop_oldest"
    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    needs_hard_links: bool = False  # several sinks are configured


def run_checks(directory: Directory, clock: Clock, limits: DoctorLimits) -> list[DoctorFinding]:
    """Run every check of the directory and its filesystem, the most important first.

    Stops after the first checks if the directory cannot be used at all.
    """
    try:
        findings = _check_directory(directory, limits)
        if not all(finding.ok for finding in findings if finding.check in ("directory", "filesystem")):
            return findings
        queues = directory.queues()
        needs_hard_links = limits.needs_hard_links or bool(queues)
        findings += probe_filesystem(directory, clock, power=limits.power, needs_hard_links=needs_hard_links)
        findings.append(_check_free_space(directory, limits))
        usage = directory.disk_usage()  # before the clock is read: a batch that is sealed in between is not ahead of it
        findings += _check_pending(usage, limits)
        findings += _check_dead_and_quarantine(usage, queues, limits)
        findings.append(_check_open_files())
        findings.append(_check_stamps(usage, clock.micros()))
        findings.append(_check_seal_request(directory, clock.micros()))
        findings += _check_file_ownership(directory, queues)
    except OSError as error:
        findings = [failed("directory", f"{error.strerror}: {_remedy(error)}")]
    return findings


def _remedy(error: OSError) -> str:
    return _REMEDIES.get(error.errno or 0, _USE_LOCAL_DISK)


def _check_directory(directory: Directory, limits: DoctorLimits) -> list[DoctorFinding]:
    path = directory.path
    facts = directory.filesystem.inspect_directory(path)
    if facts is None:
        return [failed("directory", f"does not exist: create it with mkdir -m 700 {quote(path)}")]
    if not facts.is_directory:
        return [failed("directory", "is not a directory: name a directory")]
    if not facts.is_usable:
        return [failed("directory", f"this user cannot read and write it: change its owner with chown USER {quote(path)}")]
    findings = [passed("directory", "exists; this user can read and write it")]
    if facts.mode & OTHERS_MASK:
        findings.append(failed("mode", f"{facts.mode:03o} gives other users access to the events: run chmod 700 {quote(path)}"))
    else:
        findings.append(passed("mode", f"{facts.mode:03o}, only the owner has access"))
    if facts.filesystem_type in NETWORK_FILESYSTEMS:
        text = (
            f"{facts.filesystem_type} is a network filesystem, where file locks and fsync are not reliable: {_USE_LOCAL_DISK}"
        )
        return [*findings, failed("filesystem", text)]
    if limits.power and facts.filesystem_type in VOLATILE_FILESYSTEMS:
        text = f'{facts.filesystem_type} is in memory, which durability "power" cannot use: {_USE_LOCAL_DISK}'
        return [*findings, failed("filesystem", text)]
    return [*findings, _check_medium(facts.filesystem_type)]


def _check_medium(filesystem_type: str) -> DoctorFinding:
    """Whether stored events survive a restart of the machine or container."""
    if filesystem_type in VOLATILE_FILESYSTEMS:
        text = f"{filesystem_type} is in memory: a restart of the machine or container deletes all pending events"
        return warning("filesystem", f"{text}: {_USE_LOCAL_DISK}")
    if filesystem_type in _CONTAINER_FILESYSTEMS:
        text = f"{filesystem_type}: in a container this is deleted with it, and with it all pending events"
        return warning("filesystem", f"{text}: mount a volume, and use a directory on it")
    return passed("filesystem", filesystem_type or "type unknown; this system does not report it")


def probe_filesystem(directory: Directory, clock: Clock, *, power: bool, needs_hard_links: bool = False) -> list[DoctorFinding]:
    """Try each operation that the store relies on, on probe files, and delete these."""
    prefix = f"{_PREFIX}{directory.new_id()}"
    steps: tuple[tuple[str, Callable[[Directory, str], DoctorFinding]], ...] = (
        ("create", _probe_create),
        ("append", _probe_append),
        ("lock", _probe_lock),
        ("rename", _probe_rename),
        ("fsync", partial(_probe_fsync, clock=clock, power=power)),
        ("directory fsync", partial(_probe_directory_fsync, clock=clock)),
        ("hard link", partial(_probe_hard_link, needed=needs_hard_links)),
    )
    findings: list[DoctorFinding] = []
    try:
        for number, (check, step) in enumerate(steps):
            try:
                findings.append(step(directory, f"{prefix}-{number}.probe"))
            except OSError as error:
                findings.append(failed(check, f"{error.strerror}: {_remedy(error)}"))
            except FileUnusableError as error:  # a network filesystem may map this user to another one
                findings.append(failed(check, f"a file that was just created {error.problem}: {_USE_LOCAL_DISK}"))
            if check in _PREREQUISITES and not findings[-1].ok:
                break
    finally:
        deleted = _delete_probe_files(directory, prefix)
    return [*findings, deleted]


def _delete_probe_files(directory: Directory, prefix: str) -> DoctorFinding:
    """Delete every probe file; an interrupt is raised once that is done."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for name in [
                entry.name for entry in directory.filesystem.list_files(directory.path) if entry.name.startswith(prefix)
            ]:
                directory.remove(name)
        except KeyboardInterrupt as error:
            interrupt = error
            continue
        except OSError as error:
            finding = failed("delete", f"{error.strerror}: {_remedy(error)}; then delete {directory.path_of(prefix)}-*")
        else:
            finding = passed("delete", "the probe files were deleted")
        break
    if interrupt is not None:
        raise interrupt
    return finding


@contextlib.contextmanager
def _new_file(directory: Directory, name: str) -> Iterator[int]:
    fd = directory.filesystem.create(directory.path_of(name))
    try:
        yield fd
    finally:
        directory.filesystem.close(fd)


def _probe_create(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name):
        try:
            second_fd = directory.filesystem.create(directory.path_of(name))
        except FileExistsError:
            return passed("create", "creating a file fails if its name exists")
        directory.filesystem.close(second_fd)
    return failed("create", f"created a file although its name existed: {_USE_LOCAL_DISK}")


def _probe_append(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        directory.filesystem.write_all(fd, _LINE * 2)
        directory.filesystem.truncate(fd, len(_LINE))  # O_APPEND must now write here, not where the last write ended
        directory.filesystem.write_all(fd, _LINE)
        if directory.filesystem.read_all(fd) == _LINE * 2:
            return passed("append", "writes go to the end of the file and can be read back")
    return failed("append", f"the data read differs from the data appended: {_USE_LOCAL_DISK}")


def _probe_lock(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        if not directory.filesystem.lock(fd):
            return failed("lock", f"flock did not grant a lock that nobody holds: {_USE_LOCAL_DISK}")
        second = directory.lock_existing(name)
    if second is not None:
        directory.filesystem.close(second.fd)
        return failed("lock", f"flock granted the same lock twice: {_USE_LOCAL_DISK}")
    third = directory.lock_existing(name)
    if third is None:
        return failed("lock", f"flock did not release the lock of a closed file: {_USE_LOCAL_DISK}")
    directory.filesystem.close(third.fd)
    return passed("lock", "flock grants a lock once, and releases it when the file is closed")


def _probe_rename(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        directory.write_atomically(name, _LINE)
        replaced = directory.read_small_file(name) == _LINE and directory.filesystem.size(fd) == 0
        if (
            replaced
            and not directory.filesystem.has_name(fd)
            and not directory.filesystem.is_file_at(fd, directory.path_of(name))
        ):
            return passed("rename", "replaces a file as a whole")
    return failed("rename", f"does not replace a file as a whole: {_USE_LOCAL_DISK}")


def _median_s(clock: Clock, prepare: Callable[[], None], fsync: Callable[[], None]) -> tuple[float, int]:
    """The median duration of an fsync, and the number of measurements."""
    durations_s: list[float] = []
    while len(durations_s) < _FSYNCS_MAX and sum(durations_s) < _FSYNCS_MAX_S:
        prepare()
        started = clock.monotonic()
        fsync()
        durations_s.append(clock.monotonic() - started)
    return statistics.median(durations_s), len(durations_s)


def _probe_fsync(directory: Directory, name: str, *, clock: Clock, power: bool) -> DoctorFinding:
    disk = directory.filesystem
    with _new_file(directory, name) as fd:
        seconds, count = _median_s(clock, partial(disk.write_all, fd, _LINE), partial(disk.sync_data, fd))
    text = f"fdatasync takes {seconds * 1e3:.3f} ms (median of {count})"
    if not power:
        return passed("fsync", text)
    if seconds < _FSYNC_MIN_S:
        remedy = "remove the mount option (nobarrier, volatile) or the preloaded library that skips fsync"
        return failed("fsync", f"{text}, too fast to reach a disk: {remedy}")
    return passed("fsync", f'{text}; with durability "power" an event waits for one or two of them')


def _probe_directory_fsync(directory: Directory, name: str, *, clock: Clock) -> DoctorFinding:
    numbers = iter(range(_FSYNCS_MAX))

    def prepare() -> None:
        with _new_file(directory, f"{name}-{next(numbers)}"):
            pass

    seconds, count = _median_s(clock, prepare, partial(directory.filesystem.sync_directory, directory.path))
    return passed("directory fsync", f"fsync takes {seconds * 1e3:.3f} ms (median of {count})")


def _probe_hard_link(directory: Directory, name: str, *, needed: bool) -> DoctorFinding:
    with _new_file(directory, name):
        try:
            directory.filesystem.link(directory.path_of(name), directory.path_of(f"{name}-2"))
        except OSError as error:
            text = f"cannot be created ({error.strerror})"
            if needed:
                return failed("hard link", f"{text}, but several sinks need hard links: {_USE_LOCAL_DISK}")
            return passed("hard link", f"{text}; a single sink needs none")
    if os_filesystem.link_count(directory.path_of(name)) > 1:
        return passed("hard link", "can be created, and is counted")
    return passed("hard link", "can be created, but is not counted: a second link to a file of the store goes unnoticed")


def _check_free_space(directory: Directory, limits: DoctorLimits) -> DoctorFinding:
    space = directory.filesystem.disk_space(directory.path)
    least = least_free(space, limits.min_free_bytes)
    text = f"{space.free_bytes:,} bytes free; {least.bytes:,} must stay free (min_free_bytes)"
    if space.free_inodes < least.inodes:
        inodes = f"{space.free_inodes:,} inodes free; {least.inodes:,} must stay free"
        return failed("free space", f"{inodes}, so no new event is accepted: delete files on the volume")
    if space.free_bytes < least.bytes:
        return failed("free space", f"{text}, so no new event is accepted: free space on the volume")
    return passed("free space", text)


def _check_pending(usage: DiskUsage, limits: DoctorLimits) -> Iterator[DoctorFinding]:
    for check, used, limit, setting in (
        ("pending bytes", usage.pending_bytes, limits.max_bytes, "max_bytes"),
        ("pending files", usage.pending_files, limits.max_files, "max_files"),
    ):
        text = f"{used:,} of {limit:,} ({setting})"
        if used < limit - (limit // SLACK_SHARE if limits.evicts else 0):
            yield passed(check, text)
            continue
        loss = "the oldest events are evicted" if limits.evicts else "no new event is accepted"
        yield failed(check, f"{text}, full, so {loss}: have the backlog delivered, or raise {setting}")


def _check_dead_and_quarantine(usage: DiskUsage, queues: Sequence[Directory], limits: DoctorLimits) -> Iterator[DoctorFinding]:
    """The limits apply to each queue, and to the directory without its queues."""
    queue_usages = [(queue, queue.disk_usage()) for queue in queues]
    dead_bytes = usage.dead_bytes - sum(queue_usage.dead_bytes for _, queue_usage in queue_usages)
    quarantine_bytes = usage.corrupt_bytes - sum(queue_usage.corrupt_bytes for _, queue_usage in queue_usages)
    yield from _check_dead_and_quarantine_of("", "", max(0, dead_bytes), max(0, quarantine_bytes), limits)
    for queue, queue_usage in queue_usages:
        option = f" -d {quote(queue.path)}"
        yield from _check_dead_and_quarantine_of(
            f"{queue.sink}: ", option, queue_usage.dead_bytes, queue_usage.corrupt_bytes, limits
        )


def _check_dead_and_quarantine_of(
    label: str, directory_option: str, dead_bytes: int, quarantine_bytes: int, limits: DoctorLimits
) -> Iterator[DoctorFinding]:
    for check, used, limit, setting, command in (
        ("dead letters", dead_bytes, limits.max_dead_bytes, "max_dead_bytes", "dead"),
        ("quarantine", quarantine_bytes, limits.max_quarantine_bytes, "max_quarantine_bytes", "quarantine"),
    ):
        text = f"{label}{used:,} of {limit:,} bytes ({setting})"
        if used and used >= limit - limit // SLACK_SHARE:
            verb = "replay" if command == "dead" else "repair"
            remedy = f"list them with pillarbox {command} list{directory_option}, then {verb} or purge them"
            yield failed(check, f"{text}, full or nearly full: {remedy}")
        else:
            yield passed(check, text)


def _check_open_files() -> DoctorFinding:
    """The limit of this shell; that of a service may differ."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return passed("open files", "no limit for a process of this shell (RLIMIT_NOFILE)")
    text = f"{soft:,} for a process of this shell (RLIMIT_NOFILE)"
    if soft < _OPEN_FILES_MIN:
        remedy = "run ulimit -n 1024, or set LimitNOFILE=1024 in the service"
        return failed("open files", f"{text}, but an outbox may need {_OPEN_FILES_MIN}: {remedy}")
    return passed("open files", text)


def _check_seal_request(directory: Directory, now_micros: int) -> DoctorFinding:
    """The content of `seal.request`; whether the file itself can be used is among the checks of all files."""
    try:
        data = directory.read_small_file(layout.SEAL_REQUEST)
    except OSError as error:
        text = f"{layout.SEAL_REQUEST} cannot be read, so pillarbox seal and flush have no effect"
        return failed("seal request", f"{text}: {_remedy(error)}")
    if not data:
        return passed("seal request", "no seal was requested yet")
    try:
        request = msgspec.json.decode(data, type=SealRequest)
    except msgspec.DecodeError:
        return failed("seal request", f"{layout.SEAL_REQUEST} is not a seal request: run pillarbox seal, which rewrites it")
    age_s = max(0.0, (now_micros - request.at_micros) / 1e6)
    return passed("seal request", f"the last seal was requested {age_s:,.0f} s ago")


def _check_stamps(usage: DiskUsage, now_micros: int) -> DoctorFinding:
    """Batches must not be sealed in the future: new ones would be delivered out of order."""
    if usage.newest_sealed_at is None:
        return passed("clock", "there is no sealed batch to compare the clock with")
    age_s = (now_micros - usage.newest_sealed_at) / 1e6
    if usage.newest_sealed_at > now_micros + _STAMP_AHEAD_MAX_MICROS:
        return failed("clock", f"the newest batch was sealed {-age_s:,.0f} s in the future: set the clock, which stepped back")
    return passed("clock", f"the newest batch was sealed {max(0.0, age_s):,.0f} s ago")


def _check_file_ownership(directory: Directory, queues: Sequence[Directory]) -> list[DoctorFinding]:
    """Files with a name of the store that the store ignores, in the directory and in the queues."""
    findings = []
    ignored = 0
    linked = bool(queues or directory.requested_queues())  # then a batch file may have names in queues too
    for where in (directory, *queues):
        for name, problem in os_filesystem.foreign_entries(where.path, allow_links=linked):
            if name == ".":
                remedy = f"change its owner with chown USER {quote(where.path)}"
                findings.append(failed("owner", f"{where.path} {problem}, who can delete the files in it: {remedy}"))
            elif _has_store_name(name, problem):
                ignored += 1
                if ignored <= _FILES_NAMED_MAX:
                    path = where.path_of(name)
                    remedy = _file_remedy(where.path, path, layout.kind_of(name), problem)
                    findings.append(failed("files", f"{path} {problem}, so the store ignores it: {remedy}"))
    if ignored > _FILES_NAMED_MAX:
        findings.append(failed("files", f"and {ignored - _FILES_NAMED_MAX:,} more"))
    return findings or [passed("files", "the store can use every file that has one of its names")]


def _file_remedy(directory: str, path: str, kind: Kind, problem: str) -> str:
    """What to do about a file that the store ignores. A regular file may hold accepted events, so it must stay."""
    if problem == os_filesystem.HAS_SECOND_LINK:
        first = "stop the application that writes it, then " if kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) else ""
        copy = f"{path}.copy"
        return f"{first}make it a file of its own: cp -p {quote(path)} {quote(copy)} && mv {quote(copy)} {quote(path)}"
    if problem.startswith(os_filesystem.BELONGS_TO):
        return f"give it to the owner of the directory, as root: chown --reference={quote(directory)} {quote(path)}"
    return "move it to another directory"


def _has_store_name(name: str, problem: str) -> bool:
    """Whether the name means something to the store; a queue's name means something unless it is a directory."""
    if layout.sink_of_queue(name) is not None:
        return problem != os_filesystem.IS_DIRECTORY
    return layout.kind_of(name) is not Kind.OTHER or name in _CONTROL_FILES


def check_delivery(status: OutboxStatus) -> Iterator[DoctorFinding]:
    """The delivery worker of each sink, and that of the directory: the only one, or the one that fans out."""
    findings = [
        _check_worker(f"{sink.name}: ", sink.heartbeat, sink.heartbeat_age_s, sink.backlog_files, sink.oldest_age_s)
        for sink in status.sinks
    ]
    yield from findings
    label = "all sinks: " if findings else ""
    whole = _check_worker(label, status.heartbeat, status.heartbeat_age_s, status.sealed_files, status.oldest_age_s)
    if whole.ok or all(finding.ok for finding in findings):  # otherwise it would repeat what a sink's finding says
        yield whole


def _check_worker(
    label: str, heartbeat: Heartbeat | None, age_s: float | None, backlog_files: int, oldest_age_s: float | None
) -> DoctorFinding:
    pending = f"{counted(backlog_files, 'batch', 'batches')} pending"
    overdue = oldest_age_s is not None and oldest_age_s > BACKLOG_OVERDUE_AFTER_S
    if overdue:
        pending = f"{pending}, the oldest for {oldest_age_s:,.0f} s"
    if heartbeat is None or age_s is None:
        text = f"{label}no delivery worker yet; {pending}"
        return failed("delivery", f"{text}: {_ADD_WORKER}") if overdue else passed("delivery", text)
    if age_s > HEARTBEAT_STALE_AFTER_S:
        text = f"{label}process {heartbeat.pid}, no heartbeat for {age_s:,.0f} s; {pending}"
        if not overdue:
            return passed("delivery", text)
        if os_filesystem.exists(f"/proc/{heartbeat.pid}"):
            return failed("delivery", f"{text}; a process with this number exists: if it is the delivery worker, restart it")
        return failed("delivery", f"{text}; the process has ended: {_ADD_WORKER}")
    text = f"{label}process {heartbeat.pid}, sink {heartbeat.sink}: {heartbeat.state}; {pending}"
    if heartbeat.state.name == "waiting":
        since = ""
        if heartbeat.failing_since_micros is not None:
            failing_s = (heartbeat.at_micros - heartbeat.failing_since_micros) / 1e6 + age_s
            since = f", failing for {format_duration(max(0.0, failing_s))}"
        remedy = "check the destination, for example with pillarbox check; events are kept and delivery is retried"
        return failed("delivery", f"{text}{since}: {remedy}")
    if heartbeat.state.name in ("stopped", "degraded"):
        return failed("delivery", f"{text}: fix the cause that is named")
    return passed("delivery", text)


def check_drops(status: OutboxStatus, now_micros: int) -> DoctorFinding:
    """Events that any process dropped, according to the ledger."""
    if not status.dropped:
        return passed("drops", "the ledger has no dropped events")
    text = f"{describe_dropped(status.dropped, now_micros)}, were not stored"
    remedies = [
        _DROP_REMEDIES[reason]
        for reason, dropped in status.dropped.items()
        if is_recent_loss(reason, dropped, now_micros) and reason in _DROP_REMEDIES
    ]
    if not remedies:
        return passed("drops", text)
    return failed("drops", f"{text}: {'; '.join(dict.fromkeys(remedies))}")


def check_heartbeats(status: OutboxStatus, now_micros: int) -> Iterator[DoctorFinding]:
    """Heartbeats must not be in the future: such a delivery worker would never be found silent."""
    heartbeats = {"": status.heartbeat} | {sink.name: sink.heartbeat for sink in status.sinks}
    for name, heartbeat in heartbeats.items():
        if heartbeat is not None and heartbeat.at_micros > now_micros + _HEARTBEAT_AHEAD_MAX_MICROS:
            ahead_s = (heartbeat.at_micros - now_micros) / 1e6
            whose = f" of {name}" if name else ""
            text = f"the heartbeat{whose} is {ahead_s:,.0f} s in the future: set the clock, which stepped back"
            yield failed("clock", text)


def check_queues(directory: Directory, sink_names: Collection[str], status: OutboxStatus) -> Iterator[DoctorFinding]:
    """Queues that no configured sink delivers, that other users can read, or that this user cannot use.

    Args:
        directory: The outbox directory.
        sink_names: The configured sinks; empty where the settings name none, which says nothing about the queues.
        status: The status of the directory.
    """
    backlog_files = {sink.name: sink.backlog_files for sink in status.sinks}
    for queue in directory.queues():
        if sink_names and queue.sink not in sink_names:
            pending = f"{counted(backlog_files.get(queue.sink, 0), 'batch', 'batches')} pending"
            text = f"{queue.path} belongs to no sink of the settings, {pending}"
            yield failed("queue", f"{text}: add sink {queue.sink} again, or run pillarbox sinks remove {queue.sink}")
        facts = queue.filesystem.inspect_directory(queue.path)
        if facts is not None and facts.mode & OTHERS_MASK:
            text = f"{queue.path}: {facts.mode:03o} gives other users access to the events: run chmod 700 {quote(queue.path)}"
            yield failed("mode", text)
        if facts is not None and not facts.is_usable:
            text = f"{queue.path}: this user cannot read and write it: change its owner with chown USER {quote(queue.path)}"
            yield failed("owner", text)
    for name in sorted(directory.requested_queues() if sink_names else ()):
        if name not in sink_names:
            text = f"a queue for sink {name} was requested, but the settings have no such sink"
            yield failed("queue", f"{text}: add the sink, or run pillarbox sinks remove {name}")
