"""The file system of the machine: which files may be opened, what a forked child inherits, and its type."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import Lease
from pillarbox.errors import FileUnusableError
from pillarbox.stats import State
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem, filesystem_type_of
from tests.conftest import UNUSABLE_KINDS, create_unusable_file


@pytest.mark.parametrize("planted", UNUSABLE_KINDS)
def test_a_planted_lock_file_is_an_error_and_its_target_unchanged(outbox_dir: Directory, tmp_path: Path, planted: str) -> None:
    """The heartbeat would be written into the target."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious\n")
    path = Path(outbox_dir.path_of(layout.DELIVER_LOCK))
    create_unusable_file(planted, path, victim)
    lease = Lease(outbox_dir, "sink", SystemClock())
    with pytest.raises(FileUnusableError):
        lease.acquire()
    lease.write_heartbeat(State("idle"), 0, "", now=True)
    assert victim.read_bytes() == b"precious\n"


class _SyncRecordingFilesystem(OsFilesystem):
    """Records which directories are synced."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[str] = []

    def sync_directory(self, path: str) -> None:
        self.synced.append(path)
        super().sync_directory(path)


def test_a_new_directory_and_its_parents_are_durable(tmp_path: Path) -> None:
    """Its contents would be lost with its name. The process that created a parent may have died before it synced it."""
    filesystem = _SyncRecordingFilesystem()
    for times in (1, 2):
        filesystem.make_directory(str(tmp_path / "a" / "b"))
        assert filesystem.synced.count(str(tmp_path)) == filesystem.synced.count(str(tmp_path / "a")) == times
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        filesystem.make_directory(str(tmp_path / "file"))


def test_a_symbolic_link_to_a_directory_is_used(tmp_path: Path) -> None:
    """An operator may move the directory elsewhere."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    OsFilesystem().make_directory(str(tmp_path / "link"))


def test_the_type_of_a_filesystem_and_its_free_space_are_known(tmp_path: Path) -> None:
    """Every Linux system has `/proc`."""
    if os.path.exists("/proc/self/mountinfo"):
        assert filesystem_type_of("/proc/self") == "proc"
        assert filesystem_type_of(str(tmp_path))
    space = OsFilesystem().disk_space(str(tmp_path))
    assert 0 <= space.free_bytes <= space.total_bytes


def test_a_fork_while_files_are_opened_and_closed_leaves_the_child_no_lock(tmp_path: Path) -> None:
    """The child knows each descriptor that it inherits, even one that another thread is just opening."""
    filesystem, stop = OsFilesystem(), threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            fd = filesystem.create(str(tmp_path / str(number)))
            filesystem.lock(fd)
            filesystem.close(fd)
            os.unlink(tmp_path / str(number))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(100):
            child = os.fork()
            if child == 0:
                filesystem.close_inherited()
                open_paths = [
                    os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _is_open(fd)
                ]
                os._exit(1 if any(path.startswith(str(tmp_path)) for path in open_paths) else 0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def _is_open(fd: str) -> bool:
    try:
        fcntl.fcntl(int(fd), fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_many_processes_may_create_the_directory_at_once(tmp_path: Path) -> None:
    """The processes that come second find the directory, and do not report an existing file."""
    for number in range(20):
        path = str(tmp_path / f"{number}" / "above" / "outbox")
        start, children = tmp_path / f"go-{number}", []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                while not start.exists():
                    pass
                try:
                    OsFilesystem().make_directory(path)
                except OSError:
                    os._exit(1)
                os._exit(0)
            children.append(child)
        start.touch()
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_an_existing_file_is_not_overwritten_by_creating_one(tmp_path: Path) -> None:
    """It may hold somebody's data."""
    (tmp_path / "existing").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        OsFilesystem().create(str(tmp_path / "existing"))
    assert (tmp_path / "existing").read_bytes() == b"x"


def test_creating_a_file_fails_where_locks_do_not_work(outbox_dir: Directory) -> None:
    """It does not retry forever."""
    outbox_dir.filesystem.create_each = lambda paths: ([-1] * len(paths), None)  # type: ignore[method-assign]
    with pytest.raises(OSError, match="locks do not work"):
        outbox_dir.write_atomically("dead-a.ndjson", b"1\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create files for other users")
def test_files_created_by_root_belong_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    """Otherwise the application could not use the files that an operator's command creates."""
    os.chown(tmp_path, 65534, 65534)
    filesystem = OsFilesystem()
    for name, create in (("a", filesystem.create), ("b", filesystem.open_lock_file), ("c", filesystem.open_append)):
        filesystem.close(create(str(tmp_path / name)))
        info = (tmp_path / name).stat()
        assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (65534, 65534, 0o600)
