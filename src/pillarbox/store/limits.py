"""What bounds a writer, what it has done so far, and what an error of the disk is to its callers. Pure."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pillarbox.outcome import DropReason

SPARE_RECHECK_SHARE: Final = 16  # of a file's events: how many more go into a full one before another look for a spare
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class WriterLimits(NamedTuple):
    """What bounds a writer."""

    batch_size: int  # events a file
    batch_bytes: int  # bytes a file, overshot by one append
    max_bytes: int  # pending bytes of the directory
    max_files: int = 200_000  # pending files of the directory: so many are listed in well under a second


class WriterProgress(NamedTuple):
    """Bytes appended and released by this process, ever."""

    appended: int
    released: int


def drop_reason_of(error: OSError) -> DropReason:
    """What an error of the disk is to a caller."""
    return "disk_full" if error.errno in _DISK_FULL else "io_error"
