"""Tells whether a path is an outbox directory or the queue of a sink."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.room import reclaim_space

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.filesystem import Filesystem


def directory_at(path: str, filesystem: Filesystem, clock: Clock) -> Directory:
    """The `Directory` at a path, which may not exist yet: the outbox directory, or the queue of a sink in it."""
    parent, slash, name = path.rpartition("/")
    sink = layout.sink_of_queue(name)
    if sink is None:
        return _directory(path, filesystem, clock)
    main = _directory(parent or slash or ".", filesystem, clock)
    try:  # a process that makes queues holds this lock
        filesystem.close(filesystem.open_existing(main.path_of(layout.DELIVER_LOCK)))
    except (OSError, FileUnusableError):
        return _directory(path, filesystem, clock)
    return main.queue(sink)


def _directory(path: str, filesystem: Filesystem, clock: Clock) -> Directory:
    directory = Directory(path, filesystem, clock)
    directory.reclaim_space = partial(reclaim_space, directory)
    return directory
