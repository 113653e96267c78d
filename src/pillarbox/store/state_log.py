"""Decides which changes of a state are logged: one line when a kind of problem begins, and one when it is over.

Problems repeat in loops, with different file names and numbers each time, or come and go many times a second: a process without
free descriptors may get one now and then. So problems are compared by kind and not by text. A problem that came back within a
minute counts as over only after some time without it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pillarbox.clock import Clock

_REPEAT_S: Final = 60.0  # a problem that returns earlier was not over; a kind that returns earlier is not logged
_CALM_S: Final = 5.0  # without a problem that had returned, until it is over; doubles each time it returns
_KINDS_MAX: Final = 5  # logged within `_REPEAT_S`: texts that `kind_of` cannot recognize as one kind would fill the log
_TEXT_CHARS_MAX: Final = 400  # of a text that is compared
_VARIABLE: Final = re.compile(r"""'[^']*'|"[^"]*"|/[^\s:;,)]*|(sealed|active)-[^\s:;,)]*|[0-9a-f-]{6,}""")


def kind_of(problem: str) -> str:
    """The text of a problem without its variable parts: paths, names of files, quoted texts and ids."""
    return _VARIABLE.sub("*", problem[:_TEXT_CHARS_MAX])


class StateLog:
    """Decides which changes of one state, such as that of a disk or a destination, are logged."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._current = ""
        self._logged_at: dict[str, float] = {}  # monotonic, by kind
        self._ok_since: float | None = None
        self._last_end = -_REPEAT_S
        self._calm_s = 0.0
        self._problem = ""  # the text of the last problem
        self._began_at = self._lasted_s = 0.0

    def is_new_problem(self, problem: str) -> bool:
        """Record that there is a problem. Returns whether to log it."""
        kind, now = kind_of(problem), self._clock.monotonic()
        is_first = not self._current
        self._ok_since = None
        self._problem = problem
        if is_first:
            self._began_at = now
        if kind == self._current:
            return False
        if is_first:
            has_returned = now - self._last_end < _REPEAT_S
            self._calm_s = min(_REPEAT_S, max(_CALM_S, 2 * self._calm_s)) if has_returned else 0.0
        self._logged_at = {other: at for other, at in self._logged_at.items() if now - at < _REPEAT_S}
        self._current = kind
        if not is_first and (kind in self._logged_at or len(self._logged_at) >= _KINDS_MAX):
            return False
        self._logged_at[kind] = now
        return True

    def is_over(self) -> bool:
        """Record that there is no problem. Returns whether to log that the last one is over."""
        if not self._current:
            return False
        now = self._clock.monotonic()
        if self._ok_since is None:
            self._ok_since = now
        if now - self._ok_since < self._calm_s:
            return False
        self._current, self._last_end = "", now
        self._lasted_s = self._ok_since - self._began_at
        return True

    def describe_end(self) -> str:
        """How long the last problem lasted, and its text. Valid once it is over."""
        return f"over after {self._lasted_s:.0f} s: {self._problem}"
