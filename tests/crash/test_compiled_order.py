"""The C runs on the simulated disk: its order of operations is seen, its errors come through, and a death ends it."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from pillarbox.store.dirscan import ALL_NAMES
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed
from pillarbox.testing.fault import Fault, FaultFilesystem
from tests.crash import compiled_order
from tests.crash.compiled_order import Order, crash_filesystem, fault_filesystem
from tests.crash.enumeration import ENDS, Bounds, Enumeration, Histories

pytestmark = pytest.mark.skipif(bool(compiled_order.why_not()), reason=compiled_order.why_not())

# What the C could call on files and directories; a call that the header does not replace would reach the real file system.
FILE_CALLS = [
    "access",
    "chmod",
    "chown",
    "close",
    "closedir",
    "creat",
    "dup",
    "dup2",
    "fallocate",
    "fchmod",
    "fchown",
    "fcntl",
    "fdatasync",
    "fdopendir",
    "flock",
    "fopen",
    "fstat",
    "fstatat",
    "fsync",
    "ftruncate",
    "link",
    "linkat",
    "lstat",
    "mkdir",
    "open",
    "openat",
    "opendir",
    "pread",
    "pwrite",
    "read",
    "readdir",
    "readlink",
    "rename",
    "renameat",
    "rmdir",
    "stat",
    "symlink",
    "sync",
    "sync_file_range",
    "syncfs",
    "truncate",
    "unlink",
    "unlinkat",
    "utimensat",
    "write",
    "writev",
]

Orders = dict[Order, list[str]]


@pytest.fixture
def compiled() -> Iterator[None]:
    with compiled_order.order("compiled"):
        yield


def orders_of(call: str, count: int = 2) -> Orders:
    """The operations of the file system that a batch operation consists of, in each order."""
    made: Orders = {}
    for order in compiled_order.ORDERS:
        disk = Disk({f"/d/{number}": b"line\n" for number in range(count)})
        seen: list[str] = []
        with compiled_order.order(order):
            filesystem = crash_filesystem(disk, lambda verb, path, seen=seen: seen.append(f"{verb} {path}"))  # type: ignore[misc]
        paths = [f"/d/{number}" for number in range(count)]
        fds = [filesystem.open_existing(path) for path in paths]
        seen.clear()
        match call:
            case "sync":
                assert filesystem.sync_each(fds) == [None] * count
            case "rename":
                assert filesystem.rename_each(paths, [f"{path}x" for path in paths]) == (count, None)
            case "create":
                created, error = filesystem.create_each([f"{path}x" for path in paths])
                assert (len(created), error) == (count, None)
            case "close":
                filesystem.close_each(fds)
            case "lock":
                filesystem.open_locked(paths[0])
            case "append":
                filesystem.append_locked(paths[0], paths[1], b"more\n", max_size=100)
            case "scan":
                assert filesystem.file_totals("/d", ALL_NAMES)[0][:2] == (count, 5 * count)
        made[order] = seen
    return made


def test_files_are_written_back_before_the_first_is_synced() -> None:
    """Writing is started for each and then waited for, in C; in Python each file is synced by itself."""
    orders = orders_of("sync")
    assert orders["portable"] == ["sync_data /d/0", "sync_data /d/1"]
    assert orders["compiled"] == [*["write_back /d/0", "write_back /d/1"] * 2, "sync_data /d/0", "sync_data /d/1"]
    assert orders_of("sync", 1)["compiled"] == ["sync_data /d/0"]


@pytest.mark.parametrize(
    ("call", "steps"),
    [
        ("rename", ["rename /d/0", "rename /d/1"]),
        ("create", [f"{verb} /d/{name}" for name in ("0x", "1x") for verb in ("create", "lock", "has_name")]),
        ("close", ["close /d/0", "close /d/1"]),
        ("lock", [f"{verb} /d/0" for verb in ("open_existing", "has_name", "lock", "has_name", "is_file_at")]),
        ("scan", ["list_files /d", "sizes /d"]),
        (
            "append",
            [
                *[f"{verb} /d/0" for verb in ("open_existing", "has_name", "lock", "has_name", "is_file_at")],
                *[f"{verb} /d/1" for verb in ("open_existing", "has_name", "has_name", "read_at", "write")],
                "close /d/0",
            ],
        ),
    ],
)
def test_the_order_of_each_batch_operation_is_that_of_the_c_source(call: str, steps: list[str]) -> None:
    """Of what is one call in C, Python leaves the steps to its caller."""
    orders = orders_of(call)
    assert orders["compiled"] == steps
    assert orders["portable"] == ([] if call in ("lock", "append") else steps[: 1 if call == "scan" else None])


@pytest.mark.usefixtures("compiled")
def test_an_error_of_the_disk_comes_through_the_c() -> None:
    """With its number, at the file that it belongs to; the others are done."""
    disk = Disk({f"/d/{number}": b"line\n" for number in range(3)})
    for verb, nth in (("write_back", 2), ("write_back", 5), ("sync_data", 2)):
        filesystem = fault_filesystem(crash_filesystem(disk), Fault(verb, nth, errno.EIO))
        fds = [filesystem.open_existing(f"/d/{number}") for number in range(3)]
        errors = filesystem.sync_each(fds)
        assert [error and error.errno for error in errors] == [None, errno.EIO, None]
        filesystem.close_each(fds)
    filesystem = fault_filesystem(crash_filesystem(disk), Fault("rename", 2, errno.ENOSPC))
    done, error = filesystem.rename_each(["/d/0", "/d/1", "/d/2"], ["/d/a", "/d/b", "/d/c"])
    assert (done, error and error.errno) == (1, errno.ENOSPC)
    assert sorted(disk.files) == ["/d/1", "/d/2", "/d/a"]
    for partial in (False, True):
        filesystem = fault_filesystem(crash_filesystem(disk), Fault("list_files", 1, errno.EIO, partial=partial))
        with pytest.raises(OSError, match="/d"):
            filesystem.file_totals("/d", ALL_NAMES)
        assert filesystem.file_totals("/d", ALL_NAMES)[0].files == 3


@pytest.mark.usefixtures("compiled")
def test_a_process_that_dies_in_the_middle_of_a_batch_does_no_more() -> None:
    """The C goes on for a while, and nothing of it has an effect; then the death is raised."""
    disk = Disk({f"/d/{number}": b"" for number in range(3)})
    left = 2

    def before(_verb: str, _path: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    filesystem = crash_filesystem(disk, before)
    with pytest.raises(Killed):
        filesystem.rename_each(["/d/0", "/d/1", "/d/2"], ["/d/a", "/d/b", "/d/c"])
    assert sorted(disk.files) == ["/d/2", "/d/a", "/d/b"]


@pytest.mark.usefixtures("compiled")
def test_a_file_that_vanishes_between_its_name_and_its_size_is_left_out() -> None:
    """Another process has renamed it; in one listing a name and a size are of two moments."""
    disk = Disk({"/d/a": b"1", "/d/b": b"22"})
    other = CrashFilesystem(disk)

    def before(verb: str, _path: str) -> None:
        if verb == "sizes":
            with contextlib.suppress(FileNotFoundError):
                other.rename("/d/a", "/d/c")

    filesystem = crash_filesystem(disk, before)
    assert [tuple(entry) for entry in filesystem.list_files("/d")] == [("b", 2)]
    assert sorted(filesystem.list_names("/d", ALL_NAMES)) == ["b", "c"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("moment", ["has_name", "lock", "is_file_at"])
def test_a_file_that_is_replaced_while_it_is_opened_and_locked_is_not_taken(moment: str) -> None:
    """Another process has renamed another file to its name: the one that was opened has no name any more."""
    disk = Disk({"/d/a": b"1", "/d/b": b"22"})
    other = CrashFilesystem(disk)

    def before(verb: str, _path: str) -> None:
        if verb == moment:
            with contextlib.suppress(FileNotFoundError):
                other.rename("/d/b", "/d/a")

    filesystem = crash_filesystem(disk, before)
    assert filesystem.open_locked("/d/a") is None
    assert not filesystem._open
    fd = filesystem.open_locked("/d/a")
    assert fd is not None
    assert filesystem.size(fd) == 2


@pytest.mark.usefixtures("compiled")
def test_a_disk_that_fails_is_asked_once() -> None:
    """The file system inside of another one leaves the compiled order to it."""
    seen: list[str] = []
    disk = Disk({"/d/a": b"1"})
    filesystem = fault_filesystem(crash_filesystem(disk, lambda verb, _path: seen.append(verb)))
    assert isinstance(filesystem, FaultFilesystem)
    filesystem.sync_directory("/d")
    assert [entry.name for entry in filesystem.list_files("/d")] == ["a"]
    assert seen == ["sync_directory", "list_files", "sizes"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is missing, which lists what a library calls")
def test_no_system_call_on_a_file_passes_the_simulated_disk_by() -> None:
    """A new one in the C must be in the header."""
    with compiled_order.built() as path:
        output = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    called = {line.split()[-1].partition("@")[0] for line in output.splitlines()}
    assert "geteuid" in called
    assert not called & {f"{call}{suffix}" for call in FILE_CALLS for suffix in ("", "64")}


@pytest.mark.usefixtures("compiled")
def test_every_state_after_every_history_of_two_steps_is_recovered() -> None:
    """The exhaustive harnesses run over both orders in `make proof`."""
    looked, histories = Enumeration(Bounds(tears=ENDS)), Histories()
    while histories.complete < 2:
        assert histories.check_longer(looked)
    assert not looked.violations, looked.violations
