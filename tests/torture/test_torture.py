"""A fixed part of the torture against each destination, and that its checks find what they are there to find."""

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
from tests.torture.account import Account, Arrivals, Event, Sums, Tally
from tests.torture.lives import FICKLE, STEADY

ROOT = Path(__file__).parents[2]
SEED = 20261
SECONDS = {
    "sqlite": 8.0,
    "http": 8.0,
    "spacetimedb": 5.0,
    destinations.TWO: 4.0,
}  # what is left then takes a few more, at a slow destination the most
KILLS_MIN = 20
EVENTS_MIN = 3_000
LIFE = 7


@pytest.mark.parametrize("destination", destinations.DESTINATIONS)
def test_every_event_is_there_once_and_only_the_poisoned_are_dead_letters(destination: str) -> None:
    """It runs in a process of its own: a parent with threads must not fork."""
    if destination == "spacetimedb" and not destinations.has_server():
        pytest.skip("there is no SpacetimeDB server: tools/spacetimedb-server says why")
    command = [sys.executable, "-m", "tests.torture", "--destination", destination]
    command += ["--minutes", str(SECONDS[destination] / 60), "--seed", str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    figures = {name: int(count.replace(",", "")) for count, name in re.findall(r"([\d,]+) (kills|events|arrived|dead)", last)}
    assert figures["kills"] >= KILLS_MIN
    assert figures["events"] >= EVENTS_MIN
    assert 0 < figures["dead"] < figures["arrived"]


@pytest.fixture
def told() -> Account:
    """An account of life 7: thousands of events, acknowledged but the last two, which were attempted and dropped."""
    found = Account(SEED, 2)
    notes = found.notes(1)
    notes.note_attempt(range(BEGUN + 1))
    for number in range(BEGUN):
        notes.note_outcome(number, account.ACKNOWLEDGED)
    notes.note_attempt(range(BEGUN + 1, BEGUN + 2))
    notes.note_outcome(BEGUN + 1, account.REFUSED)
    found.take_over_notes(1, LIFE)
    return found


BEGUN = 5_000  # the number of the event that was only begun
BAD = next(number for number in range(BEGUN) if events.poisoned(SEED, LIFE, number))
GOOD = next(number for number in range(BEGUN) if not events.poisoned(SEED, LIFE, number))


def as_it_should_be() -> Arrivals:
    everything = range(BEGUN)
    dead = Counter((LIFE, number) for number in everything if events.poisoned(SEED, LIFE, number))
    arrived = Counter((LIFE, number) for number in everything if not events.poisoned(SEED, LIFE, number))
    return Arrivals(arrived, dead, frozenset())


def test_nothing_is_wrong_where_everything_is_in_its_place(told: Account) -> None:
    """An event that was attempted and not acknowledged may be there too."""
    found = as_it_should_be()
    assert told.check(found) == []
    assert told.check(Arrivals({**found.arrived, (LIFE, BEGUN): 1}, found.dead, frozenset())) == []
    sums = told.sums(found)
    assert (sums.begun, sums.acknowledged, sums.arrived + sums.dead) == (BEGUN + 2, BEGUN, BEGUN)


def spoil(where: str, event: Event, count: int) -> Callable[[Arrivals], Arrivals]:
    def spoiled(found: Arrivals) -> Arrivals:
        folder: Counter[Event] = Counter(getattr(found, where))
        folder[event] += count
        changed: dict[str, Any] = {where: +folder}
        return found._replace(**changed)

    return spoiled


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (spoil("arrived", (LIFE, GOOD), -1), f"1 lost: {LIFE}-{GOOD}"),
        (spoil("dead", (LIFE, BAD), -1), f"1 lost: {LIFE}-{BAD}"),
        (spoil("arrived", (LIFE, GOOD), 1), f"1 at the destination 2 times: {LIFE}-{GOOD}"),
        (spoil("dead", (LIFE, BAD), 1), f"1 among the dead letters 2 times: {LIFE}-{BAD}"),
        (spoil("arrived", (LIFE, BAD), 1), f"1 poisoned, and at the destination: {LIFE}-{BAD}"),
        (spoil("dead", (LIFE, GOOD), 1), f"1 good, and among the dead letters: {LIFE}-{GOOD}"),
        (spoil("arrived", (LIFE, BEGUN + 1), 1), f"1 invented: at the destination though refused: {LIFE}-{BEGUN + 1}"),
        (spoil("arrived", (3, 0), 1), "1 invented: at the destination though never begun: 3-0"),
    ],
)
def test_what_is_not_in_its_place_is_found(told: Account, change: Callable[[Arrivals], Arrivals], complaint: str) -> None:
    """Lost, doubled, in the wrong place, or invented."""
    assert told.check(change(as_it_should_be())) == [complaint]


def test_where_everything_is_taken_no_event_is_a_dead_letter(told: Account) -> None:
    """As at the steady one of two sinks."""
    found = as_it_should_be()
    everything = Arrivals({**found.arrived, **found.dead}, Counter(), frozenset())
    assert told.check(everything, takes_all=True) == []
    assert told.check(spoil("dead", (LIFE, BAD), 1)(everything), takes_all=True) == [
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


def test_a_sink_that_is_down_and_behind_is_as_it_should_be(watch: lag.Watch) -> None:
    """So is the other one, with a backlog of a few events."""
    wait_for(watch, FICKLE, 30.0, 500)
    wait_for(watch, STEADY, 1.0, 20)
    assert [complaint for now in range(30) for complaint in watch.sample(now)] + watch.conclude() == []
    assert [behind.events for behind in (watch.down.steady[-1], watch.down.fickle[-1])] == [20, 500]
    assert len(watch.down.steady) == 10


def test_a_sink_that_is_held_back_by_the_one_that_is_down_is_seen(watch: lag.Watch) -> None:
    """By the age and the size of its backlog."""
    for sink in (FICKLE, STEADY):
        wait_for(watch, sink, lag.BEHIND_MAX_S + 1, 500)
    assert watch.sample(5.0) == []  # neither is down
    assert [text.partition(":")[0] for text in watch.sample(15.0)] == ["the steady sink is held back"]
    assert [text.partition(":")[0] for text in watch.conclude()] == ["the steady sink is held back"]


def test_an_acknowledged_event_in_quarantine_is_lost(told: Account) -> None:
    """A torn line of an event that was only attempted is not."""
    found = spoil("arrived", (LIFE, GOOD), -1)(as_it_should_be())
    found = found._replace(quarantined=frozenset({(LIFE, GOOD), (LIFE, BEGUN)}))
    assert told.check(found) == [f"1 lost: in quarantine though acknowledged: {LIFE}-{GOOD}"]


def test_a_poisoned_event_carries_its_mark_wherever_it_goes() -> None:
    """The destinations look for it, in JSON and in the arguments of a function."""
    from pillarbox.codec import Codec
    from pillarbox.event import TrackingEvent

    encode = Codec(TrackingEvent).encode
    for number in (GOOD, BAD):
        line = encode(events.make_event(SEED, LIFE, number))
        assert (events.MARK in line) == (number == BAD)
        assert events.EVENT.findall(line) == [(b"7", b"%d" % number, events.POISON.encode() if number == BAD else b"click")]


def test_counts_of_several_processes_add_up() -> None:
    """Each process counts in its own row."""
    tally = Tally(["a", "b"], 2)
    tally.row(0).add("a")
    tally.row(1).add("a")
    tally.row(1).add("b")
    assert tally.sums() == {"a": 2, "b": 1}


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A directory whose two batches, of three events and of one, are delivered."""
    outbox = tmp_path / "outbox"
    with Outbox(str(outbox), f"sqlite:///{tmp_path / 'destination.db'}", min_free_bytes=0) as filled:
        for numbers in (range(3), range(3, 4)):
            filled.enqueue_many([events.make_event(SEED, LIFE, number) for number in numbers])
            assert filled.flush()
    return outbox


def test_a_ledger_that_says_what_is_there_balances(settled: Path) -> None:
    """Events that were attempted and not acknowledged may be accepted or not."""
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(begun=4, acknowledged=4, arrived=4, dead=0)) == []
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(begun=6, acknowledged=3, arrived=4, dead=0)) == []


@pytest.mark.parametrize("there", [Sums(4, 4, 3, 0), Sums(4, 4, 4, 1), Sums(5, 5, 4, 0), Sums(3, 3, 4, 0)])
def test_a_ledger_that_says_something_else_is_found(settled: Path, there: Sums) -> None:
    """One delivered too many, one dead letter too few, one accepted too few and too many."""
    assert run.unbalanced(reconcile(run.open_directory(str(settled))), there)


def test_a_batch_that_is_gone_without_an_entry_is_found(settled: Path) -> None:
    """By the writer's own count."""
    ledger = settled / layout.LEDGER
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(line for line in lines if b'"settled"' not in line))
    wrong = run.unbalanced(reconcile(run.open_directory(str(settled))), Sums(4, 4, 4, 0))
    assert [text.partition(" does not balance by ")[2].partition(":")[0] for text in wrong[:2]] == ["3", "1"]
