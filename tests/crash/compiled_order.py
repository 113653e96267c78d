"""Runs the compiled batch operations and directory scans on the simulated disk: the real C code with simulated system calls.

`simulated_speedups` compiles the sources of the extension again, with `simulated_calls.h` included before each. Calls of open,
flock, rename, readdir and others become calls of `system_call` below, which does the same on the simulated disk. So the
harnesses check the real order of operations of the C code, errors included, and not a model of it.

    with order("compiled"):
        filesystem = crash_filesystem(disk, before)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final, Literal, get_args

from greenlet import getcurrent

import pillarbox
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem
from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.fault import Fault, FaultCounter, FaultFilesystem

Order = Literal["portable", "compiled"]  # of the system calls of a batch operation
ORDERS: Final[tuple[Order, ...]] = get_args(Order)
COMPILER: Final = os.environ.get("CC", "gcc")
SIMULATED_CALLS: Final = Path(__file__).with_name("simulated_calls.c")
_FLAGS: Final = ("-shared", "-fPIC", "-O0", "-fvisibility=hidden")
_START_WRITING: Final = 2  # SYNC_FILE_RANGE_WRITE alone: starts the writeback without waiting
_WRITABLE: Final = os.O_RDWR

_order: Order = "portable"


def why_not() -> str:
    """The reason why the compiled order cannot be simulated on this machine; empty if it can."""
    include = Path(sysconfig.get_paths()["include"])
    if shutil.which(COMPILER) is None:
        return f"there is no C compiler ({COMPILER})"
    return "" if (include / "Python.h").exists() else f"there is no {include / 'Python.h'}"


def build_extension(source: Path, folder: Path, *options: str) -> Path:
    """Compile the extension from the C sources in `source` into `folder`, with additional compiler options."""
    path = folder / f"_speedups{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = sysconfig.get_paths()["include"]
    command = [COMPILER, *_FLAGS, "-I", include, *options, *map(str, sorted(source.glob("*.c"))), "-o", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise ImportError(f"{' '.join(command)}\n{process.stderr}")
    return path


@contextlib.contextmanager
def built() -> Iterator[Path]:
    """Build the extension with simulated system calls in a temporary folder."""
    source = Path(pillarbox.__file__).parents[1] / "speedups"  # of the checkout, or of a copy with a mutant
    with tempfile.TemporaryDirectory(prefix="pillarbox-simulated-") as folder:
        header = SIMULATED_CALLS.with_suffix(".h")
        yield build_extension(source, Path(folder), "-include", str(header), str(SIMULATED_CALLS))


@cache
def simulated_speedups() -> ModuleType:
    """The extension with simulated system calls, loaded beside the installed one."""
    with built() as path:
        spec = spec_from_file_location("_speedups", path, loader=ExtensionFileLoader("_speedups", str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@contextlib.contextmanager
def order(chosen: Order) -> Iterator[None]:
    """Make `crash_filesystem` and `fault_filesystem` create file systems with this order of operations."""
    global _order  # noqa: PLW0603 - every harness creates file systems in many places
    previous, _order = _order, chosen
    try:
        yield
    finally:
        _order = previous


def current_order() -> Order:
    """The order of operations of new file systems."""
    return _order


def crash_filesystem(disk: Disk, before: Callable[[str, str], None] = lambda _verb, _path: None) -> CrashFilesystem:
    """A process's view of a simulated disk, with the current order of operations."""
    return (CompiledCrashFilesystem if _order == "compiled" else CrashFilesystem)(disk, before)


def fault_filesystem(inner: CrashFilesystem, fault: Fault | FaultCounter | None = None) -> FaultFilesystem:
    """A file system with faults, with the current order of operations."""
    if not isinstance(inner, CompiledCrashFilesystem):
        return FaultFilesystem(inner, fault)
    inner.is_inner = True
    return CompiledFaultFilesystem(inner, fault)


# The file systems that the C code runs on, by greenlet: each process of `interleave.py` is one, and may be switched in a call.
_running: dict[object, list[CompiledOrder]] = {}


def system_call(name: str, *arguments: Any) -> Any:
    """Called by the C code in place of a system call. `simulated_calls.c` describes the result."""
    filesystem = _running[getcurrent()][-1]
    if filesystem.raised is not None:  # the process is killed, and its later calls have no effect
        return -errno.ECANCELED
    try:
        return getattr(filesystem, f"_sys_{name}")(*arguments)
    except OSError as error:
        return -(error.errno or errno.EIO)
    except BaseException as error:  # noqa: BLE001 - raised after the C code has returned
        filesystem.raised = error
        return -errno.ECANCELED


class _on:  # noqa: N801 - used as: with _on(filesystem)
    """Run the C code on a file system within the block. Then an exception of a system call is raised."""

    __slots__ = ("filesystem", "running")

    def __init__(self, filesystem: CompiledOrder) -> None:
        self.filesystem = filesystem
        self.running = _running.setdefault(getcurrent(), [])

    def __enter__(self) -> None:
        self.running.append(self.filesystem)

    def __exit__(self, *_: object) -> None:
        self.running.pop()
        if not self.running:
            del _running[getcurrent()]
        raised, self.filesystem.raised = self.filesystem.raised, None
        if raised is not None:
            raise raised


def _simulated(function: Any) -> Any:
    """A method of `CompiledOsFilesystem` that calls the simulated build."""

    @cache
    def copy() -> Any:
        simulated_globals = function.__globals__ | {
            "speedups": simulated_speedups(),
            "_owner_of_directory": lambda _path: None,
            "usable_owner": lambda _path: os.geteuid(),
        }
        copied = FunctionType(
            function.__code__, simulated_globals, function.__name__, function.__defaults__, function.__closure__
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied

    @wraps(function)
    def method(self: CompiledOrder, *arguments: Any, **named: Any) -> Any:
        if self.is_inner:
            return getattr(super(CompiledOrder, self), function.__name__)(*arguments, **named)
        with _on(self):
            result = copy()(self, *arguments, **named)
            return iter(list(result)) if isinstance(result, Iterator) else result

    return method


class CompiledOrder:
    """The batch operations and scans of `CompiledOsFilesystem`, and their system calls on a simulated disk."""

    raised: BaseException | None = None  # the exception of a system call, to be raised when the C code has returned
    is_inner = False  # whether it is inside another file system, which has the compiled order

    list_files = _simulated(CompiledOsFilesystem.list_files)
    list_names = _simulated(CompiledOsFilesystem.list_names)
    file_totals = _simulated(CompiledOsFilesystem.file_totals)
    first_names = _simulated(CompiledOsFilesystem.first_names)
    open_locked = _simulated(CompiledOsFilesystem.open_locked)
    append_locked = _simulated(CompiledOsFilesystem.append_locked)
    sync_each = _simulated(CompiledOsFilesystem.sync_each)
    rename_each = _simulated(CompiledOsFilesystem.rename_each)
    create_each = _simulated(CompiledOsFilesystem.create_each)
    close_each = _simulated(CompiledOsFilesystem.close_each)
    sync_directory = _simulated(CompiledOsFilesystem.sync_directory)
    _track_fd = CompiledOsFilesystem._track_fd
    _note_open = OsFilesystem._note_open
    _note_closed = OsFilesystem._note_closed

    def __init__(self: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open_fds: set[int] = set()  # used by `CompiledOsFilesystem`; the simulated disk has its own record
        self._directories: dict[int, str] = {}  # open directories: number -> path
        self._next_directory = itertools.count(10**6).__next__
        self._sized_directory = 0  # the directory whose sizes were read last

    # The file systems below.

    @property
    def crash(self: Any) -> CrashFilesystem:
        """The file system of the simulated disk itself."""
        filesystem = self
        while not isinstance(filesystem, CrashFilesystem):
            filesystem = filesystem._inner
        return filesystem

    def fail(self, verb: str) -> OSError | None:
        """The planned error of an operation that exists only in C; None if it succeeds."""
        return None

    # The system calls.

    def _sys_open(self: Any, path: str, flags: int) -> int:
        if flags & os.O_DIRECTORY:
            number = self._next_directory()
            self._directories[number] = path
            return int(number)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert flags & os.O_APPEND
            return int(self.create(path))
        if flags & os.O_ACCMODE == _WRITABLE:
            return self._open_writable(path)  # type: ignore[no-any-return]
        return int(self.open_existing(path, allow_links=True))  # the C code checks the number of names itself

    def _open_writable(self, path: str) -> int:
        crash = self.crash
        crash._before_path_op("open_existing", path)
        names, name = crash.disk.names_at(path)
        if name not in names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return crash._add_descriptor(names[name], writable=True)

    def _sys_close(self: Any, fd: int) -> int:
        if fd in self._directories:
            del self._directories[fd]
        else:
            self.close(fd)
        return 0

    def _sys_flock(self: Any, fd: int, operation: int) -> int:
        assert operation & fcntl.LOCK_NB
        lock = self.lock_shared if operation & fcntl.LOCK_SH else self.lock
        return 0 if lock(fd) else -errno.EWOULDBLOCK

    def _sys_fstat(self, fd: int) -> tuple[int, int, int]:
        if fd in self._directories:  # for its owner
            return 0, 1, 0
        inode = self.crash._before_fd_op("has_name", fd)
        return inode.number, len(inode.paths), len(inode.data)

    def _sys_lstat(self, path: str) -> tuple[int, int, int] | int:
        crash = self.crash
        crash._before_path_op("is_file_at", path)
        return self._stat_of(path)

    def _stat_of(self, path: str) -> tuple[int, int, int] | int:
        names, name = self.crash.disk.names_at(path)
        inode = names.get(name)
        return -errno.ENOENT if inode is None else (inode.number, len(inode.paths), len(inode.data))

    def _sys_rename(self: Any, source: str, target: str) -> int:
        self.rename(source, target)
        return 0

    def _sys_sync_file_range(self, fd: int, offset: int, count: int, flags: int) -> int:
        # The data is being written, but neither the data nor the size of the file is durable. So this call does not change the
        # states of the durability model.
        assert offset == count == 0
        assert flags
        self.crash._before_fd_op("write_back", fd)
        error = self.fail("write_back")
        if error is not None:
            self.crash.sync_failed(fd)
            raise error
        return 0

    def _sys_fdatasync(self: Any, fd: int) -> int:
        self.sync_data(fd)
        return 0

    def _sys_fsync(self, fd: int) -> int:
        super().sync_directory(self._directories[fd])  # type: ignore[misc]
        return 0

    def _sys_pread(self: Any, fd: int, count: int, offset: int) -> bytes:
        return bytes(self.read_at(fd, offset, count))

    def _sys_write(self: Any, fd: int, data: bytes) -> int:
        return int(self.write(fd, data))

    def _sys_ftruncate(self: Any, fd: int, size: int) -> int:
        self.truncate(fd, size)
        return 0

    def _sys_opendir(self, path: str) -> tuple[int, list[str], int]:
        entries = super().list_files(path)  # type: ignore[misc]
        names: list[str] = []
        error = 0
        try:
            names.extend(entry.name for entry in entries)
        except OSError as listing_error:
            error = listing_error.errno or errno.EIO
        number = self._next_directory()
        self._directories[number] = path
        return number, names, error

    def _sys_fstatat(self: Any, directory: int, name: str, _flags: int) -> tuple[int, int, int] | int:
        if self._sized_directory != directory:  # one operation for the names, and one for all sizes
            self._sized_directory = directory
            self.crash._before_path_op("sizes", self._directories[directory])
        return self._stat_of(f"{self._directories[directory]}/{name}")  # type: ignore[no-any-return]

    def _sys_closedir(self: Any, directory: int) -> int:
        del self._directories[directory]
        return 0


class CompiledCrashFilesystem(CompiledOrder, CrashFilesystem):
    """A process's view of a simulated disk, with the compiled order of operations."""


class CompiledFaultFilesystem(CompiledOrder, FaultFilesystem):
    """A file system with faults, with the compiled order of operations."""

    def fail(self, verb: str) -> OSError | None:
        fault = self.counter.count(verb)
        return None if fault is None else OSError(fault.errno, os.strerror(fault.errno))

    def _open_writable(self, path: str) -> int:
        self._fail_if_due("open_existing", path)
        return super()._open_writable(path)
