"""The loop that delivers: takes sealed files in order, sends them, and has them settled once the destination is sure.

Decisions are `policy`'s, files are read by `loading`, calls are the `courier`'s, what becomes of a delivered file is the
`settlement`'s. With a sink whose acceptance needs `confirming`, up to `capabilities.unconfirmed_max` shipments are sent and not
yet settled. With `max_in_flight` several are on their way at once, where the sink takes them; each is settled by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from typing import TYPE_CHECKING, Final, Literal

from pillarbox.delivery.backoff import jitter
from pillarbox.delivery.compactor import Compactor
from pillarbox.delivery.confirms import RECHECK_S, Confirmer
from pillarbox.delivery.fetcher import Fetcher
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S, Lease
from pillarbox.delivery.policy import DeliveryConfig, Verdict
from pillarbox.delivery.retry import PoisonTracker
from pillarbox.delivery.sender import Sender, describe_error, is_being_cancelled
from pillarbox.delivery.settlement import DEFAULT_LIMITS, GROUP_S, NO_CALLBACKS, DeliveryCallbacks, SettlementLimits, Settler
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.delivery.status import StatusReporter
from pillarbox.errors import FileUnusableError, SinkUnusableError
from pillarbox.sinks.base import Misconfigured, Sink
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import AdoptedEntry
from pillarbox.store.recovery import recover

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.request import SendRequest
    from pillarbox.stats import DeliveryCounters, State
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter

log = logging.getLogger("pillarbox")

_TAKEOVER_POLL_S: Final = 0.5  # between two looks whether the process that delivers is gone
_COMPACT_MIN_PAUSE_S: Final = 0.1  # a shorter one is no time for anything else
_CLOSE_TIMEOUT_S: Final = 5.0  # how long a sink may take to hang up
_LIST_TIME_FACTOR: Final = 9  # times as long as a look in the middle of a drain takes, nobody looks again
_FAILED_SETTLEMENTS_MAX: Final = 3  # settlements that fail in a row: not the files are at fault then, but the disk


class WorkerEnding(Exception):  # noqa: N818 - no error: it ends the loop from within a wait
    """The worker is told to end and would have to wait."""


class Worker:
    """Delivers a directory to one sink for as long as this process holds the lease.

    Everything but `notify`, `end` and the attributes without an underscore belongs to the event loop that `run` is on.
    """

    def __init__(
        self,
        directory: Directory,
        sink: Sink,
        sink_name: str,
        clock: Clock,
        config: DeliveryConfig,
        counters: DeliveryCounters,
        callbacks: DeliveryCallbacks = NO_CALLBACKS,
        is_busy: Callable[[], bool] = lambda: False,
        durability: str = "",
        limits: SettlementLimits = DEFAULT_LIMITS,
        ledger: LedgerWriter | None = None,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._sink_name = sink_name
        self._clock = clock
        self._config = config
        self.counters = counters
        self._ledger = ledger
        self.lease = Lease(directory, sink_name, clock, durability)
        self._status = StatusReporter(sink_name, clock, counters, self.lease)
        self._poison_tracker = PoisonTracker(config)
        self._sender = Sender(sink, clock, config, counters, self._status, self._poison_tracker, self._pause, self._during_call)
        groups = ledger is not None and sink.capabilities.deduplicates_by != "nothing"
        self._settler = Settler(
            directory, clock, sink_name, config, counters, self._status, limits, ledger, callbacks, uses_groups=groups
        )
        self._fetcher = Fetcher(directory, sink, clock, config, self._status, self._poison_tracker, self._settler, is_busy)
        self._compactor: Compactor | None = None
        if config.compress_after_s is not None:
            self._compactor = Compactor(directory, clock, config.compress_after_s, self._is_tracked, callbacks.on_bytes_saved)
        self._confirmer = Confirmer(sink, sink_name, config, self._fetcher, self._settle_request)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work_event = asyncio.Event()  # there may be something to do
        self._end_event = asyncio.Event()
        self._end_requested = False
        self._opened = False
        self._known_outages = 0
        self._listed_at = self._list_after = 0.0
        self._in_flight: dict[asyncio.Task[None], SendRequest] = {}
        self.idle = threading.Event()  # set while a look at the directory has found nothing to do

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._status.state

    @property
    def last_error(self) -> str:
        """What it last complained of."""
        return self._status.last_error

    @property
    def settlement_done(self) -> threading.Condition:
        """Notified after each group of settled files."""
        return self._settler.settlement_done

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        self._call_in_loop(self._set_work)

    def end(self) -> None:
        """Deliver what can be delivered without waiting, then return from `run`; from any thread."""
        self._end_requested = True  # before it is looked whether there is a loop: who begins one looks afterwards
        self._call_in_loop(self._set_end)

    def _set_work(self) -> None:
        self._work_event.set()

    def _set_end(self) -> None:
        self._end_event.set()

    def _call_in_loop(self, function: Callable[[], None]) -> None:
        """Have the loop call something; where there is none, one that begins finds out by itself."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(function)

    async def run(self) -> None:
        """Deliver until `end` is called; may be run again, on another loop."""
        self._work_event, self._end_event = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._end_requested:
            self._end_event.set()
        self._sender.start_loop()
        self._confirmer.start_loop()
        try:
            while await self._run_once():
                pass
        except WorkerEnding:
            pass
        finally:
            await self._close_all()

    async def _close_all(self) -> None:
        """Let go of everything, whatever ended the loop and whatever goes wrong with that."""
        try:
            await self._cancel_calls()
        finally:
            try:
                self._release_all()
            finally:
                self._status.heartbeat(now=True)
                self.lease.release()
                try:
                    async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                        await self._sink.close()  # also where `open` has failed: it may have come halfway
                except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
                    log.warning("%s: not closed properly: %s", self._sink_name, describe_error(error))

    async def _cancel_calls(self) -> None:
        """Have nothing under way any more; told to end, each call may still do so by itself."""
        self._confirmer.stop_asking()
        tasks = set(self._in_flight)
        if not tasks:
            return
        try:
            if self._end_event.is_set() and not is_being_cancelled():
                await asyncio.wait(tasks)
        finally:
            await asyncio.sleep(0)  # each has begun then, and closes its files
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # it has closed its files; the reason for all of this is another
            self._in_flight.clear()

    def _release_all(self) -> None:
        self._fetcher.drop_pending()
        self._confirmer.drop_unconfirmed()
        self._opened = False
        self._settler.flush_all()

    async def _run_once(self) -> bool:
        """Look once and deliver what is found; False when the worker is to end."""
        self._work_event.clear()
        try:
            if not self.lease.is_valid() and not self.lease.acquire():
                self._status.transition("standby", STANDBY_REASON)
                await self._pause(min(self._config.poll_interval_s, _TAKEOVER_POLL_S))
                return True
            if await self._belongs_to_queues() or (not self._opened and not await self._open_sink()):
                return True
            self._recover_segments()
            self._schedule_first()
        except (OSError, FileUnusableError) as error:
            self._status.transition("degraded", str(error))
            await self._pause(self._config.poll_interval_s)
            return True
        if await self._drain():
            return True
        if self._fetcher.lister.has_more:  # the directory could not be listed any further
            await self._pause(self._config.poll_interval_s)
            return True
        if self._confirmer.has_unconfirmed:
            await self._wait_for_confirms(1)
            return True
        self._settler.flush_all()
        await self._rest()
        return True

    async def _belongs_to_queues(self) -> bool:
        """Whether what lies here belongs to other sinks too, after a wait: this one would take it from them."""
        queues = self._directory.queues()
        if queues:
            names = ", ".join(queue.sink for queue in queues)
            way_out = "name all of them as sinks, or pillarbox sinks remove NAME"
            await self._hold_delivery(
                "stopped", f"the directory has queues of several sinks ({names}): {way_out}", self._config.recheck_s
            )
        return bool(queues)

    async def _rest(self) -> None:
        """Nothing can be sent now."""
        unjudged = len(self._poison_tracker.undecided())
        if self._poison_tracker.is_circuit_open:
            await self._stop_delivery()
        elif unjudged:
            reason = self._poison_tracker.last_reason()
            what = f"refused as a whole, judged once another batch is accepted: {unjudged} so far; {reason}"
            self._status.transition("degraded", what)
        else:
            self._sender.note_drained()
            self._status.set_healthy("idle")
            if not self._settler.has_held_files:
                self.idle.set()
        await self._pause(self._config.poll_interval_s, until=self._work_event)

    def _recover_segments(self) -> None:
        adopted = recover(self._directory)
        if adopted:
            log.info("%s: adopted what a writer left that is gone", self._directory.path)
        if adopted and self._ledger is not None:
            now = self._clock.micros()
            self._ledger.add(
                *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
            )

    def _select_batches(self, names: list[str]) -> list[str]:
        """Which of the sealed files to send now, in order."""
        existing = set(names)
        # Of a part of a long backlog: what is remembered of files that are not in it.
        for name in (
            *self._fetcher.locked_elsewhere,
            *self._settler.held_names,
            *self._poison_tracker.tracked_names(),
            *self._status.warnings,
        ):
            if name not in existing and self._fetcher.lister.is_outside_page(name) and self._directory.contains(name):
                existing.add(name)
        self._fetcher.forget_missing(existing)
        for name in set(self._status.warnings) - existing if self._status.warnings else ():
            if layout.kind_of(name) is Kind.SEALED:
                self._status.clear_warning(name)
        self._poison_tracker.forget_missing(existing)
        busy = self._settler.unavailable(existing)
        busy |= self._confirmer.unconfirmed_names()
        return self._poison_tracker.select_batches([name for name in names if name not in busy], self._clock.monotonic())

    def _schedule_first(self) -> None:
        """Look which files wait, and have them sent."""
        self._note_outage()
        # Where the order is another than that of the names, all of them must be known.
        self._schedule(
            self._fetcher.lister.list_first_page(everything=self._poison_tracker.has_deferred or self._config.live_share > 0)
        )

    def _schedule(self, names: list[str]) -> None:
        chosen = self._select_batches(names)
        if self._poison_tracker.has_deferred:
            self._fetcher.scheduler.schedule_in_order(chosen)
        else:
            self._fetcher.scheduler.schedule(chosen)

    def _schedule_more(self) -> bool:
        """Have the next part of a long backlog sent; False where nothing is left to send in this round."""
        loader = self._fetcher
        while loader.lister.has_more and not loader.has_more and not self._poison_tracker.has_deferred:
            try:
                self._schedule(loader.lister.list_next_page())
            except (OSError, FileUnusableError) as error:
                self._status.transition("degraded", str(error))
                break
        return loader.has_more

    def _note_outage(self) -> None:
        if self._sender.outages != self._known_outages:
            self._known_outages = self._sender.outages
            self._fetcher.scheduler.start_backlog()

    def _schedule_live(self) -> None:
        """In the middle of a drain: what is sealed meanwhile may have a share in it. A tenth of the time goes into this."""
        began = self._clock.monotonic()
        if not self._config.live_share or self._poison_tracker.has_deferred or began < self._list_after:
            return
        if not self._work_event.is_set() and began < self._listed_at + self._config.poll_interval_s:
            return
        self._note_outage()
        lineup = self._fetcher.scheduler
        if lineup.is_backlog_done:
            return
        self._work_event.clear()
        with contextlib.suppress(OSError, FileUnusableError):  # the next round says so
            lineup.add_live(self._fetcher.lister.list_first_page(everything=True))
        self._listed_at = self._clock.monotonic()
        self._list_after = self._listed_at + _LIST_TIME_FACTOR * (self._listed_at - began)

    async def _drain(self) -> bool:
        """Send what is queued; whether anything was sent."""
        progress = False
        self._listed_at = self._clock.monotonic()
        window = max(1, self._sink.capabilities.unconfirmed_max)
        max_in_flight = self._config.max_in_flight if self._sink.capabilities.concurrent else 1
        while self._fetcher.has_more or self._schedule_more():
            if await self._wait_for_confirms(window):
                await self._await_calls(0)
                return True  # the queue is empty, and what was in it is on disk
            self._schedule_live()
            request = self._fetcher.next_request()
            if self._fetcher.waits_for_lock():
                # Its turn comes before the others': a process that dies lets go of this file in a moment.
                if request is not None:
                    self._fetcher.close_request(request)
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
            if await self._has_to_wait():
                break
            self._status.heartbeat()
            if not self.lease.is_held:  # somebody has removed its file
                self._fetcher.drop_pending()
                break
        await self._await_calls(0)
        return progress

    async def _has_to_wait(self) -> bool:
        """Whether it makes no sense to go on with the queue, after a wait."""
        if self._poison_tracker.is_circuit_open:
            self._fetcher.drop_pending()
            await self._await_calls(0)
            if self._poison_tracker.is_circuit_open:  # one that was still under way may have been accepted
                await self._stop_delivery()
            return True
        if self._settler.failures_in_row >= _FAILED_SETTLEMENTS_MAX:
            self._fetcher.drop_pending()
            await self._await_calls(0)
            wait = self._config.backoff.delay(self._settler.failures_in_row, jitter())
            self._status.transition("waiting", self.last_error, wait)
            await self._pause(wait)
            return True
        return False

    async def _stop_delivery(self) -> None:
        """Batch after batch is refused: not they are bad, but what is set up. One is tried each time, until one is accepted."""
        self.counters.failed_flushes += 1
        self._sender.note_unreachable()
        row = self._poison_tracker.rejected_in_row() + self._poison_tracker.dead_lettered_batches
        reason = f"{row} batches in a row were refused as a whole, and are kept: {self._poison_tracker.last_reason()}"
        if self.state.name != "stopped":
            self._settler.flush_all()
        self._status.transition("stopped", reason, self._config.recheck_s)
        await self._pause(self._config.recheck_s)

    async def _await_calls(self, remaining: int) -> None:
        """Wait until at most so many shipments are on their way; raises what one of them has raised."""
        while len(self._in_flight) > remaining:
            done, _ = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._in_flight[task]
            failed = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
            if failed:
                raise failed[0]

    async def _deliver_request(self, request: SendRequest) -> None:
        """Send a shipment and do what follows for its files."""
        try:
            verdict = await self._sender.send(request)
            if verdict is Verdict.FINAL:
                request.assign_results(self._sink_name)
        except BaseException:
            self._fetcher.close_request(request)
            raise
        if verdict is not Verdict.FINAL:
            self._defer_request(request)
            return
        if request.rejected and not request.accepted:
            self._poison_tracker.note_dead_lettered()
        if self._sink.capabilities.needs_confirmation and request.accepted:
            self._confirmer.add_sent(request)
        else:
            self._settle_request(request)

    def _settle_request(self, request: SendRequest) -> None:
        while request.files:
            file = request.files.pop(0)  # the settler's from here on, whatever happens
            self._poison_tracker.forget_batch(file.name)
            self._settler.settle_file(file)

    def _defer_request(self, request: SendRequest) -> None:
        """All of it was refused, which proves nothing yet."""
        self._fetcher.close_request(request)
        if len(request.files) > 1:
            self._poison_tracker.send_alone.update(job.name for job in request.files)
            self._fetcher.drop_pending()
            return
        refusal, _ = next(iter(request.rejected.values()))
        reason = f"{refusal.code}: {refusal.reason}"
        self._poison_tracker.defer_batch(request.files[0].name, reason, request.attempt_history(), self._clock.monotonic())

    def _during_call(self) -> None:
        """While a shipment is on its way: let go of what is due, and read and prepare the next."""
        self._settler.flush_if_due()
        self._status.heartbeat()
        if self.state.name in ("waiting", "stopped"):  # until it accepts something, this call is one more that may hang
            self._compress_one()
        self._fetcher.prefetch()

    # Waiting.

    async def _wait_for_confirms(self, window: int) -> bool:
        """Wait until fewer shipments than `unconfirmed_max` are unconfirmed; whether some must be sent again."""
        trouble = await self._confirmer.wait_for_room(window, self._while_waiting)
        if isinstance(trouble, Misconfigured):
            await self._hold_delivery("stopped", trouble.reason, self._config.recheck_s)
        elif trouble is not None:
            await self._hold_delivery("waiting", trouble.reason, self._config.backoff.delay(self._confirmer.failures, jitter()))
        return trouble is not None

    def _while_waiting(self) -> None:
        self._settler.flush_group()
        self._status.heartbeat()

    def _compress_one(self) -> float:
        """Make what waits smaller, one file; seconds until there may be another one to do."""
        if self._compactor is None or not self.lease.is_held:
            return math.inf
        done, rest = self._compactor.compress_next()
        if done:
            self._fetcher.drop_pending()  # it has the old name, perhaps
        return rest

    def _is_tracked(self, name: str) -> bool:
        """Whether something is known of a file that would be lost with its name."""
        return self._poison_tracker.is_tracked(name) or self._settler.is_held(name) or name in self._status.warnings

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
            self._opened = True
        finally:
            opening.cancel()
        return self._opened

    async def _hold_delivery(self, name: Literal["stopped", "waiting"], reason: str, seconds: float) -> None:
        self.counters.failed_flushes += 1
        self._sender.note_unreachable()
        self._status.transition(name, reason, seconds)
        await self._pause(seconds)

    async def _pause(self, seconds: float, until: asyncio.Event | None = None) -> None:
        """Wait for `seconds` or for an event, beating meanwhile. Raises `WorkerEnding` where the worker is told to end.

        Not where the event has come too: what was sealed just before the end can be delivered without waiting.
        """
        until = until or self._end_event
        deadline = self._clock.monotonic() + seconds
        while not until.is_set() and not self._end_event.is_set() and (left := deadline - self._clock.monotonic()) > 0:
            if left < GROUP_S:
                self._settler.flush_if_due()
            else:
                self._settler.flush_group()
            self._status.heartbeat()
            rest = self._compress_one() if left > _COMPACT_MIN_PAUSE_S else left
            waits = [asyncio.ensure_future(event.wait()) for event in {until, self._end_event}]
            try:
                await asyncio.wait(waits, timeout=min(left, rest, HEARTBEAT_INTERVAL_S), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._end_event.is_set() and (until is self._end_event or not until.is_set()):
            raise WorkerEnding
