"""Parses `Retry-After`, in seconds or as a date (RFC 9110, section 10.2.3). Pure."""

from __future__ import annotations

import re
from email.utils import mktime_tz, parsedate_tz
from typing import Final

RETRY_AFTER_MAX_S: Final = 1e11  # 3,000 years; a time that far ahead is still a valid date, and delivery has a limit of its own
_HEADER_CHARS_MAX: Final = 200  # characters of a header that are parsed
_SECONDS_FORM = re.compile(r"[+-]?\d+(\.\d*)?")


def parse_retry_after(text: str, date: str, now_s: float | None) -> float | None:
    """Return the seconds until the time that `Retry-After` names; None where it names none.

    A date counts from the response's own `Date`, where it has one, because the server's clock may differ from ours.

    Args:
        text: the value of the header.
        date: the value of the header `Date`, or an empty text.
        now_s: the current Unix time in seconds; None: a date without `Date` names no time.
    """
    text, date = text[:_HEADER_CHARS_MAX].strip(), date[:_HEADER_CHARS_MAX]
    if _SECONDS_FORM.fullmatch(text):
        seconds = float(text)
    else:
        then, now = _parse_http_date(text), _parse_http_date(date)
        if now is None:
            now = now_s
        if then is None or now is None:
            return None
        seconds = then - now
    return min(max(0.0, seconds), RETRY_AFTER_MAX_S)


def _parse_http_date(text: str) -> float | None:
    """Parse an HTTP date, in any of its three formats, to Unix time."""
    try:
        parts = parsedate_tz(text)
        return None if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
