"""A sink may be any code: whatever it returns, raises or fails to do, delivery continues, reports it, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import (
    Batch,
    Delivered,
    DeliveryResult,
    Misconfigured,
    PartialFailure,
    Rejected,
    Rejection,
    Retry,
    UnconfirmedError,
)
from pillarbox.store import layout
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import QUICK_CONFIG, REJECTION, MovingClock, make_worker, remaining_files, seal_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pillarbox.delivery.worker import Worker
    from pillarbox.store.directory import Directory

ONCE = DeliveryConfig(
    poll_interval_s=0.01, recheck_s=60.0, backoff=Backoff(base_s=60.0, max_s=60.0)
)  # no second attempt within a test
LONE = "caf\udce9"  # what `surrogateescape` makes of bytes that are not UTF-8


@contextlib.contextmanager
def running_worker(worker: Worker) -> Iterator[ThreadRunner]:
    """Run a worker in its thread."""
    thread = ThreadRunner(worker)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop(30)


def deliver_all(worker: Worker) -> None:
    """Deliver all pending batches; ends the worker also if that takes too long."""
    with running_worker(worker):
        assert worker.idle.wait(60)


@pytest.fixture
def quick_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart a failed worker without delay."""
    monkeypatch.setattr("pillarbox.delivery.runner._RESTART_S", 0.01)


class FixedResultSink(RecordingSink):
    """Returns the same result for every call."""

    def __init__(self, answer: object, *, confirms: bool = False) -> None:
        super().__init__(needs_confirmation=confirms, unconfirmed_max=4)
        self.answer = answer

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.calls.append(batch.id)
        return cast("DeliveryResult", self.answer)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "accepted",
        PartialFailure({}, None),
        PartialFailure({}, 2),
        PartialFailure({7: REJECTION}, None),
        PartialFailure({-1: REJECTION}, 1),
        PartialFailure({0: REJECTION}, 2),
        PartialFailure({0: REJECTION}, 0),
        Delivered(1),
        Delivered(3),
        Delivered(-1),
        Delivered(2, -1),
    ],
    ids=repr,
)
def test_an_invalid_result_stops_delivery_after_one_call(outbox_dir: Directory, answer: object) -> None:
    """Nothing is settled because of it, and the destination is not called without a pause."""
    batch = seal_batch(outbox_dir, 1, b"1", b"2")
    sink = FixedResultSink(answer)
    worker = make_worker(outbox_dir, sink, config=ONCE)
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "stopped")
        # wait: nothing may happen in this time
        assert not worker.idle.wait(0.1)  # long enough for another call, if one were made
        assert worker.state.reason == f"the sink answered a call of 2 records with an impossible {answer!r}; fix the sink"
    assert (sink.calls, remaining_files(outbox_dir)) == ([batch], [batch + layout.SUFFIX])


@pytest.mark.parametrize("after", [-5.0, float("nan"), float("inf")])
def test_an_invalid_retry_time_is_replaced_by_the_backoff(outbox_dir: Directory, after: float) -> None:
    """The pause is neither zero nor endless."""
    seal_batch(outbox_dir, 1, b"1")
    sink = FixedResultSink(Retry("not now", after))
    worker = make_worker(outbox_dir, sink, config=ONCE._replace(backoff=Backoff(base_s=9_000.0, max_s=9_000.0)))
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "waiting")
        # wait: nothing may happen in this time
        assert not worker.idle.wait(0.1)  # long enough for another call, if one were made
        assert worker.state.retry_at_micros is not None
    assert len(sink.calls) == 1


def test_an_index_outside_the_part_does_not_dead_letter_an_accepted_record(outbox_dir: Directory) -> None:
    """A result for the second half of a batch cannot reject a record of the first half."""

    class Wrong(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            self.calls.append(batch.id)
            if ":" not in batch.id:
                return Rejected(REJECTION)
            return PartialFailure({-1: REJECTION}, 2) if batch.first_index else Delivered(len(batch))

    seal_batch(outbox_dir, 1, b'"a"', b'"b"', b'"c"', b'"d"')
    worker = make_worker(outbox_dir, Wrong(), config=ONCE)
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "stopped")
    assert [layout.kind_of(name) for name in remaining_files(outbox_dir)] == [layout.Kind.SEALED]


class FaultySink(RecordingSink):
    """Raises once in one of its methods, and works afterwards."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(needs_confirmation=True, unconfirmed_max=2)
        self.where = where
        self.error: BaseException | None = error

    def _act(self, where: str) -> None:
        error = self.error
        if where == self.where and error is not None:
            self.error = None
            raise error

    async def open(self) -> None:
        self._act("open")
        await super().open()

    def prepare(self, batch: Batch) -> None:
        self._act("prepare")

    async def deliver(self, batch: Batch) -> DeliveryResult:
        # wait: the call is under way while the test acts
        await asyncio.sleep(0.01)  # longer than the quick turns, so that the next batch is prepared
        self._act("deliver")
        return await super().deliver(batch)

    async def confirm(self, batches: Sequence[Batch]) -> int:
        self._act("confirm")
        return await super().confirm(batches)

    async def close(self) -> None:
        self._act("close")


@pytest.mark.usefixtures("quick_restart")
@pytest.mark.parametrize(
    "error", [OSError("cut"), MemoryError(), RecursionError(), asyncio.CancelledError(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("where", ["open", "prepare", "deliver", "confirm", "close"])
def test_whatever_a_sink_raises_all_records_are_delivered(outbox_dir: Directory, where: str, error: BaseException) -> None:
    """The thread continues, and each record is delivered once."""
    stamps = range(1, 6)
    for stamp in stamps:
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = FaultySink(where, error)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG)
    with running_worker(worker) as thread:
        assert worker.idle.wait(60)
        assert thread.stop(30)
    assert sink.error is None
    assert sink.payloads == [b"%d" % stamp for stamp in stamps]
    assert (remaining_files(outbox_dir), worker.counters.delivered, worker.lease.is_held) == ([], 5, False)


def test_a_call_that_the_sink_cancels_itself_is_retried(outbox_dir: Directory) -> None:
    """The cancellation counts as a result, and does not end the loop."""
    seal_batch(outbox_dir, 1, b"1")
    sink = FaultySink("deliver", asyncio.CancelledError())
    worker = make_worker(outbox_dir, sink)
    deliver_all(worker)
    assert (worker.last_error, sink.open_count, sink.payloads) == ("the sink cancelled its own call", 1, [b"1"])


def test_a_prepare_that_raises_does_not_repeat_the_call_in_flight(outbox_dir: Directory) -> None:
    """It prepares the next batch, so the current one must not be affected."""
    for stamp in range(1, 4):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    begun: list[str] = []

    class Unprepared(FaultySink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            begun.append(batch.id)
            return await super().deliver(batch)

    sink = Unprepared("prepare", ValueError("cannot be encoded"))
    deliver_all(make_worker(outbox_dir, sink))
    assert (sink.error, begun) == (None, sink.calls)


class UncancellableSink(RecordingSink):
    """Continues a cancelled call until the test releases it; counts the calls in flight."""

    def __init__(self, *, accepts: bool) -> None:
        super().__init__()
        self.accepts = accepts
        self.cancelled = self.under_way = self.most = 0
        self.over = False

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        while not self.over:
            try:
                # wait: the call is under way while the test acts
                await asyncio.sleep(0.01)  # it polls, because it swallows the cancellation
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.accepts:
                    break
        self.under_way -= 1
        return await super().deliver(batch)


def test_a_call_that_timed_out_does_not_overlap_the_next(outbox_dir: Directory) -> None:
    """A sink with one call at a time gets the next one after the first has ended."""
    seal_batch(outbox_dir, 1, b"1")
    sink = UncancellableSink(accepts=False)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(call_timeout_s=0.05))
    with running_worker(worker):
        wait_until(lambda: worker.state.reason == "the sink is still running a call that timed out")
        # wait: nothing may happen in this time
        assert not worker.idle.wait(0.1)  # long enough for another call, if one were made
        assert (sink.under_way, sink.cancelled) == (1, 1)
        sink.over = True
        assert worker.idle.wait(60)
    assert (sink.most, remaining_files(outbox_dir)) == (1, [])


def test_a_result_that_arrives_during_a_cancellation_counts(outbox_dir: Directory) -> None:
    """The delivered records are not sent again."""
    seal_batch(outbox_dir, 1, b"1")
    sink = UncancellableSink(accepts=True)
    deliver_all(make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(call_timeout_s=0.05)))
    assert (sink.cancelled, len(sink.calls), remaining_files(outbox_dir)) == (1, 1, [])


@pytest.mark.parametrize("where", ["open", "confirm"])
def test_a_method_that_hangs_is_cancelled_and_retried(outbox_dir: Directory, where: str) -> None:
    """Each wait for a sink is bounded."""

    class HangingMethodSink(RecordingSink):
        hung = 0

        async def _hang(self, there: str) -> None:
            if there == where and not self.hung:
                self.hung += 1
                # wait: the sink hangs, until it is cancelled
                await asyncio.sleep(60)  # longer than the call timeout; it is cancelled

        async def open(self) -> None:
            await self._hang("open")

        async def confirm(self, batches: Sequence[Batch]) -> int:
            await self._hang("confirm")
            return await super().confirm(batches)

    seal_batch(outbox_dir, 1, b"1")
    sink = HangingMethodSink(needs_confirmation=True)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(call_timeout_s=0.1))
    deliver_all(worker)
    assert (sink.hung, sink.payloads, remaining_files(outbox_dir)) == (1, [b"1"], [])
    assert worker.last_error


@pytest.mark.parametrize("sure", [-1, 3, None, "2", 0.5])
def test_an_invalid_confirmation_settles_nothing(outbox_dir: Directory, sure: object) -> None:
    """It is a misconfiguration. Once the sink is fixed, the batches are sent again."""
    asked: list[int] = []

    class Unsure(RecordingSink):
        is_mended = False

        async def confirm(self, batches: Sequence[Batch]) -> int:
            asked.append(len(batches))
            return await super().confirm(batches) if self.is_mended else cast("int", sure)

    batch = seal_batch(outbox_dir, 1, b"1")
    sink = Unsure(needs_confirmation=True, unconfirmed_max=2)
    clock = MovingClock()
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(recheck_s=60.0), clock=clock)
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "stopped")
        assert worker.state.reason == f"the sink confirmed {sure!r} of 1 batches; fix the sink"
        # wait: nothing may happen in this time
        assert not worker.idle.wait(0.1)  # long enough for another call, if one were made
        assert (len(asked), remaining_files(outbox_dir)) == (1, [batch + layout.SUFFIX])
        sink.is_mended = True
        clock.advance(60.0)
        assert worker.idle.wait(60)
    assert (sink.calls, remaining_files(outbox_dir)) == ([batch, batch], [])


@pytest.mark.parametrize("confirms", [False, True])
def test_a_rejection_with_any_text_becomes_a_dead_letter(outbox_dir: Directory, *, confirms: bool) -> None:
    """Also with text that cannot be encoded."""
    batch = seal_batch(outbox_dir, 1, b'"good"', b'"bad"')
    worker = make_worker(outbox_dir, FixedResultSink(PartialFailure({1: Rejection(LONE, LONE)}, 1), confirms=confirms))
    deliver_all(worker)
    assert remaining_files(outbox_dir) == [layout.dead_name(batch)]
    letter = json.loads(Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes())
    assert (letter["event"], letter["code"], letter["reason"]) == ("bad", "caf\\udce9", "caf\\udce9")


@pytest.mark.usefixtures("quick_restart")
@pytest.mark.parametrize("where", ["open", "deliver", "confirm"])
@pytest.mark.parametrize(
    "error", [OSError(LONE), SinkUnusableError(LONE), UnconfirmedError(LONE)], ids=["error", "unusable", "unconfirmed"]
)
def test_an_exception_with_any_text_is_reported(outbox_dir: Directory, where: str, error: Exception) -> None:
    """In the state and in the heartbeat; then everything is delivered."""
    seal_batch(outbox_dir, 1, b"1")
    sink = FaultySink(where, error)
    worker = make_worker(outbox_dir, sink)
    with running_worker(worker):
        assert worker.idle.wait(60)
        beat = read_heartbeat(outbox_dir)
        assert beat is not None
        assert beat.last_error.endswith("caf\\udce9")
    assert (sink.payloads, remaining_files(outbox_dir)) == ([b"1"], [])


@pytest.mark.parametrize("answer", [Retry(LONE), Misconfigured(LONE)], ids=["retry", "misconfigured"])
def test_a_retry_with_any_text_is_reported(outbox_dir: Directory, answer: DeliveryResult) -> None:
    """It delays the batch, and has no other effect."""
    seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink([answer])
    worker = make_worker(outbox_dir, sink)
    deliver_all(worker)
    assert (worker.last_error, sink.payloads, remaining_files(outbox_dir)) == ("caf\\udce9", [b"1"], [])
