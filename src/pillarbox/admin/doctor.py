"""What `pillarbox doctor` asks of a directory: can it, and the file system below it, keep what the store promises?

Probes with files of its own, named `doctor-...`, which mean nothing to anybody else, and removes them. Of everything else it
looks at names and sizes only: it locks, creates, adopts and renames nothing.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import statistics
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, os_filesystem
from pillarbox.store.directory import NETWORK_FILESYSTEMS, OTHERS_MASK, VOLATILE_FILESYSTEMS
from pillarbox.store.layout import Kind
from pillarbox.store.quota import MIN_FREE_BYTES_MAX, MIN_FREE_SHARE, SLACK_SHARE
from pillarbox.store.sealer import SealRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory
    from pillarbox.store.usage import DiskUsage

_PREFIX: Final = "doctor-"
_SYNCS_MAX: Final = 20  # of each kind; the median counts
_SYNCS_MAX_S: Final = 3.0  # fewer of them where the disk is slow
# Nothing that reaches a device returns so soon: the file system is mounted to ignore syncs, or something preloaded does.
_PLAUSIBLE_SYNC_S: Final = 5e-6
_LINE: Final = b"x" * 299 + b"\n"  # about an event
_STAMP_AHEAD_MAX_MICROS: Final = (
    1_000_000  # how far a newest stamp may be ahead: they strictly increase, however fast files are sealed
)
_CONTROL_FILES: Final = (layout.DELIVER_LOCK, layout.EVICT_LOCK, layout.SEAL_REQUEST, layout.LEDGER, layout.LEDGER_LOCK)
_PREREQUISITES: Final = ("create", "lock")  # to try what comes after them
_DESCRIPTORS_MIN: Final = (
    256  # the writer's files that wait for their sync and its spares, the deliverer's, and the application's
)
_NAMED_MAX: Final = 20  # files that are not ours are named up to here; all are counted
_REMEDIES: Final = {
    errno.ENOSPC: "make room on the volume",
    errno.EDQUOT: "have the quota raised",
    errno.EROFS: "mount it writable; where it turned read-only by itself, look at the kernel's log",
    errno.EACCES: "change the owner or the mode",
    errno.EPERM: "change the owner, the mode or the file attributes",
    errno.EIO: "the disk fails: look at the kernel's log",
    errno.EMFILE: "raise the limit of open files",
}
_USE_LOCAL_FILESYSTEM: Final = "name a directory on a local file system, e.g. ext4 or XFS"


class DoctorFinding(NamedTuple):
    """One line of `pillarbox doctor`; `ok` is False where something must be mended, and `text` then says how."""

    ok: bool
    check: str
    text: str


def passed(check: str, text: str) -> DoctorFinding:
    """All is well."""
    return DoctorFinding(ok=True, check=check, text=text)


def failed(check: str, text: str) -> DoctorFinding:
    """Something must be mended; `text` says how."""
    return DoctorFinding(ok=False, check=check, text=text)


class DoctorLimits(NamedTuple):
    """Those settings that the state of a directory is held against."""

    power: bool
    max_bytes: int
    max_files: int
    min_free_bytes: int | None
    evicts: bool
    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    needs_hard_links: bool = False  # needed for what is to be: several destinations, whose queues are made of them


def run_checks(directory: Directory, clock: Clock, limits: DoctorLimits) -> list[DoctorFinding]:
    """All findings, in the order in which they matter; where the directory itself will not do, nothing further is tried."""
    try:
        findings = _check_directory(directory, limits)
        if not all(finding.ok for finding in findings if finding.check in ("directory", "medium")):
            return findings
        queues = directory.queues()
        findings += probe_filesystem(
            directory, clock, power=limits.power, needs_hard_links=limits.needs_hard_links or bool(queues)
        )
        findings.append(_check_free_space(directory, limits))
        account = directory.disk_usage()  # before the clock is read: what is sealed meanwhile is not ahead of it
        findings += _check_pending(account, limits)
        findings += _check_dead_and_quarantine(account, queues, limits)
        findings.append(_check_open_files())
        findings.append(_check_clock(account, clock.micros()))
        findings.append(_check_seal_request(directory, clock.micros()))
        findings += _check_foreign_files(directory, queues)
    except OSError as error:
        findings = [failed("directory", f"{error.strerror}: {_remedy(error)}")]
    return findings


def _remedy(error: OSError) -> str:
    return _REMEDIES.get(error.errno or 0, _USE_LOCAL_FILESYSTEM)


def _check_directory(directory: Directory, limits: DoctorLimits) -> list[DoctorFinding]:
    facts = directory.filesystem.inspect_directory(directory.path)
    if facts is None:
        return [failed("directory", "is not there: make it (mkdir -m 700), or have the application make it first")]
    if not facts.is_directory:
        return [failed("directory", "is not a directory: name a directory")]
    if not facts.is_usable:
        return [failed("directory", "cannot be read and written by this user: change its owner or mode")]
    findings = [passed("directory", "is there, and can be read and written")]
    if facts.mode & OTHERS_MASK:
        findings.append(failed("mode", f"{facts.mode:03o} lets other users in, and events may be personal: chmod 700"))
    else:
        findings.append(passed("mode", f"{facts.mode:03o}, for its owner only"))
    medium = facts.filesystem_type or "unknown: this system does not tell"
    if facts.filesystem_type in NETWORK_FILESYSTEMS:
        text = f"{medium}, over a network, where locks and syncs do not hold what is promised: {_USE_LOCAL_FILESYSTEM}"
    elif limits.power and facts.filesystem_type in VOLATILE_FILESYSTEMS:
        text = f'{medium}, in memory, where durability "power" cannot be kept: name a directory on a disk'
    else:
        return [*findings, passed("medium", medium)]
    return [*findings, failed("medium", text)]


def probe_filesystem(directory: Directory, clock: Clock, *, power: bool, needs_hard_links: bool = False) -> list[DoctorFinding]:
    """Try each verb that the store needs on files of our own."""
    prefix = f"{_PREFIX}{directory.new_id()}"
    steps: tuple[tuple[str, Callable[[Directory, str], DoctorFinding]], ...] = (
        ("create", _probe_create),
        ("append", _probe_append),
        ("lock", _probe_lock),
        ("rename", _probe_rename),
        ("sync", partial(_probe_sync, clock=clock, power=power)),
        ("directory sync", partial(_probe_directory_sync, clock=clock)),
        ("hard link", partial(_probe_hard_link, needed=needs_hard_links)),
    )
    findings: list[DoctorFinding] = []
    try:
        for number, (check, step) in enumerate(steps):
            try:
                findings.append(step(directory, f"{prefix}-{number}.probe"))
            except OSError as error:
                findings.append(failed(check, f"{error.strerror}: {_remedy(error)}"))
            except FileUnusableError as error:  # where users are mapped to others, as network file systems do
                findings.append(failed(check, f"a file made just now {error.problem}: {_USE_LOCAL_FILESYSTEM}"))
            if check in _PREREQUISITES and not findings[-1].ok:
                break
    finally:
        removed = _remove_probe_files(directory, prefix)
    return [*findings, removed]


def _remove_probe_files(directory: Directory, prefix: str) -> DoctorFinding:
    """Remove what the steps made, as far as they came; an interrupt waits until that is done."""
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
            found = failed("remove", f"{error.strerror}: {_remedy(error)}; then remove {prefix}-*")
        else:
            found = passed("remove", "deletes")
        break
    if interrupt is not None:
        raise interrupt
    return found


@contextlib.contextmanager
def _new_file(directory: Directory, name: str) -> Iterator[int]:
    """A new file, open."""
    fd = directory.filesystem.create(directory.path_of(name))
    try:
        yield fd
    finally:
        directory.filesystem.close(fd)


def _probe_create(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name):
        try:
            again = directory.filesystem.create(directory.path_of(name))
        except FileExistsError:
            return passed("create", "refuses a name that is taken")
        directory.filesystem.close(again)
    return failed("create", f"made a file under a name that was taken: {_USE_LOCAL_FILESYSTEM}")


def _probe_append(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        directory.filesystem.write_all(fd, _LINE * 2)
        directory.filesystem.truncate(fd, len(_LINE))  # what follows goes to the end of now, not to where the last one ended
        directory.filesystem.write_all(fd, _LINE)
        if directory.filesystem.read_all(fd) == _LINE * 2:
            return passed("append", "writes go to the end of the file, and are read back")
    return failed("append", f"what was appended is not what is read: {_USE_LOCAL_FILESYSTEM}")


def _probe_lock(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        if not directory.filesystem.lock(fd):
            return failed("lock", f"flock does not give out a lock that nobody holds: {_USE_LOCAL_FILESYSTEM}")
        second = directory.lock_existing(name)
    if second is not None:
        directory.filesystem.close(second.fd)
        return failed("lock", f"flock gave the same lock out twice: {_USE_LOCAL_FILESYSTEM}")
    freed = directory.lock_existing(name)
    if freed is None:
        return failed("lock", f"flock still holds a lock whose file was closed: {_USE_LOCAL_FILESYSTEM}")
    directory.filesystem.close(freed.fd)
    return passed("lock", "flock excludes a second, and is free once closed")


def _probe_rename(directory: Directory, name: str) -> DoctorFinding:
    with _new_file(directory, name) as fd:
        directory.write_atomically(name, _LINE)
        whole = directory.read_small_file(name) == _LINE and directory.filesystem.size(fd) == 0
        if whole and not directory.filesystem.has_name(fd) and not directory.filesystem.is_file_at(fd, directory.path_of(name)):
            return passed("rename", "puts one file in another's place, whole")
    return failed("rename", f"does not put one file in another's place as a whole: {_USE_LOCAL_FILESYSTEM}")


def _median_s(clock: Clock, prepare: Callable[[], None], sync: Callable[[], None]) -> tuple[float, int]:
    """How long a sync takes, and how many that is the median of."""
    took: list[float] = []
    while len(took) < _SYNCS_MAX and sum(took) < _SYNCS_MAX_S:
        prepare()
        began = clock.monotonic()
        sync()
        took.append(clock.monotonic() - began)
    return statistics.median(took), len(took)


def _probe_sync(directory: Directory, name: str, *, clock: Clock, power: bool) -> DoctorFinding:
    disk = directory.filesystem
    with _new_file(directory, name) as fd:
        seconds, count = _median_s(clock, partial(disk.write_all, fd, _LINE), partial(disk.sync_data, fd))
    text = f"fdatasync takes {seconds * 1e3:.3f} ms (median of {count})"
    if not power:
        return passed("sync", text)
    if seconds < _PLAUSIBLE_SYNC_S:
        return failed("sync", f"{text}, too little to reach a disk: mount without volatile or nobarrier, preload nothing")
    return passed("sync", f'{text}: with durability "power" an event waits for one or two of them')


def _probe_directory_sync(directory: Directory, name: str, *, clock: Clock) -> DoctorFinding:
    numbers = iter(range(_SYNCS_MAX))

    def prepare() -> None:
        with _new_file(directory, f"{name}-{next(numbers)}"):
            pass

    seconds, count = _median_s(clock, prepare, partial(directory.filesystem.sync_directory, directory.path))
    return passed("directory sync", f"fsync takes {seconds * 1e3:.3f} ms (median of {count})")


def _probe_hard_link(directory: Directory, name: str, *, needed: bool) -> DoctorFinding:
    """Only reported, but where several destinations need them."""
    with _new_file(directory, name):
        try:
            directory.filesystem.link(directory.path_of(name), directory.path_of(f"{name}-2"))
        except OSError as error:
            text = f"cannot be made here ({error.strerror})"
            if needed:
                return failed(
                    "hard link", f"{text}, and several destinations need them: {_USE_LOCAL_FILESYSTEM}, or have one destination"
                )
            return passed("hard link", f"{text}; one destination needs none")
    try:
        fd = directory.filesystem.open_existing(directory.path_of(name))
    except FileUnusableError:
        return passed("hard link", "can be made, and is counted")
    directory.filesystem.close(fd)
    return passed("hard link", "can be made, but is not counted: a second link to our files would not be seen")


def _check_free_space(directory: Directory, limits: DoctorLimits) -> DoctorFinding:
    space = directory.filesystem.disk_space(directory.path)
    least = limits.min_free_bytes
    if least is None:
        least = min(MIN_FREE_BYTES_MAX, space.total_bytes // MIN_FREE_SHARE)
    text = f"{space.free_bytes:,} bytes are free, of which min_free_bytes keeps {least:,}"
    if space.free_bytes < least:
        return failed("space", f"{text}: nothing is accepted; make room on the volume, or lower min_free_bytes")
    return passed("space", text)


def _check_pending(account: DiskUsage, limits: DoctorLimits) -> list[DoctorFinding]:
    findings: list[DoctorFinding] = []
    for check, used, limit, setting in (
        ("pending bytes", account.pending_bytes, limits.max_bytes, "max_bytes"),
        ("pending files", account.pending_files, limits.max_files, "max_files"),
    ):
        full = used >= limit - (limit // SLACK_SHARE if limits.evicts else 0)
        text = f"{used:,} of {limit:,} ({setting})"
        if full:
            loses = "the oldest events are given up for new ones" if limits.evicts else "new events are refused"
            text = f"{text}, full: {loses}; have them delivered, or raise {setting}"
        findings.append(failed(check, text) if full else passed(check, text))
    return findings


def _check_dead_and_quarantine(
    account: DiskUsage, queues: Sequence[Directory], limits: DoctorLimits
) -> Iterator[DoctorFinding]:
    """What is set aside; the limits are those of each queue, and of the directory without them."""
    each = [(queue, queue.disk_usage()) for queue in queues]
    dead = account.dead_bytes - sum(found.dead_bytes for _, found in each)
    corrupt = account.corrupt_bytes - sum(found.corrupt_bytes for _, found in each)
    yield from _check_dead_and_quarantine_of("", "", max(0, dead), max(0, corrupt), limits)
    for queue, found in each:
        yield from _check_dead_and_quarantine_of(
            f"{queue.sink}: ", f" -d {queue.path}", found.dead_bytes, found.corrupt_bytes, limits
        )


def _check_dead_and_quarantine_of(
    name: str, where: str, dead: int, corrupt: int, limits: DoctorLimits
) -> Iterator[DoctorFinding]:
    for check, used, limit, setting, command in (
        ("dead letters", dead, limits.max_dead_bytes, "max_dead_bytes", "dead"),
        ("quarantine", corrupt, limits.max_quarantine_bytes, "max_quarantine_bytes", "quarantine"),
    ):
        text = f"{name}{used:,} of {limit:,} bytes ({setting})"
        if used and used >= limit - limit // SLACK_SHARE:
            way_out = f"look at them with pillarbox {command} list{where}, and mend or purge them, or raise {setting}"
            yield failed(check, f"{text}, full or nearly so: {way_out}")
        else:
            yield passed(check, text)


def _check_open_files() -> DoctorFinding:
    """Of this shell's processes; a service may have others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return passed("open files", "no limit (RLIMIT_NOFILE)")
    text = f"a process may have {soft:,} (RLIMIT_NOFILE, as it is here)"
    if soft < _DESCRIPTORS_MIN:
        return failed(
            "open files", f"{text}, and an outbox may need {_DESCRIPTORS_MIN}: ulimit -n 1024, or LimitNOFILE= of the service"
        )
    return passed("open files", text)


def _check_seal_request(directory: Directory, now: int) -> DoctorFinding:
    """Of `seal.request`; that it is a file of ours is looked at with all others."""
    try:
        data = directory.read_small_file(layout.SEAL_REQUEST)
    except OSError as error:
        return failed("request", f"{layout.SEAL_REQUEST} cannot be read, so that seal and flush do nothing: {_remedy(error)}")
    if not data:
        return passed("request", "nobody has asked the writers to seal")
    try:
        asked = msgspec.json.decode(data, type=SealRequest)
    except msgspec.DecodeError:
        return failed("request", f"{layout.SEAL_REQUEST} does not hold what pillarbox seal writes: run that, it writes it anew")
    return passed("request", f"the writers were asked to seal {max(0.0, (now - asked.at_micros) / 1e6):,.0f} s ago")


def _check_clock(account: DiskUsage, now: int) -> DoctorFinding:
    if account.newest_sealed_at is None:
        return passed("clock", "no sealed file to hold it against")
    age_s = (now - account.newest_sealed_at) / 1e6
    if account.newest_sealed_at > now + _STAMP_AHEAD_MAX_MICROS:
        return failed("clock", f"the newest sealed file is {-age_s:,.0f} s in the future: set the clock, it stepped back")
    return passed("clock", f"the newest sealed file is {max(0.0, age_s):,.0f} s old")


def _check_foreign_files(directory: Directory, queues: Sequence[Directory]) -> list[DoctorFinding]:
    """Files under our names that the store will leave alone, here and in the queues."""
    findings = []
    others = 0
    linked = bool(queues or directory.requested_queues())  # what waits has, or may have, names in queues too
    for within, name, problem in [
        (f"{layout.queue_name(where.sink)}/" if where.sink else "", *found)
        for where in (directory, *queues)
        for found in os_filesystem.foreign_entries(where.path, allow_links=linked)
    ]:
        if name == ".":
            findings.append(failed("owner", f"{within or 'the directory'} {problem}, who may remove what is in it: chown it"))
        elif _has_store_name(name, problem):
            others += 1
            if others <= _NAMED_MAX:
                findings.append(failed("names", f"{within}{name} {problem}, and is left alone: see what it is, and remove it"))
    if others > _NAMED_MAX:
        findings.append(failed("names", f"and {others - _NAMED_MAX:,} more like these"))
    return findings or [passed("names", "all files under our names are ours to use")]


def _has_store_name(name: str, problem: str) -> bool:
    """Whether it has a name that means something to the store; a queue is a directory, and nothing else."""
    if layout.sink_of_queue(name) is not None:
        return problem != os_filesystem.IS_DIRECTORY
    return layout.kind_of(name) is not Kind.OTHER or name in _CONTROL_FILES
