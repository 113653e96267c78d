"""The directory: listing, locking, recovery, sealing and deletion."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.fanout import FanOut
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.filesystem import DirectoryInfo
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.recovery import RECOVERY, FileTail, LockState, RecoveryAction, recover
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from tests.conftest import UNUSABLE_KINDS, create_unusable_file


def put(outbox_dir: Directory, name: str, data: bytes = b"x\n") -> Path:
    path = Path(outbox_dir.path) / name
    path.write_bytes(data)
    return path


def names(outbox_dir: Directory) -> list[str]:
    return sorted(os.listdir(outbox_dir.path))


def test_directories_and_files_are_for_the_owner_only(outbox_dir: Directory) -> None:
    """Their modes are 0700 and 0600."""
    outbox_dir.filesystem.close(outbox_dir.filesystem.create(outbox_dir.path_of("active-w-1.ndjson")))
    assert stat.S_IMODE(os.stat(outbox_dir.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(outbox_dir.path_of("active-w-1.ndjson")).st_mode) == 0o600


def test_a_directory_open_to_others_is_used_with_a_warning(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not an error, because the operator may have a reason."""
    tmp_path.chmod(0o755)
    Directory(str(tmp_path), OsFilesystem(), clock).ensure_usable()
    assert "chmod 700" in caplog.text


@pytest.mark.parametrize("path", ["file", "file/below", "\0"])
def test_an_unusable_directory_raises_before_the_first_event(tmp_path: Path, clock: ManualClock, path: str) -> None:
    """The check is part of the start."""
    (tmp_path / "file").write_text("")
    with pytest.raises((DirectoryUnusableError, ValueError)):
        Directory(str(tmp_path / path), OsFilesystem(), clock).ensure_usable()


def test_pending_bytes_are_those_of_segments_and_batch_files(outbox_dir: Directory) -> None:
    """12 bytes, as in an example in the tests of the older system."""
    put(outbox_dir, "active.ndjson", b"active")
    put(outbox_dir, "sealed-one.ndjson", b"sealed")
    put(outbox_dir, "corrupt-sealed-two.ndjson", b"corrupt")
    put(outbox_dir, "dead-sealed-two.ndjson", b"dead letter")
    put(outbox_dir, "notes.txt", b"not ours")
    put(outbox_dir, "active-spare-1.ndjson", b"")
    account = outbox_dir.disk_usage()
    assert (account.pending_bytes, account.pending_files) == (12, 2)
    assert (account.corrupt_bytes, account.dead_bytes) == (7, 11)


def test_batches_are_listed_oldest_first(outbox_dir: Directory) -> None:
    """The seal time is in the name."""
    for sealed_at in (30, 4, 100):
        put(outbox_dir, layout.sealed_name(sealed_at, "u"))
    assert [layout.sealed_at(name) for name in outbox_dir.batch_names()] == [4, 30, 100]


def test_a_locked_file_cannot_be_locked_again(outbox_dir: Directory) -> None:
    """The lock is released when the descriptor is closed."""
    put(outbox_dir, "sealed-a.ndjson")
    locked = outbox_dir.lock_existing("sealed-a.ndjson")
    assert locked is not None
    assert outbox_dir.lock_existing("sealed-a.ndjson") is None
    outbox_dir.filesystem.close(locked.fd)
    locked = outbox_dir.lock_existing("sealed-a.ndjson")
    assert locked is not None
    outbox_dir.filesystem.close(locked.fd)


def test_a_deleted_file_is_not_locked(outbox_dir: Directory) -> None:
    """Another process may deliver and delete it first."""
    assert outbox_dir.lock_existing("sealed-a.ndjson") is None


class _SwappingFilesystem(OsFilesystem):
    """Replaces the file between open and lock, once."""

    swaps = 1

    def lock(self, fd: int) -> bool:
        if self.swaps:
            self.swaps -= 1
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            path.unlink()
            path.write_bytes(b"new\n")
        return super().lock(fd)


def test_a_file_that_is_replaced_between_open_and_lock_is_opened_again(tmp_path: Path, clock: ManualClock) -> None:
    """The lock is that of the file that has the name now."""
    outbox_dir = Directory(str(tmp_path), _SwappingFilesystem(), clock)
    put(outbox_dir, "sealed-a.ndjson", b"old\n")
    locked = outbox_dir.lock_existing("sealed-a.ndjson")
    assert locked is not None
    assert outbox_dir.filesystem.read_all(locked.fd) == b"new\n"
    outbox_dir.filesystem.close(locked.fd)


@pytest.mark.parametrize("planted", UNUSABLE_KINDS)
def test_planted_files_are_left_alone(outbox_dir: Directory, tmp_path: Path, planted: str) -> None:
    """They neither redirect nor block the process."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\n")
    path = Path(outbox_dir.path) / "active-x-1.ndjson"
    create_unusable_file(planted, path, victim)
    with pytest.raises(FileUnusableError):
        outbox_dir.lock_existing(path.name)
    assert recover(outbox_dir) == []
    assert victim.read_bytes() == b"precious\n"


def test_the_recovery_table_is_total() -> None:
    """Every combination has one action; a file whose lock is held is left alone, and so is a batch file."""
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
def test_recovery_does_what_the_table_says(outbox_dir: Directory, kind: Kind, lock: LockState, tail: FileTail) -> None:
    """On a real directory. A second recovery changes nothing."""
    data = {FileTail.EMPTY: b"", FileTail.WHOLE: b"some\n", FileTail.TORN: b"some\nto", FileTail.NUL: b"some\nto\0\0"}[tail]
    path = put(outbox_dir, EXAMPLES[kind], data)
    holder = os.open(path, os.O_RDONLY)
    if lock is LockState.ANOTHER:
        fcntl.flock(holder, fcntl.LOCK_EX)
    recovered = recover(outbox_dir)
    names_after = names(outbox_dir)
    assert recover(outbox_dir) == []
    assert names(outbox_dir) == names_after
    os.close(holder)
    action = RECOVERY[kind, lock, tail]
    if action is RecoveryAction.LEAVE:
        assert (recovered, names_after) == ([], [path.name])
    elif action is RecoveryAction.REMOVE:
        assert (recovered, names_after) == ([], [])
    else:
        assert names_after == [recovered[0].sealed_name]
        assert (Path(outbox_dir.path) / names_after[0]).read_bytes() == data


def test_seal_times_increase_even_where_the_clock_steps_back(outbox_dir: Directory, clock: ManualClock) -> None:
    """They start after the latest one in the directory."""
    outbox_dir.seal_after(clock.micros() + 5_000_000)
    sealed: list[str] = []
    for number in range(3):
        fd = outbox_dir.filesystem.create(outbox_dir.path_of(f"active-w-{number}.ndjson"))
        outbox_dir.seal([LockedFile(f"active-w-{number}.ndjson", fd)], lambda _, names: sealed.extend(names))
        outbox_dir.filesystem.close(fd)
        clock.step(-3600)
    assert sealed == sorted(sealed)
    assert layout.sealed_at(sealed[0]) == 1_700_000_005_000_001


def test_a_forged_seal_time_far_in_the_future_is_ignored(outbox_dir: Directory, clock: ManualClock) -> None:
    """Otherwise later seal times could exceed sixteen digits."""
    outbox_dir.seal_after(layout.MICROS_MAX)
    fd = outbox_dir.filesystem.create(outbox_dir.path_of("active-w-1.ndjson"))
    sealed: list[str] = []
    outbox_dir.seal([LockedFile("active-w-1.ndjson", fd)], lambda _, names: sealed.extend(names))
    outbox_dir.filesystem.close(fd)
    assert layout.sealed_at(sealed[0]) == clock.micros()


def test_an_atomic_write_may_be_repeated_after_an_interrupted_one(outbox_dir: Directory) -> None:
    """Recovery removes the temporary file of the interrupted one, even if its lock is held meanwhile."""
    put(outbox_dir, "dead-a.ndjson.x.aside", b"half")
    temporary = outbox_dir.lock_existing("dead-a.ndjson.x.aside")
    assert temporary is not None
    outbox_dir.write_atomically("dead-a.ndjson", b"one\n")
    outbox_dir.write_atomically("dead-a.ndjson", b"one\n")
    outbox_dir.filesystem.close(temporary.fd)
    recover(outbox_dir)
    assert names(outbox_dir) == ["dead-a.ndjson"]
    assert (Path(outbox_dir.path) / "dead-a.ndjson").read_bytes() == b"one\n"


def test_segments_of_a_dead_writer_are_sealed_in_the_order_in_which_it_filled_them(outbox_dir: Directory) -> None:
    """The tenth follows the ninth."""
    for number in (1, 2, 9, 10, 11):
        put(outbox_dir, layout.active_name("w", number), b"%d\n" % number)
    recover(outbox_dir)
    assert [Path(outbox_dir.path_of(name)).read_bytes() for name in outbox_dir.batch_names()] == [
        b"1\n",
        b"2\n",
        b"9\n",
        b"10\n",
        b"11\n",
    ]


def test_segments_of_a_dead_writer_are_left_to_the_process_that_holds_the_first(outbox_dir: Directory) -> None:
    """Two processes that share them would seal them out of order; those of another writer are sealed."""
    for name in (layout.active_name("v", 1), layout.active_name("w", 1), layout.active_name("w", 2)):
        put(outbox_dir, name, b"1\n")
    first = outbox_dir.lock_existing(layout.active_name("w", 1))
    assert first is not None
    assert [file.active_name for file in recover(outbox_dir)] == [layout.active_name("v", 1)]
    outbox_dir.filesystem.close(first.fd)
    assert [file.active_name for file in recover(outbox_dir)] == [layout.active_name("w", 1), layout.active_name("w", 2)]


def test_recovered_segments_are_sealed_after_the_batches_that_exist_whatever_the_clock_says(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """Their seal time follows the latest one in the directory."""
    newest = clock.micros() + 10**9
    put(outbox_dir, layout.sealed_name(newest, "u"), b"1\n")
    put(outbox_dir, layout.active_name("w", 1), b"2\n")
    recover(outbox_dir)
    assert [layout.sealed_at(name) for name in outbox_dir.batch_names()] == [newest, newest + 1]


class _SyncTracingFilesystem(OsFilesystem):
    """Records the syncs and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def sync_data(self, fd: int) -> None:
        self.calls.append("sync")
        super().sync_data(fd)

    def sync_directory(self, path: str) -> None:
        self.calls.append("sync directory")
        super().sync_directory(path)

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        self.calls.append("rename")
        os.rename(source, target)


def test_recovery_syncs_each_segment_then_renames_all_then_syncs_the_directory_once(tmp_path: Path, clock: ManualClock) -> None:
    """In this order for all segments together."""
    filesystem = _SyncTracingFilesystem()
    outbox_dir = Directory(str(tmp_path), filesystem, clock)
    for name in ("active-w-1.ndjson", "active-w-2.ndjson"):
        (tmp_path / name).write_bytes(b'{"event":{}}\n')
    assert len(recover(outbox_dir)) == 2
    assert filesystem.calls == ["sync", "sync", "rename", "rename", "sync directory"]


class _RacingFilesystem(OsFilesystem):
    """Runs a recovery between the creation of a file and its locking, `races` times."""

    def __init__(self, outbox_dir: Directory, races: int) -> None:
        super().__init__()
        self.other = Directory(outbox_dir.path, OsFilesystem(), SystemClock())
        self.races = races

    def lock(self, fd: int) -> bool:
        if self.races:
            self.races -= 1
            recover(self.other)
        return super().lock(fd)


def test_a_new_file_that_recovery_takes_for_a_dead_writers_is_not_used(outbox_dir: Directory, clock: ManualClock) -> None:
    """It is deleted, with everything written to it; another one is created."""
    racing_dir = Directory(outbox_dir.path, _RacingFilesystem(outbox_dir, 1), clock)
    assert racing_dir.create("active-w-1.ndjson") is None
    writer = Writer(
        Directory(outbox_dir.path, _RacingFilesystem(outbox_dir, 3), clock), WriterLimits(500, 10**6, 10**9), lambda: None
    )
    writer.start(0, 0)
    assert writer.append(record.line(b"1"), 1)
    assert [entry.size for entry in outbox_dir.filesystem.list_files(outbox_dir.path)] == [len(record.line(b"1"))]
    racing_dir = Directory(outbox_dir.path, _RacingFilesystem(outbox_dir, 2), clock)
    racing_dir.write_atomically("dead-a.ndjson", b"letter")
    assert racing_dir.read_small_file("dead-a.ndjson") == b"letter"


class _NfsFilesystem(OsFilesystem):
    """Reports NFS as the type of the file system."""

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        info = super().inspect_directory(path)
        return info and info._replace(filesystem_type="nfs4")


def test_a_directory_on_a_network_filesystem_is_an_error_with_the_reason(tmp_path: Path, clock: ManualClock) -> None:
    """Locks and syncs are not reliable there."""
    with pytest.raises(DirectoryUnusableError, match=r"nfs4.*local file system"):
        Directory(str(tmp_path), _NfsFilesystem(), clock).ensure_usable()


class _UnreadableFilesystem(OsFilesystem):
    """Fails to read the end of one file."""

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        if "active-a-" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, "Input/output error")
        return super().read_at(fd, offset, count)


def test_an_unreadable_segment_does_not_prevent_the_recovery_of_others(tmp_path: Path, clock: ManualClock) -> None:
    """It is left unchanged for the next recovery."""
    outbox_dir = Directory(str(tmp_path), _UnreadableFilesystem(), clock)
    put(outbox_dir, "active-a-1.ndjson")
    put(outbox_dir, "active-b-1.ndjson")
    assert [file.active_name for file in recover(outbox_dir)] == ["active-b-1.ndjson"]
    assert names(outbox_dir)[0] == "active-a-1.ndjson"


def test_fanning_out_a_backlog_does_not_list_the_directory_for_each_batch(outbox_dir: Directory, clock: ManualClock) -> None:
    """The queues are listings a few times in all, to learn whether further links are allowed."""
    for number in range(200):
        put(outbox_dir, layout.sealed_name(number, "x"), record.line(b"{}"))
    listings: list[str] = []

    class CountingFilesystem(OsFilesystem):
        def subdirectories(self, path: str) -> list[str]:
            listings.append(path)
            return super().subdirectories(path)

    counting_dir = Directory(outbox_dir.path, CountingFilesystem(), clock)
    assert FanOut(counting_dir, ["one", "two"], clock, LedgerWriter(counting_dir, clock)).distribute_all() == 200
    assert len(listings) < 20
