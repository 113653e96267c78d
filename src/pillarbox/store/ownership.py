"""Which files are ours: to open, and to count towards the limits of a directory.

A process opens only files of its own user; root opens those of the directory's owner. If others may write to the directory,
a file must not have a second hard link either, because somebody may have linked a file of ours into it. Files of other users
do not count towards any limit, so that nobody else can fill an outbox.
"""

from __future__ import annotations

import os
import stat
from functools import cache
from typing import Final

HAS_SECOND_LINK: Final = "has a second hard link"
BELONGS_TO: Final = "belongs to user"  # and its number
_ANY_OWNER: Final = -1
_OTHERS_MAY_WRITE: Final = 0o022
_PROCESS_STATUS: Final = "/proc/self/status"
_STATUS_BYTES_MAX: Final = 64 * 1024
_CAPABILITIES: Final = b"\nCapEff:"
_CAP_CHOWN: Final = 1


def usable_owner(path: str) -> int:
    """The user whose files may be opened at a path, or -1 for all: this user, and for root the owner of the directory.

    Root would otherwise read, deliver and delete any file that the directory's owner has moved there. If root may not change
    owners, as in some containers, it uses the files of every user, because files that it creates in another user's directory
    stay its own.
    """
    me = os.geteuid()
    if me:
        return me
    try:
        return os.stat(os.path.dirname(path) or ".").st_uid if _may_change_owners() else _ANY_OWNER
    except (FileNotFoundError, NotADirectoryError):
        return _ANY_OWNER  # there is no file to open either


@cache
def _may_change_owners() -> bool:
    try:
        fd = os.open(_PROCESS_STATUS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, _STATUS_BYTES_MAX)
        finally:
            os.close(fd)
        return bool(int(text.partition(_CAPABILITIES)[2].split()[0], 16) & _CAP_CHOWN)
    except (OSError, ValueError, IndexError):
        return True


def ownership_problem(status: os.stat_result, path: str, owner: int, *, allow_links: bool) -> str:
    """Why a file at a path is not ours to use; empty if it is. `owner` is what `usable_owner` returns.

    If only its owner can write to the directory, a second link belongs to a snapshot.
    """
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_nlink > 1 and not allow_links:
        directory = os.stat(os.path.dirname(path) or ".")
        if directory.st_uid != os.geteuid() or directory.st_mode & _OTHERS_MAY_WRITE:
            return HAS_SECOND_LINK
    return f"{BELONGS_TO} {status.st_uid}" if owner not in (_ANY_OWNER, status.st_uid) else ""


def counted_owners(path: str) -> set[int]:
    """The users whose files in a directory count: this user and the owner of the directory."""
    return {os.stat(path).st_uid, os.geteuid()}
