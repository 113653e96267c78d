"""Files that are kept after their delivery give way where the volume lacks room: the first delivered go first, of all sinks.

Any process's sealer does that, and several at once come to the same files: what is gone is gone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")


def places(directory: Directory) -> dict[str, Directory]:
    """Where delivered files are kept, by the names of the sinks; "" where there are not several."""
    return {place.sink: place for place in (directory, *directory.queues())}


def give_way(directory: Directory, enough: Callable[[int], bool]) -> int:
    """Remove delivered files until it is `enough(bytes so far)` or none is left; how many. Raises `OSError`."""
    found = [(file.name, file.size, place) for place in places(directory).values() for file in place.delivered()]
    removed = size = 0
    for name, bytes_, place in sorted(found, key=lambda one: one[0]):
        if enough(size):
            break
        place.remove(name)
        removed += 1
        size += bytes_
    if removed:
        log.warning("%s: %d delivered files gave way, %d bytes: the volume lacks room", directory.path, removed, size)
    return removed
