"""Everything that figures depend on besides the code: the machine, its load, and the versions of the software."""

from __future__ import annotations

import array
import contextlib
import fcntl
import importlib.metadata
import os
import platform
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import Machine, Versions
from pillarbox._native import COMPILED

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]


_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of linux/fs.h, with a long of 8 bytes
_TOP_DIRECTORY = 0x20000  # FS_TOPDIR_FL


def spread_directories(directory: Path) -> None:
    """Let ext4 place each new subdirectory, and its files, somewhere else on the disk.

    Creating a file takes 20 us there. Beside thousands of files that were deleted in the last minutes, it takes up to 1 ms,
    because ext4 skips each of them (`recently_deleted` in fs/ext4/ialloc.c). Then the figures of a contestant would depend on
    the previous one.
    """
    with contextlib.suppress(OSError):  # another file system or operating system
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flags = array.array("l", [0])
            fcntl.ioctl(fd, _GET_FLAGS, flags)
            flags[0] |= _TOP_DIRECTORY
            fcntl.ioctl(fd, _SET_FLAGS, flags)
        finally:
            os.close(fd)


class MachineMonitor:
    """Observes the machine from its creation until `describe`."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._start_ticks = _cpu_ticks()

    def describe(self, folder: Path) -> Machine:
        """The machine, with its load since the creation of this object."""
        ticks = [after - before for before, after in zip(self._start_ticks, _cpu_ticks(), strict=True)]
        affinity = getattr(os, "sched_getaffinity", None)
        return Machine(
            platform=platform.platform(),
            kernel=f"{platform.system()} {platform.release()}",
            processor=_processor(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            filesystem=_filesystem(folder),
            load_before=round(self.load, 2),
            load_after=round(os.getloadavg()[0], 2),
            stolen_percent=round(100 * ticks[7] / sum(ticks), 2) if sum(ticks) else 0.0,
        )


def _cpu_ticks() -> list[int]:
    """The CPU ticks by kind; the eighth is the time that the host of a virtual machine took."""
    stat = Path("/proc/stat")
    return [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]] if stat.exists() else [0] * 8


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _filesystem(folder: Path) -> str:
    """The type of the file system of a directory, if the system reports it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    path = folder.resolve()
    mount_points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    candidates = [(len(point), kind) for point, kind in mount_points if path.is_relative_to(point)]
    return max(candidates)[1] if candidates else "unknown"


def versions(packages: Iterable[str]) -> Versions:
    """The versions of everything that runs."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return Versions(
        python=f"{platform.python_implementation()} {platform.python_version()}{'' if gil else ', free-threaded'}",
        msgspec=_version("msgspec"),
        sqlite=sqlite3.sqlite_version,
        zlib=zlib.ZLIB_RUNTIME_VERSION,
        packages={name: _version(name) for name in sorted(set(packages))},
        commit=_git("rev-parse", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain")),
        compiled=COMPILED,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*words: str) -> str:
    try:
        completed = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""
