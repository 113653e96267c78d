"""A destination that alternates between good and bad deploys: bounds on dead letters, calls and unreported time."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.retry import EXPIRY_MIN_FAILING_S
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, PartialFailure, Rejected, Retry, SinkCapabilities
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.test_hostile_sinks import running_worker
from tests.delivery.test_rejected_batches import calls_per_attempt, dead_in
from tests.delivery.worker_setup import REJECTION, MovingClock, make_worker, remaining_files, seal_batch

RULES = DeliveryConfig(poll_interval_s=0.01, recheck_s=0.03, backoff=Backoff(base_s=0.001, max_s=0.002))
CALLS_MAX = 2 * 9 + 2 + 2  # for 500 records of which none is accepted: two calls for each halving, and a few
CALLS_MAX_PARTLY_ACCEPTED = 4 * (2 * 9 + 2) + 3  # the same if half of them are accepted
PER_SUCCESS_MAX = RULES.stop_after_rejected_batches  # batches that may be dead-lettered after one acceptance


class FlappingSink(RecordingSink):
    """Rejects every call, except for as many as the test allows."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = SinkCapabilities("event_id", "power")
        self.accepts = 0.0
        self.calls_since = 0  # the last accepted call

    async def deliver(self, batch: Batch) -> DeliveryResult:
        if not self.accepts:
            self.calls_since += 1
            self.calls.append(batch.id)
            return Rejected(REJECTION)
        self.accepts -= 1
        self.calls_since = 0
        return await super().deliver(batch)


def deferred_count(worker: Worker) -> int:
    """The number of deferred batches; the worker's thread may defer more."""
    return len(worker._poison_tracker._deferred)


def wait_until_stopped_again(worker: Worker, sink: FlappingSink, successes: int) -> None:
    """Wait until so many calls were accepted, and the worker has stopped again after another attempt."""
    # The sink accepts a call before the worker knows it, so the state may still be stopped.
    wait_until(lambda: len(sink.batches) >= successes)
    wait_until(lambda: sink.calls_since > 0 and worker.state.name == "stopped")
    assert "consecutive batches wholly rejected; waiting batches are kept: no: it says so" in worker.state.reason


@pytest.mark.parametrize(("batches", "records"), [(30, 1), (30, 20), (100, 20)])
def test_one_acceptance_dead_letters_few_of_the_deferred_batches(outbox_dir: Directory, batches: int, records: int) -> None:
    """However many were deferred, and whether others follow or not. Then delivery stops again and reports it."""
    for stamp in range(1, batches + 1):
        seal_batch(outbox_dir, stamp, *[b'"good %d %d"' % (stamp, number) for number in range(records)])
    sink = FlappingSink()
    worker = make_worker(outbox_dir, sink, config=RULES)
    with running_worker(worker):
        wait_until(lambda: deferred_count(worker) >= 30)
        sink.accepts = 1
        wait_until_stopped_again(worker, sink, 1)
        assert len(dead_in(outbox_dir)) <= PER_SUCCESS_MAX * records
        assert len(sink.payloads) + len(dead_in(outbox_dir)) + len(outbox_dir.batch_names()) * records == batches * records


def test_a_flapping_deploy_dead_letters_few_batches_each_time_and_the_others_arrive(outbox_dir: Directory) -> None:
    """Once the destination works, all other batches are delivered, and the worker is idle."""
    flaps = 4
    for stamp in range(1, 41):
        seal_batch(outbox_dir, stamp, b'"%d"' % stamp)
    sink = FlappingSink()
    worker = make_worker(outbox_dir, sink, config=RULES)
    with running_worker(worker):
        for flap in range(flaps):
            wait_until_stopped_again(worker, sink, flap)
            sink.accepts = 1
        wait_until_stopped_again(worker, sink, flaps)
        sink.accepts = float("inf")
        assert worker.idle.wait(60)
        assert worker.state.name == "idle"
    dead = dead_in(outbox_dir)
    assert len(dead) <= flaps * PER_SUCCESS_MAX
    assert Counter(sink.payloads) + Counter(dead) == Counter(b'"%d"' % stamp for stamp in range(1, 41))


def test_a_flap_takes_few_calls_per_batch(outbox_dir: Directory) -> None:
    """One batch may be halved down to single records; the others are deferred early, each time."""
    for stamp in range(1, 13):
        seal_batch(outbox_dir, stamp, *[b'"%d %d"' % (stamp, number) for number in range(500)])
    sink = FlappingSink()
    worker = make_worker(outbox_dir, sink, config=RULES)
    with running_worker(worker):
        wait_until(lambda: deferred_count(worker) == 12)
        assert max(calls_per_attempt(sink)) <= CALLS_MAX
        sink.accepts = 1
        wait_until_stopped_again(worker, sink, 1)
        given_up = len([name for name in remaining_files(outbox_dir) if layout.kind_of(name) is layout.Kind.DEAD])
        assert given_up <= PER_SUCCESS_MAX
        assert len([calls for calls in calls_per_attempt(sink) if calls > CALLS_MAX]) == given_up


def test_a_batch_that_is_always_rejected_takes_a_bounded_number_of_calls(outbox_dir: Directory) -> None:
    """At each attempt."""
    batch = seal_batch(outbox_dir, 1, *[b'"%d"' % number for number in range(500)])
    sink = FlappingSink()
    worker = make_worker(outbox_dir, sink, config=RULES._replace(recheck_s=60.0))
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "degraded")
        assert calls_per_attempt(sink) == [len(sink.calls)]
        assert len(sink.calls) <= CALLS_MAX
    assert remaining_files(outbox_dir) == [batch + layout.SUFFIX]


@pytest.mark.parametrize("first_only", [False, True])
def test_a_destination_that_names_one_rejected_record_per_call_gets_a_bounded_number_of_calls(
    outbox_dir: Directory, *, first_only: bool
) -> None:
    """The batch is not halved down to single records either."""

    class OneRejectionPerCallSink(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            self.calls.append(batch.id)
            return PartialFailure({0 if first_only else len(batch) - 1: REJECTION}, None)

    batch = seal_batch(outbox_dir, 1, *[b'"%d"' % number for number in range(500)])
    sink = OneRejectionPerCallSink()
    worker = make_worker(outbox_dir, sink, config=RULES._replace(recheck_s=60.0))
    with running_worker(worker):
        wait_until(lambda: worker.state.name == "degraded")
        assert calls_per_attempt(sink) == [len(sink.calls)]
        assert len(sink.calls) <= CALLS_MAX
    assert remaining_files(outbox_dir) == [batch + layout.SUFFIX]


def test_a_deploy_that_turns_bad_in_the_middle_of_a_batch_dead_letters_nothing(outbox_dir: Directory) -> None:
    """If the destination deduplicates, the whole batch is deferred. Once the destination works, all of it is delivered."""

    class Halfway(FlappingSink):
        is_fixed = False

        async def deliver(self, batch: Batch) -> DeliveryResult:
            if len(self.calls) == 1:
                self.accepts = max(self.accepts, 1)
            if self.is_fixed and ":" not in batch.id:  # not in the middle of an attempt: what was rejected of it would be final
                self.accepts = float("inf")
            return await super().deliver(batch)

    everything = [b'"%d %d"' % (stamp, number) for stamp in range(1, 6) for number in range(500)]
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, *everything[(stamp - 1) * 500 : stamp * 500])
    sink = Halfway()
    worker = make_worker(outbox_dir, sink, config=RULES)
    with running_worker(worker):
        wait_until_stopped_again(worker, sink, 1)
        tries = calls_per_attempt(sink)
        assert tries[0] <= CALLS_MAX_PARTLY_ACCEPTED
        assert max(tries[1:]) <= CALLS_MAX
        assert dead_in(outbox_dir) == []
        sink.is_fixed = True
        assert worker.idle.wait(60)
    assert (set(sink.payloads), dead_in(outbox_dir)) == (set(everything), [])


def test_a_stop_is_not_reported_if_a_call_in_flight_is_accepted(outbox_dir: Directory) -> None:
    """Three batches are rejected while a fourth is in flight and is accepted: delivery neither stops nor waits."""

    class Mixed(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            self.calls.append(batch.id)
            if int(batch.payloads[0]) <= RULES.stop_after_rejected_batches:
                return Rejected(REJECTION)
            # wait: a call takes this long, so that calls overlap
            await asyncio.sleep(0.05)  # still in flight when the others are rejected
            return Delivered(len(batch))

    for stamp in range(1, 9):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = Mixed()
    sink.capabilities = sink.capabilities._replace(concurrent=True)
    worker = make_worker(outbox_dir, sink, config=RULES._replace(max_in_flight=4, recheck_s=60.0))
    thread = ThreadRunner(worker)
    thread.start()
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert len(dead_in(outbox_dir)) == RULES.stop_after_rejected_batches
    assert "0 batches" not in worker.last_error
    assert worker.counters.failed_flushes == 0


@pytest.mark.parametrize(
    "answer", [Rejected(REJECTION), PartialFailure({0: REJECTION}, None), Retry("not now")], ids=["refused", "named", "not now"]
)
def test_the_age_limit_applies_to_every_result(outbox_dir: Directory, answer: DeliveryResult) -> None:
    """Also to rejections, but not before the batch has failed for long enough."""
    clock = MovingClock()
    begun = clock.monotonic()

    class Refusing(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            self.calls.append(batch.id)
            clock.advance(20.0)
            return answer

    now = clock.micros()
    for number in range(4):
        seal_batch(outbox_dir, now - 3_700_000_000 + number, b'"old %d"' % number)
    sink = Refusing()
    worker = make_worker(outbox_dir, sink, config=RULES._replace(max_age_s=3600.0), clock=clock)
    with running_worker(worker):
        wait_until(lambda: outbox_dir.batch_names() == [])
    assert clock.monotonic() - begun >= EXPIRY_MIN_FAILING_S
    assert dead_in(outbox_dir) == [b'"old %d"' % number for number in range(4)]
