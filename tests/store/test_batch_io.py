"""Batch operations give the same results as single ones, both in Python (one call after another) and in C."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox._native import COMPILED, speedups
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem, local_filesystem
from tests.conftest import UNUSABLE_KINDS, create_unusable_file
from tests.store.test_full_disks import run_in_child

KINDS = [OsFilesystem, *([CompiledOsFilesystem] if COMPILED else [])]
compiled_only = pytest.mark.skipif(not COMPILED, reason="needs the C extension")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def disk(request: pytest.FixtureRequest) -> Iterator[OsFilesystem]:
    """Each implementation; the files that it leaves open are closed afterwards."""
    filesystem = request.param()
    yield filesystem
    filesystem.close_inherited()


def is_locked(path: Path) -> bool:
    """Whether the lock of a file is held, seen from a new file description."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def paths(folder: Path, count: int) -> list[str]:
    return [str(folder / f"file-{number}-\udcff") for number in range(count)]  # not valid UTF-8


def test_the_compiled_filesystem_is_used_if_it_is_available() -> None:
    """With `PILLARBOX_PURE_PYTHON` it is not used."""
    assert type(local_filesystem()) is KINDS[-1]
    code = "from pillarbox.store.os_filesystem import *; assert type(local_filesystem()) is OsFilesystem"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PILLARBOX_PURE_PYTHON": "1"})


def test_files_are_created_for_appending_and_locked_and_only_the_owner_may_read_them(
    disk: OsFilesystem, tmp_path: Path
) -> None:
    """Like a file that is created alone."""
    names = paths(tmp_path, 3)
    fds, error = disk.create_each(names)
    assert (len(set(fds)), error) == (3, None)
    for fd, name in zip(fds, names, strict=True):
        assert os.stat(name).st_mode & 0o777 == 0o600
        assert os.fstat(fd).st_ino == os.stat(name).st_ino
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        assert Path(name).read_bytes() == b"onetwo"
        assert is_locked(Path(name))
    disk.close_each(fds)
    assert not any(is_locked(Path(name)) for name in names)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_creating_files_stops_at_the_first_failure(disk: OsFilesystem, tmp_path: Path) -> None:
    """The files before it are created and returned."""
    names = paths(tmp_path, 3)
    Path(names[1]).write_bytes(b"somebody's")
    fds, error = disk.create_each(names)
    assert len(fds) == 1
    assert isinstance(error, FileExistsError)
    assert error.filename == names[1]
    assert not Path(names[2]).exists()
    assert disk.create_each([]) == ([], None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_closes_the_files_that_batch_operations_opened(kind: type[OsFilesystem], tmp_path: Path) -> None:
    """Otherwise it would keep its parent's locks."""
    filesystem = kind()
    names = paths(tmp_path, 2)
    fds, _ = filesystem.create_each(names)
    filesystem.close_each(fds[1:])
    locked_fd = filesystem.open_locked(names[1])
    opened_fd = filesystem.open_existing(names[1])
    expected = {fds[0], opened_fd, *([] if locked_fd is None else [locked_fd])}
    assert filesystem._open_fds == expected
    filesystem.close_inherited()
    assert not any(is_locked(Path(name)) for name in names)


def test_renaming_files_stops_at_the_first_failure(disk: OsFilesystem, tmp_path: Path) -> None:
    """The files before it are renamed, and the error names the file."""
    sources, targets = paths(tmp_path, 4), [f"{name}.to" for name in paths(tmp_path, 4)]
    for name in (sources[0], sources[1], sources[3]):
        Path(name).write_bytes(b"x")
    done, error = disk.rename_each(sources, targets)
    assert done == 2
    assert isinstance(error, FileNotFoundError)
    assert error.filename == sources[2]
    assert [Path(name).exists() for name in targets] == [True, True, False, False]
    assert Path(sources[3]).exists()
    assert disk.rename_each(sources[3:], targets[3:]) == (1, None)
    assert disk.rename_each([], []) == (0, None)
    with pytest.raises(ValueError, match=r"as many|shorter|longer"):
        disk.rename_each(["a"], [])


def test_each_sync_has_its_own_result(disk: OsFilesystem, tmp_path: Path) -> None:
    """A failed sync does not affect the others."""
    fds, _ = disk.create_each(paths(tmp_path, 2))
    reader, writer = os.pipe()  # cannot be synced
    try:
        first, failed, last = disk.sync_each([fds[0], writer, fds[1]])
    finally:
        os.close(reader)
        os.close(writer)
    assert (first, last) == (None, None)
    assert isinstance(failed, OSError)
    assert failed.errno == errno.EINVAL
    assert disk.sync_each([]) == []


def test_only_an_existing_directory_can_be_synced(disk: OsFilesystem, tmp_path: Path) -> None:
    """A missing directory and a file raise the error of the system call."""
    disk.sync_directory(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        disk.sync_directory(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        disk.sync_directory(str(tmp_path / "file"))


@compiled_only
@pytest.mark.parametrize("planted", [*UNUSABLE_KINDS, "nothing", "locked"])
def test_open_locked_leaves_unusual_files_to_the_step_by_step_path(tmp_path: Path, planted: str) -> None:
    """It returns None for them and leaves no descriptor open; the step-by-step path reports the reason."""
    disk, path, victim = CompiledOsFilesystem(), tmp_path / "path", tmp_path / "victim"
    victim.write_bytes(b"")
    if planted in UNUSABLE_KINDS:
        create_unusable_file(planted, path, victim)
    elif planted == "locked":
        path.write_bytes(b"")
        assert disk.open_locked(str(path)) is not None
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert disk.open_locked(str(path)) is None
    assert (set(os.listdir("/proc/self/fd")) if before else set()) == before
    assert (disk.open_locked(str(path), allow_links=True) is not None) == (planted == "hardlink")
    disk.close_inherited()


@compiled_only
def test_several_holders_share_the_lock_of_a_file(tmp_path: Path) -> None:
    """Sinks do so with the links in their queues."""
    disk, path = CompiledOsFilesystem(), tmp_path / "path"
    path.write_bytes(b"line\n")
    first, second = disk.open_locked(str(path), shared=True), disk.open_locked(str(path), shared=True)
    assert first is not None
    assert second is not None
    assert disk.open_locked(str(path)) is None
    assert disk.read_all(first) == b"line\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(first, b"x")
    disk.close_each([first, second])
    exclusive = disk.open_locked(str(path), writable=True)
    assert exclusive is not None
    assert os.write(exclusive, b"x") == 1
    disk.close(exclusive)


@compiled_only
def test_a_locked_file_is_the_one_that_has_the_name_despite_renames(tmp_path: Path) -> None:
    """A thread renames other files over the name meanwhile."""
    disk, path = CompiledOsFilesystem(), tmp_path / "path"
    path.write_bytes(b"")
    stop = threading.Event()

    def rename() -> None:
        while not stop.is_set():
            (tmp_path / "other").write_bytes(b"")
            os.rename(tmp_path / "other", path)

    thread = threading.Thread(target=rename)
    thread.start()
    locks = 0
    try:
        for _ in range(2000):
            fd = disk.open_locked(str(path))
            if fd is not None:
                locks += 1
                disk.close(fd)
    finally:
        stop.set()
        thread.join()
    assert locks
    fd = disk.open_locked(str(path))
    assert fd is not None
    assert disk.is_file_at(fd, str(path))
    disk.close(fd)


@pytest.mark.parametrize("filesystem", KINDS)
def test_a_file_never_gets_the_descriptor_of_standard_output(tmp_path: Path, filesystem: type[OsFilesystem]) -> None:
    """Where a program has closed it, the number is free, and what C code prints would be written into the file."""

    def work() -> None:
        os.closerange(0, 3)
        disk = filesystem()
        fds, error = disk.create_each([str(tmp_path / "a"), str(tmp_path / "b")])
        assert error is None
        fds += [disk.open_lock_file(str(tmp_path / "lock")), disk.open_append(str(tmp_path / "ledger"))]
        fds.append(disk.open_existing(str(tmp_path / "a")))
        locked = disk.open_locked(str(tmp_path / "lock"), writable=True)
        fds += [] if locked is None else [locked]
        assert min(fds) >= 3
        assert not any(os.get_inheritable(fd) for fd in fds)

    run_in_child(work)


LINES = b'{"n":1}\n{"n":2}\n'


@compiled_only
@pytest.mark.parametrize("contents", [b"", b"old\n", b"torn", b"x" * 99 + b"\n"])
@pytest.mark.parametrize("lock", ["free", "held", "missing", "symlink"])
def test_append_locked_needs_a_whole_last_line_and_a_free_lock(tmp_path: Path, contents: bytes, lock: str) -> None:
    """The file must also be below its size limit. Otherwise nothing is written."""
    disk, path, guard = CompiledOsFilesystem(), tmp_path / "lines", tmp_path / "lock"
    path.write_bytes(contents)
    if lock in {"free", "held"}:
        guard.touch()
    elif lock == "symlink":
        guard.symlink_to(path)
    holder = disk.open_locked(str(guard)) if lock == "held" else None
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    fd = disk.append_locked(str(guard), str(path), LINES, max_size=100)
    if contents == b"old\n" and lock == "free":
        assert fd is not None
        assert path.read_bytes() == b"old\n" + LINES
        assert not is_locked(guard)
        disk.sync_data(fd)
        disk.close(fd)
    else:
        assert fd is None
        assert path.read_bytes() == contents
    assert (set(os.listdir("/proc/self/fd")) if before else set()) == before
    if holder is not None:
        disk.close(holder)


@compiled_only
def test_a_partly_written_append_is_cut_off(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk. It applies to a whole process, so the test starts one."""
    (tmp_path / "lock").touch()
    (tmp_path / "lines").write_bytes(b"old\n")
    code = """
import resource, signal, sys
from pillarbox.store.os_filesystem import CompiledOsFilesystem
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
assert CompiledOsFilesystem().append_locked("lock", "lines", b"new line\\n", max_size=100) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "lines").read_bytes() == b"old\n"


@compiled_only
def test_two_processes_that_append_under_a_lock_lose_nothing(tmp_path: Path) -> None:
    """A process that does not get the lock gets None, and tries again."""
    (tmp_path / "lock").touch()
    (tmp_path / "lines").write_bytes(b"first\n")
    code = """
import sys
from pillarbox.store.os_filesystem import CompiledOsFilesystem
disk = CompiledOsFilesystem()
for number in range(300):
    while (fd := disk.append_locked("lock", "lines", b"%b-%d\\n" % (sys.argv[1].encode(), number), max_size=2**40)) is None:
        pass
    disk.close(fd)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in ("a", "b")]
    assert [process.wait(60) for process in processes] == [0, 0]
    lines = (tmp_path / "lines").read_bytes().splitlines()
    for name in (b"a", b"b"):
        assert [line for line in lines if line.startswith(name)] == [b"%b-%d" % (name, number) for number in range(300)]
    assert len(lines) == 601


@compiled_only
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("sync_each", (["1"],)),
        ("sync_each", (1,)),
        ("sync_each", ([2**40],)),
        ("close_each", ([None],)),
        ("rename_each", ([1], ["a"])),
        ("rename_each", (["a\0b"], ["c"])),
        ("rename_each", (["a"], None)),
        ("create_each", (["a\0b"], 0, 0, -1, -1)),
        ("create_each", (None, 0, 0, -1, -1)),
        ("open_locked", (1, 0, False, False)),
        ("open_existing", ("a\0b", 0, False)),
        ("append_locked", ("a", "b", "text", 0, 1)),
        ("append_locked", ("a", None, b"", 0, 1)),
        ("sync_directory", (None,)),
    ],
)
def test_arguments_of_the_wrong_type_raise(function: str, arguments: tuple[object, ...]) -> None:
    """They are not read as descriptors or paths."""
    with pytest.raises((TypeError, ValueError, OverflowError)):
        getattr(speedups, function)(*arguments)
