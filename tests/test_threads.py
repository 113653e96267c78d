"""Many threads in one outbox at once, and in what they share: on a free-threaded Python they run at the same moment.

With the interpreter lock they change places as often as it can be had.
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
def _restless() -> Iterator[None]:
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_in_threads(*works: Callable[[], object]) -> None:
    """Run each in a thread, all from one moment on; raises the first of what they raise."""
    start = threading.Barrier(len(works))
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        start.wait(10)
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - the test's, not the thread's
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure


class Caller:
    """Stores events with ids of its own, and knows which were accepted."""

    def __init__(self, outbox: Outbox, name: str) -> None:
        self.outbox = outbox
        self.name = name
        self.accepted: list[str] = []
        self.dropped = 0
        self._numbers = itertools.count()

    def make_event(self) -> TrackingEvent:
        return event(1, event_id=f"{self.name}-{next(self._numbers)}")

    def record_outcome(self, made: TrackingEvent, outcome: Outcome) -> None:
        if outcome:
            self.accepted.append(made.event_id)
        else:
            self.dropped += 1

    def enqueue_one(self) -> None:
        made = self.make_event()
        self.record_outcome(made, self.outbox.enqueue(made))

    def enqueue_with_power(self) -> None:
        made = self.make_event()
        self.record_outcome(made, self.outbox.enqueue(made, durability="power"))

    def enqueue_many(self) -> None:
        made = [self.make_event() for _ in range(random.randrange(1, 12))]
        for each, outcome in zip(made, self.outbox.enqueue_many(made), strict=True):
            self.record_outcome(each, outcome)

    def enqueue_in_coroutines(self) -> None:
        async def store(made: TrackingEvent) -> None:
            self.record_outcome(made, await self.outbox.enqueue_async(made, durability="power"))

        async def store_all() -> None:
            await asyncio.gather(*[store(self.make_event()) for _ in range(20)])

        asyncio.run(store_all())


def repeat_until(end: threading.Event, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        while not end.is_set():
            work()

    return run


def test_whatever_threads_do_with_one_outbox_each_event_arrives_once_and_the_account_balances(tmp_path: Path) -> None:
    """They store in every way, flush, read, and close it in the middle of all that; files hold three events."""
    url = f"sqlite:///{tmp_path}/events.db"
    outbox = Outbox(str(tmp_path / "outbox"), sink=url, batch_size=3, flush_interval=0.01)
    ways = [
        Caller.enqueue_one,
        Caller.enqueue_one,
        Caller.enqueue_many,
        Caller.enqueue_with_power,
        Caller.enqueue_with_power,
        Caller.enqueue_in_coroutines,
    ]
    callers = [Caller(outbox, str(number)) for number in range(len(ways))]
    end = threading.Event()

    def close() -> None:
        end.wait(BUSY_S)
        outbox.close(30)
        end.set()

    calls = [repeat_until(end, partial(way, caller)) for way, caller in zip(ways, callers, strict=True)]
    run_in_threads(close, *calls, repeat_until(end, outbox.stats), repeat_until(end, lambda: outbox.flush(0.05)))
    accepted = [each for caller in callers for each in caller.accepted]
    assert all(caller.accepted for caller in callers)
    assert outbox.stats().accepted == len(accepted)
    with Outbox(str(tmp_path / "outbox"), sink=url) as again:
        assert again.flush(30)
        assert again.stats().duplicates == 0
        assert reconcile(again._directory).balances
    with closing(sqlite3.connect(tmp_path / "events.db")) as database:
        arrived = Counter(event_id for (event_id,) in database.execute("SELECT event_id FROM tracking_event"))
    assert arrived == Counter(accepted)
    assert outbox.stats().delivered + again.stats().delivered == len(accepted)
