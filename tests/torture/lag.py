"""Measures the backlog of each sink, and checks that a fickle sink that is down delays only itself.

In the middle third of a round with two sinks, the fickle one rejects everything. The backlog of each sink is sampled
throughout: how many events are in batches, and how old the oldest batch is.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Final, NamedTuple

from pillarbox.store import compression, layout
from pillarbox.store.directory import Directory
from tests.torture.destinations import Arena
from tests.torture.lives import FICKLE, STEADY

BEHIND_MAX_S: Final = 15.0  # of a steady sink, while the other one is down for longer
SAMPLE_EVERY_S: Final = 0.2
_JUDGED_S: Final = 5.0  # a shorter outage does not show which sink is delayed


class SinkBacklog(NamedTuple):
    """The backlog of a sink: events, and the age of the oldest file in seconds."""

    events: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.events:,} for {self.seconds:.1f} s"


class BacklogSamples(NamedTuple):
    """The samples of both sinks."""

    steady: list[SinkBacklog]
    fickle: list[SinkBacklog]

    def __str__(self) -> str:
        most = [SinkBacklog(*map(max, zip(*behind, strict=True))) if behind else SinkBacklog(0, 0.0) for behind in self]
        return f"at most {most[0]} wait for the steady sink, {most[1]} for the fickle one"


class Watch:
    """Watches one round of `seconds`, which starts at the monotonic time `now`."""

    def __init__(self, directory: Directory, arena: Arena, now: float, seconds: float) -> None:
        self.directory = directory
        self._arena = arena
        self._down_at, self._back_at = now + seconds / 3, now + seconds * 2 / 3
        self._counted: dict[str, int] = {}  # events by batch
        self.next = now
        self.up = BacklogSamples([], [])
        self.down = BacklogSamples([], [])

    def sample(self, now: float) -> list[str]:
        """Take a sample if it is due. Returns what is wrong."""
        if now < self.next:
            return []
        self.next = now + SAMPLE_EVERY_S
        if not self._down_at <= now < self._back_at:
            self._arena.come_back()
            seen = self.up
        else:
            self._arena.go_down()
            seen = self.down
        steady, fickle = self.behind(STEADY), self.behind(FICKLE)
        seen.steady.append(steady)
        seen.fickle.append(fickle)
        if seen is self.down and steady.seconds > BEHIND_MAX_S:
            return [f"the steady sink is delayed: {steady} wait for it while the other one is down"]
        return []

    def conclude(self) -> list[str]:
        """List what is wrong with the whole round."""
        self._arena.come_back()
        later = [looks[len(looks) // 2 :] for looks in self.down]
        if not all(later) or self._back_at - self._down_at < _JUDGED_S:
            return []
        steady, fickle = (statistics.median(behind.events for behind in looks) for looks in later)
        if 2 * steady > fickle:
            return [
                f"the steady sink is delayed: the median backlog is {steady:,} events, and {fickle:,} for the one that is down"
            ]
        return []

    def behind(self, sink: str) -> SinkBacklog:
        """The current backlog of a sink, in its queue and in the directory."""
        paths: dict[str, str] = {}
        for folder in (self.directory, self.directory.queue(sink)):
            try:
                paths |= {layout.batch_id(name): folder.path_of(name) for name in folder.all_sealed_names()}
            except FileNotFoundError:
                continue  # no queue yet
        events = sum(self._events(batch, path) for batch, path in paths.items())
        seal_times = [at for path in paths.values() if (at := layout.sealed_at(os.path.basename(path))) is not None]
        return SinkBacklog(events, max(0.0, time.time() - min(seal_times) / 1e6) if seal_times else 0.0)

    def _events(self, batch: str, path: str) -> int:
        if batch not in self._counted:
            try:
                data = Path(path).read_bytes()
            except FileNotFoundError:
                return 0  # settled or fanned out meanwhile
            self._counted[batch] = compression.decompressed_lines(path, data).count(b"\n")
        return self._counted[batch]
