"""What the figures depend on beside the code: the machine, what else it does meanwhile, and the versions."""

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


_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS in linux/fs.h, where a long has 8 bytes
_TOP_DIRECTORY = 0x20000  # FS_TOPDIR_FL


def spread(directory: Path) -> None:
    """Have ext4 put each directory that is made in this one, and its files, somewhere else on the disk.

    A new file there costs 20 us; beside thousands that were removed in the last minutes it costs up to 1 ms, for ext4 looks
    past each of them (`recently_deleted` in fs/ext4/ialloc.c). So the turn of one would be measured by what it came after.
    """
    with contextlib.suppress(OSError):  # another file system, or system: it may not need that
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flags = array.array("l", [0])
            fcntl.ioctl(fd, _GET_FLAGS, flags)
            flags[0] |= _TOP_DIRECTORY
            fcntl.ioctl(fd, _SET_FLAGS, flags)
        finally:
            os.close(fd)


class Watch:
    """The machine, from now until `describe`."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._ticks = _ticks()

    def describe(self, folder: Path) -> Machine:
        """What to record of it."""
        since = [after - before for before, after in zip(self._ticks, _ticks(), strict=True)]
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
            stolen_percent=round(100 * since[7] / sum(since), 2) if sum(since) else 0.0,
        )


def _ticks() -> list[int]:
    """What the processors did, by kind; the eighth is what the host of a virtual machine kept for itself."""
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
    """The type of the file system that holds a directory, where the system tells."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    at = folder.resolve()
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    holding = [(len(point), kind) for point, kind in found if at.is_relative_to(point)]
    return max(holding)[1] if holding else "unknown"


def versions(packages: Iterable[str]) -> Versions:
    """Of everything that takes part."""
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
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
