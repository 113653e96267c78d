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
from pillarbox.delivery.compactor import Compressor
from pillarbox.delivery.confirms import NOT_YET_S, Confirmer
from pillarbox.delivery.fetcher import Loader
from pillarbox.delivery.lease import BEAT_EVERY_S, Lease
from pillarbox.delivery.policy import Rules, Verdict
from pillarbox.delivery.retry import Suspects
from pillarbox.delivery.sender import Courier, is_being_cancelled, words
from pillarbox.delivery.settlement import GROUP_S, KEPT, NOBODY, Callbacks, Kept, Settler
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.delivery.status import Standing
from pillarbox.errors import FileUnusableError, SinkUnusableError
from pillarbox.sinks.base import Misconfigured, Sink
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.reconciliation import AdoptedEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.shipment import Shipment
    from pillarbox.stats import DeliveryCounters, State
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter

log = logging.getLogger("pillarbox")

_TAKE_OVER_S: Final = 0.5  # between two looks whether the process that delivers is gone
_PAUSE_S: Final = 0.1  # a shorter one is no time for anything else
_CLOSE_S: Final = 5.0  # how long a sink may take to hang up
_LOOK_SHARE: Final = 9  # times as long as a look in the middle of a drain takes, nobody looks again
_UNSETTLED_MAX: Final = 3  # settlements that fail in a row: not the files are at fault then, but the disk


class Ending(Exception):  # noqa: N818 - no error: it ends the loop from within a wait
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
        rules: Rules,
        counters: DeliveryCounters,
        callbacks: Callbacks = NOBODY,
        busy: Callable[[], bool] = lambda: False,
        durability: str = "",
        kept: Kept = KEPT,
        ledger: LedgerWriter | None = None,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._sink_name = sink_name
        self._clock = clock
        self._rules = rules
        self.counters = counters
        self._ledger = ledger
        self.lease = Lease(directory, sink_name, clock, durability)
        self._standing = Standing(sink_name, clock, counters, self.lease)
        self._suspects = Suspects(rules)
        self._courier = Courier(sink, clock, rules, counters, self._standing, self._suspects, self._pause, self._meanwhile)
        groups = ledger is not None and sink.capabilities.deduplicates_by != "nothing"
        self._settler = Settler(
            directory, clock, sink_name, rules, counters, self._standing, kept, ledger, callbacks, groups=groups
        )
        self._loader = Loader(directory, sink, clock, rules, self._standing, self._suspects, self._settler, busy)
        self._compressor: Compressor | None = None
        if rules.compress_after_s is not None:
            self._compressor = Compressor(directory, clock, rules.compress_after_s, self._remembers, callbacks.on_shrunk)
        self._confirmer = Confirmer(sink, sink_name, rules, self._loader, self._settle)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()  # there may be something to do
        self._end = asyncio.Event()
        self._is_told_to_end = False
        self._opened = False
        self._outages = 0
        self._looked_at = self._look_at = 0.0
        self._in_flight: dict[asyncio.Task[None], Shipment] = {}
        self.idle = threading.Event()  # set while a look at the directory has found nothing to do

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._standing.state

    @property
    def last_error(self) -> str:
        """What it last complained of."""
        return self._standing.last_error

    @property
    def settled(self) -> threading.Condition:
        """Notified after each group of settled files."""
        return self._settler.settled

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        self._call(self._look)

    def end(self) -> None:
        """Deliver what can be delivered without waiting, then return from `run`; from any thread."""
        self._is_told_to_end = True  # before it is looked whether there is a loop: who begins one looks afterwards
        self._call(self._finish)

    def _look(self) -> None:
        self._work.set()

    def _finish(self) -> None:
        self._end.set()

    def _call(self, function: Callable[[], None]) -> None:
        """Have the loop call something; where there is none, one that begins finds out by itself."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(function)

    async def run(self) -> None:
        """Deliver until `end` is called; may be run again, on another loop."""
        self._work, self._end = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._is_told_to_end:
            self._end.set()
        self._courier.begin()
        self._confirmer.begin()
        try:
            while await self._round():
                pass
        except Ending:
            pass
        finally:
            await self._hang_up()

    async def _hang_up(self) -> None:
        """Let go of everything, whatever ended the loop and whatever goes wrong with that."""
        try:
            await self._call_back()
        finally:
            try:
                self._let_go_of_all()
            finally:
                self._standing.beat(now=True)
                self.lease.release()
                try:
                    async with asyncio.timeout(_CLOSE_S):
                        await self._sink.close()  # also where `open` has failed: it may have come halfway
                except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
                    log.warning("%s: not closed properly: %s", self._sink_name, words(error))

    async def _call_back(self) -> None:
        """Have nothing under way any more; told to end, each call may still do so by itself."""
        self._confirmer.cancel()
        tasks = set(self._in_flight)
        if not tasks:
            return
        try:
            if self._end.is_set() and not is_being_cancelled():
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

    def _let_go_of_all(self) -> None:
        self._loader.forget()
        self._confirmer.forget()
        self._opened = False
        self._settler.finish()

    async def _round(self) -> bool:
        """Look once and deliver what is found; False when the worker is to end."""
        self._work.clear()
        try:
            if not self.lease.is_good() and not self.lease.take():
                self._standing.enter("standby", STANDBY_REASON)
                await self._pause(min(self._rules.interval_s, _TAKE_OVER_S))
                return True
            if await self._is_for_several() or (not self._opened and not await self._open()):
                return True
            self._adopt()
            self._line_up()
        except (OSError, FileUnusableError) as error:
            self._standing.enter("degraded", str(error))
            await self._pause(self._rules.interval_s)
            return True
        if await self._drain():
            return True
        if self._loader.backlog.has_more:  # the directory could not be listed any further
            await self._pause(self._rules.interval_s)
            return True
        if self._confirmer.has_unconfirmed:
            await self._sends_again(1)
            return True
        self._settler.finish()
        await self._rest()
        return True

    async def _is_for_several(self) -> bool:
        """Whether what lies here belongs to other sinks too, after a wait: this one would take it from them."""
        queues = self._directory.queues()
        if queues:
            names = ", ".join(queue.sink for queue in queues)
            way_out = "name all of them as sinks, or pillarbox sinks remove NAME"
            await self._hold(
                "stopped", f"the directory has queues of several sinks ({names}): {way_out}", self._rules.recheck_s
            )
        return bool(queues)

    async def _rest(self) -> None:
        """Nothing can be sent now."""
        unjudged = len(self._suspects.unjudged())
        if self._suspects.is_outage:
            await self._stop_for_outage()
        elif unjudged:
            what = f"refused as a whole, judged once another batch is accepted: {unjudged} so far; {self._suspects.reason()}"
            self._standing.enter("degraded", what)
        else:
            self._courier.caught_up()
            self._standing.well("idle")
            if not self._settler.has_parked:
                self.idle.set()
        await self._pause(self._rules.interval_s, until=self._work)

    def _adopt(self) -> None:
        adopted = self._directory.recover()
        if adopted:
            log.info("%s: adopted what a writer left that is gone", self._directory.path)
        if adopted and self._ledger is not None:
            now = self._clock.micros()
            self._ledger.add(
                *(AdoptedEntry(now, layout.batch_id(file.sealed_name), layout.writer_of(file.active_name)) for file in adopted)
            )

    def _choose(self, found: list[str]) -> list[str]:
        """Which of the sealed files to send now, in order."""
        there = set(found)
        # Of a part of a long backlog: what is remembered of files that are not in it.
        for name in (*self._loader.held, *self._settler.parked, *self._suspects.names(), *self._standing.complaints):
            if name not in there and self._loader.backlog.is_silent_on(name) and self._directory.contains(name):
                there.add(name)
        self._loader.keep_only(there)
        for name in set(self._standing.complaints) - there if self._standing.complaints else ():
            if layout.kind_of(name) is Kind.SEALED:
                self._standing.withdraw(name)
        self._suspects.keep_only(there)
        busy = self._settler.waiting(there)
        busy |= self._confirmer.names()
        return self._suspects.choose([name for name in found if name not in busy], self._clock.monotonic())

    def _line_up(self) -> None:
        """Look which files wait, and have them sent."""
        self._notice_outage()
        # Where the order is another than that of the names, all of them must be known.
        self._fill(self._loader.backlog.begin(whole=self._suspects.has_some or self._rules.live_share > 0))

    def _fill(self, found: list[str]) -> None:
        chosen = self._choose(found)
        if self._suspects.has_some:
            self._loader.lineup.fill_as_given(chosen)
        else:
            self._loader.lineup.fill(chosen)

    def _line_up_more(self) -> bool:
        """Have the next part of a long backlog sent; False where nothing is left to send in this round."""
        loader = self._loader
        while loader.backlog.has_more and not loader.has_more and not self._suspects.has_some:
            try:
                self._fill(loader.backlog.next())
            except (OSError, FileUnusableError) as error:
                self._standing.enter("degraded", str(error))
                break
        return loader.has_more

    def _notice_outage(self) -> None:
        if self._courier.outages != self._outages:
            self._outages = self._courier.outages
            self._loader.lineup.begin()

    def _look_for_live(self) -> None:
        """In the middle of a drain: what is sealed meanwhile may have a share in it. A tenth of the time goes into this."""
        began = self._clock.monotonic()
        if not self._rules.live_share or self._suspects.has_some or began < self._look_at:
            return
        if not self._work.is_set() and began < self._looked_at + self._rules.interval_s:
            return
        self._notice_outage()
        lineup = self._loader.lineup
        if lineup.is_settled:
            return
        self._work.clear()
        with contextlib.suppress(OSError, FileUnusableError):  # the next round says so
            lineup.add(self._loader.backlog.begin(whole=True))
        self._looked_at = self._clock.monotonic()
        self._look_at = self._looked_at + _LOOK_SHARE * (self._looked_at - began)

    async def _drain(self) -> bool:
        """Send what is queued; whether anything was sent."""
        progress = False
        self._looked_at = self._clock.monotonic()
        window = max(1, self._sink.capabilities.unconfirmed_max)
        at_once = self._rules.max_in_flight if self._sink.capabilities.concurrent else 1
        while self._loader.has_more or self._line_up_more():
            if await self._sends_again(window):
                await self._land(0)
                return True  # the queue is empty, and what was in it is on disk
            self._look_for_live()
            shipment = self._loader.next()
            if self._loader.waits_for_another():
                # Its turn comes before the others': a process that dies lets go of this file in a moment.
                if shipment is not None:
                    self._loader.close(shipment)
                self._loader.forget()
                await self._land(0)
                await self._pause(NOT_YET_S)
                return True
            if shipment is None:
                continue
            progress = True
            self.idle.clear()
            if self.state.name in ("idle", "standby"):
                self._standing.well("draining")
            if at_once == 1:
                await self._carry(shipment)
            else:
                self._in_flight[asyncio.create_task(self._carry(shipment))] = shipment
                await self._land(at_once - 1)
            if await self._has_to_wait():
                break
            self._standing.beat()
            if not self.lease.held:  # somebody has removed its file
                self._loader.forget()
                break
        await self._land(0)
        return progress

    async def _has_to_wait(self) -> bool:
        """Whether it makes no sense to go on with the queue, after a wait."""
        if self._suspects.is_outage:
            self._loader.forget()
            await self._land(0)
            if self._suspects.is_outage:  # one that was still under way may have been accepted
                await self._stop_for_outage()
            return True
        if self._settler.failures_in_row >= _UNSETTLED_MAX:
            self._loader.forget()
            await self._land(0)
            wait = self._rules.backoff.delay(self._settler.failures_in_row, jitter())
            self._standing.enter("waiting", self.last_error, wait)
            await self._pause(wait)
            return True
        return False

    async def _stop_for_outage(self) -> None:
        """Batch after batch is refused: not they are bad, but what is set up. One is tried each time, until one is accepted."""
        self.counters.failed_flushes += 1
        self._courier.failed()
        row = self._suspects.in_row() + self._suspects.condemned
        reason = f"{row} batches in a row were refused as a whole, and are kept: {self._suspects.reason()}"
        if self.state.name != "stopped":
            self._settler.finish()
        self._standing.enter("stopped", reason, self._rules.recheck_s)
        await self._pause(self._rules.recheck_s)

    async def _land(self, left: int) -> None:
        """Wait until at most so many shipments are on their way; raises what one of them has raised."""
        while len(self._in_flight) > left:
            done, _ = await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._in_flight[task]
            failed = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
            if failed:
                raise failed[0]

    async def _carry(self, shipment: Shipment) -> None:
        """Send a shipment and do what follows for its files."""
        try:
            verdict = await self._courier.send(shipment)
            if verdict is Verdict.FINAL:
                shipment.hand_out(self._sink_name)
        except BaseException:
            self._loader.close(shipment)
            raise
        if verdict is not Verdict.FINAL:
            self._put_off(shipment)
            return
        if shipment.refused and not shipment.accepted:
            self._suspects.condemn()
        if self._sink.capabilities.needs_confirmation and shipment.accepted:
            self._confirmer.add(shipment)
        else:
            self._settle(shipment)

    def _settle(self, shipment: Shipment) -> None:
        while shipment.jobs:
            job = shipment.jobs.pop(0)  # the settler's from here on, whatever happens
            self._suspects.forget(job.name)
            self._settler.settle(job)

    def _put_off(self, shipment: Shipment) -> None:
        """All of it was refused, which proves nothing yet."""
        self._loader.close(shipment)
        if len(shipment.jobs) > 1:
            self._suspects.alone.update(job.name for job in shipment.jobs)
            self._loader.forget()
            return
        refusal, _ = next(iter(shipment.refused.values()))
        reason = f"{refusal.code}: {refusal.reason}"
        self._suspects.put_off(shipment.jobs[0].name, reason, shipment.history(), self._clock.monotonic())

    def _meanwhile(self) -> None:
        """While a shipment is on its way: let go of what is due, and read and prepare the next."""
        self._settler.let_go_in_time()
        self._standing.beat()
        if self.state.name in ("waiting", "stopped"):  # until it accepts something, this call is one more that may hang
            self._compress()
        self._loader.read_ahead()

    # Waiting.

    async def _sends_again(self, window: int) -> bool:
        """Wait until fewer shipments than `unconfirmed_max` are unconfirmed; whether some must be sent again."""
        trouble = await self._confirmer.wait_for_room(window, self._while_waiting)
        if isinstance(trouble, Misconfigured):
            await self._hold("stopped", trouble.reason, self._rules.recheck_s)
        elif trouble is not None:
            await self._hold("waiting", trouble.reason, self._rules.backoff.delay(self._confirmer.failures, jitter()))
        return trouble is not None

    def _while_waiting(self) -> None:
        self._settler.let_go()
        self._standing.beat()

    def _compress(self) -> float:
        """Make what waits smaller, one file; seconds until there may be another one to do."""
        if self._compressor is None or not self.lease.held:
            return math.inf
        done, rest = self._compressor.work()
        if done:
            self._loader.forget()  # it has the old name, perhaps
        return rest

    def _remembers(self, name: str) -> bool:
        """Whether something is known of a file that would be lost with its name."""
        return self._suspects.knows(name) or self._settler.is_parked(name) or name in self._standing.complaints

    async def _open(self) -> bool:
        opening = asyncio.ensure_future(self._sink.open())
        try:
            async with asyncio.timeout(self._rules.call_timeout_s):
                while not opening.done():
                    await asyncio.wait({opening}, timeout=BEAT_EVERY_S)
                    self._standing.beat()
                await opening
        except SinkUnusableError as error:
            await self._hold("stopped", str(error), self._rules.recheck_s)
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            await self._hold("waiting", words(error), self._rules.backoff.max_s)
        else:
            self._opened = True
        finally:
            opening.cancel()
        return self._opened

    async def _hold(self, name: Literal["stopped", "waiting"], reason: str, seconds: float) -> None:
        self.counters.failed_flushes += 1
        self._courier.failed()
        self._standing.enter(name, reason, seconds)
        await self._pause(seconds)

    async def _pause(self, seconds: float, until: asyncio.Event | None = None) -> None:
        """Wait for `seconds` or for an event, beating meanwhile. Raises `Ending` where the worker is told to end.

        Not where the event has come too: what was sealed just before the end can be delivered without waiting.
        """
        until = until or self._end
        deadline = self._clock.monotonic() + seconds
        while not until.is_set() and not self._end.is_set() and (left := deadline - self._clock.monotonic()) > 0:
            if left < GROUP_S:
                self._settler.let_go_in_time()
            else:
                self._settler.let_go()
            self._standing.beat()
            rest = self._compress() if left > _PAUSE_S else left
            waits = [asyncio.ensure_future(event.wait()) for event in {until, self._end}]
            try:
                await asyncio.wait(waits, timeout=min(left, rest, BEAT_EVERY_S), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._end.is_set() and (until is self._end or not until.is_set()):
            raise Ending
