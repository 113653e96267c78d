"""The only reader of time besides `src/speedups/event.c`.

Code that waits or writes a time takes a `Clock`, so that a test can pass another one.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings: one to stamp with, one to measure with."""

    def micros(self) -> int:
        """Wall time in microseconds since 1970; may step in either direction."""

    def monotonic(self) -> float:
        """Seconds since some moment; never steps back."""


class SystemClock:
    """The machine's own clocks."""

    def micros(self) -> int:
        """Wall time in microseconds since 1970."""
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        """Seconds since some moment; never steps back."""
        return time.monotonic()


wall_ns = time.time_ns


def yield_gil() -> None:
    """Let another thread of this process have the interpreter, if one waits for it."""
    time.sleep(0)
