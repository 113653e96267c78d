"""What to do with a file that is found: a table, total over (kind, lock, tail). Pure."""

from __future__ import annotations

from enum import Enum
from typing import Final

from pillarbox.store.layout import Kind


class LockState(Enum):
    """Who holds the file's lock."""

    NOBODY = "nobody"
    ANOTHER = "another"


class FileTail(Enum):
    """How the file ends."""

    EMPTY = "empty"  # there is nothing in it
    WHOLE = "whole"  # with a line feed
    TORN = "torn"  # in the middle of a line
    NUL = "nul"  # with bytes whose data never reached the disk


def tail_of(last: bytes) -> FileTail:
    """The tail of a file whose last byte is `last`; empty where it has none."""
    if not last:
        return FileTail.EMPTY
    return {b"\n": FileTail.WHOLE, b"\0": FileTail.NUL}.get(last, FileTail.TORN)


class RecoveryAction(Enum):
    """What is done with the file."""

    LEAVE = "leave"
    SEAL = "seal"
    REMOVE = "remove"


# A held lock is a living owner. Without one, an active file's writer is dead: its events wait to be sealed, however the file
# ends, for adoption changes no byte and the reader sets the rest aside. Sealed files are the deliverer's, empty or not;
# quarantine and dead letters are the operator's. What was being written aside is written anew.
_SOMETHING: Final = (FileTail.WHOLE, FileTail.TORN, FileTail.NUL)
RECOVERY: Final[dict[tuple[Kind, LockState, FileTail], RecoveryAction]] = (
    {(kind, lock, tail): RecoveryAction.LEAVE for kind in Kind for lock in LockState for tail in FileTail}
    | {(kind, LockState.NOBODY, tail): RecoveryAction.SEAL for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) for tail in _SOMETHING}
    | {(kind, LockState.NOBODY, FileTail.EMPTY): RecoveryAction.REMOVE for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE)}
    | {(Kind.TEMPORARY, LockState.NOBODY, tail): RecoveryAction.REMOVE for tail in FileTail}
)
RECOVERABLE_KINDS: Final = frozenset(kind for (kind, _, _), action in RECOVERY.items() if action is not RecoveryAction.LEAVE)
