"""The files that this process has open, as the system lists them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from typing import Final

_STANDARD_DESCRIPTORS: Final = 3


def occupy_standard_descriptors() -> None:
    """Open the null device as standard input, output or error if a program has closed them.

    Otherwise an event file would have such a descriptor until it gets a higher one, and the output of other code would be
    written into it meanwhile.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < _STANDARD_DESCRIPTORS:
        pass
    os.close(fd)


def close_unknown_files(directory: str) -> None:
    """In a child that was forked by C code: close files that a thread of the parent had just opened and not yet recorded.

    No hook made such a thread wait. A descriptor that stays open here would hold the parent's lock on a file.
    """
    within = os.path.realpath(directory) + "/"
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - the names are numbers, not paths
        with contextlib.suppress(OSError):  # the descriptor that lists them is closed already
            if path_of_open_file(int(name)).startswith(within):
                os.close(int(name))


def close_files_above(fd: int) -> None:
    """Close all files with a higher descriptor."""
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - the names are numbers, not paths
        with contextlib.suppress(OSError):  # the descriptor that lists them is closed already
            if int(name) > fd:
                os.close(int(name))


def path_of_open_file(fd: int) -> str:
    """The current path of an open file. Raises `OSError` if the system does not know it."""
    if sys.platform == "darwin":
        return os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - may name no path that exists
