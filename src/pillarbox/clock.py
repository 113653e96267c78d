"""The clocks. No other module reads the time, except the C extension (`src/speedups/event.c`).

Whatever waits or writes timestamps takes a `Clock`, so that a test can pass one that it controls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import time
else:
    from pillarbox.system.originals import time


class Clock(Protocol):
    """A wall clock for timestamps and a monotonic clock for durations."""

    def micros(self) -> int:
        """Wall time in microseconds since 1970. It may jump forwards or backwards."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment. It never goes backwards."""


class SystemClock:
    """The clocks of the operating system."""

    def micros(self) -> int:
        """Wall time in microseconds since 1970."""
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment. It never goes backwards."""
        return time.monotonic()


wall_ns = time.time_ns


def yield_gil() -> None:
    """Let another thread of this process run, if one waits for the GIL."""
    time.sleep(0)
