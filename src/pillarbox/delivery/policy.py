"""What follows from a destination's answer: tables, total over all that they are asked. Pure.

`decide` is asked after each call, `judge` once nothing of a batch is left to send. Nothing gives up by itself: the data is on
disk. A record is refused for good only where the destination takes others: a destination that refuses whole batches, one after
the other, is set up wrongly, and what it says of the records proves nothing.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final, NamedTuple

from pillarbox.delivery.backoff import Backoff
from pillarbox.delivery.pacing import Pacing
from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

TOO_OLD: Final = "too_old"  # the code of dead letters that an age limit made
# How long a batch must have failed here before its age counts, in seconds: a clock that was wrong when the machine came up is
# put right within minutes, and must not have made dead letters by then.
AGE_PROOF_S: Final = 600.0
_SPARE_CALLS: Final = 2
_PATIENCE_WITH_GOOD_ONES: Final = 4  # several poisoned records side by side, in a batch of which others were accepted


class Rules(NamedTuple):
    """What an operator may set. Times in seconds."""

    interval_s: float = 1.0  # between two looks at an idle directory
    recheck_s: float = 15.0  # between two looks at a destination that is set up wrongly
    backoff: Backoff = Backoff()
    stop_after_rejected_batches: int = (
        3  # batches refused as a whole, in a row, that stop delivery; 0: none do, and each refusal is final
    )
    max_age_s: float | None = None  # after which a batch that still fails is given up as dead letters; None: never
    max_in_flight: int = 1  # batches at once, where the sink allows several
    call_timeout_s: float = 60.0  # after which a call to a sink is given up and tried again
    pacing: Pacing = Pacing()
    named_at_once: int = 16_384  # sealed files: 2 MiB of names; each further part of a backlog lists the directory once more
    live_share: float = 0.0  # of the files that go while a backlog waits, those sealed since the drain began
    compress_after_s: float | None = None  # that a sealed file has waited; None: never


class Lately(NamedTuple):
    """What is known beside the answer."""

    proven: bool = False  # the destination has accepted something since it refused this batch as a whole
    accepted: bool = False  # it has accepted something of this batch
    repeatable: bool = True  # what it has accepted of the batch may be sent again: it tells repeats
    records: int = 1  # of the whole batch
    refused_calls: int = 0  # how many calls of the batch in a row it has refused, this one not among them
    refused_batches: int = 0  # how many other batches in a row it has refused as a whole
    condemned: int = 0  # how many of them were given up as dead letters since it has accepted something
    age_s: float = 0.0  # since the batch was sealed
    failing_s: float = 0.0  # since its first call here failed


class Settle(NamedTuple):
    """Done with the part: `accepted` and `duplicates` arrived, the records in `dead` are refused."""

    accepted: int
    duplicates: int
    dead: dict[int, Rejection]


class Resend(NamedTuple):
    """The records in `dead` are refused; send what stands between them, for nothing of the call was kept."""

    dead: dict[int, Rejection]


class Split(NamedTuple):
    """Send the two halves one by one."""


class Wait(NamedTuple):
    """Send the same part again after `seconds`."""

    seconds: float
    reason: str


class Stop(NamedTuple):
    """Send nothing, say so, and look again after `seconds`."""

    seconds: float
    reason: str


class PutOff(NamedTuple):
    """The batch is refused as a whole, as far as one can tell: send others before it is judged."""

    refusal: Rejection


class GiveUp(NamedTuple):
    """The part is older than the operator wants: its records are dead letters."""

    refusal: Rejection


Action = Settle | Resend | Split | Wait | Stop | PutOff | GiveUp


class Verdict(Enum):
    """What becomes of a batch's refusals once all of it was sent."""

    FINAL = "final"  # they are dead letters
    PUT_OFF = "put off"  # judged after the next success
    OUTAGE = "outage"  # put off, and delivery stops


def decide(answer: DeliveryResult, size: int, attempt: int, share: float, lately: Lately, rules: Rules) -> Action:
    """The action that follows from the answer to one call.

    `size` is the number of records in the call, `attempt` counts the calls in a row with this part that were to be tried
    again, from 1; `share` is the jitter, uniform in [0, 1).
    """
    match answer:
        case Delivered(accepted, duplicates):
            return Settle(accepted, duplicates, {})
        case PartialFailure(refused, None) if _is_hopeless(lately, rules):
            return _too_old(lately, rules) or PutOff(next(iter(refused.values())))
        case PartialFailure(refused, None):
            return Resend(refused)
        case PartialFailure(refused, accepted, duplicates):
            return Settle(accepted or 0, duplicates, refused)
        case Rejected(refusal) if size <= 1:
            return Settle(0, 0, {0: refusal})
        case Rejected(refusal) if _is_hopeless(lately, rules):
            return _too_old(lately, rules) or PutOff(refusal)
        case Rejected():
            return Split()
        case Retry(reason, after):
            # Never earlier than asked for, and not later either; a destination that names no time gets ours.
            seconds = after or rules.backoff.delay(attempt, share)
            return _too_old(lately, rules) or Wait(seconds, reason)
        case Misconfigured(reason):
            return _too_old(lately, rules) or Stop(rules.recheck_s, reason)


def judge(accepted: int, lately: Lately, rules: Rules) -> Verdict:
    """What becomes of the refusals of a batch of which `accepted` records arrived."""
    if accepted or not rules.stop_after_rejected_batches or is_too_old(lately, rules):
        return Verdict.FINAL
    # One success proves a few batches bad, not all that wait: the destination may have been well for a moment only.
    if lately.proven and lately.condemned < rules.stop_after_rejected_batches:
        return Verdict.FINAL
    return Verdict.OUTAGE if is_outage(lately.refused_batches + lately.condemned + 1, rules) else Verdict.PUT_OFF


def checked(answer: object, size: int) -> DeliveryResult:
    """A sink's answer to a call of `size` records, or what to make of one that cannot be: a sink may be anybody's code."""
    match answer:
        case Delivered(accepted, duplicates) if accepted == size and duplicates >= 0:
            return answer
        case Retry(str(reason), after) if after is not None and not 0 <= after < math.inf:
            return Retry(reason, None)
        case Retry(str()) | Rejected(Rejection()) | Misconfigured(str()):
            return answer
        case PartialFailure(dict(refused), accepted) if refused and refused.keys() <= set(range(size)):
            if not all(isinstance(refusal, Rejection) for refusal in refused.values()):
                return Misconfigured("the sink refuses records with something that is no Rejection: mend the sink")
            if accepted is None or accepted == size - len(refused):
                return answer
    return Misconfigured(f"the sink answered a call of {size} records with {answer!r:.200}, which cannot be: mend the sink")


def is_outage(refused_batches: int, rules: Rules) -> bool:
    """Whether so many batches in a row were refused as a whole that it is not they that are bad."""
    return 0 < rules.stop_after_rejected_batches <= refused_batches


def is_too_old(lately: Lately, rules: Rules) -> bool:
    """Whether a batch that fails is given up for its age."""
    limit = rules.max_age_s
    return limit is not None and lately.age_s > limit and lately.failing_s >= min(limit, AGE_PROOF_S)


def _too_old(lately: Lately, rules: Rules) -> GiveUp | None:
    if not is_too_old(lately, rules):
        return None
    return GiveUp(Rejection(TOO_OLD, f"not delivered within {rules.max_age_s:g} s of being sealed"))


def _is_hopeless(lately: Lately, rules: Rules) -> bool:
    """Whether halving goes on no further: one poisoned record is found by half as many refusals without a success."""
    if not rules.stop_after_rejected_batches or (lately.proven and lately.condemned < rules.stop_after_rejected_batches):
        return False
    if lately.accepted and not lately.repeatable:
        return False
    patience = 2 * (lately.records - 1).bit_length() + _SPARE_CALLS
    return lately.refused_calls >= patience * (_PATIENCE_WITH_GOOD_ONES if lately.accepted else 1)
