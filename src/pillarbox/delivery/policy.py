"""What follows from a destination's answer: a table, total over (answer, batch size). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pillarbox.sinks.base import Answer, Delivered, Misconfigured, Partly, Refusal, Refused, Retry

if TYPE_CHECKING:
    from pillarbox.delivery.backoff import Backoff


class Settle(NamedTuple):
    """Done with the batch: `accepted` and `duplicates` arrived, the records in `dead` are dead letters."""

    accepted: int
    duplicates: int
    dead: dict[int, Refusal]


class Resend(NamedTuple):
    """The records in `dead` are dead letters; send what stands between them, for nothing of the call was kept."""

    dead: dict[int, Refusal]


class Split(NamedTuple):
    """Send the two halves one by one."""


class Wait(NamedTuple):
    """Send the same batch again after `seconds`."""

    seconds: float
    reason: str


class Stop(NamedTuple):
    """Send nothing, say so, and look again after `seconds`."""

    seconds: float
    reason: str


Action = Settle | Resend | Split | Wait | Stop


def decide(answer: Answer, size: int, attempt: int, share: float, backoff: Backoff, recheck_s: float) -> Action:
    """The action that follows.

    `size` is the number of records in the batch, `attempt` counts the failures in a row with this one, `share` is the jitter,
    uniform in [0, 1). No number of attempts gives up: the data is on disk.
    """
    match answer:
        case Delivered(accepted, duplicates):
            return Settle(accepted, duplicates, {})
        case Retry(reason, after):
            return Wait(max(after or 0.0, backoff.delay(attempt, share)), reason)
        case Partly(refused, None):
            return Resend(refused)
        case Partly(refused, accepted, duplicates):
            return Settle(accepted or 0, duplicates, refused)
        case Refused(refusal) if size <= 1:
            return Settle(0, 0, {0: refusal})
        case Refused():
            return Split()
        case Misconfigured(reason):
            return Stop(recheck_s, reason)
