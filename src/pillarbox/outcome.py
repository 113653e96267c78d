"""What `enqueue` returns: `Enqueued`, or `Dropped` with the reason."""

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
    "disk_slow",
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
    """The event is stored. Truthy.

    Attributes:
        durability: What the event survives from now on: "process", the death of the process; "power", also a power loss.
    """

    durability: Durability = "process"

    def __bool__(self) -> Literal[True]:
        return True


class Dropped(msgspec.Struct, frozen=True, gc=False):
    """The event is not stored. Falsy, so that `if not outcome:` works.

    There is one exception: "io_error" can also mean that the event was written and could neither be made durable (durability
    "power") nor cut off again; then it may still be delivered. After every other reason it is never delivered.

    Attributes:
        reason: Why; `docs/reference/outcomes.md` explains each reason.
    """

    reason: DropReason

    def __bool__(self) -> Literal[False]:
        return False


Outcome = Enqueued | Dropped

# Shared objects: the hot path creates none.
ENQUEUED: Final = Enqueued()
ENQUEUED_POWER: Final = Enqueued("power")
DROPPED: Final[dict[str, Dropped]] = {reason: Dropped(reason) for reason in DROP_REASONS}
