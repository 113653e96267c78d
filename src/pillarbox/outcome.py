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


Durability = Literal["process", "power"]
DURABILITIES: Final[tuple[Durability, ...]] = get_args(Durability)


class Enqueued(msgspec.Struct, frozen=True, gc=False):
    """The event is stored; `durability` says what it survives from now on: the death of the process, or the loss of power."""

    durability: Durability = "process"

    def __bool__(self) -> bool:
        return True


class Dropped(msgspec.Struct, frozen=True, gc=False):
    """The event was refused at the door and is nowhere; falsy, so that `if not outcome:` reads well.

    One exception: under durability "power", `io_error` may mean that the event was written and the disk did not confirm it.
    """

    reason: DropReason

    def __bool__(self) -> bool:
        return False


Outcome = Enqueued | Dropped

# One object for each answer, for the hot path makes none.
ENQUEUED: Final = Enqueued()
ENQUEUED_POWER: Final = Enqueued("power")
DROPPED: Final[dict[str, Dropped]] = {reason: Dropped(reason) for reason in DROP_REASONS}
