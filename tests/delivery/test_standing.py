"""One state, told in the heartbeat as in the worker itself; and a heart that stops where a sink blocks."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from pillarbox.delivery.lease import last_heartbeat
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.sinks.base import Answer, Batch, Misconfigured, Retry
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.stage import QUICK, seal, worker_for


class Held(RecordingSink):
    """Takes its time, with the event loop free or not."""

    def __init__(self, *, blocks: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.begun = threading.Event()
        self.go_on = threading.Event()

    async def deliver(self, batch: Batch) -> Answer:
        self.begun.set()
        if self.blocks:
            self.go_on.wait(20)
        await asyncio.to_thread(self.go_on.wait, 20)
        return await super().deliver(batch)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_slow_destination_is_told_from_a_deliverer_that_hangs(place: Directory, *, blocks: bool) -> None:
    """Only the former's heart goes on beating."""
    seal(place, 1, b"1")
    sink = Held(blocks=blocks)
    worker = worker_for(place, sink, rules=QUICK)
    thread = DeliveryThread(worker)
    thread.start()
    assert sink.begun.wait(10)
    first = last_heartbeat(place)
    assert first is not None
    beats = threading.Event()
    for _ in range(30):
        beats.wait(0.1)
        last = last_heartbeat(place)
        if last is not None and last.at_micros > first.at_micros + 1_500_000:
            break
    assert last is not None
    assert (last.at_micros > first.at_micros + 1_500_000) != blocks
    sink.go_on.set()
    assert worker.idle.wait(10)
    assert thread.stop(5)


def test_each_state_is_the_same_in_the_heartbeat_and_logged_once(place: Directory, caplog: pytest.LogCaptureFixture) -> None:
    """With the reason, the time of the next try, and totals."""
    caplog.set_level(logging.INFO, "pillarbox")
    answers: list[Answer | Exception] = [Retry("busy", 0.3), Retry("busy", 0.3), Misconfigured("no such table")]
    sink = RecordingSink(answers)
    worker = worker_for(place, sink, rules=QUICK._replace(recheck_s=0.3))
    seal(place, 1, b"1")
    thread = DeliveryThread(worker)
    thread.start()
    for name, reason in (("waiting", "busy"), ("stopped", "no such table")):
        wait_until(lambda name=name: worker.state.name == name)  # type: ignore[misc]
        beat = last_heartbeat(place)
        assert beat is not None
        assert (beat.state.name, beat.state.reason, beat.last_error) == (name, reason, reason)
        assert beat.state.retry_at_micros is not None
        assert abs(beat.state.retry_at_micros - beat.at_micros - 300_000) < 50_000
    assert worker.idle.wait(10)
    assert thread.stop(5)
    said = [entry.message for entry in caplog.records if entry.message.startswith("test: ")]
    assert said == [
        "test: waiting: busy (delivered 0, dead letters 0, failed attempts 1)",
        "test: stopped: no such table (delivered 0, dead letters 0, failed attempts 3)",
        "test: draining (delivered 0, dead letters 0, failed attempts 3)",
    ]
