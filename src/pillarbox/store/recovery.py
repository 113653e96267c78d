"""What to do with a file that is found: a table, total over (kind, lock, content). Pure."""

from __future__ import annotations

from enum import Enum
from typing import Final

from pillarbox.store.layout import Kind


class Lock(Enum):
    """Who holds the file's lock."""

    NOBODY = "nobody"
    ANOTHER = "another"


class Content(Enum):
    """Whether there is anything in it."""

    EMPTY = "empty"
    SOME = "some"


class Action(Enum):
    """What is done with the file."""

    LEAVE = "leave"
    SEAL = "seal"
    REMOVE = "remove"


# A held lock is a living owner. Without one, an active file's writer is dead: its events wait to be sealed. Sealed files are
# the deliverer's, empty or not; quarantine and dead letters are the operator's. What was being written aside is written anew.
RECOVERY: Final[dict[tuple[Kind, Lock, Content], Action]] = {
    (kind, lock, content): Action.LEAVE for kind in Kind for lock in Lock for content in Content
} | {
    (Kind.ACTIVE, Lock.NOBODY, Content.SOME): Action.SEAL,
    (Kind.ACTIVE, Lock.NOBODY, Content.EMPTY): Action.REMOVE,
    (Kind.LEGACY_ACTIVE, Lock.NOBODY, Content.SOME): Action.SEAL,
    (Kind.LEGACY_ACTIVE, Lock.NOBODY, Content.EMPTY): Action.REMOVE,
    (Kind.ASIDE, Lock.NOBODY, Content.SOME): Action.REMOVE,
    (Kind.ASIDE, Lock.NOBODY, Content.EMPTY): Action.REMOVE,
}
RECOVERABLE: Final = frozenset(kind for (kind, _, _), action in RECOVERY.items() if action is not Action.LEAVE)
