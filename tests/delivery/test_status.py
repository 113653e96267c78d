"""The state of the worker is the same in the heartbeat. The heartbeat stops if a sink blocks the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
from typing import TYPE_CHECKING

import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import Lease, read_heartbeat
from pillarbox.delivery.pacing import PacingConfig
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.sinks.base import Batch, DeliveryResult, Misconfigured, Retry
from pillarbox.stats import State, StateName
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.worker_setup import QUICK_CONFIG, MovingClock, make_worker, seal_batch

if TYPE_CHECKING:
    from pillarbox.delivery.worker import Worker


class BlockingSink(RecordingSink):
    """Takes a long time, and may block the event loop meanwhile."""

    def __init__(self, *, blocks: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.begun = threading.Event()
        self.go_on = threading.Event()

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.begun.set()
        if self.blocks:
            self.go_on.wait(60)
        await asyncio.to_thread(self.go_on.wait, 60)
        return await super().deliver(batch)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_slow_destination_can_be_distinguished_from_a_hanging_worker(outbox_dir: Directory, *, blocks: bool) -> None:
    """With a slow destination, the heartbeat continues."""
    seal_batch(outbox_dir, 1, b"1")
    sink = BlockingSink(blocks=blocks)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG)
    thread = ThreadRunner(worker)
    thread.start()
    assert sink.begun.wait(60)
    first = read_heartbeat(outbox_dir)
    assert first is not None

    def beats() -> bool:
        last = read_heartbeat(outbox_dir)
        return last is not None and last.at_micros > first.at_micros + 1_500_000

    if blocks:
        # wait: the heartbeat must grow older than it may
        threading.Event().wait(3.0)  # two heartbeats would be due meanwhile
        assert not beats()
    else:
        wait_until(beats)
    sink.go_on.set()
    assert worker.idle.wait(60)
    assert thread.stop(30)


def test_a_heartbeat_can_be_read_while_a_shorter_one_overwrites_it(outbox_dir: Directory) -> None:
    """Between the write and the truncation."""
    lease = Lease(outbox_dir, "test", SystemClock())
    assert lease.acquire()
    lease.write_heartbeat(State("waiting", "a long story about a server that is busy"), 7, "", now=True)
    long = outbox_dir.read_small_file(layout.DELIVER_LOCK)
    lease.write_heartbeat(State("idle"), 8, "", now=True)
    short = outbox_dir.read_small_file(layout.DELIVER_LOCK)
    lease.release()
    with open(outbox_dir.path_of(layout.DELIVER_LOCK), "wb") as file:
        file.write(short + long[len(short) :])
    beat = read_heartbeat(outbox_dir)
    assert beat is not None
    assert (beat.state, beat.delivered) == (State("idle"), 8)


def wait_for_next_retry(worker: Worker, before: int) -> int:
    """Wait until the heartbeat has an attempt later than `before`; returns its time."""

    def has_next_retry() -> bool:
        beat = read_heartbeat(worker._directory)
        return (worker.state.retry_at_micros or 0) > before and beat is not None and beat.state == worker.state

    wait_until(has_next_retry)
    return worker.state.retry_at_micros or 0


def test_each_state_is_the_same_in_the_heartbeat_and_logged_once(
    outbox_dir: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """With the reason, the time of the next attempt, and the totals."""
    caplog.set_level(logging.INFO, "pillarbox")
    answers: list[DeliveryResult | Exception] = [Retry("busy", 300.0), Retry("busy", 300.0), Misconfigured("no such table")]
    sink, clock = RecordingSink(answers), MovingClock()
    rules = QUICK_CONFIG._replace(recheck_s=300.0, pacing=PacingConfig(outage_s=math.inf))
    worker = make_worker(outbox_dir, sink, config=rules, clock=clock)
    seal_batch(outbox_dir, 1, b"1")
    size = outbox_dir.pending()[0]
    thread = ThreadRunner(worker)
    thread.start()
    before = 0
    began = clock.micros()
    states: list[tuple[StateName, str]] = [("waiting", "busy"), ("waiting", "busy"), ("stopped", "no such table")]
    for name, reason in states:
        before = wait_for_next_retry(worker, before)
        beat = read_heartbeat(outbox_dir)
        assert beat is not None
        assert 0 <= (beat.failing_since_micros or 0) - began < 10_000_000  # the clock moves a little
        assert (beat.state, beat.last_error) == (State(name, reason, before), reason)
        assert 290_000_000 < before - clock.micros() <= 300_000_000
        clock.advance(300.0)
    assert worker.idle.wait(60)
    assert thread.stop(30)
    said = [entry.message for entry in caplog.records if entry.message.startswith("test: ")]
    assert [re.sub(r"after 90\d s", "after 900 s", line) for line in said] == [
        "test: waiting: busy (delivered 0, dead letters 0, failed attempts 1)",
        "test: stopped: no such table (delivered 0, dead letters 0, failed attempts 3)",
        f"test: draining, works again after 900 s; delayed: 1 file, {size} bytes (delivered 0, dead letters 0, failed attempts 3)",
    ]
    assert [entry.levelname for entry in caplog.records if entry.message.startswith("test: ")] == ["WARNING", "ERROR", "ERROR"]
