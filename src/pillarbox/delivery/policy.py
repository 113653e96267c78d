"""What follows from a destination's answer: tables, total over all that they are asked. Pure.

`decide` is asked after each call, `judge_rejections` once nothing of a batch is left to send. Nothing is given up without a
limit that the operator has set: the data is on disk. A record is dead-lettered only if the destination accepts others. If it
rejects whole batches, one after the other, it is set up wrongly, and its answers prove nothing about the records.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final, NamedTuple

from pillarbox.delivery.backoff import Backoff
from pillarbox.delivery.pacing import PacingConfig
from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

TOO_OLD: Final = "too_old"  # the code of dead letters that an age limit made
# How long a batch must have failed here before its age counts, in seconds: a clock that was wrong when the machine came up is
# put right within minutes, and must not have made dead letters by then.
EXPIRY_MIN_FAILING_S: Final = 600.0
_EXTRA_SPLIT_CALLS: Final = 2
_SPLIT_FACTOR_PARTLY_ACCEPTED: Final = 4  # several poisoned records side by side, in a batch of which others were accepted


class DeliveryConfig(NamedTuple):
    """What an operator may set. Times in seconds."""

    poll_interval_s: float = 1.0  # between two looks at an idle directory
    recheck_s: float = 15.0  # between two looks at a destination that is set up wrongly
    backoff: Backoff = Backoff()
    stop_after_rejected_batches: int = (
        3  # batches refused as a whole, in a row, that stop delivery; 0: none do, and each refusal is final
    )
    max_age_s: float | None = None  # after which a batch that still fails is given up as dead letters; None: never
    max_in_flight: int = 1  # batches at once, where the sink allows several
    call_timeout_s: float = 60.0  # after which a call to a sink is given up and tried again
    pacing: PacingConfig = PacingConfig()
    page_files: int = 16_384  # sealed files: 2 MiB of names; each further part of a backlog lists the directory once more
    live_share: float = 0.0  # of the files that go while a backlog waits, those sealed since the drain began
    compress_after_s: float | None = None  # that a sealed file has waited; None: never


class AttemptContext(NamedTuple):
    """What is known beside the answer."""

    accepted_since_rejection: bool = False  # the destination has accepted something since it refused this batch as a whole
    partly_accepted: bool = False  # it has accepted something of this batch
    deduplicates: bool = True  # what it has accepted of the batch may be sent again: it tells repeats
    batch_records: int = 1  # of the whole batch
    rejected_calls_in_row: int = 0  # how many calls of the batch in a row it has refused, this one not among them
    other_rejected_batches: int = 0  # how many other batches in a row it has refused as a whole
    dead_lettered_batches: int = 0  # how many of them were given up as dead letters since it has accepted something
    age_s: float = 0.0  # since the batch was sealed
    failing_s: float = 0.0  # since its first call here failed


class PartDone(NamedTuple):
    """Done with the part: `partly_accepted` and `duplicates` arrived, the records in `dead` are refused."""

    accepted: int
    duplicates: int
    dead: dict[int, Rejection]


class SendRest(NamedTuple):
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


class Defer(NamedTuple):
    """The batch is refused as a whole, as far as one can tell: send others before it is judged."""

    refusal: Rejection


class Expire(NamedTuple):
    """The part is older than the operator wants: its records are dead letters."""

    refusal: Rejection


Action = PartDone | SendRest | Split | Wait | Stop | Defer | Expire


class Verdict(Enum):
    """What becomes of a batch's refusals once all of it was sent."""

    FINAL = "final"  # they are dead letters
    DEFERRED = "put off"  # judged after the next success
    STOPPED = "outage"  # put off, and delivery stops


def decide(
    answer: DeliveryResult, records: int, attempt: int, jitter_share: float, context: AttemptContext, config: DeliveryConfig
) -> Action:
    """The action that follows from the answer to one call.

    `records` is the number of records in the call, `attempt` counts the calls in a row with this part that were to be tried
    again, from 1; `jitter_share` is the jitter, uniform in [0, 1).
    """
    match answer:
        case Delivered(accepted, duplicates):
            return PartDone(accepted, duplicates, {})
        case PartialFailure(refused, None) if _is_splitting_futile(context, config):
            return _expire_if_old(context, config) or Defer(next(iter(refused.values())))
        case PartialFailure(refused, None):
            return SendRest(refused)
        case PartialFailure(refused, accepted, duplicates):
            return PartDone(accepted or 0, duplicates, refused)
        case Rejected(refusal) if records <= 1:
            return PartDone(0, 0, {0: refusal})
        case Rejected(refusal) if _is_splitting_futile(context, config):
            return _expire_if_old(context, config) or Defer(refusal)
        case Rejected():
            return Split()
        case Retry(reason, after):
            # Never earlier than asked for, and not later either; a destination that names no time gets ours.
            seconds = after or config.backoff.delay(attempt, jitter_share)
            return _expire_if_old(context, config) or Wait(seconds, reason)
        case Misconfigured(reason):
            return _expire_if_old(context, config) or Stop(config.recheck_s, reason)


def judge_rejections(accepted: int, context: AttemptContext, config: DeliveryConfig) -> Verdict:
    """What becomes of the refusals of a batch of which `partly_accepted` records arrived."""
    if accepted or not config.stop_after_rejected_batches or is_expired(context, config):
        return Verdict.FINAL
    # One success proves a few batches bad, not all that wait: the destination may have been well for a moment only.
    if context.accepted_since_rejection and context.dead_lettered_batches < config.stop_after_rejected_batches:
        return Verdict.FINAL
    return (
        Verdict.STOPPED
        if is_circuit_open(context.other_rejected_batches + context.dead_lettered_batches + 1, config)
        else Verdict.DEFERRED
    )


def validate_answer(answer: object, records: int) -> DeliveryResult:
    """A sink's answer to a call of `records` records, or what to make of one that cannot be: a sink may be anybody's code."""
    match answer:
        case Delivered(accepted, duplicates) if accepted == records and duplicates >= 0:
            return answer
        case Retry(str(reason), after) if after is not None and not 0 <= after < math.inf:
            return Retry(reason, None)
        case Retry(str()) | Rejected(Rejection()) | Misconfigured(str()):
            return answer
        case PartialFailure(dict(refused), accepted) if refused and refused.keys() <= set(range(records)):
            if not all(isinstance(refusal, Rejection) for refusal in refused.values()):
                return Misconfigured("the sink refuses records with something that is no Rejection: mend the sink")
            if accepted is None or accepted == records - len(refused):
                return answer
    return Misconfigured(f"the sink answered a call of {records} records with {answer!r:.200}, which cannot be: mend the sink")


def is_circuit_open(rejected_batches: int, config: DeliveryConfig) -> bool:
    """Whether so many batches in a row were refused as a whole that it is not they that are bad."""
    return 0 < config.stop_after_rejected_batches <= rejected_batches


def is_expired(context: AttemptContext, config: DeliveryConfig) -> bool:
    """Whether a batch that fails is given up for its age."""
    limit = config.max_age_s
    return limit is not None and context.age_s > limit and context.failing_s >= min(limit, EXPIRY_MIN_FAILING_S)


def _expire_if_old(context: AttemptContext, config: DeliveryConfig) -> Expire | None:
    if not is_expired(context, config):
        return None
    return Expire(Rejection(TOO_OLD, f"not delivered within {config.max_age_s:g} s of being sealed"))


def _is_splitting_futile(context: AttemptContext, config: DeliveryConfig) -> bool:
    """Whether halving goes on no further: one poisoned record is found by half as many refusals without a success."""
    if not config.stop_after_rejected_batches or (
        context.accepted_since_rejection and context.dead_lettered_batches < config.stop_after_rejected_batches
    ):
        return False
    if context.partly_accepted and not context.deduplicates:
        return False
    calls_max = 2 * (context.batch_records - 1).bit_length() + _EXTRA_SPLIT_CALLS
    return context.rejected_calls_in_row >= calls_max * (_SPLIT_FACTOR_PARTLY_ACCEPTED if context.partly_accepted else 1)
