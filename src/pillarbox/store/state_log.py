"""Which changes of a state are logged: one line when a kind of problem begins, and one when it is over.

Problems repeat in loops, with other file names and numbers each time, or come and go many times a second: a process without
free descriptors may get one now and then. So a problem is compared by its kind, and not by its text; and a problem that has
come back within a minute counts as over only once it has stayed away for a while.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pillarbox.clock import Clock

_REPEAT_S: Final = 60.0  # a problem that comes back earlier has not been over; a kind that comes back earlier is not logged
_CALM_S: Final = 5.0  # without a problem that comes and goes, until it counts as over; twice as long each time it comes back
_KINDS_MAX: Final = 5  # logged in `_REPEAT_S`; texts that differ in other ways than `kind_of` knows count as kinds
_TEXT_CHARS_MAX: Final = 400  # of a text that are compared
_VARIABLE: Final = re.compile(r"""'[^']*'|"[^"]*"|/[^\s:;,)]*|(sealed|active)-[^\s:;,)]*|[0-9a-f-]{6,}""")


def kind_of(problem: str) -> str:
    """The text of a problem without what differs from one time to the next: paths, names of files, what is quoted, ids."""
    return _VARIABLE.sub("*", problem[:_TEXT_CHARS_MAX])


class StateLog:
    """Decides for one state, as that of a disk or of a destination, which of its changes are logged."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._current = ""
        self._logged_at: dict[str, float] = {}  # monotonic, by kind
        self._well_since: float | None = None
        self._last_end = -_REPEAT_S
        self._calm_s = 0.0
        self._problem = ""  # the text of the last problem
        self._began_at = self._lasted_s = 0.0

    def is_new_problem(self, problem: str) -> bool:
        """Note that there is a problem; whether to log it."""
        kind, now = kind_of(problem), self._clock.monotonic()
        is_first = not self._current
        self._well_since = None
        self._problem = problem
        if is_first:
            self._began_at = now
        if kind == self._current:
            return False
        if is_first:
            comes_back = now - self._last_end < _REPEAT_S
            self._calm_s = min(_REPEAT_S, max(_CALM_S, 2 * self._calm_s)) if comes_back else 0.0
        self._logged_at = {other: at for other, at in self._logged_at.items() if now - at < _REPEAT_S}
        self._current = kind
        if not is_first and (kind in self._logged_at or len(self._logged_at) >= _KINDS_MAX):
            return False
        self._logged_at[kind] = now
        return True

    def is_over(self) -> bool:
        """Note that there is no problem; whether to log that the last one is over."""
        if not self._current:
            return False
        now = self._clock.monotonic()
        if self._well_since is None:
            self._well_since = now
        if now - self._well_since < self._calm_s:
            return False
        self._current, self._last_end = "", now
        self._lasted_s = self._well_since - self._began_at
        return True

    def describe_end(self) -> str:
        """Once it is over: how long the last problem lasted, and which one it was."""
        return f"over after {self._lasted_s:.0f} s: {self._problem}"
