"""Publisher confirms: batches that are sent and not settled yet, because the destination must confirm them first.

One confirmation answers for all batches sent before it. If it fails, all of them are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S
from pillarbox.delivery.sender import describe_error, is_being_cancelled
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Misconfigured, Retry, UnconfirmedError
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from pillarbox.delivery.batch import SentBatch
    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.fetcher import Fetcher
    from pillarbox.delivery.housekeeping import Housekeeping
    from pillarbox.delivery.settlement import Settler

log = logging.getLogger("pillarbox")

RECHECK_S: Final = 0.01  # pause before a sink that could not confirm anything yet is asked again
UNCONFIRMED_FILES_MAX: Final = 512  # limit if files are combined; otherwise the sink's window is the limit


class Confirmer:
    """Asks the sink which sent batches are confirmed, and hands these to the settler, in order."""

    def __init__(self, context: DeliveryContext, fetcher: Fetcher, settler: Settler, housekeeping: Housekeeping) -> None:
        self._sink = context.sink
        self._sink_name = context.sink_name
        self._config = context.config
        self._filesystem = context.directory.filesystem
        self._fetcher = fetcher
        self._settler = settler
        self._housekeeping = housekeeping
        self._room_free = asyncio.Event()
        self._unconfirmed: deque[SentBatch] = deque()
        self._unconfirmed_files = 0
        self._confirm_task: asyncio.Task[None] | None = None
        self._problem: Misconfigured | Retry | None = None
        self._state_log = StateLog(context.clock)
        self.failures = 0  # consecutive failed confirmations

    def start_loop(self) -> None:
        """Reset the state for the event loop that runs now."""
        self._room_free = asyncio.Event()

    def stop_asking(self) -> None:
        """Cancel the call to the sink."""
        if self._confirm_task is not None:
            self._confirm_task.cancel()

    def drop_unconfirmed(self) -> None:
        """Release all unconfirmed batches, so that they are sent again."""
        for sent in self._unconfirmed:
            sent.close_files(self._filesystem)
        self._unconfirmed.clear()
        self._unconfirmed_files = 0
        self._confirm_task = self._problem = None

    @property
    def has_unconfirmed(self) -> bool:
        """Whether any batch is sent and not confirmed."""
        return bool(self._unconfirmed)

    def unconfirmed_names(self) -> set[str]:
        """The files of all unconfirmed batches."""
        return {delivered.file.name for sent in self._unconfirmed for delivered in sent.files}

    def add_sent(self, sent: SentBatch) -> None:
        """Add a batch of which at least a part was accepted."""
        self._unconfirmed.append(sent)
        self._unconfirmed_files += sent.file_count
        self._ensure_asking()

    async def wait_for_room(self, window: int) -> Misconfigured | Retry | None:
        """Wait until fewer than `window` batches are unconfirmed; return the problem if some must be sent again."""
        files_max = max(window, UNCONFIRMED_FILES_MAX // self._config.max_in_flight)
        while len(self._unconfirmed) >= window or self._unconfirmed_files >= files_max:
            self._ensure_asking()
            self._room_free.clear()
            while not self._room_free.is_set():
                self._housekeeping.while_unconfirmed()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room_free.wait(), HEARTBEAT_INTERVAL_S)
        problem, self._problem = self._problem, None
        return problem

    def _ensure_asking(self) -> None:
        task = self._confirm_task
        if task is not None and task.done() and not task.cancelled():
            task.result()  # raises what ended it
        if task is None or task.done():
            self._confirm_task = asyncio.create_task(self._confirm_all())

    async def _confirm_all(self) -> None:
        """Settle batches once the destination confirms them; have the others sent again if it fails to."""
        try:
            while self._unconfirmed:
                group = list(self._unconfirmed)
                confirmed, problem = await self._ask_sink(group)
                if problem is not None:
                    self._drop_group(group, problem)
                    continue
                if confirmed:
                    self._state_log.is_over()
                for sent in group[:confirmed]:
                    self._unconfirmed_files -= sent.file_count
                    self._settler.settle_batch(sent)
                    self._unconfirmed.popleft()
                if confirmed:
                    self.failures = 0
                    self._room_free.set()
                else:
                    await asyncio.sleep(RECHECK_S)
        finally:
            self._room_free.set()  # nobody must wait for a task that has ended

    def _drop_group(self, group: list[SentBatch], problem: Misconfigured | Retry) -> None:
        for sent in group:
            self._unconfirmed.popleft()
            self._unconfirmed_files -= sent.file_count
            sent.was_dropped = True
            sent.close_files(self._filesystem)
        self._fetcher.drop_pending()
        self.failures += 1
        self._problem = problem
        batches = "1 batch was" if len(group) == 1 else f"{len(group)} batches were"
        if self._state_log.is_new_problem(problem.reason):
            log.warning("%s: %s not confirmed and will be sent again: %s", self._sink_name, batches, problem.reason)

    async def _ask_sink(self, group: list[SentBatch]) -> tuple[int, Misconfigured | Retry | None]:
        """Ask how many of these batches, counted from the first, are confirmed; return the number or the problem."""
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                confirmed = await self._sink.confirm([sent.batch for sent in group])
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            return 0, Retry("the sink cancelled its own call")
        except SinkUnusableError as error:
            return 0, Misconfigured(str(error))
        except UnconfirmedError as error:
            return 0, Retry(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return 0, Retry(describe_error(error))
        if not isinstance(confirmed, int) or not 0 <= confirmed <= len(group):
            return 0, Misconfigured(f"the sink confirmed {confirmed!r:.100} of {len(group)} batches; fix the sink")
        return confirmed, None
