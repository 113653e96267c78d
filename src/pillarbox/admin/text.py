"""Text that operators read and type: counts and times."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from pillarbox.errors import UsageError

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 event`, `2 events`; `plural` where an "s" is not enough."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_duration(seconds: float | None) -> str:
    """Seconds in the largest unit of which there are at least two; "-" for None."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def parse_time(text: str, now_micros: int) -> int:
    """Parse an age such as `2h` or `3d`, or an ISO 8601 time, which is UTC unless it has an offset.

    Returns:
        Microseconds since 1970.

    Raises:
        UsageError: The text is neither.
    """
    age = _AGE.fullmatch(text.strip())
    if age:
        return now_micros - int(float(age[1]) * _SECONDS[age[2]] * 1e6)
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"{text!r} is not a time: write an age, such as 90s, 30m, 2h, 3d or 1w, or ISO 8601, such as 2026-01-31T12:00"
        ) from None
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def format_time(micros: int | None) -> str:
    """Microseconds since 1970 as ISO 8601 in UTC, to the second; "-" for None; the number itself after the year 9999."""
    if micros is None:
        return "-"
    try:
        return (_EPOCH + micros // 1_000_000 * timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        return f"{micros} us"
