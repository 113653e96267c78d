"""Shipments that are sent and not settled yet: one confirmation answers for all of them, a failed one has them sent again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S
from pillarbox.delivery.sender import describe_error, is_being_cancelled
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Misconfigured, Retry, Sink, UnconfirmedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.delivery.fetcher import Fetcher
    from pillarbox.delivery.policy import DeliveryConfig
    from pillarbox.delivery.request import SendRequest

log = logging.getLogger("pillarbox")

RECHECK_S: Final = 0.01  # before a sink that could confirm nothing yet is asked again
UNCONFIRMED_FILES_MAX: Final = 512  # where several are sent together; by itself each may be one of the sink's window


class Confirmer:
    """Asks a sink about what it was sent, and calls `settle(shipment)` for each of which it is sure, in order."""

    def __init__(
        self, sink: Sink, sink_name: str, config: DeliveryConfig, fetcher: Fetcher, settle: Callable[[SendRequest], None]
    ) -> None:
        self._sink = sink
        self._sink_name = sink_name
        self._config = config
        self._fetcher = fetcher
        self._settle = settle
        self._room_free = asyncio.Event()
        self._unconfirmed: deque[SendRequest] = deque()
        self._unconfirmed_files = 0  # of these
        self._confirm_task: asyncio.Task[None] | None = None
        self._problem: Misconfigured | Retry | None = None
        self.failures = 0  # confirmations in a row

    def start_loop(self) -> None:
        """Start afresh, on another event loop."""
        self._room_free = asyncio.Event()

    def stop_asking(self) -> None:
        """Ask no more."""
        if self._confirm_task is not None:
            self._confirm_task.cancel()

    def drop_unconfirmed(self) -> None:
        """Let go of everything: it is sent again."""
        for shipment in self._unconfirmed:
            self._fetcher.close_request(shipment)
        self._unconfirmed.clear()
        self._unconfirmed_files = 0
        self._confirm_task = self._problem = None

    @property
    def has_unconfirmed(self) -> bool:
        """Whether something is sent and not settled yet."""
        return bool(self._unconfirmed)

    def unconfirmed_names(self) -> set[str]:
        """The files of all that is sent and not settled yet."""
        return {job.name for shipment in self._unconfirmed for job in shipment.files}

    def add_sent(self, request: SendRequest) -> None:
        """This was sent, and at least a part of it accepted."""
        self._unconfirmed.append(request)
        self._unconfirmed_files += len(request.files)
        self._ensure_asking()

    async def wait_for_room(self, window: int, meanwhile: Callable[[], None]) -> Misconfigured | Retry | None:
        """Wait until fewer shipments than `window` are unconfirmed; what was wrong, where some must be sent again.

        `meanwhile()` is called before each wait, of a second at most.
        """
        files_max = max(window, UNCONFIRMED_FILES_MAX // self._config.max_in_flight)
        while len(self._unconfirmed) >= window or self._unconfirmed_files >= files_max:
            self._ensure_asking()
            self._room_free.clear()
            while not self._room_free.is_set():
                meanwhile()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room_free.wait(), HEARTBEAT_INTERVAL_S)
        problem, self._problem = self._problem, None
        return problem

    def _ensure_asking(self) -> None:
        if self._confirm_task is not None and self._confirm_task.done() and not self._confirm_task.cancelled():
            self._confirm_task.result()  # raises what has ended it
        if self._confirm_task is None or self._confirm_task.done():
            self._confirm_task = asyncio.create_task(self._confirm_all())

    async def _confirm_all(self) -> None:
        """Settle what is sent once the destination is sure of it; what it is not sure of is sent again."""
        try:
            while self._unconfirmed:
                group = list(self._unconfirmed)
                confirmed, problem = await self._ask_sink(group)
                if problem is None:
                    for request in group[:confirmed]:
                        self._unconfirmed_files -= len(request.files)
                        self._settle(request)
                        self._unconfirmed.popleft()
                    if confirmed:
                        self.failures = 0
                        self._room_free.set()
                    else:
                        await asyncio.sleep(RECHECK_S)
                    continue
                for request in group:
                    self._unconfirmed.popleft()
                    self._unconfirmed_files -= len(request.files)
                    self._fetcher.close_request(request)
                self._fetcher.drop_pending()
                self.failures += 1
                self._problem = problem
                log.warning("%s: not confirmed, sent again: %d batches; %s", self._sink_name, len(group), problem.reason)
        finally:
            self._room_free.set()  # whoever waits must not wait for a task that is no more

    async def _ask_sink(self, group: list[SendRequest]) -> tuple[int, Misconfigured | Retry | None]:
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                confirmed = await self._sink.confirm([shipment.batch for shipment in group])
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
            return 0, Misconfigured(f"the sink confirmed {confirmed!r:.100} of {len(group)} batches: mend the sink")
        return confirmed, None
