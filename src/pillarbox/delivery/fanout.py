"""The `Deliverer` of several sinks: a thread for each, and one that hands sealed files over to their queues.

Each sink has a lease of its own, in its queue, and so may be delivered by another process than its neighbour. Who holds the
lease of the directory itself hands over; as long as it does, nobody else takes what lies there for a single sink's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.deliverer import combine_stats
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S, Lease
from pillarbox.delivery.thread import ThreadRunner
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.stats import DeliveryCounters, State
from pillarbox.store import layout
from pillarbox.store.ledger_entries import AdoptedEntry
from pillarbox.store.recovery import recover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.worker import Worker
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory
    from pillarbox.store.fanout import FanOut
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.retention import Retention

log = logging.getLogger("pillarbox")

_TAKEOVER_POLL_S: Final = 0.5  # between two looks whether the process that hands over is gone
_SETTLEMENT_POLL_S: Final = 0.01  # between two looks whether a file was settled
_LOCKED_RETRY_S: Final = 0.05  # before a file that another process has is tried again


class FanOutRunner:
    """Delivers a directory to several sinks. `make_worker(queue)` is called once a sink, when its queue is there."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        ledger: LedgerWriter,
        fan_out: FanOut,
        poll_interval_s: float,
        urls: Mapping[str, str],
        make_worker: Callable[[Directory], Worker],
        durability: str = "",
        retention: Retention | None = None,
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._clock = clock
        self._fan_out = fan_out
        self._poll_interval_s = poll_interval_s
        self._urls = urls  # of the sinks, without what is secret
        self._make_worker = make_worker
        self._retention = retention  # of the directory itself: what was kept while there was one sink
        self._lease = Lease(directory, ", ".join(urls), clock, durability)
        self._runners: dict[str, ThreadRunner] = {}
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._fan_out_until = 0.0
        self._problem = ""
        self._all_fanned_out = False  # all that was found
        self._thread = threading.Thread(target=self._run, name="pillarbox-fan-out", daemon=True)

    def start(self) -> None:
        """Begin to hand over, and to deliver what was handed over."""
        self._thread.start()

    def notify(self) -> None:
        """There may be something to hand over; from any thread."""
        self._work.set()

    def stop(self, timeout: float) -> bool:
        """Hand over and deliver what can be without waiting, and end; what takes longer than `timeout` stays on disk."""
        deadline = self._clock.monotonic() + timeout
        self._fan_out_until = deadline - timeout / 2  # what is handed over is to be delivered, too
        self._stopping.set()
        self._work.set()
        with contextlib.suppress(RuntimeError):  # it has not begun
            self._thread.join(timeout)
        threads = list(self._runners.values())
        for thread in threads:
            thread.worker.end()
        ended = [thread.stop(max(0.0, deadline - self._clock.monotonic())) for thread in threads]
        if self._thread.is_alive():
            return False
        self._write_heartbeat(now=True)  # how it ended
        self._lease.release()
        return all(ended)

    def sinks(self) -> dict[str, SinkStats]:
        """How each sink stands; trouble with handing over is every sink's."""
        stats: dict[str, SinkStats] = {}
        for sink in self._urls:
            thread = self._runners.get(sink)
            if thread is not None:
                (stats[sink],) = thread.sinks().values()
            else:
                stats[sink] = DeliveryCounters().to_stats(State("standby", "its queue is not there yet"), "")
            problem = self._problem
            if problem and stats[sink].state.name in ("idle", "draining"):
                stats[sink] = stats[sink].as_degraded(problem)
        return stats

    def is_idle(self) -> bool:
        """Whether the last looks have found nothing left to hand over, nor to deliver to any of the sinks."""
        threads = [self._runners.get(sink) for sink in self._urls]
        if not self._all_fanned_out or not all(thread is not None and thread.is_idle() for thread in threads):
            return False
        try:
            return not any(self._directory.queue(sink).batch_names() for sink in self._urls)
        except OSError:
            return False

    def is_stopped(self) -> bool:
        """Whether nothing more is delivered until somebody mends the set-up: the other sinks have nothing to do."""
        threads = [self._runners.get(sink) for sink in self._urls]
        stuck = [thread is not None and thread.is_stopped() for thread in threads]
        return (
            self._all_fanned_out
            and any(stuck)
            and all(each or (thread is not None and thread.is_idle()) for each, thread in zip(stuck, threads, strict=True))
        )

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until other than `known_files` files are settled, at most `timeout` seconds."""
        deadline = self._clock.monotonic() + timeout
        while (left := deadline - self._clock.monotonic()) > 0 and not self._stopping.wait(min(left, _SETTLEMENT_POLL_S)):
            if sum(sink.flushed_files for sink in self.sinks().values()) != known_files:
                return

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._work.clear()
            wait = self._round()
            self._work.wait(wait)
        self._round()

    def _round(self) -> float:
        """Adopt and hand over, if that is this process's; seconds until the next round."""
        problem = ""
        wait_s = min(self._poll_interval_s, HEARTBEAT_INTERVAL_S)
        try:
            if self._lease.is_valid() or self._lease.acquire():
                self._recover_segments()
                self._fan_out.distribute(self._after_group)
                self._all_fanned_out = not self._directory.batch_names()
                if self._retention is not None:
                    self._retention.prune()
                problem = self._find_problem()
                wait_s = _LOCKED_RETRY_S if self._fan_out.waits_for_lock else wait_s
            else:
                wait_s = min(wait_s, _TAKEOVER_POLL_S)
            self._start_runners()
        except (OSError, FileUnusableError, DirectoryUnusableError) as error:
            problem = f"not handed over: {error}"
        except Exception as error:  # a defect must not end this thread: nothing would be delivered any more
            log.exception("%s: a defect in Pillarbox while files were handed over", self._directory.path)
            problem = f"not handed over: a defect in Pillarbox: {error}"
        self._log_problem(problem)
        self._write_heartbeat()
        return wait_s

    def _after_group(self) -> bool:
        """A group of files was handed over: deliver it, and let others see that this process lives; whether to go on."""
        self._start_runners()
        for thread in self._runners.values():
            thread.notify()
        self._write_heartbeat()
        return not self._stopping.is_set() or self._clock.monotonic() < self._fan_out_until

    def _write_heartbeat(self, *, now: bool = False) -> None:
        stands = combine_stats(self.sinks())
        self._lease.write_heartbeat(stands.state, stands.delivered, stands.last_error, now=now)

    def _recover_segments(self) -> None:
        now = self._clock.micros()
        adopted = recover(self._directory)
        self._ledger.add(
            *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
        )

    def _start_runners(self) -> None:
        """A thread for each sink whose queue is there, whoever has made it."""
        for queue in self._directory.queues() if len(self._runners) < len(self._urls) else ():
            if queue.sink in self._urls and queue.sink not in self._runners:
                thread = ThreadRunner(self._make_worker(queue))
                self._runners[queue.sink] = thread
                thread.start()

    def _find_problem(self) -> str:
        """With single files, or with queues that nobody delivers."""
        for name, why in self._fan_out.problems.items():
            return f"not handed over: {name}: {why}"
        for queue in self._directory.queues():
            if queue.sink not in self._urls and queue.batch_names():
                return (
                    f"{queue.path} fills: {queue.sink} is not among the sinks; name it, or pillarbox sinks remove {queue.sink}"
                )
        return ""

    def _log_problem(self, problem: str) -> None:
        if problem == self._problem:
            return
        if problem:
            log.error("%s: %s", self._directory.path, problem)
        else:
            log.info("%s: everything is handed over again", self._directory.path)
        self._problem = problem
