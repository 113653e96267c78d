"""Chooses between the compiled pieces of the hot path and of the reader, and those in Python.

They are compiled where the package was installed with a C compiler (`_native.py`). What they do is the same, and the same
tests hold both to it.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import TYPE_CHECKING

from pillarbox._native import COMPILED
from pillarbox.outcome import ENQUEUED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.door import AppendHooks, EnqueueFunction

if COMPILED:
    from pillarbox.store import _listing as listing
    from pillarbox.store import _speed
    from pillarbox.store import _together as together
    from pillarbox.store._lines import records
    from pillarbox.store._speed import Appending, Counts, line, pack, value
    from pillarbox.store._waiter import Waiter, gather, wake
else:
    from pillarbox.store.plain import Appending, Counts, line, pack, records, value
    from pillarbox.store.waiter import Waiter, gather, wake

    listing = together = None  # type: ignore[assignment]

__all__ = [
    "Appending",
    "Counts",
    "Waiter",
    "gather",
    "line",
    "listing",
    "pack",
    "quickest",
    "records",
    "together",
    "value",
    "wake",
]


def quickest(
    writer: Appending, closure: EnqueueFunction, door: AppendHooks, write: Callable[[int, bytes], int]
) -> EnqueueFunction:
    """The closure of a writer, or one that does its simple case compiled and leaves the others to it."""
    if not COMPILED:
        return closure
    found = _speed.Enqueue(
        writer,
        closure,
        door.encode,
        door.event_type,
        door.event_bytes_max,
        door.append_unstarted,
        write,
        ENQUEUED,
        door.power_by_default,
    )
    return update_wrapper(found, closure)
