"""The loop that delivers one queue: fetch a request, send it, settle its files.

`Fetcher` says what to send, `Sender` sends it and returns a result, and the worker acts on the result: it settles the files,
has them confirmed first, or defers the batch. If the sink needs confirmations, up to `capabilities.unconfirmed_max` batches
are sent and not settled yet. With `max_in_flight`, several requests are in flight at a time, if the sink allows it; each is
settled by itself. All waiting goes through `Housekeeping`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final, Literal

from pillarbox.delivery.compactor import Compactor
from pillarbox.delivery.config import jitter
from pillarbox.delivery.confirms import RECHECK_S, Confirmer
from pillarbox.delivery.context import DeliveryContext
from pillarbox.delivery.fetcher import Fetcher
from pillarbox.delivery.housekeeping import Housekeeping
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S, STANDBY_REASON, Lease
from pillarbox.delivery.retry import PoisonTracker, Verdict
from pillarbox.delivery.sender import Sender, describe_error, is_being_cancelled
from pillarbox.delivery.settlement import NO_CALLBACKS, DeliveryCallbacks, Settler
from pillarbox.delivery.status import StatusReporter
from pillarbox.delivery.windowed import WindowedSender, WindowsEnd
from pillarbox.errors import FileUnusableError, SinkUnusableError
from pillarbox.sinks.base import Misconfigured
from pillarbox.stats import DeliveryCounters
from pillarbox.store import layout
from pillarbox.store.ledger import LOCKED_PROBLEM
from pillarbox.store.ledger_entries import AdoptedEntry
from pillarbox.store.queue_changes import remove_request_links
from pillarbox.store.recovery import recover
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.batch import SendRequest, SendResult, SentBatch
    from pillarbox.delivery.config import DeliveryConfig
    from pillarbox.delivery.context import NamedSink
    from pillarbox.stats import State
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter

log = logging.getLogger("pillarbox")

_TAKEOVER_POLL_S: Final = 0.5  # between two attempts to acquire the lease
_CLOSE_TIMEOUT_S: Final = 5.0  # for a sink to close
_LEDGER_RETRY_S: Final = 0.25  # while another process holds the ledger's lock
_FAILED_SETTLEMENTS_MAX: Final = 3  # consecutive errors after which the disk is at fault, not the files


class _Ending(Exception):  # noqa: N818 - no error: `_pause` raises it and `run` catches it
    """The worker must end and would have to wait."""


class Worker:
    """Delivers a directory to one sink for as long as this process holds the lease.

    `notify`, `end` and the public attributes may be used from any thread. Everything else belongs to the event loop of `run`.

    Args:
        directory: The outbox directory, or the queue of one of several sinks.
        sink: Where batches go, and its display name.
        clock: Where time comes from.
        config: The operator's settings.
        callbacks: Functions of the outbox or the command that the worker reports to.
        ledger: Where counts are written; None: nowhere.
        durability: Durability of the outbox in this process, for the heartbeat; empty if this process only delivers.
    """

    def __init__(
        self,
        directory: Directory,
        sink: NamedSink,
        clock: Clock,
        config: DeliveryConfig,
        callbacks: DeliveryCallbacks = NO_CALLBACKS,
        ledger: LedgerWriter | None = None,
        durability: str = "",
    ) -> None:
        self._directory = directory
        self._sink, self._sink_name = sink
        self._clock = clock
        self._config = config
        self._ledger = ledger
        self.counters = DeliveryCounters()
        self.lease = Lease(directory, self._sink_name, clock, durability)
        self._status = StatusReporter(self._sink_name, clock, self.counters, self.lease, directory.pending)
        context = DeliveryContext(
            directory, self._sink, self._sink_name, clock, config, self.counters, self.lease, self._status
        )
        self._poison_tracker = PoisonTracker(config)
        self._settler = Settler(context, self._poison_tracker, ledger, callbacks)
        self._fetcher = Fetcher(context, self._poison_tracker, self._settler, callbacks.is_busy)
        compactor = _build_compactor(context, self._poison_tracker, self._settler, callbacks)
        self._housekeeping = Housekeeping(context, self._settler, self._fetcher, compactor)
        self._sender = Sender(context, self._poison_tracker, self._housekeeping)
        self._confirmer = Confirmer(context, self._fetcher, self._settler, self._housekeeping)
        self._windowed_sender = WindowedSender(context, self._sender, self._settler, self._confirm_window)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()  # set when there may be something to do
        self._end_requested = False
        self._is_open = False
        self._is_prepared = False  # since this process has the lease
        self._known_outages = 0
        self._in_flight: dict[asyncio.Task[None], SendRequest] = {}
        self.idle = threads.Event()  # set while the last scan of the directory has found nothing to do

    @property
    def state(self) -> State:
        """The current state."""
        return self._status.state

    @property
    def last_error(self) -> str:
        """The last reason not to be healthy."""
        return self._status.last_error

    @property
    def settlement_done(self) -> threads.Condition:
        """Notified after each group of settled files."""
        return self._settler.settlement_done

    def notify(self) -> None:
        """Say that there may be something to do; from any thread."""
        self._call_in_loop(self._set_work)

    def end(self) -> None:
        """Deliver what needs no waiting, then return from `run`; may be called from any thread."""
        self._end_requested = True  # before the loop is looked up: `run` sets the loop first and reads this afterwards
        self._call_in_loop(self._set_end)

    def _set_work(self) -> None:
        self._work.set()  # looked up in the loop's thread: `run` replaces it

    def _set_end(self) -> None:
        self._housekeeping.end.set()

    def _call_in_loop(self, function: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(function)

    async def run(self) -> None:
        """Deliver until `end` is called; may be run again, on another loop."""
        self._work = asyncio.Event()
        self._housekeeping.start_loop()
        self._loop = asyncio.get_running_loop()
        if self._end_requested:
            self._housekeeping.end.set()
        self._sender.start_loop()
        self._confirmer.start_loop()
        try:
            while True:
                await self._run_once()
        except _Ending:
            pass
        finally:
            await self._close_all()

    async def _run_once(self) -> None:
        """Scan the directory once and deliver what is found."""
        self._work.clear()
        try:
            if not self.lease.is_valid() and not self.lease.acquire():
                self._is_prepared = False
                self._status.transition("standby", STANDBY_REASON)
                await self._pause(min(self._config.poll_interval_s, _TAKEOVER_POLL_S))
                return
            if not self._is_prepared:
                remove_request_links(self._directory)
                self._is_prepared = True
            if await self._belongs_to_queues() or (not self._is_open and not await self._open_sink()):
                return
            self._recover_segments()
            self._note_outage()
            self._fetcher.schedule_first_page(self._confirmer.unconfirmed_names())
        except (OSError, FileUnusableError) as error:
            self._status.transition("degraded", str(error))
            await self._pause(self._config.poll_interval_s)
            return
        if await self._drain():
            return
        if self._fetcher.has_more_pages:  # the next page could not be listed
            await self._pause(self._config.poll_interval_s)
        elif self._confirmer.has_unconfirmed:
            await self._wait_for_confirms(1)
        else:
            self._settler.flush_all()
            if not await self._wait_for_ledger():
                await self._rest()

    async def _belongs_to_queues(self) -> bool:
        """Whether the directory has queues; waits if so, because this worker must not deliver batches of several sinks."""
        queues = self._directory.queues()
        if queues:
            names = ", ".join(queue.sink for queue in queues)
            remedy = "name all of them in sinks, or remove one with pillarbox sinks remove NAME"
            reason = f"the directory has queues of several sinks ({names}): {remedy}"
            await self._hold_delivery("stopped", reason, self._config.recheck_s)
        return bool(queues)

    def _recover_segments(self) -> None:
        adopted = recover(self._directory)
        if not adopted:
            return
        files = "1 file" if len(adopted) == 1 else f"{len(adopted)} files"
        log.info("%s: recovered %s of a writer that has ended", self._directory.path, files)
        if self._ledger is not None:
            now = self._clock.micros()
            self._ledger.add(
                *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
            )
            self._ledger.write(sync=False)

    def _note_outage(self) -> None:
        """After an outage, make all pending batches the backlog."""
        if self._sender.outages != self._known_outages:
            self._known_outages = self._sender.outages
            self._fetcher.start_backlog()

    async def _rest(self) -> None:
        """Report that nothing can be sent now, and wait until there may be something to send."""
        undecided = len(self._poison_tracker.undecided())
        if self._poison_tracker.is_circuit_open:
            await self._stop_delivery()
        elif undecided:
            batches = "1 batch" if undecided == 1 else f"{undecided} batches"
            reason = self._poison_tracker.last_reason()
            self._status.transition(
                "degraded", f"{batches} wholly rejected; dead-lettering waits for the next accepted batch; {reason}"
            )
        else:
            self._sender.note_drained()
            self._status.set_healthy("idle")
            if not self._settler.has_held_files:
                self.idle.set()
        await self._pause(self._config.poll_interval_s, until=self._work)

    # Sending.

    async def _drain(self) -> bool:
        """Send the scheduled batches; return whether any was sent."""
        progress = False
        self._fetcher.start_drain()
        window = max(1, self._sink.capabilities.unconfirmed_max)
        max_in_flight = self._config.max_in_flight if self._sink.capabilities.concurrent else 1
        while self._fetcher.has_more or self._fetcher.schedule_next_pages(self._confirmer.unconfirmed_names()):
            if await self._wait_for_confirms(window):
                await self._await_calls(0)
                return True
            self._note_outage()
            self._fetcher.schedule_live(self._work)
            request = self._fetcher.next_request()
            if self._fetcher.waits_for_lock():
                # The file's turn is first, and if a dying process has locked it, the lock is released in a moment.
                if request is not None:
                    request.close_files(self._directory.filesystem)
                self._fetcher.drop_pending()
                await self._await_calls(0)
                await self._pause(RECHECK_S)
                return True
            if request is None:
                continue
            progress = True
            self.idle.clear()
            if self.state.name in ("idle", "standby"):
                self._status.set_healthy("draining")
            if max_in_flight == 1:
                await self._deliver_request(request)
            else:
                self._in_flight[asyncio.create_task(self._deliver_request(request))] = request
                await self._await_calls(max_in_flight - 1)
            if await self._must_pause():
                break
            self._status.heartbeat()
            if not self.lease.is_held:  # somebody has deleted its file
                self._fetcher.drop_pending()
                break
        await self._await_calls(0)
        return progress

    async def _deliver_request(self, request: SendRequest) -> None:
        """Send a request and act on the result."""
        if request.is_windowed:
            await self._deliver_windows(request)
            return
        try:
            result = await self._sender.send(request)
            sent = result.to_sent_batch(self._sink_name, self._clock.micros()) if result.verdict is Verdict.FINAL else None
        except BaseException:
            request.close_files(self._directory.filesystem)
            raise
        if result.verdict is None:
            request.close_files(self._directory.filesystem)
            raise _Ending
        if sent is None:
            self._defer_request(request, result)
        else:
            self._settle_sent(sent, result, rejected=bool(result.rejected and not result.accepted))

    async def _deliver_windows(self, request: SendRequest) -> None:
        """Send a file in windows and act on the result."""
        try:
            end, last, sent = await self._windowed_sender.send(request)
        except BaseException:
            request.close_files(self._directory.filesystem)
            raise
        if end is WindowsEnd.ENDING:
            request.close_files(self._directory.filesystem)
            raise _Ending
        if end is WindowsEnd.DEFERRED:
            self._defer_request(request, last)
        elif sent is not None:
            (delivered,) = sent.files
            self._settle_sent(sent, last, rejected=bool(delivered.dead_count and not delivered.accepted))

    def _settle_sent(self, sent: SentBatch, result: SendResult, *, rejected: bool) -> None:
        """Settle what was sent, or have it confirmed first. `rejected`: the destination has accepted none of it."""
        if rejected:
            self._poison_tracker.note_dead_lettered()
        if self._sink.capabilities.needs_confirmation and result.accepted:
            self._confirmer.add_sent(sent)
        else:
            self._settler.settle_batch(sent)

    async def _confirm_window(self, sent: SentBatch) -> bool:
        """Wait until a window is confirmed; False if its file must be sent again."""
        self._confirmer.add_sent(sent)
        await self._wait_for_confirms(1)
        return not sent.was_dropped

    def _defer_request(self, request: SendRequest, result: SendResult) -> None:
        """Defer a batch that was wholly rejected, which proves nothing yet."""
        request.close_files(self._directory.filesystem)
        if len(request.files) > 1:
            self._poison_tracker.send_alone.update(file.name for file in request.files)
            self._fetcher.drop_pending()
            return
        rejection, _ = next(iter(result.rejected.values()))
        reason = f"{rejection.code}: {rejection.reason}"
        self._poison_tracker.defer_batch(request.files[0].name, reason, result.history, self._clock.monotonic())

    async def _await_calls(self, remaining: int) -> None:
        """Wait until at most `remaining` requests are in flight. Raises the exception of one that has failed."""
        while len(self._in_flight) > remaining:
            done, _ = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._in_flight[task]
            failed = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
            if failed:
                raise failed[0]

    # Waiting.

    async def _must_pause(self) -> bool:
        """Whether the rest of the schedule must wait; returns after the wait."""
        if self._poison_tracker.is_circuit_open:
            self._fetcher.drop_pending()
            await self._await_calls(0)
            if self._poison_tracker.is_circuit_open:  # a request that was still in flight may have been accepted
                await self._stop_delivery()
            return True
        if self._settler.waits_for_ledger:
            self._fetcher.drop_pending()
            await self._await_calls(0)
            return await self._wait_for_ledger()
        if self._settler.failures_in_row >= _FAILED_SETTLEMENTS_MAX:
            self._fetcher.drop_pending()
            await self._await_calls(0)
            wait = self._config.backoff.delay(self._settler.failures_in_row, jitter())
            self._status.transition("waiting", self.last_error, wait)
            await self._pause(wait)
            return True
        return False

    async def _wait_for_ledger(self) -> bool:
        """Wait while another process holds the ledger's lock: delivered batches must be counted before they are deleted."""
        has_waited = self._settler.waits_for_ledger
        while self._settler.waits_for_ledger:
            self._status.transition("waiting", LOCKED_PROBLEM, _LEDGER_RETRY_S)
            await self._pause(_LEDGER_RETRY_S)
            self._settler.flush_group()
        if has_waited:
            self._status.set_healthy("draining")
        return has_waited

    async def _stop_delivery(self) -> None:
        """Report the open circuit breaker and wait. Each time one batch is tried, until one is accepted."""
        self.counters.failed_flushes += 1
        self._sender.note_unreachable()
        in_row = self._poison_tracker.rejected_in_row() + self._poison_tracker.dead_lettered_batches
        batches = "1 batch" if in_row == 1 else f"{in_row} consecutive batches"
        reason = f"{batches} wholly rejected; waiting batches are kept: {self._poison_tracker.last_reason()}"
        if self.state.name != "stopped":
            self._settler.flush_all()
        self._status.transition("stopped", reason, self._config.recheck_s)
        await self._pause(self._config.recheck_s)

    async def _wait_for_confirms(self, window: int) -> bool:
        """Wait until fewer than `window` batches are unconfirmed; return whether some must be sent again."""
        problem = await self._confirmer.wait_for_room(window)
        if isinstance(problem, Misconfigured):
            await self._hold_delivery("stopped", problem.reason, self._config.recheck_s)
        elif problem is not None:
            delay = self._config.backoff.delay(self._confirmer.failures, jitter())
            await self._hold_delivery("waiting", problem.reason, delay)
        return problem is not None

    async def _hold_delivery(self, name: Literal["stopped", "waiting"], reason: str, seconds: float) -> None:
        self.counters.failed_flushes += 1
        self._sender.note_unreachable()
        self._status.transition(name, reason, seconds)
        await self._pause(seconds)

    async def _pause(self, seconds: float, until: asyncio.Event | None = None) -> None:
        if not await self._housekeeping.wait(seconds, until):
            raise _Ending

    # Opening and closing.

    async def _open_sink(self) -> bool:
        opening = asyncio.ensure_future(self._sink.open())
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                while not opening.done():
                    await asyncio.wait({opening}, timeout=HEARTBEAT_INTERVAL_S)
                    self._status.heartbeat()
                await opening
        except SinkUnusableError as error:
            await self._hold_delivery("stopped", str(error), self._config.recheck_s)
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            await self._hold_delivery("waiting", describe_error(error), self._config.backoff.max_s)
        else:
            self._is_open = True
        finally:
            opening.cancel()
        return self._is_open

    async def _close_all(self) -> None:
        """Release files, lease and sink, even if one of these steps fails."""
        try:
            await self._finish_calls()
        finally:
            try:
                self._fetcher.drop_pending()
                self._confirmer.drop_unconfirmed()
                self._is_open = False
                self._settler.flush_all()
                self._settler.abandon_group()
            finally:
                self._status.heartbeat(now=True)
                self.lease.release()
                try:
                    async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                        await self._sink.close()  # also if `open` has failed, because it may have opened a part
                except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
                    log.warning("%s: closing the sink failed: %s", self._sink_name, describe_error(error))

    async def _finish_calls(self) -> None:
        """End all calls to the sink. If the worker was told to end, calls may finish first."""
        self._confirmer.stop_asking()
        tasks = set(self._in_flight)
        if not tasks:
            return
        try:
            if self._housekeeping.end.is_set() and not is_being_cancelled():
                await asyncio.wait(tasks)
        finally:
            await asyncio.sleep(0)  # so each has started, and closes its files
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # otherwise asyncio would log it; the exception that ended the loop is reported instead
            self._in_flight.clear()


def _build_compactor(
    context: DeliveryContext, poison_tracker: PoisonTracker, settler: Settler, callbacks: DeliveryCallbacks
) -> Compactor | None:
    """The compactor, if the settings ask for one. A batch of which something is remembered by name keeps its name."""
    after_s = context.config.compress_after_s
    if after_s is None:
        return None

    def is_in_use(name: str) -> bool:
        return poison_tracker.is_tracked(name) or settler.is_held(name) or name in context.status.warnings

    return Compactor(context.directory, context.clock, after_s, is_in_use, callbacks.on_bytes_saved)
