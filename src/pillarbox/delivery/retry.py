"""Decides what to do after a destination's answer, and which rejected batches are poison. Pure: times are passed in.

`decide` is called after each call to the sink, `judge_rejections` once every record of a batch has an answer. No batch expires
unless the operator has set `max_age`: the data is on disk.

A record is dead-lettered only if the destination accepts others. A destination that rejects whole batches, one after the other,
is probably set up wrongly, and its answers prove nothing about the records. A wholly rejected batch is therefore deferred until
the destination has accepted another batch; `PoisonTracker` remembers the deferred ones. After a number of them in a row
(`DeliveryConfig.stop_after_rejected_batches`) the circuit breaker opens: delivery stops, and one batch at a time is tried.
"""

from __future__ import annotations

import itertools
import math
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.sinks.base import Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.delivery.config import DeliveryConfig

TOO_OLD: Final = "too_old"  # the code of dead letters that an age limit made
# How long a batch must have failed in this process before its age counts, in seconds. A clock that is wrong when the machine
# starts is corrected within minutes, and must not cause dead letters before that.
EXPIRY_MIN_FAILING_S: Final = 600.0
_EXTRA_SPLIT_CALLS: Final = 2
_SPLIT_FACTOR_PARTLY_ACCEPTED: Final = 4  # finds several poisoned records side by side in a partly accepted batch
_DEFERRED_MAX: Final = 64  # batches; if so many are deferred while delivery is stopped, they are tried in turn


class AttemptContext(NamedTuple):
    """What is known besides the answer to the last call."""

    accepted_since_rejection: bool = False  # the destination has accepted something since it rejected this batch as a whole
    partly_accepted: bool = False  # the destination has accepted a part of this batch
    deduplicates: bool = True  # the destination deduplicates, so a part that it has accepted may be sent again
    batch_records: int = 1
    rejected_calls_in_row: int = 0  # calls with records of this batch, before the last one
    other_rejected_batches: int = 0  # wholly rejected, in a row
    dead_lettered_batches: int = 0  # wholly, since the destination last accepted something
    age_s: float = 0.0  # since the batch was sealed
    failing_s: float = 0.0  # since this process's first call for it failed


class PartDone(NamedTuple):
    """Every record of the part has an answer: `accepted` and `duplicates` arrived, the records in `dead` are rejected."""

    accepted: int
    duplicates: int
    dead: dict[int, Rejection]


class SendRest(NamedTuple):
    """The records in `dead` are rejected and nothing of the call was stored: send the records between them again."""

    dead: dict[int, Rejection]


class Split(NamedTuple):
    """Send the two halves one after the other."""


class Wait(NamedTuple):
    """Send the same part again after `seconds`."""

    seconds: float
    reason: str


class Stop(NamedTuple):
    """Report that delivery is stopped, and try again after `seconds`."""

    seconds: float
    reason: str


class Defer(NamedTuple):
    """The batch seems to be rejected as a whole: send other batches before it is judged."""

    rejection: Rejection


class Expire(NamedTuple):
    """The part is older than `max_age_s`: its records become dead letters."""

    rejection: Rejection


Action = PartDone | SendRest | Split | Wait | Stop | Defer | Expire


class Verdict(Enum):
    """What becomes of a batch's rejected records once every record has an answer."""

    FINAL = "final"  # they become dead letters
    DEFERRED = "deferred"  # decided after the destination has accepted another batch
    STOPPED = "stopped"  # deferred, and delivery stops


def decide(
    answer: DeliveryResult, records: int, attempt: int, jitter_share: float, context: AttemptContext, config: DeliveryConfig
) -> Action:
    """The action that follows from the answer to one call.

    Args:
        answer: What the sink returned.
        records: How many records the call had.
        attempt: How many calls in a row with this part have asked for a retry, this one included; from 1.
        jitter_share: Uniform in [0, 1), for the backoff.
        context: What is known besides the answer.
        config: The operator's limits.
    """
    match answer:
        case Delivered(accepted, duplicates):
            return PartDone(accepted, duplicates, {})
        case PartialFailure(rejected, None) if _is_splitting_futile(context, config):
            return _expire_if_old(context, config) or Defer(next(iter(rejected.values())))
        case PartialFailure(rejected, None):
            return SendRest(rejected)
        case PartialFailure(rejected, accepted, duplicates):
            return PartDone(accepted or 0, duplicates, rejected)
        case Rejected(rejection) if records <= 1:
            return PartDone(0, 0, {0: rejection})
        case Rejected(rejection) if _is_splitting_futile(context, config):
            return _expire_if_old(context, config) or Defer(rejection)
        case Rejected():
            return Split()
        case Retry(reason, after):
            # Retry exactly when the destination asks, up to a limit: its clock or its configuration may be wrong, and delivery
            # must not stop for years. If it names no time, the backoff decides.
            seconds = min(after, config.retry_after_max_s) if after else config.backoff.delay(attempt, jitter_share)
            return _expire_if_old(context, config) or Wait(seconds, reason)
        case Misconfigured(reason):
            return _expire_if_old(context, config) or Stop(config.recheck_s, reason)


def judge_rejections(accepted: int, context: AttemptContext, config: DeliveryConfig) -> Verdict:
    """Decide about the rejected records of a batch of which `accepted` records arrived."""
    if accepted or not config.stop_after_rejected_batches or is_expired(context, config):
        return Verdict.FINAL
    # One acceptance proves that a few batches are bad, not all pending ones: the destination may have worked for a moment.
    if context.accepted_since_rejection and context.dead_lettered_batches < config.stop_after_rejected_batches:
        return Verdict.FINAL
    rejected_batches = context.other_rejected_batches + context.dead_lettered_batches + 1
    return Verdict.STOPPED if is_circuit_open(rejected_batches, config) else Verdict.DEFERRED


def validate_answer(answer: object, records: int) -> DeliveryResult:
    """Check a sink's answer to a call of `records` records; an impossible one becomes `Misconfigured`."""
    match answer:
        case Delivered(accepted, duplicates) if accepted == records and duplicates >= 0:
            return answer
        case Retry(str(reason), after) if after is not None and not 0 <= after < math.inf:
            return Retry(reason, None)
        case Retry(str()) | Rejected(Rejection()) | Misconfigured(str()):
            return answer
        case PartialFailure(dict(rejected), accepted) if rejected and rejected.keys() <= set(range(records)):
            if not all(isinstance(rejection, Rejection) for rejection in rejected.values()):
                return Misconfigured("the sink rejected records with a value that is not a Rejection; fix the sink")
            if accepted is None or accepted == records - len(rejected):
                return answer
    return Misconfigured(f"the sink answered a call of {records} records with an impossible {answer!r:.200}; fix the sink")


def is_circuit_open(rejected_batches: int, config: DeliveryConfig) -> bool:
    """Whether so many batches in a row were wholly rejected that the configuration is at fault, not the batches."""
    return 0 < config.stop_after_rejected_batches <= rejected_batches


def is_expired(context: AttemptContext, config: DeliveryConfig) -> bool:
    """Whether a failing batch is dead-lettered for its age."""
    limit = config.max_age_s
    return limit is not None and context.age_s > limit and context.failing_s >= min(limit, EXPIRY_MIN_FAILING_S)


def _expire_if_old(context: AttemptContext, config: DeliveryConfig) -> Expire | None:
    if not is_expired(context, config):
        return None
    return Expire(Rejection(TOO_OLD, f"not delivered within {config.max_age_s:g} s of being sealed"))


def _is_splitting_futile(context: AttemptContext, config: DeliveryConfig) -> bool:
    """Whether to stop splitting: half as many rejections without a success would have found one poisoned record."""
    if not config.stop_after_rejected_batches:
        return False
    if context.accepted_since_rejection and context.dead_lettered_batches < config.stop_after_rejected_batches:
        return False
    if context.partly_accepted and not context.deduplicates:
        return False
    calls_max = 2 * (context.batch_records - 1).bit_length() + _EXTRA_SPLIT_CALLS
    return context.rejected_calls_in_row >= calls_max * (_SPLIT_FACTOR_PARTLY_ACCEPTED if context.partly_accepted else 1)


class AttemptHistory(NamedTuple):
    """The earlier attempts of this process with a batch, which is sent again because it was deferred."""

    attempts: int = 0
    first_at_micros: int = 0
    failing_since: float | None = None  # monotonic seconds


class _DeferredBatch(NamedTuple):
    acceptances: int  # how many there had been when it was rejected
    tried_at: float  # monotonic seconds
    reason: str
    history: AttemptHistory


class PoisonTracker:
    """Which batches are deferred, and which to try next. Names are those of batch files."""

    def __init__(self, config: DeliveryConfig) -> None:
        self._config = config
        self._deferred: dict[str, _DeferredBatch] = {}
        self._acceptances = 0
        self._dead_lettered = 0  # wholly rejected batches since the last acceptance
        self.send_alone: set[str] = set()  # files that were rejected together with others, and are sent alone from now on

    @property
    def has_deferred(self) -> bool:
        """Whether any batch is deferred."""
        return bool(self._deferred)

    @property
    def dead_lettered_batches(self) -> int:
        """Batches dead-lettered as a whole since the last acceptance."""
        return self._dead_lettered

    def note_accepted(self) -> None:
        """Note that the destination accepted something: deferred batches are decided at their next rejection."""
        self._acceptances += 1
        self._dead_lettered = 0

    def note_dead_lettered(self) -> None:
        """Note that a batch is dead-lettered as a whole."""
        self._dead_lettered += 1

    def defer_batch(self, name: str, reason: str, history: AttemptHistory, now: float) -> None:
        """Remember a batch that was rejected as a whole."""
        self._deferred[name] = _DeferredBatch(self._acceptances, now, reason, history)

    def forget_batch(self, name: str) -> None:
        """Forget a batch that is being settled."""
        self._deferred.pop(name, None)
        self.send_alone.discard(name)

    def is_tracked(self, name: str) -> bool:
        """Whether a batch is remembered, by its name."""
        return name in self._deferred or name in self.send_alone

    def tracked_names(self) -> set[str]:
        """The names of the remembered batches."""
        return self.send_alone | self._deferred.keys()

    def forget_missing(self, existing: Iterable[str]) -> None:
        """Forget batches that no longer exist."""
        if self._deferred or self.send_alone:
            names = set(existing)
            self._deferred = {name: deferred for name, deferred in self._deferred.items() if name in names}
            self.send_alone &= names

    def accepted_since_rejection(self, name: str) -> bool:
        """Whether the destination has accepted something since it rejected this batch."""
        deferred = self._deferred.get(name)
        return deferred is not None and deferred.acceptances < self._acceptances

    def history_of(self, name: str) -> AttemptHistory:
        """The earlier attempts with a batch."""
        deferred = self._deferred.get(name)
        return deferred.history if deferred is not None else AttemptHistory()

    def undecided(self) -> list[str]:
        """The batches rejected since the last acceptance, in the order in which they were tried."""
        return [name for name, deferred in self._deferred.items() if deferred.acceptances == self._acceptances]

    def rejected_in_row(self, except_for: str = "") -> int:
        """How many batches in a row were wholly rejected; one of them may be left out of the count."""
        return len(self.undecided()) - (except_for in self._deferred and not self.accepted_since_rejection(except_for))

    @property
    def is_circuit_open(self) -> bool:
        """Whether so many batches are rejected that the configuration is at fault, not the batches."""
        in_row = self.rejected_in_row()
        return in_row > 0 and is_circuit_open(in_row + self._dead_lettered, self._config)

    def last_reason(self) -> str:
        """Why the last undecided batch was rejected."""
        undecided = self.undecided()
        return self._deferred[undecided[-1]].reason if undecided else ""

    def select_batches(self, waiting: list[str], now: float) -> list[str]:
        """Which of the waiting batches to send now: one if the circuit is open, otherwise all but the undecided ones."""
        if not self._deferred:
            return waiting
        undecided = sorted(self.undecided(), key=lambda name: self._deferred[name].tried_at)
        undecided_names = set(undecided)
        others = [name for name in waiting if name not in undecided_names]
        if self.is_circuit_open:
            untried = [name for name in others if name not in self._deferred]
            return (untried or others)[:1] if others and len(undecided) < _DEFERRED_MAX else undecided[:1]
        if others:
            return self._interleave(others)
        return [name for name in undecided if now - self._deferred[name].tried_at >= self._config.recheck_s]

    def _interleave(self, names: list[str]) -> list[str]:
        """Put an untried batch after each deferred one: the destination can then accept one in between."""
        deferred = [name for name in names if name in self._deferred]
        untried = [name for name in names if name not in self._deferred]
        pairs = itertools.zip_longest(deferred, untried[: len(deferred)])
        return [name for pair in pairs for name in pair if name is not None] + untried[len(deferred) :]
