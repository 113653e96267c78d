"""Which of the records that were set aside are meant, and moments as people write and read them. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import UsageError
from pillarbox.store import layout

if TYPE_CHECKING:
    from pillarbox.admin.dead_letters import DeadLetterRecord

_AGO: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class RecordFilter(NamedTuple):
    """What is asked for. Several of one kind: any of them; several kinds: all of them; nothing: everything."""

    records: tuple[str, ...] = ()  # by name: `<batch>#<index>`
    batches: tuple[str, ...] = ()  # ids of batches, or their beginnings
    reasons: tuple[str, ...] = ()  # parts of the reason
    codes: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()  # parts of the destination's URL
    event_keys: tuple[str, ...] = ()
    event_ids: tuple[str, ...] = ()
    since_micros: int | None = None  # of the last attempt
    until_micros: int | None = None

    @property
    def matches_all(self) -> bool:
        """Whether nothing in particular is asked for."""
        return self == RecordFilter()

    def matches_batch(self, batch: str) -> bool:
        """Whether a file can hold anything that is meant."""
        if self.records and not any(name.rpartition("#")[0] == batch for name in self.records):
            return False
        return not self.batches or batch.startswith(self.batches)

    def matches(self, record: DeadLetterRecord) -> bool:
        """Whether a dead letter is meant."""
        letter = record.letter
        return (
            self.matches_batch(record.batch)
            and (not self.records or record.name in self.records)
            and _contains_any(self.reasons, letter.reason)
            and _contains_any(self.sinks, letter.sink)
            and (not self.codes or letter.code in self.codes)
            and (not self.event_keys or record.event_key in self.event_keys)
            and (not self.event_ids or record.event_id in self.event_ids)
            and self.matches_time(letter.last_at_micros)
        )

    def matches_time(self, micros: int | None) -> bool:
        """Whether a moment lies in the time that is meant; one that is not known does not, where a time is meant."""
        if micros is None:
            return self.since_micros is None and self.until_micros is None
        return (self.since_micros is None or micros >= self.since_micros) and (
            self.until_micros is None or micros < self.until_micros
        )

    def matches_reason(self, reason: str) -> bool:
        """Whether a span with this reason is meant."""
        return _contains_any(self.reasons, reason)


def _contains_any(parts: tuple[str, ...], text: str) -> bool:
    return not parts or any(part in text for part in parts)


def parse_batch_id(name: str) -> str:
    """A batch id, however it was typed: by itself, or as the name of any of the batch's files."""
    base = name.rpartition("/")[2]
    for prefix in ("dead-", "corrupt-"):
        base = base.removeprefix(prefix)
    return layout.batch_id(base.removesuffix(".spans.json"))


def parse_time(text: str, now_micros: int) -> int:
    """Microseconds since 1970 of `2h`, `3d` (that long ago) or ISO 8601 (UTC if it names no offset); raises `UsageError`."""
    ago = _AGO.fullmatch(text.strip())
    if ago:
        return now_micros - int(float(ago[1]) * _SECONDS[ago[2]] * 1e6)
    try:
        parsed = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"{text!r} is no time: write 90s, 30m, 2h, 3d or 1w for that long ago, or ISO 8601, e.g. 2026-01-31T12:00"
        ) from None
    return ((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def format_time(micros: int | None) -> str:
    """A moment as ISO 8601 to the second, in UTC; "-" where it is not known, the number where no calendar has it."""
    if micros is None:
        return "-"
    try:
        return (_EPOCH + micros // 1_000_000 * timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        return f"{micros} us"
