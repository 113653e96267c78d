"""Frees space on a full volume for files that must be written, by removing spares and retained batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pillarbox.store.retention import evict_delivered

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory


def reclaim_space(directory: Directory, remove_spares: Callable[[], bool] = lambda: False) -> bool:
    """Remove the spares if the volume has no free inode, and otherwise the retained batch that was delivered first.

    Returns whether anything was removed. `remove_spares` removes those of this process. Raises `OSError`.
    """
    if not directory.filesystem.disk_space(directory.path).free_inodes and remove_spares():
        return True
    return evict_delivered(directory, lambda removed_bytes: removed_bytes > 0) > 0
