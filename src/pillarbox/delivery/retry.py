"""Batches that were refused as a whole: put off until the destination has accepted another, for only that proves them bad."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.delivery import policy
from pillarbox.delivery.shipment import History

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.delivery.policy import Rules

_REMEMBERED_MAX: Final = 64  # batches; while delivery is stopped and so many are put off, these are tried in turn


class _Suspect(NamedTuple):
    successes: int  # how many there had been when it was refused
    tried_at: float  # monotonic seconds
    reason: str
    history: History


class Suspects:
    """What is put off, and what to try next. Names are those of sealed files."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._found: dict[str, _Suspect] = {}
        self._successes = 0
        self._condemned = 0  # batches given up as a whole since the last success
        self.alone: set[str] = set()  # refused together with others: sent by itself from now on

    @property
    def has_some(self) -> bool:
        """Whether any is put off."""
        return bool(self._found)

    def success(self) -> None:
        """The destination has accepted something: what was put off before is judged at its next refusal."""
        self._successes += 1
        self._condemned = 0

    def condemn(self) -> None:
        """A batch of which nothing was accepted is given up."""
        self._condemned += 1

    @property
    def condemned(self) -> int:
        """How many were since the last success."""
        return self._condemned

    def put_off(self, name: str, reason: str, history: History, now: float) -> None:
        """This batch was refused as a whole."""
        self._found[name] = _Suspect(self._successes, now, reason, history)

    def forget(self, name: str) -> None:
        """It is settled."""
        self._found.pop(name, None)
        self.alone.discard(name)

    def knows(self, name: str) -> bool:
        """Whether something is remembered of it, by its name."""
        return name in self._found or name in self.alone

    def names(self) -> set[str]:
        """Of which something is remembered."""
        return self.alone | self._found.keys()

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget those that are gone."""
        if self._found or self.alone:
            there = set(names)
            self._found = {name: suspect for name, suspect in self._found.items() if name in there}
            self.alone &= there

    def is_proven(self, name: str) -> bool:
        """Whether the destination has accepted something since it refused this one."""
        suspect = self._found.get(name)
        return suspect is not None and suspect.successes < self._successes

    def history(self, name: str) -> History:
        """What was tried with it before."""
        suspect = self._found.get(name)
        return suspect.history if suspect is not None else History()

    def unjudged(self) -> list[str]:
        """Those refused since the last success, in the order in which they were tried."""
        return [name for name, suspect in self._found.items() if suspect.successes == self._successes]

    def in_row(self, besides: str = "") -> int:
        """How many batches in a row were refused as a whole, one of them left out of the count."""
        return len(self.unjudged()) - (besides in self._found and not self.is_proven(besides))

    @property
    def is_outage(self) -> bool:
        """Whether so many are refused that it is not they that are bad."""
        in_row = self.in_row()
        return in_row > 0 and policy.is_outage(in_row + self._condemned, self._rules)

    def reason(self) -> str:
        """Why the last of them was refused."""
        unjudged = self.unjudged()
        return self._found[unjudged[-1]].reason if unjudged else ""

    def choose(self, found: list[str], now: float) -> list[str]:
        """Which of the sealed files to send now: in an outage one, otherwise all but those that wait to be judged."""
        if not self._found:
            return found
        unjudged = sorted(self.unjudged(), key=lambda name: self._found[name].tried_at)
        waiting = set(unjudged)
        others = [name for name in found if name not in waiting]
        if self.is_outage:
            fresh = [name for name in others if name not in self._found]
            return (fresh or others)[:1] if others and len(unjudged) < _REMEMBERED_MAX else unjudged[:1]
        if others:
            return self._taking_turns(others)
        return [name for name in unjudged if now - self._found[name].tried_at >= self._rules.recheck_s]

    def _taking_turns(self, names: list[str]) -> list[str]:
        """Batches to be judged, each with another behind it: a success should stand between any two that are given up."""
        judged = [name for name in names if name in self._found]
        fresh = [name for name in names if name not in self._found]
        pairs = itertools.zip_longest(judged, fresh[: len(judged)])
        return [name for pair in pairs for name in pair if name is not None] + fresh[len(judged) :]
