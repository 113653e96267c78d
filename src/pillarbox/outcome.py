"""What `enqueue` answers: `Enqueued`, or `Dropped` with one of a closed set of reasons."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

DropReason = Literal[
    "disabled",
    "closed",
    "max_bytes",
    "max_files",
    "disk_full",
    "disk_low",
    "io_error",
    "invalid",
    "filtered",
    "timeout",
    "would_block",
]
DROP_REASONS: Final[tuple[DropReason, ...]] = get_args(DropReason)


class Enqueued(msgspec.Struct, frozen=True, gc=False):
    """The event is stored; `durability` says what it survives from now on ("process": the death of the process)."""

    durability: Literal["process"] = "process"

    def __bool__(self) -> bool:
        return True


class Dropped(msgspec.Struct, frozen=True, gc=False):
    """The event was refused at the door and is nowhere; falsy, so that `if not outcome:` reads well."""

    reason: DropReason

    def __bool__(self) -> bool:
        return False


Outcome = Enqueued | Dropped

# One object for each answer, for the hot path makes none.
ENQUEUED: Final = Enqueued()
DROPPED: Final[dict[str, Dropped]] = {reason: Dropped(reason) for reason in DROP_REASONS}
