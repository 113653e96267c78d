"""Sends a request, in parts if necessary, until each of its records is accepted or rejected.

`retry` and `pacing` decide; this module calls the sink and waits. Several requests may be in flight at a time: if the
destination asks one of them to wait, all of them wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from pillarbox.delivery import retry
from pillarbox.delivery.batch import SendResult
from pillarbox.delivery.config import jitter
from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S
from pillarbox.delivery.pacing import Pacer
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Retry
from pillarbox.store import layout

if TYPE_CHECKING:
    from pillarbox.delivery.batch import SendRequest
    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.housekeeping import Housekeeping
    from pillarbox.delivery.retry import PoisonTracker
    from pillarbox.sinks.base import Rejection
    from pillarbox.stats import StateName

# The year 2020. A batch with an earlier seal time was sealed before the machine's clock was set.
_CLOCK_UNSET_BEFORE_MICROS: Final = 1_577_836_800_000_000
_CANCEL_GRACE_S: Final = 1.0  # how long a call that timed out may keep running before the status reports it
# Iterations of the event loop in which a sink sends a whole call (httpx takes four). If a call takes more, the sink is waiting
# for the destination, and there is time to prefetch.
_QUICK_TURNS: Final = 8


class Sender:
    """Sends requests to a sink, at the pace of its destination."""

    def __init__(self, context: DeliveryContext, poison_tracker: PoisonTracker, housekeeping: Housekeeping) -> None:
        self._sink = context.sink
        self._clock = context.clock
        self._config = context.config
        self._counters = context.counters
        self._status = context.status
        self._poison_tracker = poison_tracker
        self._housekeeping = housekeeping
        self._stalled_s = 0.0  # total seconds of stalls that the pacer was told of
        self._not_before = 0.0  # monotonic; no call may begin earlier: the destination asked for it, or is set up wrongly
        self._pacer = Pacer(context.config.pacing, context.config.max_in_flight if self._sink.capabilities.concurrent else 1)
        self._call_order = asyncio.Lock()  # calls begin in the order of their requests
        self._started = (self._clock.micros(), self._clock.monotonic())
        self._abandoned_calls: set[asyncio.Future[DeliveryResult]] = set()  # a call that timed out and is still running
        self._report_pace()

    async def send(self, request: SendRequest) -> SendResult:
        """Send a request until each of its records has an answer.

        The result has no verdict if the worker must end before that. If the verdict is not final, nothing was accepted.
        """
        result = SendResult(request)
        parts = deque([request.batch] if request.records else [])
        failures = 0
        while parts:
            part = parts[0]
            if self._is_too_large(part):
                parts.popleft()
                parts.extendleft(reversed(part.halves()))
                continue
            if not await self._wait_until_due(len(part)):
                return result
            self._pacer.note_stall(self._new_stalls_s(), 0)
            began = self._clock.monotonic()
            answer = await self._call_sink(part)
            stalled_s = self._new_stalls_s()
            result.attempts += 1
            context = self._attempt_context(request, result)
            action = retry.decide(answer, len(part), failures + 1, jitter(), context, self._config)
            self._record_failures(result, answer)
            self._record_pace(began, answer, len(part), stalled_s)
            match action:
                case retry.PartDone(accepted, duplicates, dead):
                    self._record_part(request, result, part, accepted, duplicates, dead)
                    parts.popleft()
                    failures = 0
                case retry.SendRest(dead):
                    result.add_rejected(part, dead)
                    parts.popleft()
                    parts.extendleft(reversed(part.split_around(dead)))
                case retry.Split():
                    parts.popleft()
                    parts.extendleft(reversed(part.halves()))
                case retry.Expire(rejection):
                    result.add_rejected(part, dict.fromkeys(range(len(part)), rejection))
                    parts.popleft()
                case retry.Wait(seconds, reason) | retry.Stop(seconds, reason):
                    failures += 1
                    self._back_off("stopped" if isinstance(action, retry.Stop) else "waiting", seconds, reason)
                case retry.Defer(rejection):
                    result.add_rejected(part, {0: rejection})
                    result.verdict = retry.judge_rejections(0, self._attempt_context(request, result), self._config)
                    return result
        result.verdict = retry.Verdict.FINAL
        if result.rejected:
            context = self._attempt_context(request, result)
            result.verdict = retry.judge_rejections(request.accepted_before + result.accepted, context, self._config)
        return result

    def start_loop(self) -> None:
        """Reset the state for the event loop that runs now."""
        self._abandoned_calls.clear()
        self._call_order = asyncio.Lock()

    @property
    def outages(self) -> int:
        """The number of outages of the destination so far."""
        return self._pacer.outages

    def note_unreachable(self) -> None:
        """Slow down, because nothing can be sent for a reason that no call has shown."""
        now = self._clock.monotonic()
        if self._sink.capabilities.is_shared:
            self._pacer.note_failure(now, now)
        self._report_pace()

    def note_drained(self) -> None:
        """Remove the rate limit, because no batch is pending any more."""
        self._pacer.note_drained()
        self._report_pace()

    def _record_failures(self, result: SendResult, answer: DeliveryResult) -> None:
        """Count consecutive rejected calls, and note since when the batch has been failing; `retry` needs both."""
        if isinstance(answer, (Delivered, PartialFailure)) and answer.accepted:
            result.rejected_calls = 0
            return
        result.rejected_calls += not isinstance(answer, (Retry, Misconfigured))
        if result.failing_since is None:
            result.failing_since = self._clock.monotonic()

    def _record_pace(self, began: float, answer: DeliveryResult, records: int, stalled_s: float) -> None:
        """Learn from a call how fast the destination is. A call during which this process stalled says nothing about that."""
        if stalled_s:
            self._pacer.note_stall(stalled_s, records)
        elif isinstance(answer, (Retry, Misconfigured)):
            if self._sink.capabilities.is_shared:
                self._pacer.note_failure(began, self._clock.monotonic(), records)
        elif not isinstance(answer, Rejected) and answer.accepted:
            self._pacer.note_accepted(began, self._clock.monotonic(), records)
        else:
            self._pacer.note_rejection(records)
        self._report_pace()

    def _new_stalls_s(self) -> float:
        """How long this process stalled since the last call of this method."""
        before, self._stalled_s = self._stalled_s, self._housekeeping.stalls.tick()
        return max(0.0, self._stalled_s - before)

    def _report_pace(self) -> None:
        self._counters.rate = rate = self._pacer.rate
        self._status.pacing_note = f"paced: {rate:,.0f} events/s" if self._pacer.is_paced else ""

    def _record_part(
        self,
        request: SendRequest,
        result: SendResult,
        part: Batch,
        accepted: int,
        duplicates: int,
        rejections: dict[int, Rejection],
    ) -> None:
        result.add_accepted(accepted, duplicates)
        result.add_rejected(part, rejections)
        if accepted:
            self._poison_tracker.note_accepted()
        if accepted or request.accepted_since_rejection:
            self._status.set_healthy("draining")

    def _back_off(self, name: StateName, seconds: float, reason: str) -> None:
        self._counters.failed_flushes += 1
        self._not_before = max(self._not_before, self._clock.monotonic() + seconds)
        self._status.transition(name, reason, seconds)

    def _attempt_context(self, request: SendRequest, result: SendResult) -> retry.AttemptContext:
        now = self._clock.monotonic()
        return retry.AttemptContext(
            request.accepted_since_rejection,
            request.accepted_before + result.accepted > 0,
            self._sink.capabilities.deduplicates_by != "nothing",
            request.records,
            result.rejected_calls,
            self._poison_tracker.rejected_in_row(except_for=request.files[0].name),
            self._poison_tracker.dead_lettered_batches,
            self._age_s(request, now),
            0.0 if result.failing_since is None else now - result.failing_since,
        )

    def _age_s(self, request: SendRequest, now: float) -> float:
        """Seconds since the youngest file was sealed, by the clock that gives less, because one of them may have jumped."""
        sealed_at = layout.sealed_at(request.files[-1].name)
        if sealed_at is None or sealed_at < _CLOCK_UNSET_BEFORE_MICROS:
            return 0.0
        wall, monotonic = self._started
        return min(self._clock.micros() - sealed_at, wall - sealed_at + (now - monotonic) * 1e6) / 1e6

    def _is_too_large(self, part: Batch) -> bool:
        capabilities = self._sink.capabilities
        if len(part) <= 1:
            return False
        if capabilities.records_max is not None and len(part) > capabilities.records_max:
            return True
        return capabilities.bytes_max is not None and sum(map(len, part.payloads)) > capabilities.bytes_max

    async def _wait_until_due(self, records: int) -> bool:
        """Wait until a call may begin; False if the worker must end first."""
        async with self._call_order:
            while (left := self._seconds_left()) > 0:
                # Wait in short steps, because the rate may rise meanwhile.
                if not await self._housekeeping.wait(min(left, HEARTBEAT_INTERVAL_S)):
                    return False
            # A sink that takes one call at a time must not get another while an abandoned one is still running.
            while self._abandoned_calls and not self._sink.capabilities.concurrent:
                self._status.transition("waiting", "the sink is still running a call that timed out")
                await asyncio.wait(self._abandoned_calls, timeout=HEARTBEAT_INTERVAL_S)
                if not await self._housekeeping.wait(0):
                    return False
            self._pacer.note_sent(self._clock.monotonic(), records)
        return True

    def _seconds_left(self) -> float:
        now = self._clock.monotonic()
        return max(self._not_before - now, self._pacer.seconds_until_next(now))

    async def _call_sink(self, part: Batch) -> DeliveryResult:
        """Call the sink with a timeout. Housekeeping continues while the sink waits for the destination."""
        call = asyncio.ensure_future(self._sink.deliver(part))
        try:
            for _ in range(_QUICK_TURNS):
                await asyncio.sleep(0)
                if call.done():
                    return _answer_of(call, len(part))
            async with asyncio.timeout(self._config.call_timeout_s):
                while not call.done():
                    self._housekeeping.during_call()
                    await asyncio.wait({call}, timeout=HEARTBEAT_INTERVAL_S)
        except TimeoutError:
            await self._abandon_call(call)
            if not call.done() or call.cancelled():
                return Retry(f"no answer within {self._config.call_timeout_s:g} s")
        except BaseException:
            call.cancel()
            raise
        return _answer_of(call, len(part))

    async def _abandon_call(self, call: asyncio.Future[DeliveryResult]) -> None:
        call.cancel()
        await asyncio.wait({call}, timeout=_CANCEL_GRACE_S)
        if not call.done():
            self._abandoned_calls.add(call)
        call.add_done_callback(self._forget_abandoned)

    def _forget_abandoned(self, call: asyncio.Future[DeliveryResult]) -> None:
        self._abandoned_calls.discard(call)
        if not call.cancelled():
            call.exception()  # otherwise asyncio would log the exception


def _answer_of(call: asyncio.Future[DeliveryResult], records: int) -> DeliveryResult:
    try:
        return retry.validate_answer(call.result(), records)
    except asyncio.CancelledError:
        return Retry("the sink cancelled its own call")
    except SinkUnusableError as error:
        return Misconfigured(str(error))
    except Exception as error:  # noqa: BLE001 - a sink may be anybody's code
        return Retry(describe_error(error))


def describe_error(error: BaseException) -> str:
    """The class of an exception and its message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_being_cancelled() -> bool:
    """Whether the running task itself is being cancelled, and not something that it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
