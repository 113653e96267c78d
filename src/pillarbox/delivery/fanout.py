"""The `Deliverer` of several sinks: a thread for each, and one that hands sealed files over to their queues.

Each sink has a lease of its own, in its queue, and so may be delivered by another process than its neighbour. Who holds the
lease of the directory itself hands over; as long as it does, nobody else takes what lies there for a single sink's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.deliverer import together
from pillarbox.delivery.lease import BEAT_EVERY_S, Lease
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.stats import DeliveryCounters, State
from pillarbox.store import layout
from pillarbox.store.reconciliation import AdoptedEntry

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

_TAKE_OVER_S: Final = 0.5  # between two looks whether the process that hands over is gone
_LOOK_S: Final = 0.01  # between two looks whether a file was settled
_AGAIN_S: Final = 0.05  # before a file that another process has is tried again


class Fleet:
    """Delivers a directory to several sinks. `make_worker(queue)` is called once a sink, when its queue is there."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        ledger: LedgerWriter,
        fan_out: FanOut,
        interval_s: float,
        urls: Mapping[str, str],
        make_worker: Callable[[Directory], Worker],
        durability: str = "",
        shelf: Retention | None = None,
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._clock = clock
        self._fan_out = fan_out
        self._interval_s = interval_s
        self._urls = urls  # of the sinks, without what is secret
        self._make_worker = make_worker
        self._shelf = shelf  # of the directory itself: what was kept while there was one sink
        self._lease = Lease(directory, ", ".join(urls), clock, durability)
        self._threads: dict[str, DeliveryThread] = {}
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._hands_over_until = 0.0
        self._trouble = ""
        self._handed_over = False  # all that was found
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
        self._hands_over_until = deadline - timeout / 2  # what is handed over is to be delivered, too
        self._stopping.set()
        self._work.set()
        with contextlib.suppress(RuntimeError):  # it has not begun
            self._thread.join(timeout)
        threads = list(self._threads.values())
        for thread in threads:
            thread.worker.end()
        ended = [thread.stop(max(0.0, deadline - self._clock.monotonic())) for thread in threads]
        if self._thread.is_alive():
            return False
        self._beat(now=True)  # how it ended
        self._lease.release()
        return all(ended)

    def sinks(self) -> dict[str, SinkStats]:
        """How each sink stands; trouble with handing over is every sink's."""
        found: dict[str, SinkStats] = {}
        for sink in self._urls:
            thread = self._threads.get(sink)
            if thread is not None:
                (found[sink],) = thread.sinks().values()
            else:
                found[sink] = DeliveryCounters().to_stats(State("standby", "its queue is not there yet"), "")
            trouble = self._trouble
            if trouble and found[sink].state.name in ("idle", "draining"):
                found[sink] = found[sink].as_degraded(trouble)
        return found

    def is_idle(self) -> bool:
        """Whether the last looks have found nothing left to hand over, nor to deliver to any of the sinks."""
        threads = [self._threads.get(sink) for sink in self._urls]
        if not self._handed_over or not all(thread is not None and thread.is_idle() for thread in threads):
            return False
        try:
            return not any(self._directory.queue(sink).batch_names() for sink in self._urls)
        except OSError:
            return False

    def is_stuck(self) -> bool:
        """Whether nothing more is delivered until somebody mends the set-up: the other sinks have nothing to do."""
        threads = [self._threads.get(sink) for sink in self._urls]
        stuck = [thread is not None and thread.is_stuck() for thread in threads]
        return (
            self._handed_over
            and any(stuck)
            and all(each or (thread is not None and thread.is_idle()) for each, thread in zip(stuck, threads, strict=True))
        )

    def wait_for_settlement(self, seen: int, timeout: float) -> None:
        """Wait until other than `seen` files are settled, at most `timeout` seconds."""
        deadline = self._clock.monotonic() + timeout
        while (left := deadline - self._clock.monotonic()) > 0 and not self._stopping.wait(min(left, _LOOK_S)):
            if sum(sink.flushed_files for sink in self.sinks().values()) != seen:
                return

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._work.clear()
            wait = self._round()
            self._work.wait(wait)
        self._round()

    def _round(self) -> float:
        """Adopt and hand over, if that is this process's; seconds until the next round."""
        trouble = ""
        wait = min(self._interval_s, BEAT_EVERY_S)
        try:
            if self._lease.is_good() or self._lease.take():
                self._adopt()
                self._fan_out.step(self._between)
                self._handed_over = not self._directory.batch_names()
                if self._shelf is not None:
                    self._shelf.prune()
                trouble = self._what_is_wrong()
                wait = _AGAIN_S if self._fan_out.has_to_wait else wait
            else:
                wait = min(wait, _TAKE_OVER_S)
            self._begin_to_deliver()
        except (OSError, FileUnusableError, DirectoryUnusableError) as error:
            trouble = f"not handed over: {error}"
        except Exception as error:  # a defect must not end this thread: nothing would be delivered any more
            log.exception("%s: a defect in Pillarbox while files were handed over", self._directory.path)
            trouble = f"not handed over: a defect in Pillarbox: {error}"
        self._report(trouble)
        self._beat()
        return wait

    def _between(self) -> bool:
        """A group of files was handed over: deliver it, and let others see that this process lives; whether to go on."""
        self._begin_to_deliver()
        for thread in self._threads.values():
            thread.notify()
        self._beat()
        return not self._stopping.is_set() or self._clock.monotonic() < self._hands_over_until

    def _beat(self, *, now: bool = False) -> None:
        stands = together(self.sinks())
        self._lease.beat(stands.state, stands.delivered, stands.last_error, now=now)

    def _adopt(self) -> None:
        now = self._clock.micros()
        adopted = self._directory.recover()
        self._ledger.add(
            *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
        )

    def _begin_to_deliver(self) -> None:
        """A thread for each sink whose queue is there, whoever has made it."""
        for queue in self._directory.queues() if len(self._threads) < len(self._urls) else ():
            if queue.sink in self._urls and queue.sink not in self._threads:
                thread = DeliveryThread(self._make_worker(queue))
                self._threads[queue.sink] = thread
                thread.start()

    def _what_is_wrong(self) -> str:
        """With single files, or with queues that nobody delivers."""
        for name, why in self._fan_out.trouble.items():
            return f"not handed over: {name}: {why}"
        for queue in self._directory.queues():
            if queue.sink not in self._urls and queue.batch_names():
                return (
                    f"{queue.path} fills: {queue.sink} is not among the sinks; name it, or pillarbox sinks remove {queue.sink}"
                )
        return ""

    def _report(self, trouble: str) -> None:
        if trouble == self._trouble:
            return
        if trouble:
            log.error("%s: %s", self._directory.path, trouble)
        else:
            log.info("%s: everything is handed over again", self._directory.path)
        self._trouble = trouble
