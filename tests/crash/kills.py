"""Torture by SIGKILL: writers and delivery workers are killed at random moments, and an oracle checks their events.

A parent that has imported everything forks children. Each child records in shared memory which events it attempted to store and
which were acknowledged. Some children are killed by the parent, others kill themselves before, after or in the n-th operation
on the disk. Each round ends when all are dead. Then one process drains the directory, and the delivered events are compared
with the records. `python -m tests.crash.kills --minutes 10` is the long run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import mmap
import os
import random
import re
import signal
import sqlite3
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pillarbox import Dropped, Outbox, TrackingEvent
from pillarbox.outcome import Durability, Outcome
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from tests.crash.kill_points import BATCH_VERBS, step_by_step, wrap

WRITERS: Final = 3
DELIVERERS: Final = 2
EVENTS_MAX: Final = 2_000  # of one life; after that, the process waits to be killed
ROUND_S: Final = 2.0
DRAIN_S: Final = 60.0
ROUNDS_EACH: Final = 4  # rounds with a directory, before the next one
BACKLOG_MAX: Final = 300  # files; writers pause above it, so that draining does not take longer than a round

NEVER, BEGUN, REFUSED, UNSURE, ACKNOWLEDGED, POWER = range(6)  # the recorded states of an event
FAILED: Final = 70  # the exit status of a child that raised
_VERBS: Final = (
    "create",
    "lock",
    "lock_shared",
    "link",
    "write",
    "write_all",
    "overwrite",
    "truncate",
    "sync_data",
    "sync_directory",
    "rename",
    "unlink",
    "close",
    *BATCH_VERBS,
)
KEEPING: Final = frozenset(layout.CONTROL_FILES)  # files that remain when everything is delivered
_PRCTL: Final = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG: Final = 1  # the children of a killed parent are killed too
_ID: Final = re.compile(rb'"event_id":"(\d+)-(\d+)"')


class KillViolation(AssertionError):  # noqa: N818 - it is not an error of the program that raises it
    """Something was lost, invented, damaged, or could not be opened."""


class KillReport(NamedTuple):
    """The figures of a run."""

    seed: int
    kills: int
    rounds: int
    events: int  # attempted
    acknowledged: int
    delivered: int
    torn: int  # files in quarantine, with lines that a kill tore
    reordered: int  # events that arrived after a later one of the same life


class Oracle:
    """Records of each event whether it was attempted, dropped or acknowledged, and with which durability."""

    def __init__(self, slots: int) -> None:
        self._shared = mmap.mmap(-1, slots * EVENTS_MAX)
        self._lives: dict[int, bytes] = {}
        self.events = self.acknowledged = self.delivered = self.torn = self.reordered = 0

    def notes(self, slot: int) -> Callable[[int, int], None]:
        """The function that a child calls with the number of an event and its new state."""
        shared, first = self._shared, slot * EVENTS_MAX

        def note(number: int, state: int) -> None:
            shared[first + number] = state

        return note

    def bury(self, slot: int, life: int) -> None:
        """Take over the records of a dead child."""
        span = slice(slot * EVENTS_MAX, (slot + 1) * EVENTS_MAX)
        self._lives[life] = self._shared[span].rstrip(bytes([NEVER]))
        self._shared[span] = bytes(EVENTS_MAX)

    def check(self, database: Path, outbox: Path, kept: Sequence[int]) -> list[str]:
        """Compare the delivered events with the records, and start a new round. Returns the violations.

        Events in one of the states `kept` must have arrived.
        """
        wrong: list[str] = []
        arrived = _take_rows(database)
        latest: dict[int, int] = {}
        for (life, number), padding in arrived.items():
            self.reordered += number < latest.get(life, 0)
            latest[life] = max(number, latest.get(life, 0))
            state = self._state(life, number)
            if state in (NEVER, REFUSED):
                wrong.append(
                    f"invented: {life}-{number}, which was {'dropped' if state else 'never attempted, or delivered in an earlier round'}"
                )
            if padding != _padding(number):
                wrong.append(f"changed: {life}-{number}")
        for life, states in self._lives.items():
            lost = [number for number, state in enumerate(states) if state in kept and (life, number) not in arrived]
            wrong += [f"lost: {life}-{number}, in state {states[number]}" for number in lost]
            self.events += len(states) - states.count(NEVER)
            self.acknowledged += states.count(ACKNOWLEDGED) + states.count(POWER)
        self.delivered += len(arrived)
        wrong += self._check_files(outbox, kept)
        self._lives.clear()
        return wrong

    def _state(self, life: int, number: int) -> int:
        states = self._lives.get(life, b"")
        return states[number] if number < len(states) else NEVER

    def _check_files(self, outbox: Path, kept: Sequence[int]) -> list[str]:
        wrong: list[str] = []
        for name in sorted(os.listdir(outbox)):
            kind = layout.kind_of(name)
            if kind is Kind.CORRUPT:
                data = (outbox / name).read_bytes()
                for life, number in _ID.findall(data):
                    if self._state(int(life), int(number)) in kept:
                        wrong.append(f"in quarantine though acknowledged: {int(life)}-{int(number)}")
                self.torn += 1
            elif kind is not Kind.RANGES and name not in KEEPING:
                wrong.append(f"left behind: {name}")
                continue
            if name not in KEEPING:
                (outbox / name).unlink()
        return wrong


def _take_rows(database: Path) -> dict[tuple[int, int], str]:
    """Remove and return all rows, in order of arrival. An event that reappears in a later round counts as invented."""
    if not database.exists():
        return {}
    with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection:
        try:
            rows = connection.execute("SELECT event_id, metadata_json FROM tracking_event ORDER BY rowid").fetchall()
            connection.execute("DELETE FROM tracking_event")
            connection.commit()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return {}
            raise
    arrived = {}
    for event_id, padding in rows:
        life, _, number = event_id.partition("-")
        arrived[int(life), int(number)] = padding
    return arrived


def _padding(number: int) -> str:
    """Metadata with a length of up to two pages, because a kill tears writes at the ends of pages."""
    return f'{{"n":{number},"text":"{"x" * (number * 7919 % 211 if number % 16 else number * 7919 % 8191)}"}}'


def make_event(life: int, number: int) -> TrackingEvent:
    """The event with this number of this life."""
    return TrackingEvent(
        event_id=f"{life}-{number}",
        event_key="click",
        scope_kind="Site",
        scope_id="site",
        metadata_json=_padding(number),
        occurred_at_micros=number,
    )


def kill_self_later(chance: random.Random) -> None:
    """Make this process kill itself before or after the n-th operation on the disk, or in the middle of a write."""
    if chance.random() < 0.5:
        step_by_step()
    verbs = set(_VERBS) if chance.random() < 0.5 else {chance.choice(_VERBS)}
    operations_left = chance.choice((0, 1, 2, 3, 5, 8, 13, 21, 34, 55))
    when = chance.choice(("before", "middle", "after"))
    share = chance.random()

    def killing(verb: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal operations_left
            operations_left -= 1
            if operations_left >= 0:
                return function(*arguments, **named)
            if when == "middle" and verb == "write":
                fd, data = arguments
                assert isinstance(fd, int)
                assert isinstance(data, bytes)
                os.write(fd, data[: int(share * len(data))])
            elif when != "before":
                function(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return call

    wrap(verbs, killing)


class KilledLife:
    """A forked child, which stores or delivers until it is killed."""

    def __init__(
        self, number: int, directory: str, database: Path, note: Callable[[int, int], None], chance: random.Random, power: float
    ) -> None:
        self.number = number
        self.note = note
        self.chance = chance
        self._directory = directory
        self._sink = f"sqlite:///{database}"
        self._power = power
        self._events = 0

    def _outbox(self, *, delivers: bool) -> Outbox:
        return Outbox(
            self._directory,
            sink=self._sink if delivers else None,
            batch_size=self.chance.choice((1, 3, 10, 50)),
            batch_bytes=self.chance.choice((4_000, 1_000_000)),
            flush_interval=self.chance.choice((0.005, 0.05)),
            durability="power" if self.chance.random() < self._power else "process",
            min_free_bytes=0,
        )

    def deliver(self) -> None:
        """Deliver the events of the writers."""
        with self._outbox(delivers=True):
            _pause(3600.0)

    def store(self) -> None:
        """Store events one by one and several at a time. Sometimes reopen the outbox, or fork a child that lives longer."""
        while self._events < EVENTS_MAX:
            with self._outbox(delivers=self.chance.random() < 0.3) as outbox:
                for _ in range(self.chance.choice((1, 5, 50, 500))):
                    self._store_some(outbox)
                    if self.chance.random() < 0.02:
                        _fork_idle_child()
                    if self.chance.random() < 0.02:
                        outbox.flush(timeout=0.05)
        _pause(3600.0)

    def _store_some(self, outbox: Outbox) -> None:
        while len(os.listdir(self._directory)) > BACKLOG_MAX:
            _pause(0.01)
        in_one_call = self.chance.random() < 0.2
        count = min(self.chance.choice((2, 7, 40)) if in_one_call else self.chance.choice((1, 4)), EVENTS_MAX - self._events)
        durability: Durability | None = self.chance.choice((None, None, None, "process", "power")) if self._power else None
        numbers = range(self._events, self._events + count)
        self._events += count
        for number in numbers:
            if in_one_call:
                continue
            self.note(number, BEGUN)
            self._record_outcome(number, outbox.enqueue(make_event(self.number, number), durability=durability))
        if in_one_call:
            for number in numbers:
                self.note(number, BEGUN)
            outcomes = outbox.enqueue_many([make_event(self.number, number) for number in numbers], durability=durability)
            for number, outcome in zip(numbers, outcomes, strict=True):
                self._record_outcome(number, outcome)
        if self.chance.random() < 0.3:
            _pause(self.chance.random() * 0.01)

    def _record_outcome(self, number: int, outcome: Outcome) -> None:
        if isinstance(outcome, Dropped):
            self.note(number, UNSURE if outcome.reason == "io_error" else REFUSED)
        else:
            self.note(number, POWER if outcome.durability == "power" else ACKNOWLEDGED)


def _pause(seconds: float) -> None:
    # wait: the process under test runs until it is killed
    signal.sigtimedwait([], seconds)


def _fork_idle_child() -> None:
    """Fork a process that never uses the outbox. It must not block other processes, however long it lives."""
    if os.fork() == 0:
        _pause(ROUND_S)
        os._exit(0)


class _DefectRecorder(logging.Handler):
    """Stores the tracebacks that a thread of the outbox logs, or that end it. They are defects."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.ERROR)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            (self._folder / f"{os.getpid()}.txt").write_text(self.format(record))

    def thread_ended(self, hook: threading.ExceptHookArgs) -> None:
        """Used as `threading.excepthook`."""
        trace = traceback.format_exception(hook.exc_type, hook.exc_value, hook.exc_traceback)
        (self._folder / f"{os.getpid()}.txt").write_text("".join(trace))


def fork(folder: Path, work: Callable[[], None]) -> int:
    """Start a child that runs `work`, and writes an exception to a file in `folder`. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        log = logging.getLogger("pillarbox")
        defects = _DefectRecorder(folder)
        log.handlers, log.propagate = [defects], False
        threading.excepthook = defects.thread_ended
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the exception must not unwind the stack of the parent
        (folder / f"{os.getpid()}.txt").write_text(traceback.format_exc())
    os._exit(status)


class ChildProcess(NamedTuple):
    """A forked process that works until it ends or is killed."""

    pid: int
    life: int
    deadline: float  # when it is killed, unless it killed itself before


class KillTorture:
    """Runs rounds, in directories below `outboxes`. `cut()` is called when all processes are dead; it may cut the power."""

    def __init__(
        self,
        directory: Path,
        outboxes: Path,
        seed: int,
        power: float,
        kept: Sequence[int],
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        self.seed = seed
        self.kills = self.rounds = 0
        self.oracle = Oracle(WRITERS + DELIVERERS)
        self._chance = random.Random(seed)
        self._outboxes = outboxes
        self._outbox = outboxes / "0"
        self._database = directory / "destination.db"
        self.failures = directory / "failures"
        self.failures.mkdir(parents=True, exist_ok=True)
        self._power = power
        self._kept = kept
        self._cut = cut
        self._lives = 0
        self._children: dict[int, ChildProcess] = {}

    def round(self, seconds: float) -> None:
        """Run and kill processes for a while, drain the directory, and compare."""
        if self.rounds % ROUNDS_EACH == 0:
            self._outbox = self._outboxes / str(self.rounds)  # which the processes create
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                for slot in range(WRITERS + DELIVERERS):
                    if slot not in self._children:
                        self._start_life(slot)
                first = min(child.deadline for child in self._children.values())
                # wait: until a child ends, or it is time to kill one
                signal.sigtimedwait([signal.SIGCHLD], max(0.0, min(first, end) - time.monotonic()))
                self._reap(time.monotonic())
        finally:
            self._reap(float("inf"))
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        self._cut()
        self._drain()
        wrong = self.oracle.check(self._database, self._outbox, self._kept)
        if any(self.failures.iterdir()):
            wrong.append("a thread of the outbox logged a traceback or ended with an exception")
        self.rounds += 1
        if wrong:
            raise self.violation(wrong)

    def report(self) -> KillReport:
        """The figures so far."""
        oracle = self.oracle
        figures = oracle.events, oracle.acknowledged, oracle.delivered, oracle.torn, oracle.reordered
        return KillReport(self.seed, self.kills, self.rounds, *figures)

    def make_life(self, chance: random.Random, note: Callable[[int, int], None] = lambda _number, _state: None) -> KilledLife:
        """The life with the next number."""
        return KilledLife(self._lives, str(self._outbox), self._database, note, chance, self._power)

    def _start_life(self, slot: int) -> None:
        self._lives += 1
        chance = random.Random(f"{self.seed}/{self._lives}")
        life = self.make_life(chance, self.oracle.notes(slot))

        def work() -> None:
            if chance.random() < 0.5:
                kill_self_later(chance)
            life.store() if slot < WRITERS else life.deliver()

        span = self._chance.choice((0.005, 0.05, 0.05, 0.3)) if slot < WRITERS else self._chance.choice((0.05, 0.3, 1.0))
        pid = fork(self.failures, work)
        self._children[slot] = ChildProcess(pid, self._lives, time.monotonic() + span * self._chance.random())

    def _reap(self, now: float) -> None:
        wrong: list[str] = []
        for slot, child in list(self._children.items()):
            due = now >= child.deadline
            if due:
                os.kill(child.pid, signal.SIGKILL)
            pid, status = os.waitpid(child.pid, 0 if due else os.WNOHANG)
            if not pid:
                continue
            del self._children[slot]
            self.oracle.bury(slot, child.life)
            self.kills += 1
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                wrong.append(f"life {child.life} was not killed, and ended with status {status}")
        if wrong:
            self._reap(float("inf"))
            raise self.violation(wrong)

    def _drain(self) -> None:
        def work() -> None:
            with Outbox(str(self._outbox), f"sqlite:///{self._database}", flush_interval=0.01, min_free_bytes=0) as outbox:
                if not outbox.flush(DRAIN_S):
                    raise KillViolation(f"not drained in {DRAIN_S} s: {outbox.stats()}")

        if os.waitstatus_to_exitcode(os.waitpid(fork(self.failures, work), 0)[1]) != 0:
            raise self.violation(["the directory could not be opened and drained"])

    def violation(self, wrong: list[str]) -> KillViolation:
        """The exception to raise, with the seed and the tracebacks of children."""
        traces = [path.read_text() for path in sorted(self.failures.iterdir())]
        more = f"and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        where = f"seed {self.seed}, round {self.rounds}, {self.kills} kills, files in {self._outbox}"
        return KillViolation("\n".join([where, *wrong[:20], more, *traces[:3]]))


def run(
    seconds: float,
    seed: int,
    directory: Path,
    progress: Callable[[KillReport], None] = lambda _: None,
    *,
    kills_min: int = 0,
    acknowledged_min: int = 0,
) -> KillReport:
    """Torture for about `seconds`, and longer on a slow machine, until the minima of kills and acknowledged events are reached.

    Raises `KillViolation`; the directory is kept then.
    """
    torture = KillTorture(directory, directory / "outboxes", seed, power=0.3, kept=(ACKNOWLEDGED, POWER))
    end = time.monotonic() + seconds
    while (
        (seconds_left := end - time.monotonic()) > 0
        or (report := torture.report()).kills < kills_min
        or report.acknowledged < acknowledged_min
    ):
        torture.round(min(ROUND_S, max(seconds_left, 1.0)))
        progress(torture.report())
    return torture.report()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--kills-min", type=int, default=0)
    parser.add_argument("--acknowledged-min", type=int, default=0)
    chosen = parser.parse_args()
    directory = chosen.directory or Path(tempfile.mkdtemp(prefix="pillarbox-kills-"))
    print(f"seed {chosen.seed}, in {directory}", flush=True)  # noqa: T201 - the report
    report = run(
        chosen.minutes * 60,
        chosen.seed,
        directory,
        lambda report: print(report, flush=True),  # noqa: T201
        kills_min=chosen.kills_min,
        acknowledged_min=chosen.acknowledged_min,
    )
    print(report)  # noqa: T201


if __name__ == "__main__":
    main()
