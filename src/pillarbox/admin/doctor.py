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
from pillarbox.store import filesystem, layout
from pillarbox.store.directory import NETWORK_MEDIA, OPEN_MODE, VOLATILE_MEDIA
from pillarbox.store.layout import Kind
from pillarbox.store.quota import MIN_FREE_MAX, MIN_FREE_SHARE, SLACK_SHARE
from pillarbox.store.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory
    from pillarbox.store.usage import Account

_PREFIX: Final = "doctor-"
_SYNCS: Final = 20  # of each kind; the median counts
_SYNCS_S: Final = 3.0  # fewer of them where the disk is slow
# Nothing that reaches a device returns so soon: the file system is mounted to ignore syncs, or something preloaded does.
_NO_SYNC_S: Final = 5e-6
_LINE: Final = b"x" * 299 + b"\n"  # about an event
_AHEAD_MICROS: Final = 1_000_000  # how far a newest stamp may be ahead: they strictly increase, however fast files are sealed
_OTHER_NAMES: Final = (layout.DELIVER_LOCK, layout.EVICT_LOCK, layout.SEAL_REQUEST, layout.LEDGER, layout.LEDGER_LOCK)
_NEEDED: Final = ("create", "lock")  # to try what comes after them
_DESCRIPTORS_MIN: Final = (
    256  # the writer's files that wait for their sync and its spares, the deliverer's, and the application's
)
_NAMED_MAX: Final = 20  # files that are not ours are named up to here; all are counted
_WAYS_OUT: Final = {
    errno.ENOSPC: "make room on the volume",
    errno.EDQUOT: "have the quota raised",
    errno.EROFS: "mount it writable; where it turned read-only by itself, look at the kernel's log",
    errno.EACCES: "change the owner or the mode",
    errno.EPERM: "change the owner, the mode or the file attributes",
    errno.EIO: "the disk fails: look at the kernel's log",
    errno.EMFILE: "raise the limit of open files",
}
_ANOTHER_DISK: Final = "name a directory on a local file system, e.g. ext4 or XFS"


class Finding(NamedTuple):
    """One line of `pillarbox doctor`; `ok` is False where something must be mended, and `text` then says how."""

    ok: bool
    check: str
    text: str


def good(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(ok=True, check=check, text=text)


def bad(check: str, text: str) -> Finding:
    """Something must be mended; `text` says how."""
    return Finding(ok=False, check=check, text=text)


class Limits(NamedTuple):
    """Those settings that the state of a directory is held against."""

    power: bool
    max_bytes: int
    max_files: int
    min_free_bytes: int | None
    evicts: bool
    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    links: bool = False  # needed for what is to be: several destinations, whose queues are made of them


def examine(place: Directory, clock: Clock, limits: Limits) -> list[Finding]:
    """All findings, in the order in which they matter; where the directory itself will not do, nothing further is tried."""
    try:
        findings = _directory(place, limits)
        if not all(finding.ok for finding in findings if finding.check in ("directory", "medium")):
            return findings
        queues = place.queues()
        findings += probe(place, clock, power=limits.power, links=limits.links or bool(queues))
        findings.append(_space(place, limits))
        account = place.account()  # before the clock is read: what is sealed meanwhile is not ahead of it
        findings += _room(account, limits)
        findings += _kept(account, queues, limits)
        findings.append(_descriptors())
        findings.append(_stamps(account, clock.micros()))
        findings.append(_request(place, clock.micros()))
        findings += _strangers(place, queues)
    except OSError as error:
        findings = [bad("directory", f"{error.strerror}: {_way_out(error)}")]
    return findings


def _way_out(error: OSError) -> str:
    return _WAYS_OUT.get(error.errno or 0, _ANOTHER_DISK)


def _directory(place: Directory, limits: Limits) -> list[Finding]:
    facts = place.filesystem.directory_facts(place.path)
    if facts is None:
        return [bad("directory", "is not there: make it (mkdir -m 700), or have the application make it first")]
    if not facts.is_directory:
        return [bad("directory", "is not a directory: name a directory")]
    if not facts.usable:
        return [bad("directory", "cannot be read and written by this user: change its owner or mode")]
    findings = [good("directory", "is there, and can be read and written")]
    if facts.mode & OPEN_MODE:
        findings.append(bad("mode", f"{facts.mode:03o} lets other users in, and events may be personal: chmod 700"))
    else:
        findings.append(good("mode", f"{facts.mode:03o}, for its owner only"))
    medium = facts.medium or "unknown: this system does not tell"
    if facts.medium in NETWORK_MEDIA:
        text = f"{medium}, over a network, where locks and syncs do not hold what is promised: {_ANOTHER_DISK}"
    elif limits.power and facts.medium in VOLATILE_MEDIA:
        text = f'{medium}, in memory, where durability "power" cannot be kept: name a directory on a disk'
    else:
        return [*findings, good("medium", medium)]
    return [*findings, bad("medium", text)]


def probe(place: Directory, clock: Clock, *, power: bool, links: bool = False) -> list[Finding]:
    """Try each verb that the store needs on files of our own."""
    mine = f"{_PREFIX}{place.new_id()}"
    steps: tuple[tuple[str, Callable[[Directory, str], Finding]], ...] = (
        ("create", _create),
        ("append", _append),
        ("lock", _lock),
        ("rename", _rename),
        ("sync", partial(_sync, clock=clock, power=power)),
        ("directory sync", partial(_sync_directory, clock=clock)),
        ("hard link", partial(_link, needed=links)),
    )
    findings: list[Finding] = []
    try:
        for number, (check, step) in enumerate(steps):
            try:
                findings.append(step(place, f"{mine}-{number}.probe"))
            except OSError as error:
                findings.append(bad(check, f"{error.strerror}: {_way_out(error)}"))
            except FileUnusableError as error:  # where users are mapped to others, as network file systems do
                findings.append(bad(check, f"a file made just now {error.problem}: {_ANOTHER_DISK}"))
            if check in _NEEDED and not findings[-1].ok:
                break
    finally:
        removed = _remove(place, mine)
    return [*findings, removed]


def _remove(place: Directory, mine: str) -> Finding:
    """Remove what the steps made, as far as they came; an interrupt waits until that is done."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for name in [entry.name for entry in place.filesystem.listing(place.path) if entry.name.startswith(mine)]:
                place.remove(name)
        except KeyboardInterrupt as error:
            interrupt = error
            continue
        except OSError as error:
            found = bad("remove", f"{error.strerror}: {_way_out(error)}; then remove {mine}-*")
        else:
            found = good("remove", "deletes")
        break
    if interrupt is not None:
        raise interrupt
    return found


@contextlib.contextmanager
def _new(place: Directory, name: str) -> Iterator[int]:
    """A new file, open."""
    fd = place.filesystem.create(place.at(name))
    try:
        yield fd
    finally:
        place.filesystem.close(fd)


def _create(place: Directory, name: str) -> Finding:
    with _new(place, name):
        try:
            again = place.filesystem.create(place.at(name))
        except FileExistsError:
            return good("create", "refuses a name that is taken")
        place.filesystem.close(again)
    return bad("create", f"made a file under a name that was taken: {_ANOTHER_DISK}")


def _append(place: Directory, name: str) -> Finding:
    with _new(place, name) as fd:
        place.filesystem.write_all(fd, _LINE * 2)
        place.filesystem.truncate(fd, len(_LINE))  # what follows goes to the end of now, not to where the last one ended
        place.filesystem.write_all(fd, _LINE)
        if place.filesystem.read_all(fd) == _LINE * 2:
            return good("append", "writes go to the end of the file, and are read back")
    return bad("append", f"what was appended is not what is read: {_ANOTHER_DISK}")


def _lock(place: Directory, name: str) -> Finding:
    with _new(place, name) as fd:
        if not place.filesystem.lock(fd):
            return bad("lock", f"flock does not give out a lock that nobody holds: {_ANOTHER_DISK}")
        second = place.take(name)
    if second is not None:
        place.filesystem.close(second.fd)
        return bad("lock", f"flock gave the same lock out twice: {_ANOTHER_DISK}")
    freed = place.take(name)
    if freed is None:
        return bad("lock", f"flock still holds a lock whose file was closed: {_ANOTHER_DISK}")
    place.filesystem.close(freed.fd)
    return good("lock", "flock excludes a second, and is free once closed")


def _rename(place: Directory, name: str) -> Finding:
    with _new(place, name) as fd:
        place.put(name, _LINE)
        whole = place.read_bytes(name) == _LINE and place.filesystem.size(fd) == 0
        if whole and not place.filesystem.is_linked(fd) and not place.filesystem.is_still(fd, place.at(name)):
            return good("rename", "puts one file in another's place, whole")
    return bad("rename", f"does not put one file in another's place as a whole: {_ANOTHER_DISK}")


def _median_s(clock: Clock, prepare: Callable[[], None], sync: Callable[[], None]) -> tuple[float, int]:
    """How long a sync takes, and how many that is the median of."""
    took: list[float] = []
    while len(took) < _SYNCS and sum(took) < _SYNCS_S:
        prepare()
        began = clock.monotonic()
        sync()
        took.append(clock.monotonic() - began)
    return statistics.median(took), len(took)


def _sync(place: Directory, name: str, *, clock: Clock, power: bool) -> Finding:
    disk = place.filesystem
    with _new(place, name) as fd:
        seconds, count = _median_s(clock, partial(disk.write_all, fd, _LINE), partial(disk.sync_data, fd))
    text = f"fdatasync takes {seconds * 1e3:.3f} ms (median of {count})"
    if not power:
        return good("sync", text)
    if seconds < _NO_SYNC_S:
        return bad("sync", f"{text}, too little to reach a disk: mount without volatile or nobarrier, preload nothing")
    return good("sync", f'{text}: with durability "power" an event waits for one or two of them')


def _sync_directory(place: Directory, name: str, *, clock: Clock) -> Finding:
    numbers = iter(range(_SYNCS))

    def prepare() -> None:
        with _new(place, f"{name}-{next(numbers)}"):
            pass

    seconds, count = _median_s(clock, prepare, partial(place.filesystem.sync_directory, place.path))
    return good("directory sync", f"fsync takes {seconds * 1e3:.3f} ms (median of {count})")


def _link(place: Directory, name: str, *, needed: bool) -> Finding:
    """Only reported, but where several destinations need them."""
    with _new(place, name):
        try:
            place.filesystem.link(place.at(name), place.at(f"{name}-2"))
        except OSError as error:
            text = f"cannot be made here ({error.strerror})"
            if needed:
                return bad("hard link", f"{text}, and several destinations need them: {_ANOTHER_DISK}, or have one destination")
            return good("hard link", f"{text}; one destination needs none")
    try:
        fd = place.filesystem.open_existing(place.at(name))
    except FileUnusableError:
        return good("hard link", "can be made, and is counted")
    place.filesystem.close(fd)
    return good("hard link", "can be made, but is not counted: a second link to our files would not be seen")


def _space(place: Directory, limits: Limits) -> Finding:
    space = place.filesystem.space(place.path)
    least = limits.min_free_bytes
    if least is None:
        least = min(MIN_FREE_MAX, space.total_bytes // MIN_FREE_SHARE)
    text = f"{space.free_bytes:,} bytes are free, of which min_free_bytes keeps {least:,}"
    if space.free_bytes < least:
        return bad("space", f"{text}: nothing is accepted; make room on the volume, or lower min_free_bytes")
    return good("space", text)


def _room(account: Account, limits: Limits) -> list[Finding]:
    findings: list[Finding] = []
    for check, used, limit, setting in (
        ("pending bytes", account.pending_bytes, limits.max_bytes, "max_bytes"),
        ("pending files", account.pending_files, limits.max_files, "max_files"),
    ):
        full = used >= limit - (limit // SLACK_SHARE if limits.evicts else 0)
        text = f"{used:,} of {limit:,} ({setting})"
        if full:
            loses = "the oldest events are given up for new ones" if limits.evicts else "new events are refused"
            text = f"{text}, full: {loses}; have them delivered, or raise {setting}"
        findings.append(bad(check, text) if full else good(check, text))
    return findings


def _kept(account: Account, queues: Sequence[Directory], limits: Limits) -> Iterator[Finding]:
    """What is set aside; the limits are those of each queue, and of the directory without them."""
    each = [(queue, queue.account()) for queue in queues]
    dead = account.dead_bytes - sum(found.dead_bytes for _, found in each)
    corrupt = account.corrupt_bytes - sum(found.corrupt_bytes for _, found in each)
    yield from _set_aside("", "", max(0, dead), max(0, corrupt), limits)
    for queue, found in each:
        yield from _set_aside(f"{queue.sink}: ", f" -d {queue.path}", found.dead_bytes, found.corrupt_bytes, limits)


def _set_aside(name: str, where: str, dead: int, corrupt: int, limits: Limits) -> Iterator[Finding]:
    for check, used, limit, setting, command in (
        ("dead letters", dead, limits.max_dead_bytes, "max_dead_bytes", "dead"),
        ("quarantine", corrupt, limits.max_quarantine_bytes, "max_quarantine_bytes", "quarantine"),
    ):
        text = f"{name}{used:,} of {limit:,} bytes ({setting})"
        if used and used >= limit - limit // SLACK_SHARE:
            way_out = f"look at them with pillarbox {command} list{where}, and mend or purge them, or raise {setting}"
            yield bad(check, f"{text}, full or nearly so: {way_out}")
        else:
            yield good(check, text)


def _descriptors() -> Finding:
    """Of this shell's processes; a service may have others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return good("open files", "no limit (RLIMIT_NOFILE)")
    text = f"a process may have {soft:,} (RLIMIT_NOFILE, as it is here)"
    if soft < _DESCRIPTORS_MIN:
        return bad(
            "open files", f"{text}, and an outbox may need {_DESCRIPTORS_MIN}: ulimit -n 1024, or LimitNOFILE= of the service"
        )
    return good("open files", text)


def _request(place: Directory, now: int) -> Finding:
    """Of `seal.request`; that it is a file of ours is looked at with all others."""
    try:
        data = place.read_bytes(layout.SEAL_REQUEST)
    except OSError as error:
        return bad("request", f"{layout.SEAL_REQUEST} cannot be read, so that seal and flush do nothing: {_way_out(error)}")
    if not data:
        return good("request", "nobody has asked the writers to seal")
    try:
        asked = msgspec.json.decode(data, type=Request)
    except msgspec.DecodeError:
        return bad("request", f"{layout.SEAL_REQUEST} does not hold what pillarbox seal writes: run that, it writes it anew")
    return good("request", f"the writers were asked to seal {max(0.0, (now - asked.at_micros) / 1e6):,.0f} s ago")


def _stamps(account: Account, now: int) -> Finding:
    if account.newest_stamp is None:
        return good("clock", "no sealed file to hold it against")
    age_s = (now - account.newest_stamp) / 1e6
    if account.newest_stamp > now + _AHEAD_MICROS:
        return bad("clock", f"the newest sealed file is {-age_s:,.0f} s in the future: set the clock, it stepped back")
    return good("clock", f"the newest sealed file is {max(0.0, age_s):,.0f} s old")


def _strangers(place: Directory, queues: Sequence[Directory]) -> list[Finding]:
    """Files under our names that the store will leave alone, here and in the queues."""
    findings = []
    others = 0
    linked = bool(queues or place.asked_for())  # what waits has, or may have, names in queues too
    for within, name, problem in [
        (f"{layout.queue_name(where.sink)}/" if where.sink else "", *found)
        for where in (place, *queues)
        for found in filesystem.strangers(where.path, linked=linked)
    ]:
        if name == ".":
            findings.append(bad("owner", f"{within or 'the directory'} {problem}, who may remove what is in it: chown it"))
        elif _is_ours(name, problem):
            others += 1
            if others <= _NAMED_MAX:
                findings.append(bad("names", f"{within}{name} {problem}, and is left alone: see what it is, and remove it"))
    if others > _NAMED_MAX:
        findings.append(bad("names", f"and {others - _NAMED_MAX:,} more like these"))
    return findings or [good("names", "all files under our names are ours to use")]


def _is_ours(name: str, problem: str) -> bool:
    """Whether it has a name that means something to the store; a queue is a directory, and nothing else."""
    if layout.sink_of(name) is not None:
        return problem != filesystem.IS_DIRECTORY
    return layout.kind_of(name) is not Kind.OTHER or name in _OTHER_NAMES
