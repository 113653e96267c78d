"""Limits of dead letters and quarantine, and the age limit of batches. They apply only if the operator sets them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pillarbox.delivery.config import SettlementLimits
from pillarbox.delivery.retry import EXPIRY_MIN_FAILING_S
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.sinks.base import Batch, DeliveryResult, PartialFailure, Retry
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import (
    QUICK_CONFIG,
    REJECTION,
    MovingClock,
    drain_worker,
    make_worker,
    remaining_files,
    seal_batch,
)


class RejectingSink(RecordingSink):
    """Rejects the poisoned records by index, and accepts the others."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        refused = {index: REJECTION for index, payload in enumerate(batch.payloads) if b"poison" in payload}
        answer = await super().deliver(batch)
        return PartialFailure(refused, len(batch) - len(refused)) if refused else answer


@pytest.mark.parametrize(
    ("what", "kept", "lines", "raw"),
    [
        ("dead", SettlementLimits(max_dead_bytes=250), [b'"good"', b'"poison"'], b""),
        ("quarantine", SettlementLimits(max_quarantine_bytes=80), [b'"good"'], b"damaged\n"),
    ],
)
def test_a_file_that_would_exceed_the_limit_is_held_and_the_others_are_delivered(
    outbox_dir: Directory, what: str, kept: SettlementLimits, lines: list[bytes], raw: bytes
) -> None:
    """The state names the limit and the remedy. Once there is space, the file is settled."""
    seal_batch(outbox_dir, 1, *lines, raw=raw)
    second = seal_batch(outbox_dir, 2, *lines, raw=raw)
    seal_batch(outbox_dir, 3, b'"next"')
    sink = RejectingSink()
    worker = make_worker(outbox_dir, sink, limits=kept)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: b'"next"' in sink.payloads and worker.state.name == "degraded")
    calls = len(sink.calls)
    assert second + layout.SUFFIX in remaining_files(outbox_dir)
    assert f"max_{what}_bytes = " in worker.state.reason
    assert f"pillarbox {what} list" in worker.state.reason
    looked = worker.counters.failed_flushes
    for name in remaining_files(outbox_dir):
        if layout.kind_of(name) in {layout.Kind.DEAD, layout.Kind.CORRUPT, layout.Kind.RANGES}:
            outbox_dir.remove(name)
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert (len(sink.calls), looked) == (calls + 1, 1)
    expected = [layout.dead_name(second)] if what == "dead" else [layout.corrupt_name(second), layout.ranges_name(second)]
    assert remaining_files(outbox_dir) == expected
    assert worker.state.name == "idle"


def test_with_discard_records_above_the_limit_are_discarded_and_counted(
    outbox_dir: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """An error is logged once."""
    first = seal_batch(outbox_dir, 1, b'"poison"', b'"good"')
    for stamp in range(2, 6):
        seal_batch(outbox_dir, stamp, b'"poison"', b'"good"')
    worker = make_worker(outbox_dir, RejectingSink(), limits=SettlementLimits(max_dead_bytes=250, discard_when_full=True))
    with caplog.at_level(logging.ERROR, "pillarbox"):
        drain_worker(worker)
    assert remaining_files(outbox_dir) == [layout.dead_name(first)]
    counters = worker.counters
    assert (counters.dead, counters.discarded, counters.delivered) == (5, 4, 5)
    assert len([entry for entry in caplog.records if "discarding rejected or damaged records" in entry.message]) == 1


def test_a_batch_that_is_sent_again_does_not_count_its_earlier_dead_letters(outbox_dir: Directory) -> None:
    """After a kill between dead letters and deletion, the same bytes are overwritten."""
    seal_batch(outbox_dir, 1, b'"poison"', b'"good"')
    name = remaining_files(outbox_dir)[0]
    data = Path(outbox_dir.path_of(name)).read_bytes()
    kept = SettlementLimits(max_dead_bytes=250)
    drain_worker(make_worker(outbox_dir, RejectingSink(), limits=kept))
    Path(outbox_dir.path_of(name)).write_bytes(data)
    drain_worker(make_worker(outbox_dir, RejectingSink(), limits=kept))
    assert [layout.kind_of(found) for found in remaining_files(outbox_dir)] == [layout.Kind.DEAD]


class UnreachableSink(RecordingSink):
    """Is never reachable; each call advances the clock."""

    def __init__(self, clock: MovingClock, seconds: float, calls: int) -> None:
        super().__init__()
        self.clock, self.seconds, self.left = clock, seconds, calls

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.clock.advance(self.seconds)
        self.left -= 1
        return Retry("down") if self.left >= 0 else await super().deliver(batch)


def test_without_an_age_limit_no_batch_expires(outbox_dir: Directory) -> None:
    """Not even after ten years."""
    clock = MovingClock()
    seal_batch(outbox_dir, clock.micros(), b"1")
    sink = UnreachableSink(clock, 86_400.0 * 365, 10)
    worker = make_worker(Directory(outbox_dir.path, outbox_dir.filesystem, clock), sink, clock=clock)
    drain_worker(worker)
    assert (sink.payloads, worker.counters.dead) == ([b"1"], 0)


def test_records_become_dead_letters_past_the_age_limit(outbox_dir: Directory) -> None:
    """With the age limit as the reason; younger batches are still retried."""
    clock = MovingClock()
    old = seal_batch(outbox_dir, clock.micros(), b"1", b"2")
    young = Directory(outbox_dir.path, outbox_dir.filesystem, clock)
    sink = UnreachableSink(clock, 3600.0, 3)
    worker = make_worker(young, sink, config=QUICK_CONFIG._replace(max_age_s=7000.0), clock=clock)
    seal_batch(outbox_dir, clock.micros() + int(7200e6), b"3")
    drain_worker(worker)
    letters = [json.loads(line) for line in Path(outbox_dir.path_of(layout.dead_name(old))).read_bytes().splitlines()]
    assert [(letter["event"], letter["code"], letter["attempts"]) for letter in letters] == [
        (1, "too_old", 2),
        (2, "too_old", 2),
    ]
    assert letters[0]["reason"] == "not delivered within 7000 s of being sealed"
    assert sink.payloads == [b"3"]


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_jump_makes_no_batch_old(outbox_dir: Directory, jump: float) -> None:
    """While the worker runs, in either direction."""
    clock = MovingClock()
    seal_batch(outbox_dir, clock.micros(), b"1")

    class Jumping(UnreachableSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            clock.step(jump)
            return await super().deliver(batch)

    sink = Jumping(clock, EXPIRY_MIN_FAILING_S, 3)
    worker = make_worker(
        Directory(outbox_dir.path, outbox_dir.filesystem, clock),
        sink,
        config=QUICK_CONFIG._replace(max_age_s=86_400.0),
        clock=clock,
    )
    drain_worker(worker)
    assert (sink.payloads, worker.counters.dead) == ([b"1"], 0)
