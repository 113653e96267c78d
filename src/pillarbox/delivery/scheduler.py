"""Which sealed file goes next: the oldest, or by a settable share one that was sealed since the drain began. Pure.

Names sort by age. What waits when a drain begins is the backlog; what is sealed from then on is live. Each of the two goes
first in, first out; while both wait, so many of the files as the share says are live ones, evenly spread.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_NAME: Final = ""  # sorts before each name


class Scheduler:
    """The names of files to send. With a share of 0 they go in the order in which they are given."""

    def __init__(self, live_share: float = 0.0) -> None:
        self._live_share = live_share
        self._backlog: deque[str] = deque()
        self._live: deque[str] = deque()
        self._live_credit = 0.0  # files, to the live ones
        self._newest = _NO_NAME  # of those that were given
        self._newest_backlog = _NO_NAME  # the newest of the backlog

    def __bool__(self) -> bool:
        return bool(self._backlog or self._live)

    @property
    def is_backlog_done(self) -> bool:
        """Whether what is sealed from now on changes nothing: no backlog is left for it to go beside."""
        return not self._backlog and self._newest_backlog != _NO_NAME

    def start_backlog(self) -> None:
        """All that waits at the next look is the backlog."""
        self._newest_backlog = _NO_NAME

    def schedule(self, names: Sequence[str]) -> None:
        """These wait, sorted by age, and no others."""
        self.clear()
        self._newest = names[-1] if names else self._newest
        if not names or min(names) > self._newest_backlog:
            self._newest_backlog = self._newest  # nothing of the backlog is left: this is the next one
        self._add(names)

    def schedule_in_order(self, names: Sequence[str]) -> None:
        """These wait, and go in this order, whatever the share."""
        self.clear()
        self._newest = max(names, default=self._newest)
        self._backlog.extend(names)

    def add_live(self, names: Sequence[str]) -> None:
        """All that waits by now: of these, what was sealed since the last look goes as well."""
        new_names = [name for name in names if name > self._newest]
        self._newest = new_names[-1] if new_names else self._newest
        if self._newest_backlog == _NO_NAME:
            self._newest_backlog = self._newest
            new_names = sorted([*self._backlog, *self._live, *new_names])
            self.clear()
        self._add(new_names)

    def _add(self, names: Sequence[str]) -> None:
        if not self._live_share:
            self._backlog.extend(names)
            return
        self._backlog.extend(name for name in names if name <= self._newest_backlog)
        self._live.extend(name for name in names if name > self._newest_backlog)

    def pop_next(self) -> str:
        """The next one; `IndexError` where there is none."""
        if not self._backlog or not self._live:
            return (self._backlog or self._live).popleft()
        self._live_credit += self._live_share
        if self._live_credit < 1:
            return self._backlog.popleft()
        self._live_credit -= 1
        return self._live.popleft()

    def clear(self) -> None:
        """Forget the names; what is backlog stays so."""
        self._backlog.clear()
        self._live.clear()
