"""Sends a shipment, in parts where that is called for, until each of its records is accepted or refused.

Decisions are `policy`'s and `pacing`'s; this module only acts on them. Several shipments may be on their way at once: when the
destination asks for time, all of them give it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.delivery import policy
from pillarbox.delivery.backoff import jitter
from pillarbox.delivery.lease import BEAT_EVERY_S
from pillarbox.delivery.pacing import Pacer
from pillarbox.delivery.policy import Lately, Verdict
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Retry, Sink
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import Rules
    from pillarbox.delivery.retry import Suspects
    from pillarbox.delivery.shipment import Shipment
    from pillarbox.delivery.status import Standing
    from pillarbox.sinks.base import Rejection
    from pillarbox.stats import DeliveryCounters, StateName

_SANE_MICROS: Final = 1_577_836_800_000_000  # 2020: a clock that says less had not been set when the file was sealed
_GIVEN_UP_S: Final = 1.0  # how long a call that is given up may take to end, before that is worth a word
# Of the event loop, to send all of a call: one that takes more waits for the destination, time to read ahead. httpx takes four.
_TURNS: Final = 8


class Courier:
    """Carries shipments to a sink. `pause(seconds)` waits, or raises where the worker is told to end.

    `meanwhile()` is called while a call takes its time.
    """

    def __init__(
        self,
        sink: Sink,
        clock: Clock,
        rules: Rules,
        counters: DeliveryCounters,
        standing: Standing,
        suspects: Suspects,
        pause: Callable[[float], Awaitable[None]],
        meanwhile: Callable[[], None],
    ) -> None:
        self._sink = sink
        self._clock = clock
        self._rules = rules
        self._counters = counters
        self._standing = standing
        self._suspects = suspects
        self._pause = pause
        self._meanwhile = meanwhile
        self._not_before = 0.0  # monotonic: the destination asked for time, or has to be mended
        self._pacer = Pacer(rules.pacing, rules.max_in_flight if sink.capabilities.concurrent else 1)
        self._turn = asyncio.Lock()  # calls begin in the order in which they came
        self._show_pace()
        self._began = (clock.micros(), clock.monotonic())
        self._given_up: set[asyncio.Future[DeliveryResult]] = set()  # calls that have not ended yet

    async def send(self, shipment: Shipment) -> Verdict:
        """Whether what was refused of it is final; where it is not, nothing of it was accepted."""
        parts = deque([shipment.batch] if shipment.records else [])
        failures = 0
        while parts:
            part = parts[0]
            if self._is_too_large(part):
                parts.popleft()
                parts.extendleft(reversed(part.halves()))
                continue
            await self._until_due(len(part))
            began = self._clock.monotonic()
            answer = await self._call(part)
            shipment.attempts += 1
            action = policy.decide(answer, len(part), failures + 1, jitter(), self._lately(shipment), self._rules)
            self._remember(shipment, answer)
            self._pace(began, answer, len(part))
            match action:
                case policy.Settle(accepted, duplicates, dead):
                    self._settle(shipment, part, accepted, duplicates, dead)
                    parts.popleft()
                    failures = 0
                case policy.Resend(dead):
                    shipment.refuse(part, dead)
                    parts.popleft()
                    parts.extendleft(reversed(part.split_around(dead)))
                case policy.Split():
                    parts.popleft()
                    parts.extendleft(reversed(part.halves()))
                case policy.GiveUp(refusal):
                    shipment.refuse(part, dict.fromkeys(range(len(part)), refusal))
                    parts.popleft()
                case policy.Wait(seconds, reason) | policy.Stop(seconds, reason):
                    failures += 1
                    self._hold("stopped" if isinstance(action, policy.Stop) else "waiting", seconds, reason)
                case policy.PutOff(refusal):
                    shipment.refuse(part, {0: refusal})
                    return policy.judge(0, self._lately(shipment), self._rules)
        if not shipment.refused:
            return Verdict.FINAL
        return policy.judge(shipment.accepted, self._lately(shipment), self._rules)

    def _remember(self, shipment: Shipment, answer: DeliveryResult) -> None:
        """How many calls in a row were refused, and since when the batch fails; policy asks for both."""
        if isinstance(answer, (Delivered, PartialFailure)) and answer.accepted:
            shipment.refused_calls = 0
            return
        shipment.refused_calls += not isinstance(answer, (Retry, Misconfigured))
        if shipment.failing_since is None:
            shipment.failing_since = self._clock.monotonic()

    def begin(self) -> None:
        """Start afresh, on another event loop."""
        self._given_up.clear()
        self._turn = asyncio.Lock()

    @property
    def outages(self) -> int:
        """How often the destination has failed for so long that it was an outage."""
        return self._pacer.outages

    def failed(self) -> None:
        """Nothing can be sent, for a reason that no call has shown."""
        now = self._clock.monotonic()
        self._pacer.failed(now, now)
        self._show_pace()

    def caught_up(self) -> None:
        """Nothing waits any more."""
        self._pacer.caught_up()
        self._show_pace()

    def _pace(self, began: float, answer: DeliveryResult, records: int) -> None:
        if isinstance(answer, (Retry, Misconfigured)):
            self._pacer.failed(began, self._clock.monotonic(), records)
        elif not isinstance(answer, Rejected) and answer.accepted:
            self._pacer.arrived(began, self._clock.monotonic(), records)
        else:
            self._pacer.refused(records)
        self._show_pace()

    def _show_pace(self) -> None:
        self._counters.rate = rate = self._pacer.rate
        self._standing.paced = f"paced: {rate:,.0f} events/s" if self._pacer.is_paced else ""

    def hold(self, seconds: float) -> None:
        """Send nothing for so long."""
        self._not_before = max(self._not_before, self._clock.monotonic() + seconds)

    def _settle(self, shipment: Shipment, part: Batch, accepted: int, duplicates: int, dead: dict[int, Rejection]) -> None:
        shipment.accept(accepted, duplicates)
        shipment.refuse(part, dead)
        if accepted:
            self._suspects.success()
        if accepted or shipment.proven:
            self._standing.well("draining")

    def _hold(self, name: StateName, seconds: float, reason: str) -> None:
        self._counters.failed_flushes += 1
        self.hold(seconds)
        self._standing.enter(name, reason, seconds)

    def _lately(self, shipment: Shipment) -> Lately:
        now = self._clock.monotonic()
        return Lately(
            shipment.proven,
            shipment.accepted > 0,
            self._sink.capabilities.deduplicates_by != "nothing",
            shipment.records,
            shipment.refused_calls,
            self._suspects.in_row(besides=shipment.jobs[0].name),
            self._suspects.condemned,
            self._age(shipment, now),
            0.0 if shipment.failing_since is None else now - shipment.failing_since,
        )

    def _age(self, shipment: Shipment, now: float) -> float:
        """Seconds since the youngest file was sealed, by whichever clock makes it younger: one of them may have jumped."""
        stamp = layout.sealed_at(shipment.jobs[-1].name)
        if stamp is None or stamp < _SANE_MICROS:
            return 0.0
        wall, monotonic = self._began
        return min(self._clock.micros() - stamp, wall - stamp + (now - monotonic) * 1e6) / 1e6

    def _is_too_large(self, part: Batch) -> bool:
        capabilities = self._sink.capabilities
        if len(part) <= 1:
            return False
        if capabilities.records_max is not None and len(part) > capabilities.records_max:
            return True
        return capabilities.bytes_max is not None and sum(map(len, part.payloads)) > capabilities.bytes_max

    async def _until_due(self, records: int) -> None:
        async with self._turn:
            while (left := self._seconds_left()) > 0:
                await self._pause(min(left, BEAT_EVERY_S))  # the rate may have risen meanwhile
            # A sink that takes one call at a time gets no second one beside a call that was given up and goes on.
            while self._given_up and not self._sink.capabilities.concurrent:
                self._standing.enter("waiting", "the sink goes on with a call that was given up")
                await asyncio.wait(self._given_up, timeout=BEAT_EVERY_S)
                await self._pause(0)
            self._pacer.sent(self._clock.monotonic(), records)

    def _seconds_left(self) -> float:
        now = self._clock.monotonic()
        return max(self._not_before - now, self._pacer.wait(now))

    async def _call(self, part: Batch) -> DeliveryResult:
        """One call, bounded in time; while it waits for the destination, the next file is read and the heart beats."""
        call = asyncio.ensure_future(self._sink.deliver(part))
        try:
            for _ in range(_TURNS):
                await asyncio.sleep(0)
                if call.done():
                    return self._answer_of(call, len(part))
            async with asyncio.timeout(self._rules.call_timeout_s):
                while not call.done():
                    self._meanwhile()
                    await asyncio.wait({call}, timeout=BEAT_EVERY_S)
        except TimeoutError:
            await self._give_up(call)
            if not call.done() or call.cancelled():
                return Retry(f"no answer within {self._rules.call_timeout_s:g} s")
        except BaseException:
            call.cancel()
            raise
        return self._answer_of(call, len(part))

    async def _give_up(self, call: asyncio.Future[DeliveryResult]) -> None:
        call.cancel()
        await asyncio.wait({call}, timeout=_GIVEN_UP_S)
        if not call.done():
            self._given_up.add(call)
        call.add_done_callback(self._ended)

    def _ended(self, call: asyncio.Future[DeliveryResult]) -> None:
        self._given_up.discard(call)
        if not call.cancelled():
            call.exception()  # what it was is of no interest any more

    def _answer_of(self, call: asyncio.Future[DeliveryResult], size: int) -> DeliveryResult:
        try:
            return policy.checked(call.result(), size)
        except asyncio.CancelledError:
            return Retry("the sink cancelled its own call")
        except SinkUnusableError as error:
            return Misconfigured(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return Retry(words(error))


def words(error: BaseException) -> str:
    """What an exception says, with its kind."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_being_cancelled() -> bool:
    """Whether it is the running task that somebody cancels, and not something that it waited for."""
    this = asyncio.current_task()
    return this is not None and this.cancelling() > 0
