"""Poisoned records or a bad deploy: whether a wholly rejected batch is dead-lettered depends on what else is accepted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, PartialFailure, Rejected, SinkCapabilities
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import REJECTION, PoisonedSink, drain_worker, make_worker, remaining_files, seal_batch

SLOW = DeliveryConfig(poll_interval_s=0.01, recheck_s=0.05, backoff=Backoff(base_s=0.001, max_s=0.002))


class BadDeploySink(RecordingSink):
    """Rejects everything while the deploy is bad, and afterwards only poisoned records."""

    def __init__(self) -> None:
        super().__init__()
        self.is_bad = True
        self.is_fixed = False  # from the next batch on

    async def deliver(self, batch: Batch) -> DeliveryResult:
        if self.is_fixed and ":" not in batch.id:  # not in the middle of a batch: what was rejected of it is final then
            self.is_bad = False
        if self.is_bad or any(b"poison" in payload for payload in batch.payloads):
            self.calls.append(batch.id)
            return Rejected(REJECTION)
        return await super().deliver(batch)


class NamingSink(RecordingSink):
    """Names each rejected record, and accepts the others."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.calls.append(batch.id)
        refused = {index: REJECTION for index, payload in enumerate(batch.payloads) if b"poison" in payload}
        self.batches[batch.id] = [payload for payload in batch.payloads if b"poison" not in payload]
        return PartialFailure(refused, len(batch) - len(refused)) if refused else Delivered(len(batch))


def calls_per_attempt(sink: RecordingSink) -> list[int]:
    """The number of calls of each attempt with a batch, in order."""
    tries: list[int] = []
    for call in list(sink.calls):
        if ":" not in call:
            tries.append(0)
        tries[-1] += 1
    return tries


def dead_in(outbox_dir: Directory) -> list[bytes]:
    return sorted(
        json.dumps(json.loads(line)["event"]).encode()
        for name in remaining_files(outbox_dir)
        if layout.kind_of(name) is layout.Kind.DEAD
        for line in Path(outbox_dir.path_of(name)).read_bytes().splitlines()
    )


@pytest.mark.parametrize("sink", [PoisonedSink, NamingSink])
def test_a_batch_of_one_record_is_decided_after_another_batch_is_accepted(
    outbox_dir: Directory, sink: type[RecordingSink]
) -> None:
    """By itself, its rejection proves nothing; it is sent once more."""
    batch = seal_batch(outbox_dir, 1, b'"poison"')
    chosen = sink()
    worker = make_worker(outbox_dir, chosen, config=SLOW)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: len(chosen.calls) >= 3)
    assert remaining_files(outbox_dir) == [batch + layout.SUFFIX]
    assert (worker.state.name, worker.idle.is_set()) == ("degraded", False)
    reason = "1 batch wholly rejected; dead-lettering waits for the next accepted batch; no: it says so"
    assert worker.state.reason == reason
    seal_batch(outbox_dir, 2, b'"good"')
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert dead_in(outbox_dir) == [b'"poison"']
    assert (chosen.payloads, remaining_files(outbox_dir)) == ([b'"good"'], [layout.dead_name(batch)])


@pytest.mark.parametrize("records", [1, 2, 500])
def test_several_wholly_rejected_batches_stop_delivery_and_dead_letter_nothing(
    outbox_dir: Directory, caplog: pytest.LogCaptureFixture, records: int
) -> None:
    """The destination is tried again at intervals, with few calls. Delivery resumes once it works."""
    caplog.set_level(logging.INFO, "pillarbox")
    payloads = [[b"%d" % (stamp * 1000 + number) for number in range(records)] for stamp in range(1, 9)]
    for stamp, lines in enumerate(payloads, 1):
        seal_batch(outbox_dir, stamp, *lines)
    sink = BadDeploySink()
    worker = make_worker(outbox_dir, sink, config=SLOW)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "stopped")
    calls = len(sink.calls)
    assert max(calls_per_attempt(sink)) <= 2 * 9 + 4
    # Three at first, and one more at each attempt.
    assert re.fullmatch(
        r"\d consecutive batches wholly rejected; waiting batches are kept: no: it says so", worker.state.reason
    )
    assert worker.state.retry_at_micros is not None
    wait_until(lambda: len(sink.calls) > calls)
    assert len(remaining_files(outbox_dir)) == 8
    sink.is_fixed = True
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert (remaining_files(outbox_dir), worker.counters.dead, worker.counters.delivered) == ([], 0, 8 * records)
    assert sorted(sink.payloads) == sorted(payload for lines in payloads for payload in lines)
    stops = [entry for entry in caplog.records if "stopped: 3 consecutive batches" in entry.message]
    assert [entry.levelno for entry in stops] == [logging.ERROR]


def test_after_a_bad_deploy_the_poisoned_records_are_found(outbox_dir: Directory) -> None:
    """Also if all records of the oldest batches are poisoned, in more batches than stop delivery."""
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b'"poison %d"' % stamp)
    for stamp in range(6, 9):
        seal_batch(outbox_dir, stamp, b'"good %d"' % stamp)
    sink = BadDeploySink()
    worker = make_worker(outbox_dir, sink, config=SLOW)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "stopped")
    assert dead_in(outbox_dir) == []
    sink.is_fixed = True
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert dead_in(outbox_dir) == [b'"poison %d"' % stamp for stamp in range(1, 6)]
    assert sorted(sink.payloads) == [b'"good %d"' % stamp for stamp in range(6, 9)]


def test_a_batch_that_begins_with_poisoned_records_is_delivered_except_for_these(outbox_dir: Directory) -> None:
    """Many of them at the start look like a bad deploy until the next batch is accepted."""
    batch = seal_batch(outbox_dir, 1, *([b'"poison"'] * 100 + [b'"good"'] * 100))
    seal_batch(outbox_dir, 2, b'"next"')
    sink = PoisonedSink()
    worker = make_worker(outbox_dir, sink, config=SLOW)
    drain_worker(worker)
    assert (worker.counters.dead, worker.counters.delivered) == (100, 101)
    assert remaining_files(outbox_dir) == [layout.dead_name(batch)]


def test_with_the_circuit_breaker_off_a_whole_rejection_is_final(outbox_dir: Directory) -> None:
    """With `stop_after_rejected_batches = 0`."""
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b'"poison %d"' % stamp)
    worker = make_worker(outbox_dir, PoisonedSink(), config=SLOW._replace(stop_after_rejected_batches=0))
    drain_worker(worker)
    assert worker.counters.dead == 5


class CombiningSink(PoisonedSink):
    """Combines several files in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = SinkCapabilities(deduplicates_by="event_id", survives="process", combines_files=True)


def test_small_files_that_are_rejected_together_are_then_sent_one_by_one(outbox_dir: Directory) -> None:
    """Each is a batch of its own, so a bad one does not affect the others."""
    for stamp in range(1, 4):
        seal_batch(outbox_dir, stamp, b'"poison %d"' % stamp)
    sink = CombiningSink()
    worker = make_worker(outbox_dir, sink, config=SLOW)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "stopped")
    seal_batch(outbox_dir, 4, b'"good"')
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert dead_in(outbox_dir) == [b'"poison %d"' % stamp for stamp in range(1, 4)]
    assert sink.payloads == [b'"good"']


def test_small_files_in_one_call_each_have_their_own_dead_letters(outbox_dir: Directory) -> None:
    """With the index of each record in its own file."""
    first = seal_batch(outbox_dir, 1, b"1", b'"poison"', b"2")
    second = seal_batch(outbox_dir, 2, b"3", raw=b"damaged\n")
    third = seal_batch(outbox_dir, 3, b"4", b"5", b'"poison"')
    sink = CombiningSink()
    worker = make_worker(outbox_dir, sink, config=SLOW)
    drain_worker(worker)
    assert sorted(sink.payloads) == [b"1", b"2", b"3", b"4", b"5"]
    found = {name: Path(outbox_dir.path_of(name)).read_bytes() for name in remaining_files(outbox_dir)}
    assert set(found) == {
        layout.dead_name(first),
        layout.dead_name(third),
        layout.corrupt_name(second),
        layout.ranges_name(second),
    }
    assert json.loads(found[layout.dead_name(first)])["index"] == 1
    assert json.loads(found[layout.dead_name(third)])["index"] == 2
    assert worker.counters.flushed_files == 3


def test_many_small_files_take_few_calls_if_the_sink_combines_files(outbox_dir: Directory) -> None:
    """A call has at most as many records as a full file, and a full file is sent alone."""
    for stamp in range(1, 101):
        seal_batch(outbox_dir, stamp, *[b"%d" % stamp] * 10)
    seal_batch(outbox_dir, 101, *[b"101"] * 500)
    sink = CombiningSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert len(sink.calls) == 3
    assert [len(payloads) for payloads in sink.batches.values()] == [500, 500, 500]
    assert sink.payloads == sorted(sink.payloads, key=int)
    assert (worker.counters.flushed_files, remaining_files(outbox_dir)) == (101, [])
