"""Pacing and the live share end to end: real files and a real worker, with an HTTP server or a sink in memory."""

from __future__ import annotations

import asyncio
import itertools
from typing import NamedTuple

import pytest

from pillarbox import TrackingEvent
from pillarbox.codec import Codec
from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.pacing import Pacer, PacingConfig
from pillarbox.delivery.worker import Worker
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import Batch, DeliveryResult
from pillarbox.store.directory import Directory
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import event
from tests.delivery.worker_setup import QUICK_CONFIG, drain_worker, make_worker, remaining_files, seal_batch
from tests.sinks.http_server import CannedResponse, Request, Server

BUSY = CannedResponse(503, b"<html>", {"Retry-After": "0"})
# Scaled down from minutes: the rate begins at a hundredth of the server's capacity, and a call takes milliseconds.
BOUNDS = PacingConfig(start_share=0.01, step_share=0.05, slow_least_s=5.0, outage_s=0.001, pause_max_s=0.2)
RULES = DeliveryConfig(poll_interval_s=0.01, recheck_s=0.02, backoff=Backoff(base_s=0.001, max_s=0.002), pacing=BOUNDS)
LISTING_S = 0.002
encode = Codec(TrackingEvent).encode


class ReceivedCall(NamedTuple):
    """A call that arrived, and the state of the worker at that moment."""

    events: int
    rate: float | None
    state: str


class RecoveringServer:
    """Responds busy a number of times after its first good responses, and then works again. Records the worker's state at each call."""

    def __init__(self, good: int, busy: int) -> None:
        self.left = [good, busy]
        self.seen: list[ReceivedCall] = []
        self.worker: Worker | None = None

    def __call__(self, request: Request) -> CannedResponse:
        assert self.worker is not None
        if self.left[0] > 0:
            self.left[0] -= 1
        elif self.left[1] > 0:
            self.left[1] -= 1
            return BUSY
        else:
            self.seen.append(ReceivedCall(len(request.events), self.worker.counters.rate, str(self.worker.state)))
        return CannedResponse()


def fill(outbox_dir: Directory, files: int, events: int = 10) -> None:
    for stamp in range(1, files + 1):
        seal_batch(outbox_dir, stamp, *[encode(event(stamp * 1000 + number)) for number in range(events)])


@pytest.mark.parametrize("in_flight", [1, 4])
def test_after_an_outage_the_rate_rises_step_by_step_until_there_is_no_bound(outbox_dir: Directory, in_flight: int) -> None:
    """The state shows it meanwhile. It is logged once, and not for each step."""
    fill(outbox_dir, 120)
    server = RecoveringServer(5, 10)
    with Server(server) as running:
        worker = make_worker(
            outbox_dir, make_sink(running.url(), TrackingEvent), config=RULES._replace(max_in_flight=in_flight)
        )
        server.worker = worker
        drain_worker(worker)
    assert remaining_files(outbox_dir) == []
    rates = [one.rate for one in server.seen if one.rate is not None]
    assert len(rates) >= 10
    assert rates[0] < max(rates) / 4
    if in_flight == 1:
        assert all(a < b for a, b in itertools.pairwise(rates))
        assert [one.state for one in server.seen if one.rate][5] == f"draining: paced: {rates[5]:,.0f} events/s"
    assert (worker.counters.rate, str(worker.state)) == (None, "idle")
    assert worker.last_error.startswith("the server responded with 503")


@pytest.mark.parametrize("in_flight", [1, 4])
def test_the_ceiling_holds_at_all_times(outbox_dir: Directory, in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several requests in flight, before and after an outage."""
    fill(outbox_dir, 30)
    server = RecoveringServer(0, 3)
    rules = RULES._replace(max_in_flight=in_flight, pacing=BOUNDS._replace(max_rate=400.0))
    sent: list[tuple[float, int]] = []
    really = Pacer.note_sent

    def note(pacer: Pacer, now: float, records: int) -> None:
        sent.append((now, records))
        really(pacer, now, records)

    monkeypatch.setattr(Pacer, "note_sent", note)
    with Server(server) as running:
        worker = make_worker(outbox_dir, make_sink(running.url(), TrackingEvent), config=rules)
        assert worker.counters.rate == 400
        server.worker = worker
        drain_worker(worker)
    assert all(one.rate is not None and one.rate <= 400 for one in server.seen)
    assert sum(one.events for one in server.seen) == 300
    # The time from a call to its arrival varies, so the intervals between calls are checked, not those between arrivals.
    well = sent[4:]  # the calls before it include busy responses, which do not count
    assert well[-1][0] - well[0][0] >= sum(records for _, records in well[:-1]) / 400 - 0.03


class SealingSink(RecordingSink):
    """Seals files of other writers while its first batch is in flight."""

    def __init__(self, outbox_dir: Directory, stamps: range) -> None:
        super().__init__()
        self.outbox_dir = outbox_dir
        self.stamps = stamps
        self.worker: Worker | None = None

    async def deliver(self, batch: Batch) -> DeliveryResult:
        assert self.worker is not None
        for stamp in self.stamps if not self.batches else ():
            seal_batch(self.outbox_dir, stamp, b"%d" % stamp)
        self.worker.notify()
        # wait: long enough for the next file to be prefetched
        await asyncio.sleep(0.005)  # long enough to prefetch the next batch
        return await super().deliver(batch)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, [*range(1, 13), 21, 22, 23, 24]),
        (0.5, [1, 2, 3, 21, 4, 22, 5, 23, 6, 24, *range(7, 13)]),
        (0.25, [1, 2, 3, 4, 5, 21, 6, 7, 8, 22, 9, 10, 11, 23, 12, 24]),
        (1.0, [1, 2, 21, 22, 23, 24, *range(3, 13)]),
    ],
)
def test_batches_sealed_during_a_drain_have_their_share(
    outbox_dir: Directory, clock: ManualClock, share: float, expected: list[int]
) -> None:
    """Without a share, the order is strict. The prefetched batch is sent first in any case. Listing takes no time here."""
    for stamp in range(1, 13):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = SealingSink(outbox_dir, range(21, 25))
    sink.worker = worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(live_share=share), clock=clock)
    drain_worker(worker)
    assert (list(map(int, sink.payloads)), remaining_files(outbox_dir)) == (expected, [])


def test_a_long_drain_spends_a_tenth_of_its_time_on_listing(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is notified."""
    for stamp in range(1, 201):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    really, looks, shares = outbox_dir.batch_names, [0], []

    def sealed() -> list[str]:
        looks[0] += 1
        clock.advance(LISTING_S)
        return really()

    class ListingShareSink(SealingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            clock.advance(0.005)
            shares.append(looks[0] * LISTING_S / clock.monotonic())
            return await super().deliver(batch)

    sink = ListingShareSink(outbox_dir, range(0))
    sink.worker = worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(live_share=0.5), clock=clock)
    monkeypatch.setattr(outbox_dir, "batch_names", sealed)
    drain_worker(worker)
    assert len(shares) == 200
    assert looks[0] > 10
    assert shares[-1] < 1 / 5
