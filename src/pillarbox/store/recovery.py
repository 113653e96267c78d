"""What to do with the files of a dead process: a table, total over (kind, lock, tail), and `recover`, which applies it."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.filesystem import concerns_one_file
from pillarbox.store.layout import Kind
from pillarbox.store.queue_changes import finish_removals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.store.directory import Directory, LockedFile

log = logging.getLogger("pillarbox")


class LockState(Enum):
    """Who holds the lock of a file."""

    NOBODY = "nobody"
    ANOTHER = "another"


class FileTail(Enum):
    """How a file ends."""

    EMPTY = "empty"  # the file is empty
    WHOLE = "whole"  # with a line feed
    TORN = "torn"  # in the middle of a line
    NUL = "nul"  # with NUL bytes: data that never reached the disk


def tail_of(last: bytes) -> FileTail:
    """The tail of a file with the last byte `last`, which is empty for an empty file."""
    if not last:
        return FileTail.EMPTY
    return {b"\n": FileTail.WHOLE, b"\0": FileTail.NUL}.get(last, FileTail.TORN)


class RecoveryAction(Enum):
    """What recovery does with a file."""

    LEAVE = "leave"
    SEAL = "seal"
    REMOVE = "remove"


# A held lock means a live owner. Without one, the writer of a segment is dead, and its events must be sealed, whatever the end
# of the file looks like. Recovery changes no byte; the reader finds the damage. Batch files belong to delivery, empty or not;
# quarantine and dead letters belong to the operator. Temporary files will be written again.
_SOMETHING: Final = (FileTail.WHOLE, FileTail.TORN, FileTail.NUL)
RECOVERY: Final[dict[tuple[Kind, LockState, FileTail], RecoveryAction]] = (
    {(kind, lock, tail): RecoveryAction.LEAVE for kind in Kind for lock in LockState for tail in FileTail}
    | {(kind, LockState.NOBODY, tail): RecoveryAction.SEAL for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) for tail in _SOMETHING}
    | {(kind, LockState.NOBODY, FileTail.EMPTY): RecoveryAction.REMOVE for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE)}
    | {(Kind.TEMPORARY, LockState.NOBODY, tail): RecoveryAction.REMOVE for tail in FileTail}
)
RECOVERABLE_KINDS: Final = frozenset(kind for (kind, _, _), action in RECOVERY.items() if action is not RecoveryAction.LEAVE)
# Files of these kinds, and compressed files, which may be copies, may need recovery after the death of a process.
_RECOVERY_PATTERNS: Final = (*layout.patterns_of(*RECOVERABLE_KINDS), *layout.COMPRESSED_PATTERNS)


class AdoptedFile(NamedTuple):
    """A segment of a dead writer that was sealed."""

    active_name: str
    sealed_name: str
    bytes: int


def recover(directory: Directory) -> list[AdoptedFile]:
    """Recover the files of dead writers: seal segments with events; remove empty ones, stale temporary files and stale copies.

    Also completes the removal of queues, whose hard links may belong to batches that are pending here.

    Only one thread recovers at a time; when this returns, the segments that another thread was recovering are sealed too.
    """
    with directory.recovery_lock:
        finish_removals(directory)
        return _recover(directory)


def _recover(directory: Directory) -> list[AdoptedFile]:
    names = list(directory.filesystem.list_names(directory.path, _RECOVERY_PATTERNS))
    segments = sorted((name for name in names if layout.kind_of(name) in RECOVERABLE_KINDS), key=layout.active_sort_key)
    if len(segments) < len(names):  # some are compressed
        directory.remove_stale_copies(directory.all_sealed_names())
    directory.forget_skips(segments)
    to_seal: list[LockedFile] = []
    adopted: list[AdoptedFile] = []
    skipped_writers: set[str] = set()  # writers with a segment that another process has locked; their later segments must wait

    def renamed(files: Sequence[LockedFile], names: Sequence[str]) -> None:
        for file, name in zip(files, names, strict=True):
            if name:
                adopted.append(AdoptedFile(file.name, name, directory.filesystem.size(file.fd)))
            to_seal.remove(file)
        directory.filesystem.close_each([file.fd for file in files])

    try:
        for name in segments:
            writer, _ = layout.active_sort_key(name)
            if writer not in skipped_writers and not _recover_file(directory, name, to_seal):
                skipped_writers.add(writer)
        if to_seal:
            # Batches that other writers have sealed since then must count as older than these, whatever the clock says.
            directory.seal_after(directory.disk_usage().newest_sealed_at)
        for index, file in enumerate(to_seal):
            to_seal[index] = _sync_or_rewrite(directory, file)
        directory.seal(to_seal.copy(), renamed)
    finally:
        for file in to_seal:
            directory.filesystem.close(file.fd)
    return adopted


def _sync_or_rewrite(directory: Directory, file: LockedFile) -> LockedFile:
    """Sync a file.

    If that fails, rewrite it; if that fails too, use it as it is, because its lines are checked when they are read.
    """
    try:
        directory.filesystem.sync_data(file.fd)
    except OSError as error:
        log.error("%s: fsync failed (%s); rewriting the file", file.name, error.strerror)  # noqa: TRY400 - a traceback adds nothing
    else:
        return file
    try:
        return directory.rewrite(file)
    except OSError as error:
        log.error("%s: rewriting failed too (%s); sealing what can be read", file.name, error.strerror)  # noqa: TRY400 - a traceback adds nothing
        return file


def _recover_file(directory: Directory, name: str, to_seal: list[LockedFile]) -> bool:
    """Apply the recovery table to a file, and add it to `to_seal` if it is to be sealed.

    False if another process has locked it.
    """
    try:
        file = directory.lock_existing(name)
    except FileUnusableError as error:
        directory.log_skip(name, error.problem)
        return True
    except OSError as error:
        if not concerns_one_file(error):
            raise
        directory.log_skip(name, str(error))
        return True
    lock = LockState.ANOTHER if file is None else LockState.NOBODY
    try:
        tail = FileTail.EMPTY if file is None else _tail(directory, file)
        action = RECOVERY[layout.kind_of(name), lock, tail]
    except OSError as error:
        directory.log_skip(name, f"cannot be read: {error}")
        action = RecoveryAction.LEAVE
    if file is None:
        return False
    if action is RecoveryAction.SEAL:
        to_seal.append(file)
        return True
    try:
        if action is RecoveryAction.REMOVE:
            directory.remove(name)
    except OSError as error:
        directory.log_skip(name, f"cannot be removed: {error}")
    finally:
        directory.filesystem.close(file.fd)
    return True


def _tail(directory: Directory, file: LockedFile) -> FileTail:
    size = directory.filesystem.size(file.fd)
    return tail_of(directory.filesystem.read_at(file.fd, size - 1, 1) if size else b"")
