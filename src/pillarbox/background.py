"""The objects that the threads of an outbox call.

None of them refers to the outbox, so that an outbox that a program drops without closing it can be garbage collected while its
threads run.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.backpressure import FULL_REASONS
from pillarbox.forks import process_id
from pillarbox.log_records import write_waiting_records
from pillarbox.system import threads

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.runner import Runner
    from pillarbox.hooks import Hooks
    from pillarbox.store.group_commit import GroupCommitter
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.sealer import Sealer
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

_BUSY_PERIOD_S: Final = 10.0  # after the last event; during this time the delivery worker yields the GIL every few records


class Activity:
    """Tells the delivery worker whether this process stored events recently. Not for other threads."""

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        self._accepted = 0
        self._since_s = -_BUSY_PERIOD_S  # monotonic

    def is_busy(self) -> bool:
        """Whether this process stored events within the last ten seconds."""
        now, count = self._clock.monotonic(), self._writer.accepted_events
        if count != self._accepted:
            self._accepted, self._since_s = count, now
        return now - self._since_s < _BUSY_PERIOD_S


class RunnerLink:
    """Refers to the runner once it exists."""

    def __init__(self) -> None:
        self.runner: Runner | None = None

    def notify(self) -> None:
        """Notify the runner that there may be something to deliver."""
        if self.runner is not None:
            self.runner.notify()


class DropReporter:
    """Calls `on_drop`: on the caller's thread, or on a separate one if the caller is a thread of Pillarbox.

    The caller is then the thread that seals segments, and it must not wait for the hook. The separate thread lives while there
    are drops to report.
    """

    def __init__(self, hooks: Hooks, *, blocks_when_full: bool) -> None:
        self._hooks = hooks
        self.blocks_when_full = blocks_when_full  # false once the outbox is closed
        self._lock = threads.RLock()
        self._totals: dict[str, int] | None = None  # what the thread reports next
        self._thread: threads.Thread | None = None
        self._reported: dict[str, int] = {}  # totals of the last call from a thread of Pillarbox

    def report(self, totals: dict[str, int]) -> None:
        """Report the drops since the last report, by reason."""
        if self._hooks.is_in_hook():
            return
        if self.blocks_when_full:
            # Such a drop is subtracted before the next attempt to store the event. It stays only if the caller is cancelled.
            totals = {reason: total for reason, total in totals.items() if reason not in FULL_REASONS}
        if not threads.is_own_thread():
            self._hooks.report_drops(totals)
            return
        if totals == self._reported:
            return
        with self._lock:
            self._reported = self._totals = totals
            if self._thread is not None:
                return
            self._thread = threads.Thread(target=self._run, name="pillarbox-hooks")
            try:
                self._thread.start()
            except RuntimeError:  # the system cannot start another thread; the next round tries again
                self._thread, self._reported = None, {}

    def wait(self, timeout: float) -> None:
        """Wait until `on_drop` has returned, for at most `timeout` seconds."""
        thread = self._thread
        if thread is not None and not self._hooks.is_in_hook():
            thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._lock:
                totals, self._totals = self._totals, None
                if totals is None:
                    self._thread = None
                    return
            self._hooks.report_drops(totals)


class BackgroundWork:
    """The parts of an outbox that run threads, and how to end them."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        sealer: Sealer,
        link: RunnerLink,
        committer: GroupCommitter,
        ledger: LedgerWriter,
        drop_reporter: DropReporter,
    ) -> None:
        self.name = name
        self._clock = clock
        self._sealer = sealer
        self._link = link
        self._committer = committer
        self._ledger = ledger
        self._drop_reporter = drop_reporter
        self._process_id = process_id()

    def is_of_this_process(self) -> bool:
        """Whether the threads run in this process, and not in its parent."""
        return self._process_id == process_id()

    def request_end(self) -> None:
        """Request that the sealer seals the segments and stops."""
        self._sealer.request_stop()

    def end(self, timeout: float) -> None:
        """Seal the segments, deliver what can be delivered without waiting, and end the threads."""
        deadline = self._clock.monotonic() + timeout
        if not self._sealer.stop(timeout):
            log.warning("%s: not sealed within %g s; the next start recovers the segment", self.name, timeout)
        runner = self._link.runner
        if runner is not None:
            runner.notify()
            runner.stop(max(0.0, deadline - self._clock.monotonic()))
        self._drop_reporter.wait(max(0.0, deadline - self._clock.monotonic()))
        self._committer.stop()
        write_waiting_records()
        self._ledger.finish()

    def record_last_drops(self) -> None:
        """Record the drops in the ledger while no thread runs: the outbox never started, or it is closed."""
        self._sealer.record_drops(is_last=True)
        self._ledger.finish()
