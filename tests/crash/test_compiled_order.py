"""The compiled operations run on the simulated disk: their order is visible, errors are returned, and a kill ends them."""

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

# System calls on files and directories. A call that the header does not replace would reach the real file system.
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
    """The file-system operations of a batch operation, in each order."""
    orders: Orders = {}
    for order in compiled_order.ORDERS:
        disk = Disk({f"/d/{number}": b"line\n" for number in range(count)})
        operations: list[str] = []
        with compiled_order.order(order):
            filesystem = crash_filesystem(disk, lambda verb, path, operations=operations: operations.append(f"{verb} {path}"))  # type: ignore[misc]
        paths = [f"/d/{number}" for number in range(count)]
        fds = [filesystem.open_existing(path) for path in paths]
        operations.clear()
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
        orders[order] = operations
    return orders


def test_the_compiled_order_writes_all_files_back_before_the_first_sync() -> None:
    """In C, the writeback of all files is started and then awaited. In Python, each file is only synced."""
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
def test_each_batch_operation_has_the_order_of_the_c_source(call: str, steps: list[str]) -> None:
    """For operations without a batch form in Python, the portable order is empty: the caller does the steps."""
    orders = orders_of(call)
    assert orders["compiled"] == steps
    assert orders["portable"] == ([] if call in ("lock", "append") else steps[: 1 if call == "scan" else None])


@pytest.mark.usefixtures("compiled")
def test_the_compiled_operations_return_errors_of_the_disk() -> None:
    """The errno is that of the failed file. The operations on the other files are done."""
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
def test_a_process_that_is_killed_in_a_batch_has_no_further_effect() -> None:
    """The C code continues for a while without any effect, and then `Killed` is raised."""
    disk = Disk({f"/d/{number}": b"" for number in range(3)})
    operations_left = 2

    def before(_verb: str, _path: str) -> None:
        nonlocal operations_left
        operations_left -= 1
        if operations_left < 0:
            raise Killed

    filesystem = crash_filesystem(disk, before)
    with pytest.raises(Killed):
        filesystem.rename_each(["/d/0", "/d/1", "/d/2"], ["/d/a", "/d/b", "/d/c"])
    assert sorted(disk.files) == ["/d/2", "/d/a", "/d/b"]


@pytest.mark.usefixtures("compiled")
def test_a_file_that_vanishes_before_its_size_is_read_is_not_listed() -> None:
    """Another process renames it after its name was read and before its size is."""
    disk = Disk({"/d/a": b"1", "/d/b": b"22"})
    other_process = CrashFilesystem(disk)

    def before(verb: str, _path: str) -> None:
        if verb == "sizes":
            with contextlib.suppress(FileNotFoundError):
                other_process.rename("/d/a", "/d/c")

    filesystem = crash_filesystem(disk, before)
    assert [tuple(entry) for entry in filesystem.list_files("/d")] == [("b", 2)]
    assert sorted(filesystem.list_names("/d", ALL_NAMES)) == ["b", "c"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("moment", ["has_name", "lock", "is_file_at"])
def test_a_file_that_is_replaced_while_it_is_locked_is_not_used(moment: str) -> None:
    """Another process renames a file to its name, so the opened file no longer has a name."""
    disk = Disk({"/d/a": b"1", "/d/b": b"22"})
    other_process = CrashFilesystem(disk)

    def before(verb: str, _path: str) -> None:
        if verb == moment:
            with contextlib.suppress(FileNotFoundError):
                other_process.rename("/d/b", "/d/a")

    filesystem = crash_filesystem(disk, before)
    assert filesystem.open_locked("/d/a") is None
    assert not filesystem._open
    fd = filesystem.open_locked("/d/a")
    assert fd is not None
    assert filesystem.size(fd) == 2


@pytest.mark.usefixtures("compiled")
def test_a_failing_disk_runs_each_operation_once() -> None:
    """The compiled order runs only in the outer one of two nested file systems."""
    verbs: list[str] = []
    disk = Disk({"/d/a": b"1"})
    filesystem = fault_filesystem(crash_filesystem(disk, lambda verb, _path: verbs.append(verb)))
    assert isinstance(filesystem, FaultFilesystem)
    filesystem.sync_directory("/d")
    assert [entry.name for entry in filesystem.list_files("/d")] == ["a"]
    assert verbs == ["sync_directory", "list_files", "sizes"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, which lists the functions that a library calls")
def test_every_system_call_on_a_file_goes_to_the_simulated_disk() -> None:
    """A new system call in the C sources must be added to the header."""
    with compiled_order.built() as path:
        output = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    called = {line.split()[-1].partition("@")[0] for line in output.splitlines()}
    assert "geteuid" in called
    assert not called & {f"{call}{suffix}" for call in FILE_CALLS for suffix in ("", "64")}


@pytest.mark.usefixtures("compiled")
def test_every_state_after_every_history_of_two_steps_is_recovered() -> None:
    """The exhaustive harnesses run over both orders in `make proof`."""
    checker, histories = Enumeration(Bounds(tears=ENDS)), Histories()
    while histories.complete < 2:
        assert histories.check_longer(checker)
    assert not checker.violations, checker.violations
