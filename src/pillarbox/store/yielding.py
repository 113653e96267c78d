"""Files that are kept after their delivery give way where the volume lacks room: the first delivered go first, of all sinks.

What several sinks keep goes for all of them at once: before the last of its names does, nothing is free. Any process's sealer
does that, and several at once come to the same files: what is gone is gone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory
    from pillarbox.store.dirscan import FileEntry

log = logging.getLogger("pillarbox")


def retention_directories(directory: Directory) -> dict[str, Directory]:
    """Where delivered files are kept, by the names of the sinks; "" where there are not several."""
    return {place.sink: place for place in (directory, *directory.queues())}


def evict_delivered(directory: Directory, enough: Callable[[int], bool]) -> int:
    """Remove delivered files until it is `enough(bytes so far)` or none is left; how many. Raises `OSError`."""
    kept = [(file, place) for place in retention_directories(directory).values() for file in place.delivered_files()]
    waiting = directory.waiting_batch_ids()  # for another sink, so that nothing is free once its delivered name goes: last
    kept.sort(key=lambda one: (layout.batch_id(one[0].name) in waiting, one[0]))
    names: dict[str, list[tuple[FileEntry, Directory]]] = {}  # by batch
    for file, place in kept:
        names.setdefault(layout.batch_id(file.name), []).append((file, place))
    removed = size = 0
    for same in names.values():
        if enough(size):
            break
        for file, place in same:
            place.remove(file.name)
        removed += 1
        size += max(file.size for file, _ in same)
    if removed:
        log.warning("%s: %d delivered files gave way, %d bytes: the volume lacks room", directory.path, removed, size)
    return removed
