"""Runners, which host delivery for an outbox or a command: the protocol, a thread of this process, or another process.

`ThreadRunner` runs the worker of a single sink. `fanout.FanOutRunner` runs a `ThreadRunner` for each of several sinks.
`process.supervisor.Supervisor` delivers in a child process. `ExternalRunner` represents a process that somebody else starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import HEARTBEAT_STALE_AFTER_S, read_heartbeat
from pillarbox.sinks.event_loop import run_on_sink_loop
from pillarbox.stats import COUNTER_FIELDS, DeliveryCounters, State
from pillarbox.store.state_log import StateLog
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Heartbeat
    from pillarbox.delivery.worker import Worker
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

ONLY_SINK: Final = ""  # the name of a single sink
_STATES_WORST_FIRST: Final = ("stopped", "waiting", "degraded", "draining", "standby", "idle")
_RESTART_S: Final = 5.0  # after a defect has ended the worker
_CANCEL_GRACE_S: Final = 0.5  # time to end for a call to the sink that `stop` has cancelled
_NO_DELIVERY: Final = "no process delivers this directory (is `pillarbox deliver` running?)"


class Runner(Protocol):
    """Delivers a directory from `start` to `stop`."""

    def start(self) -> None:
        """Begin to deliver."""

    def stop(self, timeout: float) -> bool:
        """Deliver what needs no waiting, then end; False if that took longer than `timeout` seconds."""

    def notify(self) -> None:
        """Say that there may be something to do; from any thread."""

    def sinks(self) -> dict[str, SinkStats]:
        """The stats of each sink, by name; a single sink is called `ONLY_SINK`."""

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until the number of settled files is not `known_files`, for at most `timeout` seconds."""


def combine_stats(sinks: Mapping[str, SinkStats]) -> SinkStats:
    """Combine the stats of all sinks: the sums of their counts, and the worst state with the name of its sink."""
    total = DeliveryCounters()
    for sink in sinks.values():
        for name in COUNTER_FIELDS:
            setattr(total, name, getattr(total, name) + getattr(sink, name))
    rates = [sink.rate for sink in sinks.values()]
    total.rate = None if None in rates else sum(filter(None, rates)) or None
    by_state = sorted(sinks.items(), key=lambda item: _STATES_WORST_FIRST.index(item[1].state.name))
    name, worst = by_state[0] if by_state else (ONLY_SINK, total.to_stats(State("idle"), ""))
    state = worst.state
    if name != ONLY_SINK and state.reason:
        state = State(state.name, f"{name}: {state.reason}", state.retry_at_micros)
    error = next((f"{name}: {sink.last_error}" if name else sink.last_error for name, sink in by_state if sink.last_error), "")
    return total.to_stats(state, error)


class ThreadRunner:
    """Runs one worker on the event loop of a thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.unwritten_ledger_entries = 0  # the owner of the ledger finishes it
        self._stopping = threads.Event()
        self._defect_log = StateLog(SystemClock())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threads.Thread(target=self._run, name="pillarbox-delivery")

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Deliver what needs no waiting, then end; after `timeout` seconds the rest stays on disk."""
        self._stopping.set()
        self.worker.end()
        with contextlib.suppress(RuntimeError):  # the thread was not started
            self._thread.join(timeout)
        if self._thread.is_alive() and self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has just ended
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(_CANCEL_GRACE_S)
        return not self._thread.is_alive()

    def notify(self) -> None:
        """Say that there may be something to do; from any thread."""
        self.worker.notify()

    def sinks(self) -> dict[str, SinkStats]:
        """The stats of the sink."""
        worker = self.worker
        with worker.settlement_done.lock:  # a file that is gone is counted
            return {ONLY_SINK: worker.counters.to_stats(worker.state, worker.last_error)}

    def is_idle(self) -> bool:
        """Whether the last scan has found nothing to deliver."""
        return self.worker.idle.is_set()

    def is_stopped(self) -> bool:
        """Whether nothing is delivered until somebody fixes the configuration."""
        return self.worker.state.name == "stopped"

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until the number of settled files is not `known_files`, for at most `timeout` seconds."""
        with self.worker.settlement_done.lock:
            self.worker.settlement_done.wait_for(lambda: self.worker.counters.flushed_files != known_files, timeout)

    def _run(self) -> None:
        while True:
            try:
                run_on_sink_loop(self._run_worker())
            except (asyncio.CancelledError, Exception, SystemExit) as error:
                if isinstance(error, asyncio.CancelledError) and self._stopping.is_set():
                    return
                if self._defect_log.is_new_problem(f"{type(error).__name__}: {error}"):
                    log.exception("delivery failed on a defect in Pillarbox or in a sink; restarting in %g s", _RESTART_S)
            else:
                return
            if self._stopping.wait(_RESTART_S):
                return

    async def _run_worker(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        await self.worker.run()


class ExternalRunner:
    """Represents the process that delivers with `deliver="external"`. Only its heartbeat is known.

    The runner counts nothing, because this process only stores.
    """

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._started_s = clock.monotonic()
        self._checked_s = self._started_s
        self._is_silent = False
        self._silent_since_s = 0.0

    def start(self) -> None:
        """Do nothing: somebody else starts the other process."""

    def stop(self, timeout: float) -> bool:  # noqa: ARG002 - the protocol's
        """Do nothing: the other process continues."""
        return True

    def notify(self) -> None:
        """Check from time to time whether any process delivers, and log changes. That process scans by itself."""
        now = self._clock.monotonic()
        if now - self._checked_s < HEARTBEAT_STALE_AFTER_S:
            return
        self._checked_s = now
        is_silent = self._silent_seconds(read_heartbeat(self._directory)) is not None
        if is_silent != self._is_silent:
            self._is_silent = is_silent
            if is_silent:
                self._silent_since_s = now
                log.warning("%s: %s", self._directory.path, _NO_DELIVERY)
            else:
                pending_bytes, pending_files = self._directory.pending()
                text = "%s: a process delivers again, after %.0f s; pending: %d files, %d bytes"
                log.warning(text, self._directory.path, now - self._silent_since_s, pending_files, pending_bytes)

    def sinks(self) -> dict[str, SinkStats]:
        """The stats of each sink, from its heartbeat."""
        directories = self._directory.queues() or [self._directory]
        return {directory.sink or ONLY_SINK: self._stats_from(read_heartbeat(directory)) for directory in directories}

    def _stats_from(self, heartbeat: Heartbeat | None) -> SinkStats:
        silent_s = self._silent_seconds(heartbeat)
        if silent_s is not None:
            state, last_error = State("degraded", f"{_NO_DELIVERY}: no heartbeat for {silent_s:.0f} s"), _NO_DELIVERY
        elif heartbeat is not None:
            state, last_error = heartbeat.state, heartbeat.last_error
        else:
            state, last_error = State("idle"), ""
        return DeliveryCounters().to_stats(state, last_error)

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:  # noqa: ARG002 - the protocol's
        """Wait for `timeout` seconds: the other process does not report what it settles."""
        threads.pause(timeout)

    def _silent_seconds(self, heartbeat: Heartbeat | None) -> float | None:
        """The age of the last heartbeat if it is stale, otherwise None."""
        here_s = self._clock.monotonic() - self._started_s
        silent_s = here_s if heartbeat is None else heartbeat.age_s(self._clock)
        # If both processes start together, the other one has as long to write its first heartbeat.
        return silent_s if min(silent_s, here_s) > HEARTBEAT_STALE_AFTER_S else None
