"""Wraps the operations of the file system, so that a process can kill itself before, in or after one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pillarbox.store.filesystem import SequentialBatchOps
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem

BATCH_VERBS = tuple(verb for verb in vars(SequentialBatchOps) if not verb.startswith("_"))  # batch operations


def step_by_step() -> None:
    """Make this process run batch operations one by one, so that there are more moments to kill it."""
    for verb in [verb for verb in vars(CompiledOsFilesystem) if hasattr(OsFilesystem, verb) and not verb.startswith("__")]:
        delattr(CompiledOsFilesystem, verb)


def wrap(verbs: Iterable[str], wrapper: Callable[[str, Callable[..., object]], Callable[..., object]]) -> None:
    """Replace each of these operations of the file system by `wrapper(verb, function)` in this process."""
    for verb in sorted(verbs):
        for filesystem_class in (OsFilesystem, CompiledOsFilesystem):
            function = vars(filesystem_class).get(verb)
            if isinstance(function, staticmethod):
                setattr(filesystem_class, verb, staticmethod(wrapper(verb, function.__func__)))
            elif function is not None:
                setattr(filesystem_class, verb, wrapper(verb, function))
