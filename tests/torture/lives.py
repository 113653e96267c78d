"""The forked processes, each of which stores events, delivers, or both, until it is killed.

They deliver in an application or as `pillarbox deliver`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from pillarbox import Dropped, Outbox
from pillarbox.cli.main import run as run_command
from pillarbox.delivery.runner import ONLY_SINK
from pillarbox.outcome import Outcome
from pillarbox.settings import resolve
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from tests.crash.kill_points import step_by_step, wrap
from tests.torture import account, events
from tests.torture.account import Notes
from tests.torture.events import EVENTS_MAX, make_event

STEADY, FICKLE = "steady", "fickle"  # of two sinks, the one that always works, and the other
BACKLOG_FILES: Final = 120  # writers pause above it, so that draining does not take longer than a round
BACKLOG_MAX: Final = {FICKLE: 600}  # other limits, by sink
CALL_TIMEOUT_S: Final = 0.5  # of a call of a delivery worker
HANG_S: Final = 0.6  # how long a destination hangs: a little longer than the timeout
BACKOFF_MAX_S: Final = 0.05
_ALONE: Final = 0.1  # share of the delivering lives that have only one of two sinks
_KEEPING: Final = 0.3  # share of the lives with two sinks that compress batches and retain delivered ones
_KEPT: Final = {
    "compress_after": 0.02,
    "keep_delivered": 2,
    "backoff_max": 0.5,
}  # batches are compressed only in a long back-off
_SLOWER_S: Final = 0.1  # at most, after each call, so that writers do not only wait for the fickle sink
_LAST_EVENTS: Final = 3  # good events, stored when all writers are dead: deferred batches are decided after them
_FLUSH_S: Final = 1.0
_SET_ASIDE: Final = (Kind.DEAD, Kind.CORRUPT)
_OPERATIONS: Final = ("rename", "link", "sync_directory", "write_all", "sync_data", "unlink", "close")
_PENDING: Final = (Kind.ACTIVE, Kind.LEGACY_ACTIVE, Kind.SEALED, Kind.TEMPORARY)


class Scene(NamedTuple):
    """The data that the processes of a round share."""

    seed: int
    outbox: str  # the directory
    sinks: Mapping[str, str]  # URLs, by name; `ONLY_SINK` where there is one

    @property
    def has_several(self) -> bool:
        """Whether there are several sinks, each with a queue."""
        return ONLY_SINK not in self.sinks

    def queue_path(self, sink: str) -> str:
        """The directory in which batches wait for a sink."""
        return self.outbox if sink == ONLY_SINK else f"{self.outbox}/{layout.queue_name(sink)}"


class Life:
    """A forked process."""

    def __init__(self, number: int, scene: Scene, notes: Notes, chance: random.Random) -> None:
        self.number = number
        self.scene = scene
        self.notes = notes
        self.chance = chance
        self._events = 0

    def settings(self, sinks: Mapping[str, str], **more: object) -> dict[str, str]:
        """The settings as environment variables, for an application or the command."""
        chosen: dict[str, object] = {
            "directory": self.scene.outbox,
            "batch_size": self.chance.choice((4, 50, 250, 250, 500, 500)),
            "batch_bytes": self.chance.choice((8_000, 1_000_000, 1_000_000)),
            "flush_interval": self.chance.choice((0.02, 0.3) if self.scene.has_several else (0.02, 0.05)),
            "min_free_bytes": 0,
            "backoff_max": BACKOFF_MAX_S,
            "call_timeout": CALL_TIMEOUT_S,
            "stop_after_rejected_batches": self.chance.choice((0, 3)),
            "max_in_flight": self.chance.choice((1, 1, 3)),
        }
        if self.scene.has_several and self.chance.random() < _KEEPING:
            chosen |= _KEPT
        if ONLY_SINK in sinks:
            chosen["sink"] = sinks[ONLY_SINK]
        elif sinks:
            chosen["sinks"] = " ".join(_pairs(sinks))
        return {f"PILLARBOX_{name.upper()}": str(value) for name, value in (chosen | more).items()}

    def _outbox(self, sinks: Mapping[str, str], **more: object) -> Outbox:
        return Outbox.from_settings(resolve({}, self.settings(sinks, **more)))

    def _named(self) -> Mapping[str, str]:
        """The sinks of this process: all, or sometimes only one, once all have their queues."""
        sinks = self.scene.sinks
        if not self.scene.has_several or self.chance.random() > _ALONE:
            return sinks
        if not all(os.path.isdir(self.scene.queue_path(sink)) for sink in sinks):
            return sinks
        name = self.chance.choice(list(sinks))
        return {name: sinks[name]}

    def store(self) -> None:
        """Store events, a hundred at a time or one by one. Sometimes reopen the outbox."""
        while self._events < EVENTS_MAX:
            with self._outbox(self._named() if self.chance.random() < 0.2 else {}) as outbox:
                for _ in range(self.chance.choice((3, 30, 300))):
                    self._store_some(outbox)
        pause(3600.0)

    def _store_some(self, outbox: Outbox) -> None:
        while self._backlog_is_full():
            pause(0.01)
        many = self.chance.random() < 0.9
        count = min(self.chance.choice((7, 100, 100, 100)) if many else 5, EVENTS_MAX - self._events)
        numbers = range(self._events, self._events + count)
        self._events += count
        found = [make_event(self.scene.seed, self.number, number) for number in numbers]
        if many:
            self.notes.note_attempt(numbers)
            for number, outcome in zip(numbers, outbox.enqueue_many(found), strict=True):
                self._record_outcome(number, outcome)
        else:
            for number, event in zip(numbers, found, strict=True):
                self.notes.note_attempt(range(number, number + 1))
                self._record_outcome(number, outbox.enqueue(event))
        if self.scene.has_several:
            pause(self.chance.random() * _SLOWER_S)
        elif self.chance.random() < 0.2:
            pause(self.chance.random() * 0.02)

    def _backlog_is_full(self) -> bool:
        """Whether the backlog of a sink is above its limit; the fickle sink has a higher one, so that it does not delay the other."""
        sealed = len(pending(self.scene.outbox))
        queues = {sink: len(pending(self.scene.queue_path(sink))) for sink in self.scene.sinks if sink != ONLY_SINK}
        return any(sealed + queues.get(sink, 0) > BACKLOG_MAX.get(sink, BACKLOG_FILES) for sink in self.scene.sinks)

    def _record_outcome(self, number: int, outcome: Outcome) -> None:
        if not isinstance(outcome, Dropped):
            self.notes.note_outcome(number, account.ACKNOWLEDGED)
        else:
            self.notes.note_outcome(number, account.UNSURE if outcome.reason == "io_error" else account.REFUSED)

    def deliver(self) -> None:
        """Deliver the events of the writers: in an application, by a thread or a child process, or as the command."""
        sinks, ways = self._named(), ("thread", "command", "process")
        way = self.chance.choice(ways if self.scene.has_several else ways[:2])
        if way != "command":
            with self._outbox(sinks, deliver=way):
                pause(3600.0)
        named = [] if ONLY_SINK in sinks else _pairs(sinks)
        os.environ |= self.settings({} if named else sinks)
        sys.argv = ["pillarbox", "deliver", "--quiet", *(word for pair in named for word in ("--sink", pair))]
        run_command()

    def finish(self, seconds: float) -> None:
        """Store a few good events, and deliver until nothing is pending."""
        end = time.monotonic() + seconds
        left = _LAST_EVENTS
        while left or left_behind(self.scene):  # checked when the outbox is closed, because an open one has files
            with self._outbox(self.scene.sinks) as outbox:
                while left:
                    if not events.poisoned(self.scene.seed, self.number, self._events):
                        self.notes.note_attempt(range(self._events, self._events + 1))
                        event = make_event(self.scene.seed, self.number, self._events)
                        self._record_outcome(self._events, outbox.enqueue(event))
                        left -= 1
                    self._events += 1
                while not outbox.flush(_FLUSH_S):
                    if time.monotonic() > end:
                        raise TimeoutError(f"not drained in {seconds:g} s: {outbox.stats()}, {left_behind(self.scene)[:5]}")
            if time.monotonic() > end and left_behind(self.scene):
                raise TimeoutError(f"left behind after {seconds:g} s: {left_behind(self.scene)[:5]}")


def pending(directory: str) -> list[str]:
    """The files that are not settled; none if the directory does not exist yet."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    return [name for name in names if layout.kind_of(name) in _PENDING]


def left_behind(scene: Scene) -> list[str]:
    """The paths of the files that are not settled for every sink."""
    places = {scene.outbox, *map(scene.queue_path, scene.sinks)}
    return [f"{folder}/{name}" for folder in sorted(places) for name in pending(folder)]


def _pairs(sinks: Mapping[str, str]) -> list[str]:
    return [f"{name}={url}" for name, url in sinks.items()]


def pause(seconds: float) -> None:
    """Wait; the process may be killed meanwhile."""
    # wait: the process under test runs until it is killed
    signal.sigtimedwait([], seconds)


def die_in_a_settlement(chance: random.Random) -> None:
    """Make this process kill itself in a settlement.

    Some operations after it has written dead letters or quarantined bytes, and before their batch file is deleted.
    """

    def has_begun(verb: str, target: str) -> bool:
        return verb == "rename" and layout.kind_of(os.path.basename(target)) in _SET_ASIDE

    _die_after(has_begun, chance.choice((0, 0, 1, 3)), chance.choice((0, 1, 2, 3, 4, 6)), lambda: None)


def die_fanning_out(chance: random.Random, note: Callable[[], None]) -> None:
    """Make this process kill itself in a fan-out: after the first link in a queue, before the name in the outbox is removed.

    `note` is called right before.
    """
    steps = chance.choice((0, 0, 1, 1, 2, 3, 4, 6, 10, 20))
    _die_after(lambda verb, _target: verb == "link", chance.choice((0, 0, 1, 3)), steps, note)


def _die_after(has_begun: Callable[[str, str], bool], left: int, steps: int, note: Callable[[], None]) -> None:
    """Make this process kill itself so many operations after `has_begun` was true for the time after `left` times."""
    armed = False

    def dying(verb: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left, steps, armed
            steps -= armed
            if steps < 0:
                note()
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if has_begun(verb, str(arguments[-1])):
                left -= 1
                armed = left < 0
            return result

        return call

    step_by_step()
    wrap(_OPERATIONS, dying)
