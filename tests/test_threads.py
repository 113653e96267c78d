"""Many threads use one outbox at once. On a free-threaded Python, they run in parallel.

With the interpreter lock, they switch as often as possible.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from pillarbox import Outbox, Outcome
from pillarbox.event import TrackingEvent
from pillarbox.store.reconciliation import reconcile
from tests.conftest import event

BUSY_S = 2.0


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    """Let threads switch as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_in_threads(*functions: Callable[[], object]) -> None:
    """Run each function in a thread, all starting at the same moment. Raises the first error of a thread."""
    start = threading.Barrier(len(functions))
    failures: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        start.wait(10)
        try:
            function()
        except BaseException as failure:  # noqa: BLE001 - the test raises it again
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure


class Caller:
    """Enqueues events with ids of its own, and records which were accepted."""

    def __init__(self, outbox: Outbox, name: str) -> None:
        self.outbox = outbox
        self.name = name
        self.accepted: list[str] = []
        self.dropped = 0
        self._numbers = itertools.count()

    def make_event(self) -> TrackingEvent:
        return event(1, event_id=f"{self.name}-{next(self._numbers)}")

    def record_outcome(self, created: TrackingEvent, outcome: Outcome) -> None:
        if outcome:
            self.accepted.append(created.event_id)
        else:
            self.dropped += 1

    def enqueue_one(self) -> None:
        created = self.make_event()
        self.record_outcome(created, self.outbox.enqueue(created))

    def enqueue_with_power(self) -> None:
        created = self.make_event()
        self.record_outcome(created, self.outbox.enqueue(created, durability="power"))

    def enqueue_many(self) -> None:
        created = [self.make_event() for _ in range(random.randrange(1, 12))]
        for single, outcome in zip(created, self.outbox.enqueue_many(created), strict=True):
            self.record_outcome(single, outcome)

    def enqueue_in_coroutines(self) -> None:
        async def store(created: TrackingEvent) -> None:
            self.record_outcome(created, await self.outbox.enqueue_async(created, durability="power"))

        async def store_all() -> None:
            await asyncio.gather(*[store(self.make_event()) for _ in range(20)])

        asyncio.run(store_all())


def repeat_until(end: threading.Event, function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        while not end.is_set():
            function()

    return run


def test_many_threads_use_one_outbox_and_each_event_arrives_once(tmp_path: Path) -> None:
    """They enqueue with every method, flush, read statistics, and one closes the outbox meanwhile. Each batch has three events; the ledger balances."""
    url = f"sqlite:///{tmp_path}/events.db"
    outbox = Outbox(str(tmp_path / "outbox"), sink=url, batch_size=3, flush_interval=0.01)
    methods = [
        Caller.enqueue_one,
        Caller.enqueue_one,
        Caller.enqueue_many,
        Caller.enqueue_with_power,
        Caller.enqueue_with_power,
        Caller.enqueue_in_coroutines,
    ]
    callers = [Caller(outbox, str(number)) for number in range(len(methods))]
    end = threading.Event()

    def close() -> None:
        end.wait(BUSY_S)
        outbox.close(30)
        end.set()

    calls = [repeat_until(end, partial(method, caller)) for method, caller in zip(methods, callers, strict=True)]
    run_in_threads(close, *calls, repeat_until(end, outbox.stats), repeat_until(end, lambda: outbox.flush(0.05)))
    accepted = [event_id for caller in callers for event_id in caller.accepted]
    assert all(caller.accepted for caller in callers)
    assert outbox.stats().accepted == len(accepted)
    with Outbox(str(tmp_path / "outbox"), sink=url) as reopened:
        assert reopened.flush(30)
        assert reopened.stats().duplicates == 0
        assert reconcile(reopened._directory).balances
    with closing(sqlite3.connect(tmp_path / "events.db")) as database:
        arrived = Counter(event_id for (event_id,) in database.execute("SELECT event_id FROM tracking_event"))
    assert arrived == Counter(accepted)
    assert outbox.stats().delivered + reopened.stats().delivered == len(accepted)
