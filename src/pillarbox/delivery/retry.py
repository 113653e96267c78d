"""Batches that were refused as a whole: put off until the destination has accepted another, for only that proves them bad."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.delivery import policy
from pillarbox.delivery.request import AttemptHistory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.delivery.policy import DeliveryConfig

_DEFERRED_MAX: Final = 64  # batches; while delivery is stopped and so many are put off, these are tried in turn


class _DeferredBatch(NamedTuple):
    acceptances: int  # how many there had been when it was refused
    tried_at: float  # monotonic seconds
    reason: str
    history: AttemptHistory


class PoisonTracker:
    """What is put off, and what to try next. Names are those of sealed files."""

    def __init__(self, config: DeliveryConfig) -> None:
        self._config = config
        self._deferred: dict[str, _DeferredBatch] = {}
        self._acceptances = 0
        self._dead_lettered = 0  # batches given up as a whole since the last success
        self.send_alone: set[str] = set()  # refused together with others: sent by itself from now on

    @property
    def has_deferred(self) -> bool:
        """Whether any is put off."""
        return bool(self._deferred)

    def note_accepted(self) -> None:
        """The destination has accepted something: what was put off before is judged at its next refusal."""
        self._acceptances += 1
        self._dead_lettered = 0

    def note_dead_lettered(self) -> None:
        """A batch of which nothing was accepted is given up."""
        self._dead_lettered += 1

    @property
    def dead_lettered_batches(self) -> int:
        """How many were since the last success."""
        return self._dead_lettered

    def defer_batch(self, name: str, reason: str, history: AttemptHistory, now: float) -> None:
        """This batch was refused as a whole."""
        self._deferred[name] = _DeferredBatch(self._acceptances, now, reason, history)

    def forget_batch(self, name: str) -> None:
        """It is settled."""
        self._deferred.pop(name, None)
        self.send_alone.discard(name)

    def is_tracked(self, name: str) -> bool:
        """Whether something is remembered of it, by its name."""
        return name in self._deferred or name in self.send_alone

    def tracked_names(self) -> set[str]:
        """Of which something is remembered."""
        return self.send_alone | self._deferred.keys()

    def forget_missing(self, existing: Iterable[str]) -> None:
        """Forget those that are gone."""
        if self._deferred or self.send_alone:
            there = set(existing)
            self._deferred = {name: suspect for name, suspect in self._deferred.items() if name in there}
            self.send_alone &= there

    def accepted_since_rejection(self, name: str) -> bool:
        """Whether the destination has accepted something since it refused this one."""
        suspect = self._deferred.get(name)
        return suspect is not None and suspect.acceptances < self._acceptances

    def history_of(self, name: str) -> AttemptHistory:
        """What was tried with it before."""
        suspect = self._deferred.get(name)
        return suspect.history if suspect is not None else AttemptHistory()

    def undecided(self) -> list[str]:
        """Those refused since the last success, in the order in which they were tried."""
        return [name for name, suspect in self._deferred.items() if suspect.acceptances == self._acceptances]

    def rejected_in_row(self, except_for: str = "") -> int:
        """How many batches in a row were refused as a whole, one of them left out of the count."""
        return len(self.undecided()) - (except_for in self._deferred and not self.accepted_since_rejection(except_for))

    @property
    def is_circuit_open(self) -> bool:
        """Whether so many are refused that it is not they that are bad."""
        in_row = self.rejected_in_row()
        return in_row > 0 and policy.is_circuit_open(in_row + self._dead_lettered, self._config)

    def last_reason(self) -> str:
        """Why the last of them was refused."""
        unjudged = self.undecided()
        return self._deferred[unjudged[-1]].reason if unjudged else ""

    def select_batches(self, waiting: list[str], now: float) -> list[str]:
        """Which of the sealed files to send now: in an outage one, otherwise all but those that wait to be judged."""
        if not self._deferred:
            return waiting
        unjudged = sorted(self.undecided(), key=lambda name: self._deferred[name].tried_at)
        undecided_names = set(unjudged)
        others = [name for name in waiting if name not in undecided_names]
        if self.is_circuit_open:
            fresh = [name for name in others if name not in self._deferred]
            return (fresh or others)[:1] if others and len(unjudged) < _DEFERRED_MAX else unjudged[:1]
        if others:
            return self._interleave(others)
        return [name for name in unjudged if now - self._deferred[name].tried_at >= self._config.recheck_s]

    def _interleave(self, names: list[str]) -> list[str]:
        """Batches to be judged, each with another behind it: a success should stand between any two that are given up."""
        judged = [name for name in names if name in self._deferred]
        fresh = [name for name in names if name not in self._deferred]
        pairs = itertools.zip_longest(judged, fresh[: len(judged)])
        return [name for pair in pairs for name in pair if name is not None] + fresh[len(judged) :]
