"""Several requests in flight, and a destination that asks for a pause."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Rejected, Rejection, Retry, SinkCapabilities
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import REJECTION, drain_worker, make_worker, remaining_files, seal_batch

QUICK = DeliveryConfig(poll_interval_s=0.01, recheck_s=0.02, backoff=Backoff(base_s=0.001, max_s=0.002), max_in_flight=4)


class SlowSink(RecordingSink):
    """Takes longer for earlier batches; counts the calls in flight."""

    def __init__(self, *, concurrent: bool = True, confirms: bool = False) -> None:
        super().__init__(needs_confirmation=confirms, unconfirmed_max=16)
        self.capabilities = self.capabilities._replace(concurrent=concurrent)
        self.under_way = 0
        self.most = 0
        self.chance = random.Random(1)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            # wait: calls take different times, so that they end in another order
            await asyncio.sleep(self.chance.uniform(0.0, 0.01))
            return await super().deliver(batch)
        finally:
            self.under_way -= 1


@pytest.mark.parametrize("confirms", [False, True])
def test_several_batches_are_sent_at_once_and_each_is_settled_by_itself(outbox_dir: Directory, *, confirms: bool) -> None:
    """Never more than configured. They complete out of order, and none is lost."""
    for stamp in range(1, 41):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = SlowSink(confirms=confirms)
    worker = make_worker(outbox_dir, sink, config=QUICK)
    drain_worker(worker)
    assert sink.most == 4
    assert sorted(sink.payloads, key=int) == [b"%d" % stamp for stamp in range(1, 41)]
    assert sink.payloads != sorted(sink.payloads, key=int)
    assert (remaining_files(outbox_dir), worker.counters.delivered, worker.counters.flushed_files) == ([], 40, 40)


def test_a_sink_without_concurrency_gets_one_batch_at_a_time(outbox_dir: Directory) -> None:
    """Whatever is configured; the batches arrive in order."""
    for stamp in range(1, 11):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = SlowSink(concurrent=False)
    drain_worker(make_worker(outbox_dir, sink, config=QUICK))
    assert (sink.most, sink.payloads) == (1, [b"%d" % stamp for stamp in range(1, 11)])


def test_if_the_destination_asks_for_a_pause_all_requests_wait(outbox_dir: Directory) -> None:
    """No call is made before that time."""

    class Busy(SlowSink):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []
            self.asked_at: float | None = None

        async def deliver(self, batch: Batch) -> DeliveryResult:
            now = asyncio.get_running_loop().time()
            self.times.append(now)
            if len(self.times) == 3:
                self.asked_at = now
                return Retry("slowly", 0.3)
            return await super().deliver(batch)

    for stamp in range(1, 21):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = Busy()
    drain_worker(make_worker(outbox_dir, sink, config=QUICK))
    assert sink.asked_at is not None
    after = sorted(moment - sink.asked_at for moment in sink.times if moment > sink.asked_at)
    # Calls due at the same moment may begin a little later.
    begun = [moment for moment in after if moment < 0.3]
    assert len(begun) < QUICK.max_in_flight
    assert after[len(begun)] < 30.0
    assert sorted(sink.payloads, key=int) == [b"%d" % stamp for stamp in range(1, 21)]


def test_a_failing_request_does_not_prevent_the_settlement_of_others(outbox_dir: Directory) -> None:
    """Whatever the results are, every record is delivered once or becomes a dead letter."""

    class Random(SlowSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            match self.chance.randrange(5):
                case 0:
                    return Retry("not now")
                case 1:
                    raise OSError("cut")
                case 2 if len(batch) > 1:
                    return Rejected(Rejection("too_large", "half of it would do"))
            return await super().deliver(batch)

    for stamp in range(1, 61):
        seal_batch(outbox_dir, stamp, b"%d" % stamp, b"-%d" % stamp)
    sink = Random()
    worker = make_worker(outbox_dir, sink, config=QUICK)
    drain_worker(worker)
    assert Counter(sink.payloads) == Counter([b"%d" % stamp for stamp in (*range(1, 61), *range(-60, 0))])
    assert (remaining_files(outbox_dir), worker.counters.dead) == ([], 0)


def test_a_worker_finishes_the_calls_in_flight_before_it_ends(outbox_dir: Directory) -> None:
    """Their batches are settled; the others stay pending."""

    class Held(RecordingSink):
        def __init__(self) -> None:
            super().__init__()
            self.capabilities = SinkCapabilities(deduplicates_by="nothing", survives="process", concurrent=True)
            self.waiting = 0
            self.go_on = asyncio.Event()

        async def deliver(self, batch: Batch) -> DeliveryResult:
            self.waiting += 1
            await self.go_on.wait()
            if batch.payloads == [b"2"]:
                return Retry("not now", 60.0)
            return await super().deliver(batch)

    for stamp in range(1, 4):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = Held()
    worker = make_worker(outbox_dir, sink, config=QUICK)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: sink.waiting == 3)
    worker.end()
    assert thread._loop is not None
    thread._loop.call_soon_threadsafe(sink.go_on.set)
    assert thread.stop(30)
    assert sorted(sink.payloads) == [b"1", b"3"]
    assert len(remaining_files(outbox_dir)) == 1


@pytest.mark.parametrize("after", [0.05, 0.2])
def test_the_pause_that_a_destination_asks_for_is_exact(outbox_dir: Directory, after: float) -> None:
    """The next call is not earlier, and no backoff is added, which could be days."""
    times: list[float] = []

    class CallTimeSink(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            times.append(asyncio.get_running_loop().time())
            return await super().deliver(batch)

    seal_batch(outbox_dir, 1, b"1")
    rules = DeliveryConfig(poll_interval_s=0.01, backoff=Backoff(base_s=1e6, max_s=1e6))
    drain_worker(make_worker(outbox_dir, CallTimeSink([Retry("busy", after)]), config=rules))
    assert after <= times[1] - times[0] < 50.0


def test_a_call_that_takes_too_long_is_cancelled_and_retried(outbox_dir: Directory) -> None:
    """The reason contains the timeout."""
    hung: list[str] = []

    class HangingCallSink(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            if not hung:
                hung.append(batch.id)
                # wait: the sink hangs, until it is cancelled
                await asyncio.sleep(60)  # longer than the call timeout; it is cancelled
            return Delivered(len(batch))

    seal_batch(outbox_dir, 1, b"1")
    worker = make_worker(outbox_dir, HangingCallSink(), config=QUICK._replace(call_timeout_s=0.05))
    drain_worker(worker)
    assert worker.last_error == "no answer within 0.05 s"
    assert (remaining_files(outbox_dir), REJECTION.code) == ([], "no")
