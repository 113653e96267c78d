"""Runs writers and delivery workers that are killed in front of a destination that answers at random, and compares the results.

A round ends with all of them dead. Then one process, which nobody kills but the destination, stores a few good events and
delivers until nothing is pending. Now the destination must have every acknowledged good event exactly once, the dead letters
must be the poisoned events, each once, nothing may be there that nobody stored, and `pillarbox verify` must find that the
account balances, with the same counts. It is run again and again during the round as well. The next round has a directory of
its own.

With two sinks all of this holds for each. The steady sink accepts everything at once, poisoned events too. The fickle sink,
SQLite in one round and HTTP in the next, answers as it does alone, and is down for a third of the round (`lag`). Delivery
workers also die while they fan out, deliver in a process of their own, or are given one of the sinks alone.

    .venv/bin/python -m tests.torture --minutes 12                            all destinations, one after another
    .venv/bin/python -m tests.torture --destination http --minutes 4 --seed 7
    .venv/bin/python -m tests.torture --minutes 10 --under small-memory        or gevent, or full-volume: see `surroundings`
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.delivery.runner import ONLY_SINK
from pillarbox.store import layout, ledger, reconciliation
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import ReconciliationReport, reconcile, reconcile_queues
from tests.crash.kills import ChildProcess, KillViolation, fork, kill_self_later
from tests.torture import chaos, chaotic, lag, lives
from tests.torture.account import Arrivals, Event, EventRecords, SharedCounters, Sums
from tests.torture.destinations import DESTINATIONS, TWO, parsed
from tests.torture.events import EVENT
from tests.torture.lives import Life, Scene
from tests.torture.surroundings import Surroundings

WRITERS: Final = 3
DELIVERERS: Final = 2  # delivery workers
ROUND_S: Final = 30.0
ROUND_OF_TWO_S: Final = 60.0  # so that the fickle sink is down for a long time
DRAIN_S: Final = 180.0
LEDGER_BYTES: Final = 50_000  # above it the ledger is compacted, many times in a round
LEDGER_RECENT: Final = 100  # finished batches whose entries are kept in a compaction
PROGRESS_S: Final = 5.0  # between two lines of progress
_SLOTS: Final = WRITERS + DELIVERERS + 1  # the last one is for the process that finishes a round
_FINISHER: Final = _SLOTS - 1
_DOOMED: Final = 0.15  # share of the lives that kill themselves before or after a disk operation
_SETTLING: Final = 0.4  # share of the delivery workers that do so in a settlement
_WRITER_S: Final = (0.2, 1.0, 3.0)  # maximum durations of a life
_DELIVERER_S: Final = (0.3, 1.5, 1.5, 4.0)
_FLEET_S: Final = (0.3, 1.5, 1.5, 6.0)  # with two sinks, where a child process has to start first
_HANDING_OVER: Final = 0.8  # share of these that do so in a fan-out instead, with two sinks
_ANSWERS: Final = (
    *chaotic.WEIGHTS,
    chaos.CLOSE,
    chaos.GARBAGE,
    chaos.REFUSED,
    chaos.NAMED,
    chaos.KEPT,
    chaos.LARGE,
    chaos.AGAIN,
    chaos.HANDING_OVER,
)


class Report(NamedTuple):
    """The figures of a run."""

    destination: str
    seed: int
    seconds: float
    rounds: int
    kills: int
    events: int
    acknowledged: int
    arrived: int
    dead: int
    verified: int  # reconciliations during the rounds; those at the end of each round are not counted
    answers: dict[str, int]
    lag: str  # of two sinks

    def __str__(self) -> str:
        answers = ", ".join(f"{name} {count:,}" for name, count in sorted(self.answers.items()))
        return (
            f"{self.destination}, seed {self.seed}: {self.seconds:.0f} s, {self.rounds} rounds, {self.kills:,} kills, "
            f"{self.events:,} events, {self.acknowledged:,} acknowledged, {self.arrived:,} arrived, {self.dead:,} dead letters, "
            f"{self.verified} times verified meanwhile; "
            f"answers: {answers}{self.lag}"
        )


class Torture:
    """Rounds against one destination, in directories below `folder`."""

    def __init__(
        self, destination: str, folder: Path, seed: int, tell: Callable[[object], None], surroundings: Surroundings
    ) -> None:
        self.seed = seed
        self.destination = destination
        self._folder = folder
        self._surroundings = surroundings
        self._outboxes = surroundings.outboxes(folder)
        self._tell = tell
        self.failures = folder / "failures"
        self.failures.mkdir(parents=True)
        self._tally = SharedCounters(_ANSWERS, _SLOTS + 1)
        self._arena = DESTINATIONS[destination](folder, seed, self._tally.row(_SLOTS))
        self._places = self._arena.sinks(seed)
        self._account = EventRecords(seed, _SLOTS)
        self._chance = random.Random(seed)
        self._children: dict[int, ChildProcess] = {}
        self._begun = self._told = time.monotonic()
        self._lives = self.rounds = self.kills = self.verified = 0
        self._sums = Sums(0, 0, 0, 0)
        self._looks = {state: lag.BacklogSamples([], []) for state in ("up", "down")}

    def round(self, seconds: float) -> None:
        """Run and kill processes for a while, deliver the rest, and compare. Raises `KillViolation`."""
        self._places = self._arena.sinks(self.seed + self.rounds)
        urls = {name: workdir.url for name, workdir in self._places.items()}
        scene = Scene(self.seed, str(self._outboxes / f"outbox-{self.rounds}"), urls)
        Path(scene.outbox).mkdir()
        self._surroundings.start_round()
        self._account = EventRecords(self.seed, _SLOTS)
        begun = time.monotonic()
        end = begun + seconds
        watch = lag.Watch(open_directory(scene.outbox), self._arena, begun, seconds) if scene.has_several else None
        try:
            while time.monotonic() < end:
                for slot in range(WRITERS + DELIVERERS):
                    if slot not in self._children:
                        self._begin(slot, scene)
                first = min(child.deadline for child in self._children.values())
                wake = min(first, end, watch.next if watch is not None else end)
                # wait: until a child ends, or it is time to kill one
                signal.sigtimedwait([signal.SIGCHLD], max(0.0, wake - time.monotonic()))
                self._kill_due(time.monotonic(), scene)
                if self._tell_now_and_then():
                    self._verify(scene)
                self._raise_if_wrong(watch.sample(time.monotonic()) if watch is not None else [], scene)
        finally:
            self._kill_due(float("inf"), scene)
        if watch is not None:
            self._raise_if_wrong(watch.conclude(), scene)
            for state, looks in (("up", watch.up), ("down", watch.down)):
                self._looks[state].steady.extend(looks.steady)
                self._looks[state].fickle.extend(looks.fickle)
        self._finish(scene)
        self._judge(scene)
        self.rounds += 1

    def report(self) -> Report:
        """The figures so far."""
        living = self._account.attempted(range(_SLOTS))
        events = Sums(self._sums.begun + living, *self._sums[1:])
        seconds = time.monotonic() - self._begun
        waited = "".join(f"; while it is {state} {looks}" for state, looks in self._looks.items() if looks.steady)
        return Report(
            self.destination,
            self.seed,
            seconds,
            self.rounds,
            self.kills,
            *events,
            self.verified,
            dict(self._tally.sums()),
            waited,
        )

    def end(self) -> None:
        """End the processes that were started."""
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        self._children.clear()
        self._arena.end()
        self._surroundings.end()

    def _begin(self, slot: int, scene: Scene) -> None:
        self._lives += 1
        chance = random.Random(f"{self.seed}/{self._lives}")
        life = Life(self._lives, scene, self._account.notes(slot), chance)
        row = self._tally.row(slot)

        def work() -> None:
            chaotic.row = row
            for module, name, least in (
                (ledger, "COMPACT_BYTES", LEDGER_BYTES),
                (reconciliation, "RECENT_BATCHES_MAX", LEDGER_RECENT),
            ):
                setattr(module, name, least)
            self._redirect_output(slot)
            self._surroundings.enter()
            if slot == _FINISHER:
                life.finish(DRAIN_S)
                return
            fate = chance.random()
            if fate < _DOOMED:
                kill_self_later(chance)
            elif slot >= WRITERS and fate < _DOOMED + _SETTLING:
                if scene.has_several and chance.random() < _HANDING_OVER:
                    lives.die_fanning_out(chance, lambda: row.add(chaos.HANDING_OVER))
                else:
                    lives.die_in_a_settlement(chance)
            life.store() if slot < WRITERS else life.deliver()

        lasts = _WRITER_S if slot < WRITERS else _FLEET_S if scene.has_several else _DELIVERER_S
        span = self._chance.choice(lasts) * self._chance.random()
        deadline = float("inf") if slot == _FINISHER else time.monotonic() + span
        self._children[slot] = ChildProcess(fork(self.failures, work), self._lives, deadline)

    def _redirect_output(self, slot: int) -> None:
        """Redirect the output of this process to the file of its slot."""
        log = os.open(self._folder / f"printed-{slot}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)

    def _kill_due(self, now: float, scene: Scene) -> None:
        """Kill the processes whose time has come, and take over the notes of the dead."""
        wrong: list[str] = []
        for slot, child in list(self._children.items()):
            due = now >= child.deadline or now == float("inf")
            if due:
                os.kill(child.pid, signal.SIGKILL)
            if (status := self._bury(slot, child, wait=due)) not in (None, -signal.SIGKILL):
                wrong.append(f"life {child.life} was not killed, and ended with status {status}")
        wrong += [f"process {pid} of the destination ended" for pid in self._arena.pids if os.waitpid(pid, os.WNOHANG)[0]]
        self._raise_if_wrong(wrong, scene)

    def _bury(self, slot: int, child: ChildProcess, *, wait: bool) -> int | None:
        pid, status = os.waitpid(child.pid, 0 if wait else os.WNOHANG)
        if not pid:
            return None
        del self._children[slot]
        self._account.take_over_notes(slot, child.life)
        code = os.waitstatus_to_exitcode(status)
        self.kills += code == -signal.SIGKILL
        return code

    def _finish(self, scene: Scene) -> None:
        code: int | None = -signal.SIGKILL
        while code in (None, -signal.SIGKILL):
            if _FINISHER not in self._children:
                self._begin(_FINISHER, scene)  # and again if the destination has killed it
            # wait: until a child ends, or it is time to report
            signal.sigtimedwait([signal.SIGCHLD], PROGRESS_S)
            code = self._bury(_FINISHER, self._children[_FINISHER], wait=False)
            self._tell_now_and_then()
        if code:
            raise self.violation([f"the pending events could not be delivered (status {code})"], scene)

    def _judge(self, scene: Scene) -> None:
        looked = _audited(scene)
        wrong = [f"left behind: {path}" for path in lives.left_behind(scene)]
        total = Sums(0, 0, 0, 0)
        given: set[frozenset[Event]] = set()  # to each sink
        for sink, workdir in self._places.items():
            arrived, strange = workdir.arrived()
            found = Arrivals(arrived, *_kept(Path(scene.queue_path(sink))))
            given.add(frozenset(found.arrived) | frozenset(found.dead))
            sums = self._account.sums(found)
            total = sums._replace(arrived=total.arrived + sums.arrived, dead=total.dead + sums.dead)
            bad = [*strange, *self._account.check(found, takes_all=workdir.takes_all)]
            bad += unbalanced(looked[sink], sums) if self._surroundings.ledger_is_whole else []
            wrong += [f"{sink}: {what}" if sink else what for what in bad]
        if scene.has_several and self._surroundings.ledger_is_whole:
            wrong += unbalanced(looked[ONLY_SINK], total._replace(arrived=0, dead=0))
            wrong += [f"dead letters or quarantine in the outbox: {kept}" for kept in _kept(Path(scene.outbox)) if kept]
        if len(given) > 1:
            wrong.append(
                f"the sinks did not receive the same events: {' and '.join(f'{len(events)} events' for events in given)}"
            )
        wrong += self._surroundings.violations()
        if any(self.failures.iterdir()):
            wrong.append("a thread of an outbox logged a traceback or ended with an exception")
        self._raise_if_wrong(wrong, scene)
        self._sums = Sums(*(before + now for before, now in zip(self._sums, total, strict=True)))
        self._account = EventRecords(self.seed, _SLOTS)
        for workdir in self._places.values():
            workdir.empty()
        shutil.rmtree(scene.outbox)

    def _tell_now_and_then(self) -> bool:
        if time.monotonic() - self._told < PROGRESS_S:
            return False
        self._told = time.monotonic()
        self._tell(self.report())
        return True

    def _verify(self, scene: Scene) -> None:
        """Reconcile as `pillarbox verify` does, while processes live and die."""
        wrong = []
        for sink, looked in _audited(scene).items():
            found = looked.reconciliation
            if not found.balances and self._surroundings.ledger_is_whole:
                wrong += [
                    f"during the round, the ledger {sink} does not balance: {found.total}",
                    *map(str, found.discrepancies),
                ]
        self.verified += 1
        self._raise_if_wrong(wrong, scene)

    def _raise_if_wrong(self, wrong: list[str], scene: Scene) -> None:
        if wrong:
            raise self.violation(wrong, scene)

    def violation(self, wrong: list[str], scene: Scene) -> KillViolation:
        """The exception to raise, with how to reproduce it and the traces of the children."""
        traces = [path.read_text() for path in sorted(self.failures.iterdir())]
        where = f"{self.destination}, seed {self.seed}, round {self.rounds}, {self.kills} kills, files in {scene.outbox}"
        return KillViolation("\n".join([where, *wrong[:20], *traces[:3]]))


def _kept(outbox: Path) -> tuple[Counter[Event], frozenset[Event]]:
    """Dead letters, and the events in quarantine that can be read."""
    dead: Counter[Event] = Counter()
    quarantined: set[Event] = set()
    for path in sorted(outbox.iterdir()):
        kind = layout.kind_of(path.name)
        if kind is Kind.DEAD:
            letters = [msgspec.json.decode(line, type=DeadLetter) for line in path.read_bytes().splitlines()]
            dead.update(parsed(msgspec.json.decode(letter.event)["event_id"]) for letter in letters)
        elif kind is Kind.CORRUPT:
            quarantined |= {(int(life), int(number)) for life, number, _ in EVENT.findall(path.read_bytes())}
    return dead, frozenset(quarantined)


def _audited(scene: Scene) -> dict[str, ReconciliationReport]:
    """The reconciliation of the directory, and of each queue in it by sink name."""
    workdir = open_directory(scene.outbox)
    whole = reconcile(workdir)
    return {ONLY_SINK: whole} | reconcile_queues(workdir, whole)


def unbalanced(looked: ReconciliationReport, sums: Sums) -> list[str]:
    """List what is wrong with the ledger. It must balance, and agree with the destination and the writers about each event."""
    found = looked.reconciliation
    total = found.total
    wrong = [
        f"{discrepancy.batch} does not balance by {discrepancy.events}: {discrepancy.problem}"
        for discrepancy in found.discrepancies
    ]
    if not found.balances and not wrong:
        wrong.append(f"the ledger does not balance: {found.total}")
    if (total.delivered, total.dead) != (sums.arrived, sums.dead):
        wrong.append(f"the ledger has {total.delivered} delivered, {total.dead} dead letters; there are {sums}")
    if total.accepted > sums.begun or total.accepted_max < sums.acknowledged:
        wrong.append(f"the ledger has {total.accepted} to {total.accepted_max} accepted; there are {sums}")
    if wrong and looked.unread_entries:
        wrong.append(f"{looked.unread_entries} lines of the ledger cannot be read")
    return wrong


def open_directory(outbox: str) -> Directory:
    """The directory at a path, for reading."""
    return Directory(outbox, OsFilesystem(), SystemClock())


def run(
    destination: str,
    seconds: float,
    seed: int,
    folder: Path,
    tell: Callable[[object], None] = lambda _: None,
    surroundings: Surroundings | None = None,
) -> Report:
    """Torture for about `seconds`. Raises `KillViolation`; the folder is kept then."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    torture = Torture(destination, folder, seed, tell, surroundings or Surroundings())
    end = time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            torture.round(min(ROUND_OF_TWO_S if destination == TWO else ROUND_S, left))
        return torture.report()
    finally:
        torture.end()
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
