"""Shipments that are sent and not settled yet: one confirmation answers for all of them, a failed one has them sent again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.lease import BEAT_EVERY_S
from pillarbox.delivery.sender import is_being_cancelled, words
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Misconfigured, Retry, Sink, UnconfirmedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.delivery.fetcher import Loader
    from pillarbox.delivery.policy import Rules
    from pillarbox.delivery.shipment import Shipment

log = logging.getLogger("pillarbox")

NOT_YET_S: Final = 0.01  # before a sink that could confirm nothing yet is asked again
UNCONFIRMED_FILES_MAX: Final = 512  # where several are sent together; by itself each may be one of the sink's window


class Confirmer:
    """Asks a sink about what it was sent, and calls `settle(shipment)` for each of which it is sure, in order."""

    def __init__(self, sink: Sink, sink_name: str, rules: Rules, loader: Loader, settle: Callable[[Shipment], None]) -> None:
        self._sink = sink
        self._sink_name = sink_name
        self._rules = rules
        self._loader = loader
        self._settle = settle
        self._room = asyncio.Event()
        self._unconfirmed: deque[Shipment] = deque()
        self._files = 0  # of these
        self._asking: asyncio.Task[None] | None = None
        self._trouble: Misconfigured | Retry | None = None
        self.failures = 0  # confirmations in a row

    def begin(self) -> None:
        """Start afresh, on another event loop."""
        self._room = asyncio.Event()

    def cancel(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    def forget(self) -> None:
        """Let go of everything: it is sent again."""
        for shipment in self._unconfirmed:
            self._loader.close(shipment)
        self._unconfirmed.clear()
        self._files = 0
        self._asking = self._trouble = None

    @property
    def has_unconfirmed(self) -> bool:
        """Whether something is sent and not settled yet."""
        return bool(self._unconfirmed)

    def names(self) -> set[str]:
        """The files of all that is sent and not settled yet."""
        return {job.name for shipment in self._unconfirmed for job in shipment.jobs}

    def add(self, shipment: Shipment) -> None:
        """This was sent, and at least a part of it accepted."""
        self._unconfirmed.append(shipment)
        self._files += len(shipment.jobs)
        self._ask_soon()

    async def wait_for_room(self, window: int, meanwhile: Callable[[], None]) -> Misconfigured | Retry | None:
        """Wait until fewer shipments than `window` are unconfirmed; what was wrong, where some must be sent again.

        `meanwhile()` is called before each wait, of a second at most.
        """
        files_max = max(window, UNCONFIRMED_FILES_MAX // self._rules.max_in_flight)
        while len(self._unconfirmed) >= window or self._files >= files_max:
            self._ask_soon()
            self._room.clear()
            while not self._room.is_set():
                meanwhile()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), BEAT_EVERY_S)
        trouble, self._trouble = self._trouble, None
        return trouble

    def _ask_soon(self) -> None:
        if self._asking is not None and self._asking.done() and not self._asking.cancelled():
            self._asking.result()  # raises what has ended it
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Settle what is sent once the destination is sure of it; what it is not sure of is sent again."""
        try:
            while self._unconfirmed:
                group = list(self._unconfirmed)
                sure, trouble = await self._ask_once(group)
                if trouble is None:
                    for shipment in group[:sure]:
                        self._files -= len(shipment.jobs)
                        self._settle(shipment)
                        self._unconfirmed.popleft()
                    if sure:
                        self.failures = 0
                        self._room.set()
                    else:
                        await asyncio.sleep(NOT_YET_S)
                    continue
                for shipment in group:
                    self._unconfirmed.popleft()
                    self._files -= len(shipment.jobs)
                    self._loader.close(shipment)
                self._loader.forget()
                self.failures += 1
                self._trouble = trouble
                log.warning("%s: not confirmed, sent again: %d batches; %s", self._sink_name, len(group), trouble.reason)
        finally:
            self._room.set()  # whoever waits must not wait for a task that is no more

    async def _ask_once(self, group: list[Shipment]) -> tuple[int, Misconfigured | Retry | None]:
        try:
            async with asyncio.timeout(self._rules.call_timeout_s):
                sure = await self._sink.confirm([shipment.batch for shipment in group])
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            return 0, Retry("the sink cancelled its own call")
        except SinkUnusableError as error:
            return 0, Misconfigured(str(error))
        except UnconfirmedError as error:
            return 0, Retry(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return 0, Retry(words(error))
        if not isinstance(sure, int) or not 0 <= sure <= len(group):
            return 0, Misconfigured(f"the sink confirmed {sure!r:.100} of {len(group)} batches: mend the sink")
        return sure, None
