"""The verbs of a file system that are several operations in one, made of those: where they are not compiled, or simulated."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pillarbox.store.filesystem import Filesystem


class SequentialBatchOps:
    """The verbs that are several in one, made of those."""

    def open_locked(self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False) -> int | None:  # noqa: ARG002 - see below
        """A file that is there and ours to use, opened and locked; None where that is to be seen step by step: here always."""
        return None

    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None:  # noqa: ARG002 - as above
        """Append lines, under the lock of another file, to one that ends in a whole line and has less than `max_size` bytes.

        Both are there and ours to use. The descriptor of the file, the lock released; None where that is to be seen and done
        step by step: here always. Of several lines a part may be there then, if the disk is full and lets nothing be cut off.
        """
        return None

    def sync_each(self: Filesystem, fds: Sequence[int]) -> list[OSError | None]:
        """Make the data of each file durable: what went wrong with it, or None."""
        return [_error_of(self.sync_data, fd) for fd in fds]

    def rename_each(self: Filesystem, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]:
        """Rename each, up to the first that fails: how many were renamed, and what went wrong with the next one."""
        for done, (source, target) in enumerate(zip(sources, targets, strict=True)):
            error = _error_of(self.rename, source, target)
            if error is not None:
                return done, error
        return len(sources), None

    def create_each(self: Filesystem, paths: Sequence[str]) -> tuple[list[int], OSError | None]:
        """Create each and take its lock, up to the first that fails: the descriptors, and what went wrong with the next one.

        A descriptor of -1 is a file that who recovers was quicker to lock, and removes or has removed.
        """
        found: list[int] = []
        for path in paths:
            try:
                fd = self.create(path)
            except OSError as error:
                return found, error
            try:
                held = self.lock(fd) and self.has_name(fd)
            except OSError as error:
                self.close(fd)
                return found, error
            except BaseException:
                self.close(fd)
                raise
            if not held:
                self.close(fd)
            found.append(fd if held else -1)
        return found, None

    def close_each(self: Filesystem, fds: Sequence[int]) -> None:
        """Close each, and release its lock if it is held. What goes wrong with that is nobody's to mend: it is closed."""
        for fd in fds:
            with contextlib.suppress(OSError):
                self.close(fd)


def _error_of(verb: Callable[..., object], *arguments: object) -> OSError | None:
    try:
        verb(*arguments)
    except OSError as error:
        return error
    return None
