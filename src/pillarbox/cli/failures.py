"""Turns an error of the operating system into a sentence: what failed, where, and what to do."""

from __future__ import annotations

import errno
from typing import Final

_REMEDIES: Final = {
    errno.ENOENT: "name one that exists",
    errno.ENOTDIR: "name a directory",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ELOOP: "name the file itself, not a link",
    errno.EACCES: "run the command as the owner of the file and of its directory",
    errno.EPERM: "run the command as the owner of the file and of its directory",
    errno.EROFS: "remount the filesystem writable; if the kernel made it read-only, its log says why",
    errno.ENOSPC: "free space on the volume, and inodes",
    errno.EDQUOT: "raise the disk quota",
    errno.EIO: "replace the disk; the kernel log shows its errors",
    errno.ENODEV: "connect the disk again; the kernel log shows its errors",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
    errno.ENOLCK: "use a directory on a local filesystem, such as ext4 or XFS",
    errno.EXDEV: "put the outbox on one filesystem, in a container on a volume: overlayfs cannot rename what an image has",
    errno.ESTALE: "the network filesystem lost the file: use a directory on a local filesystem, such as ext4 or XFS",
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "try again when the system has fewer processes",
}
_OTHER_REMEDY: Final = "run pillarbox doctor -d DIR, which checks the disk and the directory"


def describe_os_error(error: OSError) -> str:
    """The files, what the system says, and what to do."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes)) and name]
    paths = " to ".join(name if isinstance(name, str) else name.decode(errors="backslashreplace") for name in names)
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, _OTHER_REMEDY)
    return f"{paths}: {reason}: {remedy}" if paths else f"{reason}: {remedy}"
