"""The loop that delivers: takes sealed files in order, sends them, and has them settled once the destination is sure.

Decisions are `policy`'s, calls the `courier`'s, what becomes of a delivered file the `settlement`'s. With a sink whose
acceptance needs confirming, up to `traits.window` shipments are sent and not yet settled, and one confirmation answers for all
of them. With `max_in_flight` several are on their way at once, where the sink takes them; each is settled by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, Literal

from pillarbox.clock import give_way
from pillarbox.delivery.backoff import jitter
from pillarbox.delivery.courier import Courier, is_being_cancelled, words
from pillarbox.delivery.lease import BEAT_EVERY_S, Lease
from pillarbox.delivery.policy import Rules, Verdict
from pillarbox.delivery.settlement import KEPT, NOBODY, Callbacks, Kept, Settler
from pillarbox.delivery.shipment import Job, Shipment
from pillarbox.delivery.standing import Standing
from pillarbox.delivery.suspects import Suspects
from pillarbox.errors import FileUnusable, SinkUnusable
from pillarbox.sinks.base import Misconfigured, Retry, Sink, Unconfirmed
from pillarbox.store import layout, reader
from pillarbox.store.balance import Adopted
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.state import State
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import Ledger
    from pillarbox.telemetry import DeliveryCounters

log = logging.getLogger("pillarbox")

_NOT_YET_S: Final = 0.01  # before a sink that could confirm nothing yet is asked again
_TAKE_OVER_S: Final = 0.5  # between two looks whether the process that delivers is gone
_HELD_S: Final = 1.0  # how long to wait for a file that another process has before the next one is sent
_CLOSE_S: Final = 5.0  # how long a sink may take to hang up
_UNSETTLED_MAX: Final = 3  # settlements that fail in a row: not the files are at fault then, but the disk
TOGETHER_RECORDS: Final = 500  # of small files that go out in one call, where the sink takes that: as many as a file has
TOGETHER_BYTES: Final = 1_000_000
TOGETHER_FILES: Final = 64  # each holds a descriptor
UNCONFIRMED_FILES_MAX: Final = 512  # where several are sent together; by itself each may be one of the sink's window
OPEN_FILES_MAX: Final = 256  # of all calls that are under way, and the one that is read ahead


class Ending(Exception):  # noqa: N818 - no error: it ends the loop from within a wait
    """The worker is told to end and would have to wait."""


class Worker:
    """Delivers a directory to one sink for as long as this process holds the lease.

    While `busy()`, the interpreter is given away often. Everything but `notify`, `end` and the attributes without an underscore
    belongs to the event loop that `run` is on.
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
        ledger: Ledger | None = None,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._sink_name = sink_name
        self._clock = clock
        self._rules = rules
        self.counters = counters
        self._busy = busy
        self._ledger = ledger
        self.lease = Lease(directory, sink_name, clock, durability)
        self._standing = Standing(sink_name, clock, counters, self.lease)
        self._suspects = Suspects(rules)
        self._courier = Courier(sink, clock, rules, counters, self._standing, self._suspects, self._pause, self._meanwhile)
        groups = ledger is not None and sink.traits.deduplicates_by != "nothing"
        self._settler = Settler(
            directory, clock, sink_name, rules, counters, self._standing, kept, ledger, callbacks, groups=groups
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()  # there may be something to do
        self._end = asyncio.Event()
        self._room = asyncio.Event()
        self._opened = False
        self._queue: deque[str] = deque()
        self._ahead: Shipment | None = None  # read while the one before it is on its way
        self._spare: Job | None = None  # read, and too large for the shipment before it
        self._in_flight: dict[asyncio.Task[None], Shipment] = {}
        self._unconfirmed: deque[Shipment] = deque()
        self._confirming: asyncio.Task[None] | None = None
        self._confirm_failures = 0
        self._held: dict[str, float] = {}  # the files that another process has, and since when
        self._trouble_confirming: Misconfigured | Retry | None = None
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
        """Notified after each settled file."""
        return self._settler.settled

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        self._set(self._work)

    def end(self) -> None:
        """Deliver what can be delivered without waiting, then return from `run`; from any thread."""
        self._set(self._end)

    def _set(self, event: asyncio.Event) -> None:
        if self._loop is None:
            event.set()  # `run` has not begun: nobody waits yet
            return
        try:
            self._loop.call_soon_threadsafe(event.set)
        except RuntimeError:
            return  # the loop has ended

    async def run(self) -> None:
        """Deliver until `end` is called; may be run again, on another loop."""
        ending = self._end.is_set()
        self._work, self._end, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        if ending:
            self._end.set()
        self._loop = asyncio.get_running_loop()
        self._courier.begin()
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
        if self._confirming is not None:
            self._confirming.cancel()
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
        self._forget_queue()
        for shipment in self._unconfirmed:
            self._close(shipment)
        self._unconfirmed.clear()
        self._confirming = self._trouble_confirming = None
        self._opened = False
        self._settler.finish()

    async def _round(self) -> bool:
        """Look once and deliver what is found; False when the worker is to end."""
        self._work.clear()
        try:
            if not self.lease.is_good() and not self.lease.take():
                self._standing.enter("standby", "another process delivers this directory")
                await self._pause(min(self._rules.interval_s, _TAKE_OVER_S))
                return True
            if not self._opened and not await self._open():
                return True
            self._adopt()
            self._queue.extend(self._choose(self._sealed()))
        except (OSError, FileUnusable) as error:
            self._standing.enter("degraded", str(error))
            await self._pause(self._rules.interval_s)
            return True
        if await self._drain():
            return True
        if self._unconfirmed:
            await self._wait_for_room(1)
            return True
        self._settler.finish()
        await self._rest()
        return True

    async def _rest(self) -> None:
        """Nothing can be sent now."""
        unjudged = len(self._suspects.unjudged())
        if self._suspects.is_outage:
            await self._stop_for_outage()
        elif unjudged:
            what = f"refused as a whole, judged once another batch is accepted: {unjudged} so far; {self._suspects.reason()}"
            self._standing.enter("degraded", what)
        else:
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
            self._ledger.note(*(Adopted(now, layout.batch_id(file.sealed), layout.writer_of(file.found)) for file in adopted))

    def _choose(self, found: list[str]) -> list[str]:
        """Which of the sealed files to send now, in order."""
        there = set(found)
        self._held = {name: since for name, since in self._held.items() if name in there} if self._held else {}
        for name in set(self._standing.complaints) - there if self._standing.complaints else ():
            if layout.kind_of(name) is Kind.SEALED:
                self._standing.withdraw(name)
        self._suspects.keep_only(found)
        busy = self._settler.waiting(found)
        busy.update(job.name for shipment in self._unconfirmed for job in shipment.jobs)
        return self._suspects.choose([name for name in found if name not in busy], self._clock.monotonic())

    def _sealed(self) -> list[str]:
        """The names of the files to send, in order, durable."""
        found = self._directory.sealed()
        if not found:
            return found
        self._settler.sync_names()
        # A listing may miss a name that is given while it runs and show one that is given later. One that is made afterwards
        # shows all that came before what the first one shows.
        last = found[-1]
        return [name for name in self._directory.sealed() if name <= last]

    async def _drain(self) -> bool:
        """Send what is queued; whether anything was sent."""
        progress = False
        window = max(1, self._sink.traits.window)
        at_once = self._rules.max_in_flight if self._sink.traits.concurrent else 1
        while self._queue or self._ahead is not None or self._spare is not None:
            if await self._wait_for_room(window):
                await self._land(0)
                return True  # the queue is empty, and what was in it is on disk
            shipment, self._ahead = self._ahead or self._load_shipment(), None
            if self._waits_for_another():
                # Its turn comes before the others': a process that dies lets go of this file in a moment.
                if shipment is not None:
                    self._close(shipment)
                self._forget_queue()
                await self._land(0)
                await self._pause(_NOT_YET_S)
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
                self._forget_queue()
                break
        await self._land(0)
        return progress

    async def _has_to_wait(self) -> bool:
        """Whether it makes no sense to go on with the queue, after a wait."""
        if self._suspects.is_outage:
            self._forget_queue()
            await self._land(0)
            if self._suspects.is_outage:  # one that was still under way may have been accepted
                await self._stop_for_outage()
            return True
        if self._settler.failures_in_row >= _UNSETTLED_MAX:
            self._forget_queue()
            await self._land(0)
            wait = self._rules.backoff.delay(self._settler.failures_in_row, jitter())
            self._standing.enter("waiting", self.last_error, wait)
            await self._pause(wait)
            return True
        return False

    async def _stop_for_outage(self) -> None:
        """Batch after batch is refused: not they are bad, but what is set up. One is tried each time, until one is accepted."""
        self.counters.failed_flushes += 1
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
            self._close(shipment)
            raise
        if verdict is not Verdict.FINAL:
            self._put_off(shipment)
            return
        if shipment.refused and not shipment.accepted:
            self._suspects.condemn()
        if self._sink.traits.confirms and shipment.accepted:
            self._unconfirmed.append(shipment)
            self._confirm_soon()
        else:
            self._settle(shipment)

    def _settle(self, shipment: Shipment) -> None:
        while shipment.jobs:
            job = shipment.jobs.pop(0)  # the settler's from here on, whatever happens
            self._suspects.forget(job.name)
            self._settler.settle(job)

    def _put_off(self, shipment: Shipment) -> None:
        """All of it was refused, which proves nothing yet."""
        self._close(shipment)
        if len(shipment.jobs) > 1:
            self._suspects.alone.update(job.name for job in shipment.jobs)
            self._forget_queue()
            return
        refusal, _ = next(iter(shipment.refused.values()))
        reason = f"{refusal.code}: {refusal.reason}"
        self._suspects.put_off(shipment.jobs[0].name, reason, shipment.history(), self._clock.monotonic())

    # Files that are read.

    def _meanwhile(self) -> None:
        """While a shipment is on its way: let go of what is due, and read and prepare the next."""
        self._settler.let_go_in_time()
        self._standing.beat()
        if self._ahead is None and not self._waits_for_another() and (self._queue or self._spare is not None):
            self._ahead = self._load_shipment()
            if self._ahead is not None:
                with contextlib.suppress(Exception):  # it is no part of this call; what is wrong shows in the next
                    self._sink.prepare(self._ahead.batch)

    def _forget_queue(self) -> None:
        """Have the next look at the directory find everything in order."""
        self._queue.clear()
        if self._ahead is not None:
            self._close(self._ahead)
            self._ahead = None
        if self._spare is not None:
            self._directory.filesystem.close(self._spare.file.fd)
            self._spare = None

    def _close(self, shipment: Shipment) -> None:
        for job in shipment.jobs:
            self._directory.filesystem.close(job.file.fd)

    def _load_shipment(self) -> Shipment | None:
        """The next file, or the next small ones that the sink takes together; None where none can be read."""
        jobs: list[Job] = []
        try:
            self._load_some(jobs)
        except BaseException:
            for job in jobs:
                self._directory.filesystem.close(job.file.fd)
            raise
        if not jobs:
            return None
        name = jobs[0].name
        history, proven = self._suspects.history(name), self._suspects.is_proven(name)
        return Shipment(jobs, self._clock, self._give_way, history, proven=proven)

    def _load_some(self, jobs: list[Job]) -> None:
        while self._queue or self._spare is not None:
            job, self._spare = self._spare or self._load(self._queue.popleft()), None
            if job is None:
                if self._waits_for_another():
                    return  # those behind it are not to overtake it
                continue
            if jobs and not self._goes_along(jobs, job):
                self._spare = job
                return
            jobs.append(job)
            if not self._sink.traits.combines:
                return

    def _waits_for_another(self) -> bool:
        """Whether a file that another process has is to be waited for, for its turn comes before the others'."""
        now = self._clock.monotonic()
        return any(now - since < _HELD_S for since in self._held.values())

    def _goes_along(self, jobs: list[Job], job: Job) -> bool:
        """Whether a file goes out together with these; one that was refused goes by itself, to be judged by itself."""
        together = [*jobs, job]
        if len(together) > TOGETHER_FILES or len(together) * (self._rules.max_in_flight + 1) > OPEN_FILES_MAX:
            return False
        if any(one.name in self._suspects.alone or self._suspects.is_proven(one.name) for one in together):
            return False
        return sum(one.records for one in together) <= TOGETHER_RECORDS and sum(one.size for one in together) <= TOGETHER_BYTES

    def _load(self, name: str) -> Job | None:
        """Take and read a sealed file; None where another has it or it cannot be read (it is tried again later)."""
        try:
            file = self._directory.take(name)
            if file is None:
                since = self._held.setdefault(name, self._clock.monotonic())
                if self._clock.monotonic() - since >= _HELD_S:
                    self._standing.complain(name, "another process has it, and does not let go of it")
                return None
            self._held.pop(name, None)
            try:
                data = self._directory.filesystem.read_all(file.fd)
                job = Job(file, data, reader.read(data, self._give_way), self._clock.monotonic())
            except BaseException:
                self._directory.filesystem.close(file.fd)
                raise
        except (OSError, FileUnusable) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._queue.clear()  # no fault of the file's: all are tried again later
                self._standing.enter("degraded", str(error))
                return None
            if self._standing.complain(name, f"it cannot be read: {error}"):
                log.error("%s is stepped over, it cannot be read: %s", name, error)  # noqa: TRY400 - the trace says nothing
            self._standing.well("idle")
            return None
        if not self._settler.is_parked(name):
            self._standing.withdraw(name)
        return job

    def _give_way(self) -> None:
        # 60 us or so each time, for the kernel rounds the shortest sleep up: not for nobody.
        if self._busy():
            give_way()

    # Confirming.

    def _confirm_soon(self) -> None:
        if self._confirming is not None and self._confirming.done() and not self._confirming.cancelled():
            self._confirming.result()  # raises what has ended it
        if self._confirming is None or self._confirming.done():
            self._confirming = asyncio.create_task(self._confirm())

    async def _confirm(self) -> None:
        """Settle what is sent once the destination is sure of it; what it is not sure of is sent again."""
        try:
            while self._unconfirmed:
                group = list(self._unconfirmed)
                sure, trouble = await self._ask_to_confirm(group)
                if trouble is None:
                    for shipment in group[:sure]:
                        self._settle(shipment)
                        self._unconfirmed.popleft()
                    if sure:
                        self._confirm_failures = 0
                        self._room.set()
                    else:
                        await asyncio.sleep(_NOT_YET_S)
                    continue
                for shipment in group:
                    self._unconfirmed.popleft()
                    self._close(shipment)
                self._forget_queue()
                self._confirm_failures += 1
                self._trouble_confirming = trouble
                log.warning("%s: not confirmed, sent again: %d batches; %s", self._sink_name, len(group), trouble.reason)
        finally:
            self._room.set()  # whoever waits must not wait for a task that is no more

    async def _ask_to_confirm(self, group: list[Shipment]) -> tuple[int, Misconfigured | Retry | None]:
        try:
            async with asyncio.timeout(self._rules.call_timeout_s):
                sure = await self._sink.confirm([shipment.batch for shipment in group])
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            return 0, Retry("the sink cancelled its own call")
        except SinkUnusable as error:
            return 0, Misconfigured(str(error))
        except Unconfirmed as error:
            return 0, Retry(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return 0, Retry(words(error))
        if not isinstance(sure, int) or not 0 <= sure <= len(group):
            return 0, Misconfigured(f"the sink confirmed {sure!r:.100} of {len(group)} batches: mend the sink")
        return sure, None

    async def _wait_for_room(self, window: int) -> bool:
        """Wait until fewer shipments than `window` are unconfirmed; whether some must be sent again."""
        files_max = max(window, UNCONFIRMED_FILES_MAX // self._rules.max_in_flight)
        while len(self._unconfirmed) >= window or sum(len(one.jobs) for one in self._unconfirmed) >= files_max:
            self._confirm_soon()
            self._room.clear()
            self._settler.let_go()
            while not self._room.is_set():
                self._standing.beat()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), BEAT_EVERY_S)
        trouble, self._trouble_confirming = self._trouble_confirming, None
        if isinstance(trouble, Misconfigured):
            await self._hold("stopped", trouble.reason, self._rules.recheck_s)
        elif trouble is not None:
            await self._hold("waiting", trouble.reason, self._rules.backoff.delay(self._confirm_failures, jitter()))
        return trouble is not None

    # Waiting.

    async def _open(self) -> bool:
        opening = asyncio.ensure_future(self._sink.open())
        try:
            async with asyncio.timeout(self._rules.call_timeout_s):
                while not opening.done():
                    await asyncio.wait({opening}, timeout=BEAT_EVERY_S)
                    self._standing.beat()
                await opening
        except SinkUnusable as error:
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
        self._standing.enter(name, reason, seconds)
        await self._pause(seconds)

    async def _pause(self, seconds: float, until: asyncio.Event | None = None) -> None:
        """Wait for `seconds` or for an event, beating meanwhile. Raises `Ending` where the worker is told to end."""
        until = until or self._end
        deadline = self._clock.monotonic() + seconds
        while not until.is_set() and not self._end.is_set() and (left := deadline - self._clock.monotonic()) > 0:
            self._settler.let_go()
            self._standing.beat()
            waits = [asyncio.ensure_future(event.wait()) for event in {until, self._end}]
            try:
                await asyncio.wait(waits, timeout=min(left, BEAT_EVERY_S), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._end.is_set():
            raise Ending
