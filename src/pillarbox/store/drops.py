"""Reports dropped events: in the log when they begin and end, and in the ledger, so that other processes know of them.

Both are limited, whatever the number of drops: two log lines for each episode of a reason, and one ledger entry for each reason
in ten seconds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.ledger_entries import DroppedEntry
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pillarbox.clock import Clock
    from pillarbox.store.ledger import LedgerWriter

log = logging.getLogger("pillarbox")

QUIET_S: Final = 10.0  # without a drop for a reason, until its episode ends
LEDGER_INTERVAL_S: Final = 10.0  # between two ledger entries for a reason
_NOT_REPORTED: Final = "disabled"  # the application's own decision


class _Episode(NamedTuple):
    """A period in which events are dropped for one reason."""

    began_s: float  # monotonic
    last_s: float  # when the last drop was seen
    total_before: int  # drops for the reason before it


class DropRecorder:
    """Reports the drops of one writer. Safe to share between threads, and with a signal handler.

    Args:
        path: The outbox directory, for the log.
        writer: The id of the writer.
        clock: Where time comes from.
        ledger: Receives the entries; None: drops are only logged.
        read_totals: Returns the number of dropped events by reason.
        uncounted: Reasons whose drops `when_full="block"` subtracts again, because it retries the event.
    """

    def __init__(
        self,
        path: str,
        writer: str,
        clock: Clock,
        ledger: LedgerWriter | None,
        read_totals: Callable[[], Mapping[str, int]],
        uncounted: Collection[str] = (),
    ) -> None:
        self._path = path
        self._writer = writer
        self._clock = clock
        self._ledger = ledger
        self._read_totals = read_totals
        self._uncounted = uncounted
        self._seen: dict[str, int] = {}
        self._recorded: dict[str, int] = {}
        self._recorded_at_s: dict[str, float] = {}
        self._episodes: dict[str, _Episode] = {}
        self._lock = threads.RLock()
        self._is_reporting = False

    def report(self, *, is_last: bool = False) -> bool:
        """Report what was dropped since the last call; `is_last` at the end. Returns whether ledger entries were added.

        Does nothing in a signal handler that has interrupted another call.
        """
        with self._lock:
            if self._is_reporting:
                return False
            try:
                self._is_reporting = True
                return self._report(is_last=is_last)
            finally:
                self._is_reporting = False

    def _report(self, *, is_last: bool) -> bool:
        now_s, totals = self._clock.monotonic(), self._read_totals()
        added = False
        for reason, total in totals.items():
            if reason == _NOT_REPORTED or (reason in self._uncounted and not is_last):
                continue
            self._log_episode(reason, total, now_s)
            added |= self._record(reason, total, now_s, is_last=is_last)
        return added

    def _log_episode(self, reason: str, total: int, now_s: float) -> None:
        before, self._seen[reason] = self._seen.get(reason, 0), total
        episode = self._episodes.get(reason)
        if total > before:
            if episode is None:
                log.warning("%s: dropping events: %s", self._path, reason)
                episode = _Episode(now_s, now_s, before)
            self._episodes[reason] = episode._replace(last_s=now_s)
        elif episode is not None and now_s - episode.last_s >= QUIET_S:
            del self._episodes[reason]
            dropped, seconds = total - episode.total_before, episode.last_s - episode.began_s
            text = "%s: dropped no event for %.0f s for this reason: %s; %d were dropped within %.0f s, and %d since the start"
            log.warning(text, self._path, now_s - episode.last_s, reason, dropped, seconds, total)

    def _record(self, reason: str, total: int, now_s: float, *, is_last: bool) -> bool:
        new = total - self._recorded.get(reason, 0)
        is_due = is_last or now_s - self._recorded_at_s.get(reason, -LEDGER_INTERVAL_S) >= LEDGER_INTERVAL_S
        if new <= 0 or not is_due or self._ledger is None:
            return False
        self._recorded[reason], self._recorded_at_s[reason] = total, now_s
        self._ledger.add(DroppedEntry(self._clock.micros(), self._writer, reason, new))
        return True
