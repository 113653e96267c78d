"""The thread that a `Worker` lives in: its event loop, its start, its bounded end. The `Deliverer` of one sink."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.deliverer import ONLY_SINK

if TYPE_CHECKING:
    from pillarbox.delivery.worker import Worker
    from pillarbox.stats import SinkStats

log = logging.getLogger("pillarbox")

_RESTART_S: Final = 5.0  # after a defect of ours ended the worker
_CANCEL_GRACE_S: Final = 0.5  # for a call to the sink that `stop` has cancelled


class ThreadRunner:
    """Runs a worker until `stop`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="pillarbox-deliverer", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Deliver what can be delivered without waiting and end; what takes longer than `timeout` seconds stays on disk."""
        self._stopping.set()
        self.worker.end()
        with contextlib.suppress(RuntimeError):  # it has not begun
            self._thread.join(timeout)
        if self._thread.is_alive() and self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # it ended just now
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(_CANCEL_GRACE_S)
        return not self._thread.is_alive()

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        self.worker.notify()

    def sinks(self) -> dict[str, SinkStats]:
        """How the one sink stands."""
        worker = self.worker
        with worker.settlement_done:  # a file that is gone is counted
            return {ONLY_SINK: worker.counters.to_stats(worker.state, worker.last_error)}

    def is_idle(self) -> bool:
        """Whether the last look has found nothing left to do."""
        return self.worker.idle.is_set()

    def is_stopped(self) -> bool:
        """Whether nothing more is delivered until somebody mends the set-up."""
        return self.worker.state.name == "stopped"

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until other than `known_files` files are settled, at most `timeout` seconds."""
        with self.worker.settlement_done:
            self.worker.settlement_done.wait_for(lambda: self.worker.counters.flushed_files != known_files, timeout)

    def _run(self) -> None:
        while True:
            try:
                asyncio.run(self._run_worker())
            except (asyncio.CancelledError, Exception, SystemExit) as error:
                if isinstance(error, asyncio.CancelledError) and self._stopping.is_set():
                    return
                log.exception("delivery ended by a defect in Pillarbox or in a sink; it begins again in %g s", _RESTART_S)
            else:
                return
            if self._stopping.wait(_RESTART_S):
                return

    async def _run_worker(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        await self.worker.run()
