"""A fixed part of the torture against each destination, and tests of its checks."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import layout
from pillarbox.store.reconciliation import reconcile
from tests.torture import account, destinations, events, lag, run
from tests.torture.__main__ import UNAVAILABLE
from tests.torture.account import Arrivals, Event, EventRecords, SharedCounters, Sums
from tests.torture.lives import FICKLE, STEADY

ROOT = Path(__file__).parents[2]
SEED = 20261
SECONDS = {
    "sqlite": 8.0,
    "http": 8.0,
    "spacetimedb": 5.0,
    destinations.TWO: 4.0,
}  # delivering the rest takes a few more seconds
KILLS_MIN = 20
EVENTS_MIN = 3_000
LIFE = 7


@pytest.mark.parametrize("destination", destinations.DESTINATIONS)
def test_every_event_arrives_once_and_only_poisoned_events_are_dead_letters(destination: str) -> None:
    """It runs in its own process, because a process with threads must not fork."""
    if destination == "spacetimedb" and not destinations.has_server():
        pytest.skip("there is no SpacetimeDB server: tools/spacetimedb-server says why")
    command = [sys.executable, "-m", "tests.torture", "--destination", destination]
    command += ["--minutes", str(SECONDS[destination] / 60), "--seed", str(SEED)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    last = process.stdout.splitlines()[-1]
    figures = {name: int(count.replace(",", "")) for count, name in re.findall(r"([\d,]+) (kills|events|arrived|dead)", last)}
    assert figures["kills"] >= KILLS_MIN
    assert figures["events"] >= EVENTS_MIN
    assert 0 < figures["dead"] < figures["arrived"]


@pytest.mark.parametrize(("kind", "destination"), [("gevent", "http"), ("small-memory", "http"), ("full-volume", "sqlite")])
def test_every_event_arrives_once_in_strange_surroundings(kind: str, destination: str) -> None:
    """The environment is gevent, 256 MiB of memory, or a volume that is full half of the time."""
    command = [sys.executable, "-m", "tests.torture", "--destination", destination, "--under", kind]
    command += ["--minutes", "0.1", "--seed", str(SEED)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if UNAVAILABLE in process.stderr:
        pytest.skip(process.stderr)
    assert process.returncode == 0, process.stdout + process.stderr
    last = process.stdout.splitlines()[-1]
    figures = {name: int(count.replace(",", "")) for count, name in re.findall(r"([\d,]+) (kills|acknowledged|arrived)", last)}
    assert figures["kills"] >= 10
    assert figures["arrived"] >= figures["acknowledged"] * 0.9 > 100


@pytest.fixture
def records() -> EventRecords:
    """Thousands of events of life 7, all acknowledged but the last two: one was only attempted, one dropped."""
    event_records = EventRecords(SEED, 2)
    notes = event_records.notes(1)
    notes.note_attempt(range(BEGUN + 1))
    for number in range(BEGUN):
        notes.note_outcome(number, account.ACKNOWLEDGED)
    notes.note_attempt(range(BEGUN + 1, BEGUN + 2))
    notes.note_outcome(BEGUN + 1, account.REFUSED)
    event_records.take_over_notes(1, LIFE)
    return event_records


BEGUN = 5_000  # the number of the event that was only attempted
BAD = next(number for number in range(BEGUN) if events.poisoned(SEED, LIFE, number))
GOOD = next(number for number in range(BEGUN) if not events.poisoned(SEED, LIFE, number))


def complete_delivery() -> Arrivals:
    everything = range(BEGUN)
    dead = Counter((LIFE, number) for number in everything if events.poisoned(SEED, LIFE, number))
    arrived = Counter((LIFE, number) for number in everything if not events.poisoned(SEED, LIFE, number))
    return Arrivals(arrived, dead, frozenset())


def test_complete_delivery_has_no_violation(records: EventRecords) -> None:
    """An event that was attempted and not acknowledged may arrive too."""
    found = complete_delivery()
    assert records.check(found) == []
    assert records.check(Arrivals({**found.arrived, (LIFE, BEGUN): 1}, found.dead, frozenset())) == []
    sums = records.sums(found)
    assert (sums.begun, sums.acknowledged, sums.arrived + sums.dead) == (BEGUN + 2, BEGUN, BEGUN)


def change_count(where: str, event: Event, count: int) -> Callable[[Arrivals], Arrivals]:
    def changed(found: Arrivals) -> Arrivals:
        counts: Counter[Event] = Counter(getattr(found, where))
        counts[event] += count
        fields: dict[str, Any] = {where: +counts}
        return found._replace(**fields)

    return changed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_count("arrived", (LIFE, GOOD), -1), f"1 lost: {LIFE}-{GOOD}"),
        (change_count("dead", (LIFE, BAD), -1), f"1 lost: {LIFE}-{BAD}"),
        (change_count("arrived", (LIFE, GOOD), 1), f"1 at the destination 2 times: {LIFE}-{GOOD}"),
        (change_count("dead", (LIFE, BAD), 1), f"1 among the dead letters 2 times: {LIFE}-{BAD}"),
        (change_count("arrived", (LIFE, BAD), 1), f"1 poisoned, and at the destination: {LIFE}-{BAD}"),
        (change_count("dead", (LIFE, GOOD), 1), f"1 good, and among the dead letters: {LIFE}-{GOOD}"),
        (change_count("arrived", (LIFE, BEGUN + 1), 1), f"1 invented: at the destination although dropped: {LIFE}-{BEGUN + 1}"),
        (change_count("arrived", (3, 0), 1), "1 invented: at the destination although never attempted: 3-0"),
    ],
)
def test_wrong_counts_are_found(records: EventRecords, change: Callable[[Arrivals], Arrivals], complaint: str) -> None:
    """Lost, repeated, misplaced or invented events."""
    assert records.check(change(complete_delivery())) == [complaint]


def test_a_destination_that_accepts_everything_has_no_dead_letters(records: EventRecords) -> None:
    """Like the steady one of two sinks."""
    found = complete_delivery()
    everything = Arrivals({**found.arrived, **found.dead}, Counter(), frozenset())
    assert records.check(everything, takes_all=True) == []
    assert records.check(change_count("dead", (LIFE, BAD), 1)(everything), takes_all=True) == [
        f"1 good, and among the dead letters: {LIFE}-{BAD}"
    ]


@pytest.fixture
def watch(tmp_path: Path) -> lag.Watch:
    """A round of half a minute with two sinks, both without a backlog."""
    outbox = tmp_path / "outbox"
    for sink in (STEADY, FICKLE):
        (outbox / layout.queue_name(sink)).mkdir(parents=True)
    return lag.Watch(run.open_directory(str(outbox)), destinations.Arena(tmp_path, []), 0.0, 30.0)


def wait_for(watch: lag.Watch, sink: str, seconds: float, count: int) -> None:
    name = layout.sealed_name(int((time.time() - seconds) * 1e6), "one")
    (Path(watch.directory.queue(sink).path) / name).write_bytes(b"{}\n" * count)


def test_the_backlog_of_a_sink_that_is_down_is_no_violation(watch: lag.Watch) -> None:
    """Neither is a small backlog of the other sink."""
    wait_for(watch, FICKLE, 30.0, 500)
    wait_for(watch, STEADY, 1.0, 20)
    assert [complaint for now in range(30) for complaint in watch.sample(now)] + watch.conclude() == []
    assert [behind.events for behind in (watch.down.steady[-1], watch.down.fickle[-1])] == [20, 500]
    assert len(watch.down.steady) == 10


def test_a_sink_that_is_delayed_by_the_one_that_is_down_is_found(watch: lag.Watch) -> None:
    """By the age and by the size of its backlog."""
    for sink in (FICKLE, STEADY):
        wait_for(watch, sink, lag.BEHIND_MAX_S + 1, 500)
    assert watch.sample(5.0) == []  # neither is down
    assert [text.partition(":")[0] for text in watch.sample(15.0)] == ["the steady sink is delayed"]
    assert [text.partition(":")[0] for text in watch.conclude()] == ["the steady sink is delayed"]


def test_an_acknowledged_event_in_quarantine_is_lost(records: EventRecords) -> None:
    """A torn line of an event that was only attempted is not a violation."""
    found = change_count("arrived", (LIFE, GOOD), -1)(complete_delivery())
    found = found._replace(quarantined=frozenset({(LIFE, GOOD), (LIFE, BEGUN)}))
    assert records.check(found) == [f"1 lost: in quarantine although acknowledged: {LIFE}-{GOOD}"]


def test_only_poisoned_events_contain_the_mark() -> None:
    """The destinations search for it in JSON and in function arguments."""
    from pillarbox.codec import Codec
    from pillarbox.event import TrackingEvent

    encode = Codec(TrackingEvent).encode
    for number in (GOOD, BAD):
        line = encode(events.make_event(SEED, LIFE, number))
        assert (events.MARK in line) == (number == BAD)
        assert events.EVENT.findall(line) == [(b"7", b"%d" % number, events.POISON.encode() if number == BAD else b"click")]


def test_counts_of_several_processes_add_up() -> None:
    """Each process counts in its own row."""
    counters = SharedCounters(["a", "b"], 2)
    counters.row(0).add("a")
    counters.row(1).add("a")
    counters.row(1).add("b")
    assert counters.sums() == {"a": 2, "b": 1}


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A directory whose two batches, of three events and of one, are delivered."""
    outbox = tmp_path / "outbox"
    with Outbox(str(outbox), f"sqlite:///{tmp_path / 'destination.db'}", min_free_bytes=0) as filled:
        for numbers in (range(3), range(3, 4)):
            filled.enqueue_many([events.make_event(SEED, LIFE, number) for number in numbers])
            assert filled.flush()
    return outbox


def test_a_ledger_with_the_right_counts_balances(settled: Path) -> None:
    """Events that were attempted and not acknowledged may be accepted or not."""
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(begun=4, acknowledged=4, arrived=4, dead=0)) == []
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(begun=6, acknowledged=3, arrived=4, dead=0)) == []


@pytest.mark.parametrize("there", [Sums(4, 4, 3, 0), Sums(4, 4, 4, 1), Sums(5, 5, 4, 0), Sums(3, 3, 4, 0)])
def test_a_ledger_with_wrong_counts_is_found(settled: Path, there: Sums) -> None:
    """One delivered too many, one dead letter too few, one accepted too few and too many."""
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), there)


def test_a_batch_that_was_removed_without_an_entry_is_found(settled: Path) -> None:
    """The writer's own count shows it."""
    ledger = settled / layout.LEDGER
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(line for line in lines if b'"settled"' not in line))
    wrong = run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(4, 4, 4, 0))
    assert [text.partition(" does not balance by ")[2].partition(":")[0] for text in wrong[:2]] == ["3", "1"]
