"""Listing, taking, adopting, sealing names, deletion."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.fanout import FanOut
from pillarbox.store.filesystem import DirectoryInfo
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.recovery import RECOVERY, FileTail, LockState, RecoveryAction, recover
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from tests.conftest import PLANTED, plant


def put(place: Directory, name: str, data: bytes = b"x\n") -> Path:
    path = Path(place.path) / name
    path.write_bytes(data)
    return path


def names(place: Directory) -> list[str]:
    return sorted(os.listdir(place.path))


def test_what_we_make_is_for_the_owner_only(place: Directory) -> None:
    """Directories 0700, files 0600."""
    place.filesystem.close(place.filesystem.create(place.path_of("active-w-1.ndjson")))
    assert stat.S_IMODE(os.stat(place.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(place.path_of("active-w-1.ndjson")).st_mode) == 0o600


def test_an_open_directory_is_used_with_a_warning(tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """An operator may have a reason."""
    tmp_path.chmod(0o755)
    Directory(str(tmp_path), OsFilesystem(), clock).ensure_usable()
    assert "chmod 700" in caplog.text


@pytest.mark.parametrize("path", ["file", "file/below", "\0"])
def test_a_directory_that_cannot_be_is_an_error_at_once(tmp_path: Path, clock: ManualClock, path: str) -> None:
    """Not at the first event."""
    (tmp_path / "file").write_text("")
    with pytest.raises((DirectoryUnusableError, ValueError)):
        Directory(str(tmp_path / path), OsFilesystem(), clock).ensure_usable()


def test_pending_bytes_are_active_and_sealed_files_only(place: Directory) -> None:
    """The example that the older system's tests have: 12 bytes."""
    put(place, "active.ndjson", b"active")
    put(place, "sealed-one.ndjson", b"sealed")
    put(place, "corrupt-sealed-two.ndjson", b"corrupt")
    put(place, "dead-sealed-two.ndjson", b"dead letter")
    put(place, "notes.txt", b"not ours")
    put(place, "active-spare-1.ndjson", b"")
    account = place.disk_usage()
    assert (account.pending_bytes, account.pending_files) == (12, 2)
    assert (account.corrupt_bytes, account.dead_bytes) == (7, 11)


def test_sealed_files_are_listed_oldest_first(place: Directory) -> None:
    """By name."""
    for stamp in (30, 4, 100):
        put(place, layout.sealed_name(stamp, "u"))
    assert [layout.sealed_at(name) for name in place.batch_names()] == [4, 30, 100]


def test_a_taken_file_cannot_be_taken_again(place: Directory) -> None:
    """Until its descriptor is closed."""
    put(place, "sealed-a.ndjson")
    taken = place.lock_existing("sealed-a.ndjson")
    assert taken is not None
    assert place.lock_existing("sealed-a.ndjson") is None
    place.filesystem.close(taken.fd)
    again = place.lock_existing("sealed-a.ndjson")
    assert again is not None
    place.filesystem.close(again.fd)


def test_a_file_that_is_gone_is_not_taken(place: Directory) -> None:
    """Somebody else settled it."""
    assert place.lock_existing("sealed-a.ndjson") is None


class _Swapping(OsFilesystem):
    """Replaces the file between open and lock, once."""

    swaps = 1

    def lock(self, fd: int) -> bool:
        if self.swaps:
            self.swaps -= 1
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            path.unlink()
            path.write_bytes(b"new\n")
        return super().lock(fd)


def test_a_file_that_is_replaced_between_open_and_lock_is_looked_at_again(tmp_path: Path, clock: ManualClock) -> None:
    """What is taken is what the name means now."""
    place = Directory(str(tmp_path), _Swapping(), clock)
    put(place, "sealed-a.ndjson", b"old\n")
    taken = place.lock_existing("sealed-a.ndjson")
    assert taken is not None
    assert place.filesystem.read_all(taken.fd) == b"new\n"
    place.filesystem.close(taken.fd)


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_under_our_names_is_left_alone(place: Directory, tmp_path: Path, planted: str) -> None:
    """It neither redirects nor hangs nor stops us."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\n")
    path = Path(place.path) / "active-x-1.ndjson"
    plant(planted, path, victim)
    with pytest.raises(FileUnusableError):
        place.lock_existing(path.name)
    assert recover(place) == []
    assert victim.read_bytes() == b"precious\n"


def test_the_recovery_table_is_total() -> None:
    """Every combination has one action; a held lock is never touched, a sealed file never changed."""
    assert set(RECOVERY) == {(kind, lock, tail) for kind in Kind for lock in LockState for tail in FileTail}
    for (kind, lock, tail), action in RECOVERY.items():
        if lock is LockState.ANOTHER or kind in (Kind.SEALED, Kind.CORRUPT, Kind.RANGES, Kind.DEAD, Kind.DELIVERED, Kind.OTHER):
            assert action is RecoveryAction.LEAVE
        elif kind is Kind.TEMPORARY or tail is FileTail.EMPTY:
            assert action is RecoveryAction.REMOVE
        else:
            assert action is RecoveryAction.SEAL


EXAMPLES = {
    Kind.ACTIVE: "active-w-1.ndjson",
    Kind.LEGACY_ACTIVE: "active.ndjson",
    Kind.SEALED: "sealed-a.ndjson",
    Kind.CORRUPT: "corrupt-sealed-a.ndjson",
    Kind.RANGES: "corrupt-sealed-a.spans.json",
    Kind.DEAD: "dead-sealed-a.ndjson",
    Kind.DELIVERED: "delivered-a.ndjson",
    Kind.TEMPORARY: "dead-sealed-a.ndjson.aside",
    Kind.OTHER: "notes.txt",
}


@pytest.mark.parametrize("tail", FileTail)
@pytest.mark.parametrize("lock", LockState)
@pytest.mark.parametrize("kind", Kind)
def test_recovery_does_what_the_table_says(place: Directory, kind: Kind, lock: LockState, tail: FileTail) -> None:
    """On a real directory, twice: the second time changes nothing."""
    data = {FileTail.EMPTY: b"", FileTail.WHOLE: b"some\n", FileTail.TORN: b"some\nto", FileTail.NUL: b"some\nto\0\0"}[tail]
    path = put(place, EXAMPLES[kind], data)
    holder = os.open(path, os.O_RDONLY)
    if lock is LockState.ANOTHER:
        fcntl.flock(holder, fcntl.LOCK_EX)
    adopted = recover(place)
    after = names(place)
    assert recover(place) == []
    assert names(place) == after
    os.close(holder)
    action = RECOVERY[kind, lock, tail]
    if action is RecoveryAction.LEAVE:
        assert (adopted, after) == ([], [path.name])
    elif action is RecoveryAction.REMOVE:
        assert (adopted, after) == ([], [])
    else:
        assert after == [adopted[0].sealed_name]
        assert (Path(place.path) / after[0]).read_bytes() == data


def test_seal_times_increase_also_where_the_clock_steps_back(place: Directory, clock: ManualClock) -> None:
    """And start after the newest one found."""
    place.seal_after(clock.micros() + 5_000_000)
    sealed: list[str] = []
    for number in range(3):
        fd = place.filesystem.create(place.path_of(f"active-w-{number}.ndjson"))
        place.seal([LockedFile(f"active-w-{number}.ndjson", fd)], lambda _, names: sealed.extend(names))
        place.filesystem.close(fd)
        clock.step(-3600)
    assert sealed == sorted(sealed)
    assert layout.sealed_at(sealed[0]) == 1_700_000_005_000_001


def test_a_made_up_seal_time_does_not_push_ours_out_of_their_sixteen_digits(place: Directory, clock: ManualClock) -> None:
    """It is years ahead: no clock was that wrong."""
    place.seal_after(layout.MICROS_MAX)
    fd = place.filesystem.create(place.path_of("active-w-1.ndjson"))
    sealed: list[str] = []
    place.seal([LockedFile("active-w-1.ndjson", fd)], lambda _, names: sealed.extend(names))
    place.filesystem.close(fd)
    assert layout.sealed_at(sealed[0]) == clock.micros()


def test_put_is_whole_or_not_at_all_and_may_be_done_twice(place: Directory) -> None:
    """What an interrupted one left aside is left to who recovers, who may hold it already."""
    put(place, "dead-a.ndjson.x.aside", b"half")
    held = place.lock_existing("dead-a.ndjson.x.aside")
    assert held is not None
    place.write_atomically("dead-a.ndjson", b"one\n")
    place.write_atomically("dead-a.ndjson", b"one\n")
    place.filesystem.close(held.fd)
    recover(place)
    assert names(place) == ["dead-a.ndjson"]
    assert (Path(place.path) / "dead-a.ndjson").read_bytes() == b"one\n"


def test_a_dead_writers_files_are_adopted_in_the_order_in_which_it_filled_them(place: Directory) -> None:
    """The tenth after the ninth."""
    for number in (1, 2, 9, 10, 11):
        put(place, layout.active_name("w", number), b"%d\n" % number)
    recover(place)
    assert [Path(place.path_of(name)).read_bytes() for name in place.batch_names()] == [
        b"1\n",
        b"2\n",
        b"9\n",
        b"10\n",
        b"11\n",
    ]


def test_a_dead_writers_files_are_left_to_whoever_has_the_first_of_them(place: Directory) -> None:
    """Two that share them would seal them out of order; another writer's are adopted all the same."""
    for name in (layout.active_name("v", 1), layout.active_name("w", 1), layout.active_name("w", 2)):
        put(place, name, b"1\n")
    held = place.lock_existing(layout.active_name("w", 1))
    assert held is not None
    assert [adopted.active_name for adopted in recover(place)] == [layout.active_name("v", 1)]
    place.filesystem.close(held.fd)
    assert [adopted.active_name for adopted in recover(place)] == [layout.active_name("w", 1), layout.active_name("w", 2)]


def test_what_is_adopted_is_newer_than_what_others_sealed_wherever_the_clock_went(place: Directory, clock: ManualClock) -> None:
    """The stamp follows the newest one that is found."""
    newest = clock.micros() + 10**9
    put(place, layout.sealed_name(newest, "u"), b"1\n")
    put(place, layout.active_name("w", 1), b"2\n")
    recover(place)
    assert [layout.sealed_at(name) for name in place.batch_names()] == [newest, newest + 1]


class _Tracing(OsFilesystem):
    """Writes down every verb that changes something."""

    def __init__(self) -> None:
        super().__init__()
        self.verbs: list[str] = []

    def sync_data(self, fd: int) -> None:
        self.verbs.append("sync")
        super().sync_data(fd)

    def sync_directory(self, path: str) -> None:
        self.verbs.append("sync directory")
        super().sync_directory(path)

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        self.verbs.append("rename")
        os.rename(source, target)


def test_adoption_syncs_each_file_then_renames_all_then_syncs_the_directory_once(tmp_path: Path, clock: ManualClock) -> None:
    """In this order, for several files at a time."""
    filesystem = _Tracing()
    place = Directory(str(tmp_path), filesystem, clock)
    for name in ("active-w-1.ndjson", "active-w-2.ndjson"):
        (tmp_path / name).write_bytes(b'{"event":{}}\n')
    assert len(recover(place)) == 2
    assert filesystem.verbs == ["sync", "sync", "rename", "rename", "sync directory"]


class _Raced(OsFilesystem):
    """Between the creation of a file and its locking, somebody who recovers comes along, `races` times."""

    def __init__(self, place: Directory, races: int) -> None:
        super().__init__()
        self.other = Directory(place.path, OsFilesystem(), SystemClock())
        self.races = races

    def lock(self, fd: int) -> bool:
        if self.races:
            self.races -= 1
            recover(self.other)
        return super().lock(fd)


def test_a_new_file_that_was_taken_for_a_dead_writers_is_not_used(place: Directory, clock: ManualClock) -> None:
    """It is gone: what were written to it would be lost. Another is made."""
    raced = Directory(place.path, _Raced(place, 1), clock)
    assert raced.create("active-w-1.ndjson") is None
    writer = Writer(Directory(place.path, _Raced(place, 3), clock), WriterLimits(500, 10**6, 10**9), lambda: None)
    writer.start(0, 0)
    assert writer.append(record.line(b"1"), 1)
    assert [entry.size for entry in place.filesystem.list_files(place.path)] == [len(record.line(b"1"))]
    raced = Directory(place.path, _Raced(place, 2), clock)
    raced.write_atomically("dead-a.ndjson", b"letter")
    assert raced.read_small_file("dead-a.ndjson") == b"letter"


class _Mounted(OsFilesystem):
    """On NFS."""

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        facts = super().inspect_directory(path)
        return facts and facts._replace(filesystem_type="nfs4")


def test_a_directory_on_a_network_is_refused_with_the_reason(tmp_path: Path, clock: ManualClock) -> None:
    """Its locks and syncs do not hold what is promised."""
    with pytest.raises(DirectoryUnusableError, match=r"nfs4.*local file system"):
        Directory(str(tmp_path), _Mounted(), clock).ensure_usable()


class _Unreadable(OsFilesystem):
    """Cannot read the end of one file."""

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        if "active-a-" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        return super().read_at(fd, offset, count)


def test_a_file_whose_end_cannot_be_read_does_not_keep_the_others_from_being_adopted(
    tmp_path: Path, clock: ManualClock
) -> None:
    """It stays as it is, to be looked at again."""
    place = Directory(str(tmp_path), _Unreadable(), clock)
    put(place, "active-a-1.ndjson")
    put(place, "active-b-1.ndjson")
    assert [file.active_name for file in recover(place)] == ["active-b-1.ndjson"]
    assert names(place)[0] == "active-a-1.ndjson"


def test_a_backlog_that_becomes_several_sinks_is_not_listed_once_a_file(place: Directory, clock: ManualClock) -> None:
    """Each file has further links by then, and whether it may is asked of the directory."""
    for number in range(200):
        put(place, layout.sealed_name(number, "x"), record.line(b"{}"))
    listed: list[str] = []

    class Counting(OsFilesystem):
        def subdirectories(self, path: str) -> list[str]:
            listed.append(path)
            return super().subdirectories(path)

    watched = Directory(place.path, Counting(), clock)
    assert FanOut(watched, ["one", "two"], clock, LedgerWriter(watched, clock)).distribute() == 200
    assert len(listed) < 20
