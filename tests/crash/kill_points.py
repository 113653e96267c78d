"""How a process that is to kill itself around an operation on the disk gets there: the operations of its file system are wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pillarbox.store.filesystem import SequentialBatchOps
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem

SEVERAL = tuple(verb for verb in vars(SequentialBatchOps) if not verb.startswith("_"))  # operations in one


def step_by_step() -> None:
    """Make this process run batch operations one by one: there are more moments to die at."""
    for verb in [verb for verb in vars(CompiledOsFilesystem) if hasattr(OsFilesystem, verb) and not verb.startswith("__")]:
        delattr(CompiledOsFilesystem, verb)


def wrap(verbs: Iterable[str], wrapper: Callable[[str, Callable[..., object]], Callable[..., object]]) -> None:
    """Replace each of these operations of the file system by `wrapper(verb, function)` in this process."""
    for verb in sorted(verbs):
        for outbox_dir in (OsFilesystem, CompiledOsFilesystem):
            found = vars(outbox_dir).get(verb)
            if isinstance(found, staticmethod):
                setattr(outbox_dir, verb, staticmethod(wrapper(verb, found.__func__)))
            elif found is not None:
                setattr(outbox_dir, verb, wrapper(verb, found))
