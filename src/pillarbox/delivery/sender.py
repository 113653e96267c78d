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
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S
from pillarbox.delivery.pacing import Pacer
from pillarbox.delivery.policy import AttemptContext, Verdict
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Retry, Sink
from pillarbox.store import layout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.policy import DeliveryConfig
    from pillarbox.delivery.request import SendRequest
    from pillarbox.delivery.retry import PoisonTracker
    from pillarbox.delivery.status import StatusReporter
    from pillarbox.sinks.base import Rejection
    from pillarbox.stats import DeliveryCounters, StateName

_CLOCK_UNSET_BEFORE_MICROS: Final = (
    1_577_836_800_000_000  # 2020: a clock that says less had not been set when the file was sealed
)
_CANCEL_GRACE_S: Final = 1.0  # how long a call that is given up may take to end, before that is worth a word
# Of the event loop, to send all of a call: one that takes more waits for the destination, time to read ahead. httpx takes four.
_QUICK_TURNS: Final = 8


class Sender:
    """Carries shipments to a sink. `pause(seconds)` waits, or raises where the worker is told to end.

    `meanwhile()` is called while a call takes its time.
    """

    def __init__(
        self,
        sink: Sink,
        clock: Clock,
        config: DeliveryConfig,
        counters: DeliveryCounters,
        status: StatusReporter,
        poison_tracker: PoisonTracker,
        pause: Callable[[float], Awaitable[None]],
        meanwhile: Callable[[], None],
    ) -> None:
        self._sink = sink
        self._clock = clock
        self._config = config
        self._counters = counters
        self._status = status
        self._poison_tracker = poison_tracker
        self._pause = pause
        self._meanwhile = meanwhile
        self._not_before = 0.0  # monotonic: the destination asked for time, or has to be mended
        self._pacer = Pacer(config.pacing, config.max_in_flight if sink.capabilities.concurrent else 1)
        self._call_order = asyncio.Lock()  # calls begin in the order in which they came
        self._report_pace()
        self._started = (clock.micros(), clock.monotonic())
        self._abandoned_calls: set[asyncio.Future[DeliveryResult]] = set()  # calls that have not ended yet

    async def send(self, request: SendRequest) -> Verdict:
        """Whether what was refused of it is final; where it is not, nothing of it was accepted."""
        parts = deque([request.batch] if request.records else [])
        failures = 0
        while parts:
            part = parts[0]
            if self._is_too_large(part):
                parts.popleft()
                parts.extendleft(reversed(part.halves()))
                continue
            await self._wait_until_due(len(part))
            began = self._clock.monotonic()
            answer = await self._call_sink(part)
            request.attempts += 1
            action = policy.decide(answer, len(part), failures + 1, jitter(), self._attempt_context(request), self._config)
            self._record_failures(request, answer)
            self._record_pace(began, answer, len(part))
            match action:
                case policy.PartDone(accepted, duplicates, dead):
                    self._record_part(request, part, accepted, duplicates, dead)
                    parts.popleft()
                    failures = 0
                case policy.SendRest(dead):
                    request.add_rejected(part, dead)
                    parts.popleft()
                    parts.extendleft(reversed(part.split_around(dead)))
                case policy.Split():
                    parts.popleft()
                    parts.extendleft(reversed(part.halves()))
                case policy.Expire(refusal):
                    request.add_rejected(part, dict.fromkeys(range(len(part)), refusal))
                    parts.popleft()
                case policy.Wait(seconds, reason) | policy.Stop(seconds, reason):
                    failures += 1
                    self._back_off("stopped" if isinstance(action, policy.Stop) else "waiting", seconds, reason)
                case policy.Defer(refusal):
                    request.add_rejected(part, {0: refusal})
                    return policy.judge_rejections(0, self._attempt_context(request), self._config)
        if not request.rejected:
            return Verdict.FINAL
        return policy.judge_rejections(request.accepted, self._attempt_context(request), self._config)

    def _record_failures(self, request: SendRequest, answer: DeliveryResult) -> None:
        """How many calls in a row were refused, and since when the batch fails; policy asks for both."""
        if isinstance(answer, (Delivered, PartialFailure)) and answer.accepted:
            request.rejected_calls = 0
            return
        request.rejected_calls += not isinstance(answer, (Retry, Misconfigured))
        if request.failing_since is None:
            request.failing_since = self._clock.monotonic()

    def start_loop(self) -> None:
        """Start afresh, on another event loop."""
        self._abandoned_calls.clear()
        self._call_order = asyncio.Lock()

    @property
    def outages(self) -> int:
        """How often the destination has failed for so long that it was an outage."""
        return self._pacer.outages

    def note_unreachable(self) -> None:
        """Nothing can be sent, for a reason that no call has shown."""
        now = self._clock.monotonic()
        self._pacer.note_failure(now, now)
        self._report_pace()

    def note_drained(self) -> None:
        """Nothing waits any more."""
        self._pacer.note_drained()
        self._report_pace()

    def _record_pace(self, began: float, answer: DeliveryResult, records: int) -> None:
        if isinstance(answer, (Retry, Misconfigured)):
            self._pacer.note_failure(began, self._clock.monotonic(), records)
        elif not isinstance(answer, Rejected) and answer.accepted:
            self._pacer.note_accepted(began, self._clock.monotonic(), records)
        else:
            self._pacer.note_rejection(records)
        self._report_pace()

    def _report_pace(self) -> None:
        self._counters.rate = rate = self._pacer.rate
        self._status.pacing_note = f"paced: {rate:,.0f} events/s" if self._pacer.is_paced else ""

    def hold_calls(self, seconds: float) -> None:
        """Send nothing for so long."""
        self._not_before = max(self._not_before, self._clock.monotonic() + seconds)

    def _record_part(
        self, request: SendRequest, part: Batch, accepted: int, duplicates: int, rejections: dict[int, Rejection]
    ) -> None:
        request.add_accepted(accepted, duplicates)
        request.add_rejected(part, rejections)
        if accepted:
            self._poison_tracker.note_accepted()
        if accepted or request.accepted_since_rejection:
            self._status.set_healthy("draining")

    def _back_off(self, name: StateName, seconds: float, reason: str) -> None:
        self._counters.failed_flushes += 1
        self.hold_calls(seconds)
        self._status.transition(name, reason, seconds)

    def _attempt_context(self, request: SendRequest) -> AttemptContext:
        now = self._clock.monotonic()
        return AttemptContext(
            request.accepted_since_rejection,
            request.accepted > 0,
            self._sink.capabilities.deduplicates_by != "nothing",
            request.records,
            request.rejected_calls,
            self._poison_tracker.rejected_in_row(except_for=request.files[0].name),
            self._poison_tracker.dead_lettered_batches,
            self._age_s(request, now),
            0.0 if request.failing_since is None else now - request.failing_since,
        )

    def _age_s(self, request: SendRequest, now: float) -> float:
        """Seconds since the youngest file was sealed, by whichever clock makes it younger: one of them may have jumped."""
        stamp = layout.sealed_at(request.files[-1].name)
        if stamp is None or stamp < _CLOCK_UNSET_BEFORE_MICROS:
            return 0.0
        wall, monotonic = self._started
        return min(self._clock.micros() - stamp, wall - stamp + (now - monotonic) * 1e6) / 1e6

    def _is_too_large(self, part: Batch) -> bool:
        capabilities = self._sink.capabilities
        if len(part) <= 1:
            return False
        if capabilities.records_max is not None and len(part) > capabilities.records_max:
            return True
        return capabilities.bytes_max is not None and sum(map(len, part.payloads)) > capabilities.bytes_max

    async def _wait_until_due(self, records: int) -> None:
        async with self._call_order:
            while (left := self._seconds_left()) > 0:
                await self._pause(min(left, HEARTBEAT_INTERVAL_S))  # the rate may have risen meanwhile
            # A sink that takes one call at a time gets no second one beside a call that was given up and goes on.
            while self._abandoned_calls and not self._sink.capabilities.concurrent:
                self._status.transition("waiting", "the sink goes on with a call that was given up")
                await asyncio.wait(self._abandoned_calls, timeout=HEARTBEAT_INTERVAL_S)
                await self._pause(0)
            self._pacer.note_sent(self._clock.monotonic(), records)

    def _seconds_left(self) -> float:
        now = self._clock.monotonic()
        return max(self._not_before - now, self._pacer.seconds_until_next(now))

    async def _call_sink(self, part: Batch) -> DeliveryResult:
        """One call, bounded in time; while it waits for the destination, the next file is read and the heart beats."""
        call = asyncio.ensure_future(self._sink.deliver(part))
        try:
            for _ in range(_QUICK_TURNS):
                await asyncio.sleep(0)
                if call.done():
                    return self._answer_of(call, len(part))
            async with asyncio.timeout(self._config.call_timeout_s):
                while not call.done():
                    self._meanwhile()
                    await asyncio.wait({call}, timeout=HEARTBEAT_INTERVAL_S)
        except TimeoutError:
            await self._abandon_call(call)
            if not call.done() or call.cancelled():
                return Retry(f"no answer within {self._config.call_timeout_s:g} s")
        except BaseException:
            call.cancel()
            raise
        return self._answer_of(call, len(part))

    async def _abandon_call(self, call: asyncio.Future[DeliveryResult]) -> None:
        call.cancel()
        await asyncio.wait({call}, timeout=_CANCEL_GRACE_S)
        if not call.done():
            self._abandoned_calls.add(call)
        call.add_done_callback(self._call_ended)

    def _call_ended(self, call: asyncio.Future[DeliveryResult]) -> None:
        self._abandoned_calls.discard(call)
        if not call.cancelled():
            call.exception()  # what it was is of no interest any more

    def _answer_of(self, call: asyncio.Future[DeliveryResult], size: int) -> DeliveryResult:
        try:
            return policy.validate_answer(call.result(), size)
        except asyncio.CancelledError:
            return Retry("the sink cancelled its own call")
        except SinkUnusableError as error:
            return Misconfigured(str(error))
        except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
            return Retry(describe_error(error))


def describe_error(error: BaseException) -> str:
    """What an exception says, with its kind."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_being_cancelled() -> bool:
    """Whether it is the running task that somebody cancels, and not something that it waited for."""
    this = asyncio.current_task()
    return this is not None and this.cancelling() > 0
