"""What to do with a file that is found: a table, total over (kind, lock, tail). Pure."""

from __future__ import annotations

from enum import Enum
from typing import Final

from pillarbox.store.layout import Kind


class Lock(Enum):
    """Who holds the file's lock."""

    NOBODY = "nobody"
    ANOTHER = "another"


class Tail(Enum):
    """How the file ends."""

    EMPTY = "empty"  # there is nothing in it
    WHOLE = "whole"  # with a line feed
    TORN = "torn"  # in the middle of a line
    NUL = "nul"  # with bytes whose data never reached the disk


def tail_of(last: bytes) -> Tail:
    """The tail of a file whose last byte is `last`; empty where it has none."""
    if not last:
        return Tail.EMPTY
    return {b"\n": Tail.WHOLE, b"\0": Tail.NUL}.get(last, Tail.TORN)


class Action(Enum):
    """What is done with the file."""

    LEAVE = "leave"
    SEAL = "seal"
    REMOVE = "remove"


# A held lock is a living owner. Without one, an active file's writer is dead: its events wait to be sealed, however the file
# ends, for adoption changes no byte and the reader sets the rest aside. Sealed files are the deliverer's, empty or not;
# quarantine and dead letters are the operator's. What was being written aside is written anew.
_SOMETHING: Final = (Tail.WHOLE, Tail.TORN, Tail.NUL)
RECOVERY: Final[dict[tuple[Kind, Lock, Tail], Action]] = (
    {(kind, lock, tail): Action.LEAVE for kind in Kind for lock in Lock for tail in Tail}
    | {(kind, Lock.NOBODY, tail): Action.SEAL for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) for tail in _SOMETHING}
    | {(kind, Lock.NOBODY, Tail.EMPTY): Action.REMOVE for kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE)}
    | {(Kind.ASIDE, Lock.NOBODY, tail): Action.REMOVE for tail in Tail}
)
RECOVERABLE: Final = frozenset(kind for (kind, _, _), action in RECOVERY.items() if action is not Action.LEAVE)
