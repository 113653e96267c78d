"""What is set aside has limits, and what is too old may be given up: only where the operator says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pillarbox.delivery.policy import AGE_PROOF_S
from pillarbox.delivery.settlement import Kept
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.sinks.base import Batch, DeliveryResult, PartialFailure, Retry
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.testing import RecordingSink
from tests.conftest import wait_until
from tests.delivery.stage import NO, QUICK, MovingClock, drain, left, seal, worker_for


class Picky(RecordingSink):
    """Names the poisoned records and keeps the others."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        refused = {index: NO for index, payload in enumerate(batch.payloads) if b"poison" in payload}
        answer = await super().deliver(batch)
        return PartialFailure(refused, len(batch) - len(refused)) if refused else answer


@pytest.mark.parametrize(
    ("what", "kept", "lines", "raw"),
    [
        ("dead", Kept(max_dead_bytes=250), [b'"good"', b'"poison"'], b""),
        ("quarantine", Kept(max_quarantine_bytes=10), [b'"good"'], b"damaged\n"),
    ],
)
def test_a_file_that_needs_more_than_may_be_set_aside_waits_and_the_good_ones_go_on(
    place: Directory, what: str, kept: Kept, lines: list[bytes], raw: bytes
) -> None:
    """The state says which limit and what to do; room is made, and it is settled."""
    seal(place, 1, *lines, raw=raw)
    second = seal(place, 2, *lines, raw=raw)
    seal(place, 3, b'"next"')
    sink = Picky()
    worker = worker_for(place, sink, kept=kept)
    thread = DeliveryThread(worker)
    thread.start()
    wait_until(lambda: b'"next"' in sink.payloads and worker.state.name == "degraded")
    calls = len(sink.calls)
    assert second + layout.SUFFIX in left(place)
    assert f"max_{what}_bytes = " in worker.state.reason
    assert f"pillarbox {what} list" in worker.state.reason
    looked = worker.counters.failed_flushes
    for name in left(place):
        if layout.kind_of(name) in {layout.Kind.DEAD, layout.Kind.CORRUPT, layout.Kind.RANGES}:
            place.remove(name)
    assert worker.idle.wait(60)
    assert thread.stop(30)
    assert (len(sink.calls), looked) == (calls + 1, 1)
    expected = [layout.dead_name(second)] if what == "dead" else [layout.corrupt_name(second), layout.ranges_name(second)]
    assert left(place) == expected
    assert worker.state.name == "idle"


def test_where_the_operator_says_so_what_has_no_room_is_discarded_and_counted(
    place: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """Loudly, and once."""
    first = seal(place, 1, b'"poison"', b'"good"')
    for stamp in range(2, 6):
        seal(place, stamp, b'"poison"', b'"good"')
    worker = worker_for(place, Picky(), kept=Kept(max_dead_bytes=250, discards=True))
    with caplog.at_level(logging.ERROR, "pillarbox"):
        drain(worker)
    assert left(place) == [layout.dead_name(first)]
    counters = worker.counters
    assert (counters.dead, counters.discarded, counters.delivered) == (5, 4, 5)
    assert len([entry for entry in caplog.records if "is discarded" in entry.message]) == 1


def test_a_batch_that_is_sent_again_does_not_count_what_it_has_set_aside_before(place: Directory) -> None:
    """Killed between dead letters and removal: the same bytes are written over."""
    seal(place, 1, b'"poison"', b'"good"')
    name = left(place)[0]
    data = Path(place.path_of(name)).read_bytes()
    kept = Kept(max_dead_bytes=250)
    drain(worker_for(place, Picky(), kept=kept))
    Path(place.path_of(name)).write_bytes(data)
    drain(worker_for(place, Picky(), kept=kept))
    assert [layout.kind_of(found) for found in left(place)] == [layout.Kind.DEAD]


class Down(RecordingSink):
    """Never there; each call takes the clock forward."""

    def __init__(self, clock: MovingClock, seconds: float, calls: int) -> None:
        super().__init__()
        self.clock, self.seconds, self.left = clock, seconds, calls

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.clock.advance(self.seconds)
        self.left -= 1
        return Retry("down") if self.left >= 0 else await super().deliver(batch)


def test_without_an_age_limit_no_age_gives_up(place: Directory) -> None:
    """Ten years."""
    clock = MovingClock()
    seal(place, clock.micros(), b"1")
    sink = Down(clock, 86_400.0 * 365, 10)
    worker = worker_for(Directory(place.path, place.filesystem, clock), sink, clock=clock)
    drain(worker)
    assert (sink.payloads, worker.counters.dead) == ([b"1"], 0)


def test_past_an_age_limit_records_become_dead_letters(place: Directory) -> None:
    """With that for a reason; younger ones are tried on."""
    clock = MovingClock()
    old = seal(place, clock.micros(), b"1", b"2")
    young = Directory(place.path, place.filesystem, clock)
    sink = Down(clock, 3600.0, 3)
    worker = worker_for(young, sink, rules=QUICK._replace(max_age_s=7000.0), clock=clock)
    seal(place, clock.micros() + int(7200e6), b"3")
    drain(worker)
    letters = [json.loads(line) for line in Path(place.path_of(layout.dead_name(old))).read_bytes().splitlines()]
    assert [(letter["event"], letter["code"], letter["attempts"]) for letter in letters] == [
        (1, "too_old", 2),
        (2, "too_old", 2),
    ]
    assert letters[0]["reason"] == "not delivered within 7000 s of being sealed"
    assert sink.payloads == [b"3"]


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumps_makes_nothing_old(place: Directory, jump: float) -> None:
    """In the deliverer's life, in either direction."""
    clock = MovingClock()
    seal(place, clock.micros(), b"1")

    class Jumping(Down):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            clock.step(jump)
            return await super().deliver(batch)

    sink = Jumping(clock, AGE_PROOF_S, 3)
    worker = worker_for(
        Directory(place.path, place.filesystem, clock), sink, rules=QUICK._replace(max_age_s=86_400.0), clock=clock
    )
    drain(worker)
    assert (sink.payloads, worker.counters.dead) == ([b"1"], 0)
