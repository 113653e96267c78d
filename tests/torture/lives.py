"""What a forked process does until it is killed: store, deliver as a part of an application or as `pillarbox deliver`, or both."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from pillarbox import Dropped, Outbox
from pillarbox.cli.app import run as run_command
from pillarbox.outcome import Outcome
from pillarbox.settings import resolve
from pillarbox.store import layout
from pillarbox.store.filesystem import RealFilesystem
from pillarbox.store.layout import Kind
from tests.torture import account, events
from tests.torture.account import Notes
from tests.torture.events import EVENTS_MAX, make_event

BACKLOG_MAX: Final = 120  # files; writers pause above it, lest a round takes longer to drain than to fill
CALL_TIMEOUT_S: Final = 0.5  # of a deliverer's call
HANG_S: Final = 0.6  # how long a destination that hangs does: a little longer
BACKOFF_MAX_S: Final = 0.05
_LAST_EVENTS: Final = 3  # good ones, stored when all writers are dead: what was refused until then is judged after them
_FLUSH_S: Final = 1.0
_SET_ASIDE: Final = (Kind.DEAD, Kind.CORRUPT)
_SETTLING: Final = ("rename", "sync_directory", "write_all", "sync_data", "unlink", "close")
_PENDING: Final = (Kind.ACTIVE, Kind.LEGACY_ACTIVE, Kind.SEALED, Kind.ASIDE)


class Scene(NamedTuple):
    """What the lives of a run share."""

    seed: int
    outbox: str  # the directory
    sink: str  # the URL


class Life:
    """One of them."""

    def __init__(self, number: int, scene: Scene, notes: Notes, chance: random.Random) -> None:
        self.number = number
        self.scene = scene
        self.notes = notes
        self.chance = chance
        self._events = 0

    def settings(self, *, delivers: bool) -> dict[str, str]:
        """As environment variables, the one form that a process and a command have in common."""
        chosen: dict[str, object] = {
            "directory": self.scene.outbox,
            "batch_size": self.chance.choice((4, 50, 250, 250, 500, 500)),
            "batch_bytes": self.chance.choice((8_000, 1_000_000, 1_000_000)),
            "flush_interval": self.chance.choice((0.02, 0.05)),
            "min_free_bytes": 0,
            "backoff_max": BACKOFF_MAX_S,
            "call_timeout": CALL_TIMEOUT_S,
            "outage_after": self.chance.choice((0, 3)),
            "max_in_flight": self.chance.choice((1, 1, 3)),
        }
        if delivers:
            chosen["sink"] = self.scene.sink
        return {f"PILLARBOX_{name.upper()}": str(value) for name, value in chosen.items()}

    def _outbox(self, *, delivers: bool) -> Outbox:
        return Outbox.from_settings(resolve({}, self.settings(delivers=delivers)))

    def store(self) -> None:
        """Store events, a hundred at a time or one by one; close and open anew now and then."""
        while self._events < EVENTS_MAX:
            with self._outbox(delivers=self.chance.random() < 0.2) as outbox:
                for _ in range(self.chance.choice((3, 30, 300))):
                    self._store_some(outbox)
        pause(3600.0)

    def _store_some(self, outbox: Outbox) -> None:
        while len(os.listdir(self.scene.outbox)) > BACKLOG_MAX + self._kept():
            pause(0.01)
        many = self.chance.random() < 0.9
        count = min(self.chance.choice((7, 100, 100, 100)) if many else 5, EVENTS_MAX - self._events)
        numbers = range(self._events, self._events + count)
        self._events += count
        found = [make_event(self.scene.seed, self.number, number) for number in numbers]
        if many:
            self.notes.begin(numbers)
            for number, outcome in zip(numbers, outbox.enqueue_many(found), strict=True):
                self._conclude(number, outcome)
        else:
            for number, event in zip(numbers, found, strict=True):
                self.notes.begin(range(number, number + 1))
                self._conclude(number, outbox.enqueue(event))
        if self.chance.random() < 0.2:
            pause(self.chance.random() * 0.02)

    def _kept(self) -> int:
        """Files that are no backlog."""
        return sum(layout.kind_of(name) not in _PENDING for name in os.listdir(self.scene.outbox))

    def _conclude(self, number: int, outcome: Outcome) -> None:
        if not isinstance(outcome, Dropped):
            self.notes.conclude(number, account.ACKNOWLEDGED)
        else:
            self.notes.conclude(number, account.UNSURE if outcome.reason == "io_error" else account.REFUSED)

    def deliver(self) -> None:
        """Deliver what others store, in an application or as the command."""
        if self.chance.random() < 0.5:
            with self._outbox(delivers=True):
                pause(3600.0)
        os.environ |= self.settings(delivers=True)
        sys.argv = ["pillarbox", "deliver", "--quiet"]
        run_command()

    def finish(self, seconds: float) -> None:
        """Store a few good events, and deliver until nothing is pending."""
        end = time.monotonic() + seconds
        left = _LAST_EVENTS
        while left or pending(self.scene.outbox):  # looked at when it is closed: an open outbox has files of its own
            with self._outbox(delivers=True) as outbox:
                while left:
                    if not events.poisoned(self.scene.seed, self.number, self._events):
                        self.notes.begin(range(self._events, self._events + 1))
                        event = make_event(self.scene.seed, self.number, self._events)
                        self._conclude(self._events, outbox.enqueue(event))
                        left -= 1
                    self._events += 1
                while not outbox.flush(_FLUSH_S):
                    if time.monotonic() > end:
                        raise TimeoutError(f"not drained in {seconds:g} s: {outbox.stats()}, {pending(self.scene.outbox)[:5]}")
            if time.monotonic() > end and pending(self.scene.outbox):
                raise TimeoutError(f"left behind after {seconds:g} s: {pending(self.scene.outbox)[:5]}")


def pending(directory: str) -> list[str]:
    """The files there that are not settled."""
    return [name for name in sorted(os.listdir(directory)) if layout.kind_of(name) in _PENDING]


def pause(seconds: float) -> None:
    """Wait, and be killed at it."""
    signal.sigtimedwait([], seconds)


def die_in_a_settlement(chance: random.Random) -> None:
    """Have this process kill itself a few operations after it has set something aside: before the file that it is from goes."""
    left, steps = chance.choice((0, 0, 1, 3)), chance.choice((0, 1, 2, 3, 4, 6))
    armed = False

    def dying(verb: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal left, steps, armed
            steps -= armed
            if steps < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if verb == "rename" and layout.kind_of(os.path.basename(str(arguments[-1]))) in _SET_ASIDE:
                left -= 1
                armed = left < 0
            return result

        return call

    for verb in _SETTLING:
        found = RealFilesystem.__dict__[verb]
        wrapped = dying(verb, getattr(RealFilesystem, verb))
        setattr(RealFilesystem, verb, staticmethod(wrapped) if isinstance(found, staticmethod) else wrapped)
