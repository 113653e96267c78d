"""Helpers for tests of delivery: sealed batches, a worker, and sinks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pillarbox.clock import SystemClock
from pillarbox.delivery.config import DEFAULT_LIMITS, Backoff, DeliveryConfig, SettlementLimits
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import Batch, DeliveryResult, Rejected, Rejection
from pillarbox.store import layout, record
from pillarbox.testing import RecordingSink

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.sinks.base import Sink
    from pillarbox.store.directory import Directory

QUICK_CONFIG = DeliveryConfig(poll_interval_s=0.01, recheck_s=0.01, backoff=Backoff(base_s=0.001, max_s=0.002))
REJECTION = Rejection("no", "it says so")


def seal_batch(directory: Directory, stamp: int, *payloads: bytes, raw: bytes = b"") -> str:
    name = layout.sealed_name(stamp, "u")
    Path(directory.path_of(name)).write_bytes(b"".join(map(record.line, payloads)) + raw)
    return layout.batch_id(name)


def make_worker(
    directory: Directory,
    sink: Sink,
    released_bytes: list[int] | None = None,
    config: DeliveryConfig = QUICK_CONFIG,
    limits: SettlementLimits = DEFAULT_LIMITS,
    clock: Clock | None = None,
    on_bytes_saved: Callable[[int], None] = lambda _bytes: None,
) -> Worker:
    callbacks = DeliveryCallbacks(
        (released_bytes if released_bytes is not None else []).append, on_bytes_saved=on_bytes_saved, is_busy=lambda: True
    )
    return Worker(directory, NamedSink(sink, "test"), clock or SystemClock(), config._replace(limits=limits), callbacks)


def drain_worker(worker: Worker) -> None:
    """Run the worker until nothing is pending."""

    async def until_idle() -> None:
        running = asyncio.create_task(worker.run())
        assert await asyncio.to_thread(worker.idle.wait, 60), worker.state
        worker.end()
        await running

    asyncio.run(until_idle())


def remaining_files(directory: Directory) -> list[str]:
    return sorted(set(os.listdir(directory.path)) - {layout.DELIVER_LOCK})


class PoisonedSink(RecordingSink):
    """Rejects every call with a poisoned record, without naming it."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        if any(b"poison" in payload for payload in batch.payloads):
            self.calls.append(batch.id)
            return Rejected(REJECTION)
        return await super().deliver(batch)


class MovingClock(SystemClock):
    """The system clocks plus an offset: `advance` moves both, `step` only the wall clock."""

    def __init__(self) -> None:
        self._advanced = self._stepped = 0.0

    def micros(self) -> int:
        return super().micros() + int((self._advanced + self._stepped) * 1e6)

    def monotonic(self) -> float:
        return super().monotonic() + self._advanced

    def advance(self, seconds: float) -> None:
        self._advanced += seconds

    def step(self, seconds: float) -> None:
        self._stepped += seconds
