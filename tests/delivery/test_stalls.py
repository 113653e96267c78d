"""A process that was suspended, and a file that another program has locked: neither means that the destination is overloaded."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from pillarbox import TrackingEvent
from pillarbox.codec import Codec
from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.pacing import PacingConfig
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.delivery.worker import Worker
from pillarbox.sinks import make_sink, sqlite
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Retry
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until
from tests.delivery.worker_setup import MovingClock, drain_worker, make_worker, remaining_files, seal_batch
from tests.sinks.http_server import CannedResponse, Request, Server

# An outage is a failure that lasts for a moment, so that a test is short.
QUICK_OUTAGE = DeliveryConfig(
    poll_interval_s=0.01, recheck_s=0.02, backoff=Backoff(base_s=0.001, max_s=0.002), pacing=PacingConfig(outage_s=0.001)
)
encode = Codec(TrackingEvent).encode


def seal_files(outbox_dir: Directory, files: int) -> None:
    for stamp in range(1, files + 1):
        seal_batch(outbox_dir, stamp, *[encode(event(stamp * 1000 + number)) for number in range(10)])


class StallingSink(RecordingSink):
    """Suspends the process and breaks the connection in its sixth call. Records the rate at each call."""

    def __init__(self, clock: MovingClock, *, suspends: bool) -> None:
        super().__init__()
        self.clock = clock
        self.suspends = suspends
        self.worker: Worker | None = None
        self.rates: list[float | None] = []

    async def deliver(self, batch: Batch) -> DeliveryResult:
        assert self.worker is not None
        self.rates.append(self.worker.counters.rate)
        await super().deliver(batch)
        if len(self.calls) == 6:
            self.clock.advance(35 if self.suspends else 0.5)
            return Retry("connection reset")
        return Delivered(len(batch))


@pytest.mark.parametrize("suspends", [True, False])
def test_a_call_during_which_the_process_was_suspended_does_not_pace_delivery(outbox_dir: Directory, suspends: bool) -> None:
    """A failed call without a suspension does."""
    seal_files(outbox_dir, 12)
    clock = MovingClock()
    sink = StallingSink(clock, suspends=suspends)
    sink.worker = make_worker(outbox_dir, sink, clock=clock, config=QUICK_OUTAGE)
    drain_worker(sink.worker)
    assert len(sink.calls) == 13
    assert any(sink.rates) is not suspends


def test_a_stopped_process_continues_at_full_speed(outbox_dir: Directory) -> None:
    """A real process is stopped for longer than the threshold of an outage. Meanwhile the server closes the connection."""
    seal_files(outbox_dir, 40)
    process: subprocess.Popen[str] | None = None
    calls = 0

    def respond(_: Request) -> CannedResponse:
        nonlocal calls
        calls += 1
        if calls == 6:
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            # wait: the process has to stand still for longer than the five seconds of an outage
            threading.Event().wait(7)
            os.kill(process.pid, signal.SIGCONT)
            return CannedResponse(503)
        return CannedResponse()

    with Server(respond) as running:
        command = [sys.executable, "-m", "pillarbox", "deliver", "-d", outbox_dir.path, "--sink", running.url(), "--once"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert calls == 41
    assert "paced" not in output


def test_a_locked_sqlite_file_does_not_pace_delivery(
    outbox_dir: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one process writes to the file, so the rate need not be reduced for other clients."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    database = tmp_path / "events.db"
    seal_files(outbox_dir, 1)
    worker = make_worker(outbox_dir, make_sink(f"sqlite:///{database}", TrackingEvent), config=QUICK_OUTAGE)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: not remaining_files(outbox_dir))
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        failures = worker.counters.failed_flushes
        seal_files(outbox_dir, 30)
        worker.notify()
        wait_until(lambda: worker.counters.failed_flushes > failures + 3)
        assert worker.state.name == "waiting"
        assert worker.counters.rate is None
        other.execute("ROLLBACK")
        wait_until(lambda: worker.state.name == "draining" or not remaining_files(outbox_dir))
        assert worker.counters.rate is None
    wait_until(lambda: not remaining_files(outbox_dir))
    thread.stop(10)
