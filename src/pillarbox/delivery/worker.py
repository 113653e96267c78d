"""The loop that delivers: takes sealed files in order, sends each as one batch, settles it when the destination is sure.

Decisions are `policy.decide`'s; this module only acts. With a sink whose acceptance needs confirming, up to `traits.window`
files are sent and not yet settled, and one confirmation answers for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.clock import give_way
from pillarbox.delivery import policy, settlement
from pillarbox.delivery.backoff import Backoff
from pillarbox.delivery.lease import BEAT_EVERY_S, Lease
from pillarbox.delivery.settlement import DeadLetter
from pillarbox.delivery.state import State, StateName
from pillarbox.errors import FileUnusable, SinkUnusable
from pillarbox.sinks.base import Answer, Batch, Misconfigured, Refusal, Retry, Sink, Unconfirmed
from pillarbox.store import layout, reader

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, Taken
    from pillarbox.telemetry import DeliveryCounters

log = logging.getLogger("pillarbox")

_jitter = random.SystemRandom().random  # forked processes must not wait in step
_NOT_YET_S: Final = 0.01  # before a sink that could confirm nothing yet is asked again
_AHEAD_AFTER_S: Final = 0.001  # a call that takes longer waits for the destination: time to read the next file
_TAKE_OVER_S: Final = 0.5  # between two looks whether the process that delivers is gone
_HELD_S: Final = 1.0  # how long to wait for a file that another process has before the next one is sent
_UNSETTLED_MAX: Final = 3  # settlements that fail in a row: not the files are at fault then, but the disk
_REMOVED_S: Final = 1.0  # how long a removal may wait for its sync: what power loss brings back is sent again
CALL_MAX_S: Final = 120.0  # a call to a sink that takes longer is given up and tried again


class Pace(NamedTuple):
    """How often the deliverer looks, and how long it waits, in seconds."""

    interval_s: float = 1.0  # between two looks at an idle directory
    recheck_s: float = 15.0  # between two looks at a destination that is set up wrongly
    backoff: Backoff = Backoff()


class _Job:
    """A sealed file on its way."""

    def __init__(self, file: Taken, data: bytes, contents: reader.Contents, clock: Clock, give_way: Callable[[], None]) -> None:
        self.file = file
        self.batch = Batch(layout.batch_id(file.name), contents.payloads, give_way=give_way)
        self.spans = contents.spans
        self.data = data if contents.spans else b""
        self.size = len(data)
        self.first_at = clock.micros()
        self.started = clock.monotonic()
        self.attempts = 0
        self.accepted = 0
        self.duplicates = 0
        self.dead: dict[int, DeadLetter] = {}


class Ending(Exception):  # noqa: N818 - no error: it ends the loop from within a wait
    """The worker is told to end and would have to wait."""


class Worker:
    """Delivers a directory to one sink for as long as this process holds the lease.

    `on_gone(bytes)` is called after each settled file; while `busy()`, the interpreter is given away often. Everything but
    `notify`, `end` and the attributes without an underscore belongs to the event loop that `run` is on.
    """

    def __init__(
        self,
        directory: Directory,
        sink: Sink,
        sink_name: str,
        clock: Clock,
        pace: Pace,
        counters: DeliveryCounters,
        on_gone: Callable[[int], None],
        on_duration: Callable[[float], None],
        busy: Callable[[], bool],
        durability: str = "",
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._sink_name = sink_name
        self._clock = clock
        self._pace = pace
        self.counters = counters
        self._on_gone = on_gone
        self._on_duration = on_duration
        self._busy = busy
        self.lease = Lease(directory, sink_name, clock, durability)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work = asyncio.Event()  # there may be something to do
        self._end = asyncio.Event()
        self._room = asyncio.Event()
        self._opened = False
        self._queue: deque[str] = deque()
        self._ahead: _Job | None = None  # read while the one before it is on its way
        self._unconfirmed: deque[_Job] = deque()
        self._confirming: asyncio.Task[None] | None = None
        self._confirm_failures = 0
        self._parked: dict[str, tuple[float, int]] = {}  # sent and not settled: when to try again, and how often it was tried
        self._unsettled_in_row = 0
        self._held: tuple[str, float] | None = None  # the file that another process has, and since when
        self._removed_since: float | None = None  # the first removal that is not synced yet
        self._trouble_confirming: Misconfigured | Retry | None = None
        self._unusable: dict[str, str] = {}
        self.state = State("idle")
        self.last_error = ""
        self.idle = threading.Event()  # set while a look at the directory has found nothing to do
        self.settled = threading.Condition()  # notified after each settled file

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
        try:
            while await self._round():
                pass
        except Ending:
            pass
        finally:
            if self._confirming is not None:
                self._confirming.cancel()
            self._forget_queue()
            for job in self._unconfirmed:
                self._directory.filesystem.close(job.file.fd)
            self._unconfirmed.clear()
            self._sync_removals()
            self._confirming = self._trouble_confirming = None
            self._opened = False
            await self._sink.close()  # also where `open` has failed: it may have come halfway
            self.lease.release()

    async def _round(self) -> bool:
        """Look once and deliver what is found; False when the worker is to end."""
        self._work.clear()
        try:
            if not self.lease.held and not self.lease.take():
                self._enter("standby", "another process delivers this directory")
                await self._pause(min(self._pace.interval_s, _TAKE_OVER_S))
                return True
            if not self._opened and not await self._open():
                return True
            if self._directory.recover():
                log.info("%s: adopted what a writer left that is gone", self._directory.path)
            in_flight = {job.file.name for job in self._unconfirmed}
            found = self._sealed()
            now = self._clock.monotonic()
            if self._held is not None and self._held[0] not in found:
                self._held = None
            self._parked = {name: parked for name, parked in self._parked.items() if name in found} if self._parked else {}
            in_flight |= {name for name, (at, _) in self._parked.items() if at > now}
            self._queue.extend(name for name in found if name not in in_flight)
            self._unusable = {name: why for name, why in self._unusable.items() if name in found} if self._unusable else {}
        except (OSError, FileUnusable) as error:
            self._trouble(str(error))
            await self._pause(self._pace.interval_s)
            return True
        if await self._drain():
            return True
        if self._unconfirmed:
            await self._wait_for_room(1)
            return True
        self._sync_removals()
        self._well("idle")
        if not self._parked:
            self.idle.set()
        await self._pause(self._pace.interval_s, until=self._work)
        return True

    def _sealed(self) -> list[str]:
        """The names of the files to send, in order, durable."""
        found = self._directory.sealed()
        if not found:
            return found
        self._sync_names()
        # A listing may miss a name that is given while it runs and show one that is given later. One that is made afterwards
        # shows all that came before what the first one shows.
        last = found[-1]
        return [name for name in self._directory.sealed() if name <= last]

    async def _drain(self) -> bool:
        """Deliver what is queued; whether anything was sent."""
        progress = False
        window = self._sink.traits.window
        while self._queue or self._ahead is not None:
            if await self._wait_for_room(window):
                return True  # the queue is empty, and what was in it is on disk
            job = self._next_job()
            if self._held is not None and self._clock.monotonic() - self._held[1] < _HELD_S:
                # Its turn comes before the others': a process that dies lets go of this file in a moment.
                if job is not None:
                    self._directory.filesystem.close(job.file.fd)
                self._forget_queue()
                await self._pause(_NOT_YET_S)
                return True
            if job is None:
                continue
            progress = True
            self.idle.clear()
            try:
                await self._deliver(job)
            except BaseException:
                self._directory.filesystem.close(job.file.fd)
                raise
            if self._sink.traits.confirms and job.accepted:
                job.batch.payloads = ()  # what is sent again is read again
                self._unconfirmed.append(job)
                if self._confirming is None or self._confirming.done():
                    self._confirming = asyncio.create_task(self._confirm())
            else:
                self._settle(job)
            if self._unsettled_in_row >= _UNSETTLED_MAX:
                self._forget_queue()
                wait = self._pace.backoff.delay(self._unsettled_in_row, _jitter())
                self._enter("waiting", self.last_error, wait)
                await self._pause(wait)
                return True
            if self._removed_since is not None and self._clock.monotonic() - self._removed_since >= _REMOVED_S:
                self._sync_removals()
            self._beat()
        return progress

    def _next_job(self) -> _Job | None:
        job, self._ahead = self._ahead, None
        if job is None and self._queue:
            job = self._load(self._queue.popleft())
        return job

    def _look_ahead(self) -> None:
        """While a batch is on its way, read and prepare the next."""
        if self._ahead is None and self._queue and self._held is None:
            self._ahead = self._load(self._queue.popleft())
            if self._ahead is not None:
                self._sink.prepare(self._ahead.batch)

    def _forget_queue(self) -> None:
        """Have the next look at the directory find everything in order."""
        self._queue.clear()
        if self._ahead is not None:
            self._directory.filesystem.close(self._ahead.file.fd)
            self._ahead = None

    def _load(self, name: str) -> _Job | None:
        """Take and read a sealed file; None where another has it or it cannot be read (it is tried again later)."""
        try:
            file = self._directory.take(name)
            if file is None:
                if self._held is None or self._held[0] != name:
                    self._held = (name, self._clock.monotonic())
                return None
            if self._held is not None and self._held[0] == name:
                self._held = None
            try:
                data = self._directory.filesystem.read_all(file.fd)
            except BaseException:
                self._directory.filesystem.close(file.fd)
                raise
        except (OSError, FileUnusable) as error:
            if self._unusable.get(name) != str(error):
                self._unusable[name] = str(error)
                log.error("%s is stepped over, it cannot be read: %s", name, error)  # noqa: TRY400 - the trace says nothing
            self._well("idle")
            return None
        if name not in self._parked:
            self._unusable.pop(name, None)
        return _Job(file, data, reader.read(data, self._give_way), self._clock, self._give_way)

    def _give_way(self) -> None:
        # 60 us or so each time, for the kernel rounds the shortest sleep up: not for nobody.
        if self._busy():
            give_way()

    async def _open(self) -> bool:
        try:
            async with asyncio.timeout(CALL_MAX_S):
                await self._sink.open()
        except SinkUnusable as error:
            await self._stop(str(error), self._pace.recheck_s)
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            await self._hold(_words(error), self._pace.backoff.max_s)
        else:
            self._opened = True
        return self._opened

    async def _deliver(self, job: _Job) -> None:
        """Send a file's records, in parts where that is called for, until each is accepted or a dead letter."""
        parts = deque([job.batch] if job.batch.payloads else [])
        failures = 0
        while parts:
            part = parts[0]
            answer = await self._call(part)
            job.attempts += 1
            action = policy.decide(answer, len(part), failures + 1, _jitter(), self._pace.backoff, self._pace.recheck_s)
            failures += 1
            match action:
                case policy.Settle(accepted, duplicates, dead):
                    job.accepted += accepted
                    job.duplicates += duplicates
                    self._bury(job, part, dead)
                    parts.popleft()
                    failures = 0
                    self._well("draining")
                case policy.Resend(dead):
                    self._bury(job, part, dead)
                    parts.popleft()
                    parts.extendleft(reversed(part.between(dead)))
                case policy.Split():
                    parts.popleft()
                    parts.extendleft(reversed(part.halves()))
                case policy.Wait(seconds, reason):
                    await self._hold(reason, seconds)
                case policy.Stop(seconds, reason):
                    await self._stop(reason, seconds)

    async def _call(self, part: Batch) -> Answer:
        call = asyncio.ensure_future(self._sink.deliver(part))
        try:
            async with asyncio.timeout(CALL_MAX_S):
                await asyncio.wait({call}, timeout=_AHEAD_AFTER_S)
                if not call.done():
                    self._look_ahead()
                return await call
        except SinkUnusable as error:
            return Misconfigured(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return Retry(_words(error))
        finally:
            call.cancel()

    def _bury(self, job: _Job, part: Batch, dead: dict[int, Refusal]) -> None:
        now = self._clock.micros()
        for index, refusal in dead.items():
            event = msgspec.Raw(part.payloads[index])
            job.dead[part.first + index] = DeadLetter(
                event, refusal.code, refusal.reason, self._sink_name, part.first + index, job.attempts, job.first_at, now
            )

    async def _confirm(self) -> None:
        """Settle what is sent once the destination is sure of it; what it is not sure of is sent again."""
        try:
            while self._unconfirmed:
                group = list(self._unconfirmed)
                sure, trouble = await self._ask_to_confirm(group)
                if trouble is None:
                    for job in group[:sure]:
                        self._unconfirmed.popleft()
                        self._settle(job)
                    if sure:
                        self._confirm_failures = 0
                        self._room.set()
                    else:
                        await asyncio.sleep(_NOT_YET_S)
                    continue
                for job in group:
                    self._unconfirmed.popleft()
                    self._directory.filesystem.close(job.file.fd)
                self._forget_queue()
                self._confirm_failures += 1
                self._trouble_confirming = trouble
                log.warning("%s: not confirmed, sent again: %d files; %s", self._sink_name, len(group), trouble.reason)
        finally:
            self._room.set()  # whoever waits must not wait for a task that is no more

    async def _ask_to_confirm(self, group: list[_Job]) -> tuple[int, Misconfigured | Retry | None]:
        try:
            async with asyncio.timeout(CALL_MAX_S):
                return await self._sink.confirm([job.batch for job in group]), None
        except SinkUnusable as error:
            return 0, Misconfigured(str(error))
        except Unconfirmed as error:
            return 0, Retry(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return 0, Retry(_words(error))

    async def _wait_for_room(self, window: int) -> bool:
        """Wait until fewer batches than `window` are unconfirmed; whether some must be sent again."""
        while len(self._unconfirmed) >= window:
            if self._confirming is None or self._confirming.done():
                self._confirming = asyncio.create_task(self._confirm())
            self._room.clear()
            await self._room.wait()
        trouble, self._trouble_confirming = self._trouble_confirming, None
        if isinstance(trouble, Misconfigured):
            await self._stop(trouble.reason, self._pace.recheck_s)
        elif trouble is not None:
            await self._hold(trouble.reason, self._pace.backoff.delay(self._confirm_failures, _jitter()))
        return trouble is not None

    def _settle(self, job: _Job) -> None:
        """Make durable what is kept, then let the file go. Trouble leaves this file for later, and no other."""
        try:
            if job.spans:
                settlement.keep_damaged(self._directory, job.batch.id, job.data, job.spans)
            if job.dead:
                settlement.keep_dead(self._directory, job.batch.id, job.dead)
            with self.settled:  # whoever sees that the file is gone finds it counted
                self._directory.remove(job.file.name)
                if self._removed_since is None:
                    self._removed_since = self._clock.monotonic()
                self._count(job)
                self.settled.notify_all()
        except OSError as error:
            self._park(job.file.name, f"delivered, but what is kept of it cannot be written, or it cannot be removed: {error}")
            return
        finally:
            self._directory.filesystem.close(job.file.fd)
        self._unsettled_in_row = 0
        if self._parked.pop(job.file.name, None) is not None:
            self._unusable.pop(job.file.name, None)
        if job.spans or job.dead:
            log.warning("%s: %d damaged lines and %d dead letters set aside", job.batch.id, len(job.spans), len(job.dead))

    def _park(self, name: str, trouble: str) -> None:
        """A file that is delivered and cannot be settled is sent again later; what is wrong may concern it alone."""
        _, failures = self._parked.get(name, (0.0, 0))
        wait = self._pace.backoff.delay(failures + 1, _jitter())
        self._parked[name] = (self._clock.monotonic() + wait, failures + 1)
        self._unsettled_in_row += 1
        self.counters.failed_flushes += 1
        if self._unusable.get(name) != trouble:
            self._unusable[name] = trouble
            log.error("%s: %s", name, trouble)
        self._well("draining")

    def _sync_removals(self) -> None:
        """Have what is settled not come back with the power; one sync for all that was removed since the last."""
        if self._removed_since is not None:
            self._sync_names()

    def _sync_names(self) -> None:
        """Also before sending: a file whose sealed name the power takes away comes back as another batch."""
        self._removed_since = None
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            log.warning("%s: names are not synced, power loss may bring files back: %s", self._directory.path, error)

    def _count(self, job: _Job) -> None:
        counters = self.counters
        counters.delivered += job.accepted
        counters.duplicates += job.duplicates
        counters.dead += len(job.dead)
        counters.quarantined += len(job.spans)
        counters.flushed_files += 1
        counters.flushed_bytes += job.size
        self._on_gone(job.size)
        with contextlib.suppress(Exception):  # the application's metrics are not worth an event
            self._on_duration(self._clock.monotonic() - job.started)

    # States and waiting.

    async def _hold(self, reason: str, seconds: float) -> None:
        self.counters.failed_flushes += 1
        self._enter("waiting", reason, seconds)
        await self._pause(seconds)

    async def _stop(self, reason: str, seconds: float) -> None:
        self.counters.failed_flushes += 1
        self._enter("stopped", reason, seconds)
        await self._pause(seconds)

    def _trouble(self, reason: str) -> None:
        self._enter("degraded", reason)

    def _well(self, name: StateName) -> None:
        """Nothing is wrong with the destination; files that cannot be read are still a reason to look."""
        if self._unusable:
            name_of_first, why = next(iter(self._unusable.items()))
            self._trouble(f"{len(self._unusable)} files cannot be read or settled, among them {name_of_first}: {why}")
        else:
            self._enter(name, "")

    def _enter(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        reason = reason.encode(errors="backslashreplace").decode()  # it may quote a file's name, which may be any bytes
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        before, self.state = self.state, State(name, reason, retry_at)
        if reason:
            self.last_error = reason
        if before.same_as(self.state):
            self._beat()
            return
        level = {"stopped": logging.ERROR, "waiting": logging.WARNING, "degraded": logging.WARNING}.get(name, logging.INFO)
        if not {before.name, name} <= {"idle", "draining"}:  # work coming and going is no news
            counters = self.counters
            log.log(
                level,
                "%s: %s (delivered %d, dead letters %d, failed attempts %d)",
                self._sink_name,
                self.state,
                counters.delivered,
                counters.dead,
                counters.failed_flushes,
            )
        self._beat(now=True)

    def _beat(self, *, now: bool = False) -> None:
        self.lease.beat(self.state, self.counters.delivered, self.last_error, now=now)

    async def _pause(self, seconds: float, until: asyncio.Event | None = None) -> None:
        """Wait for `seconds` or for an event, beating meanwhile. Raises `Ending` where the worker is told to end."""
        until = until or self._end
        deadline = self._clock.monotonic() + seconds
        while not until.is_set() and not self._end.is_set() and (left := deadline - self._clock.monotonic()) > 0:
            self._beat()
            waits = [asyncio.ensure_future(event.wait()) for event in {until, self._end}]
            try:
                await asyncio.wait(waits, timeout=min(left, BEAT_EVERY_S), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._end.is_set():
            raise Ending


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
