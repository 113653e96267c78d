"""Which sealed file goes next: the oldest, or by a settable share one that was sealed since the drain began. Pure.

Names sort by age. What waits when a drain begins is the backlog; what is sealed from then on is live. Each of the two goes
first in, first out; while both wait, so many of the files as the share says are live ones, evenly spread.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING: Final = ""  # sorts before each name


class Lineup:
    """The names of files to send. With a share of 0 they go in the order in which they are given."""

    def __init__(self, live_share: float = 0.0) -> None:
        self._share = live_share
        self._backlog: deque[str] = deque()
        self._live: deque[str] = deque()
        self._owed = 0.0  # files, to the live ones
        self._newest = _NOTHING  # of those that were given
        self._border = _NOTHING  # the newest of the backlog

    def __bool__(self) -> bool:
        return bool(self._backlog or self._live)

    @property
    def is_settled(self) -> bool:
        """Whether what is sealed from now on changes nothing: no backlog is left for it to go beside."""
        return not self._backlog and self._border != _NOTHING

    def begin(self) -> None:
        """All that waits at the next look is the backlog."""
        self._border = _NOTHING

    def fill(self, names: Sequence[str]) -> None:
        """These wait, sorted by age, and no others."""
        self.clear()
        self._newest = names[-1] if names else self._newest
        if not names or min(names) > self._border:
            self._border = self._newest  # nothing of the backlog is left: this is the next one
        self._add(names)

    def fill_as_given(self, names: Sequence[str]) -> None:
        """These wait, and go in this order, whatever the share."""
        self.clear()
        self._newest = max(names, default=self._newest)
        self._backlog.extend(names)

    def add(self, names: Sequence[str]) -> None:
        """All that waits by now: of these, what was sealed since the last look goes as well."""
        fresh = [name for name in names if name > self._newest]
        self._newest = fresh[-1] if fresh else self._newest
        if self._border == _NOTHING:
            self._border = self._newest
            fresh = sorted([*self._backlog, *self._live, *fresh])
            self.clear()
        self._add(fresh)

    def _add(self, names: Sequence[str]) -> None:
        if not self._share:
            self._backlog.extend(names)
            return
        self._backlog.extend(name for name in names if name <= self._border)
        self._live.extend(name for name in names if name > self._border)

    def take(self) -> str:
        """The next one; `IndexError` where there is none."""
        if not self._backlog or not self._live:
            return (self._backlog or self._live).popleft()
        self._owed += self._share
        if self._owed < 1:
            return self._backlog.popleft()
        self._owed -= 1
        return self._live.popleft()

    def clear(self) -> None:
        """Forget the names; what is backlog stays so."""
        self._backlog.clear()
        self._live.clear()
