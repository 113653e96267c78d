"""What waits must not matter: cost, time to open, memory and disk as the backlog grows to 10^7 events and to 200,000 files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from bench import pending, sample
from bench.plan import Column, Contestant, Goal, Section, figure, ratio

if TYPE_CHECKING:
    from pathlib import Path

    from bench.plan import Figures, Place

ACCEPTED = 200_000  # events
FILES_DELIVERED = 400  # at most, of each backlog
FILES_OF_ONE_DELIVERED = 8_000  # the same where each has one event: fewer are gone before they can be timed
_QUICK_ACCEPTED, _QUICK_FILES = 20_000, 120


class Backlog(NamedTuple):
    """So many sealed files of so many events."""

    files: int
    batch: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        of = "1 event" if self.batch == 1 else f"{self.batch} events"
        return f"{self.files * self.batch:,} events: {self.files:,} files of {of}"

    @property
    def delivered(self) -> int:
        """How many of them are delivered at most."""
        return min(self.files, FILES_OF_ONE_DELIVERED if self.batch == 1 else FILES_DELIVERED)

    @property
    def folder(self) -> str:
        """Where it is."""
        return f"{self.files}-{self.batch}"


LARGE = tuple(Backlog(files, sample.BATCH) for files in (20, 200, 2_000, 20_000))
MANY = tuple(Backlog(files, 1) for files in (2_000, 200_000))


def _reduced(backlog: Backlog, quick: bool) -> Backlog:
    return backlog._replace(files=min(backlog.files, _QUICK_FILES)) if quick else backlog


def prepare(shared: Path, quick: bool) -> None:
    """Write all of them."""
    for backlog in (*LARGE, *MANY):
        files, batch = _reduced(backlog, quick)
        sample.sealed_files(shared / backlog.folder, files, batch)


def run(place: Place, backlog: Backlog) -> Figures:
    """Enqueue beside the backlog while nothing is delivered, then deliver of it for a while."""
    directory = place.own / "outbox"
    directory.mkdir(mode=0o700)
    size, reduced = 0, _reduced(backlog, place.quick)
    copied = 2 * reduced.delivered  # the others are links to the files of all rounds: they are listed, and never read
    names = sorted(os.listdir(place.shared / backlog.folder))
    for number, name in enumerate(names):
        path = place.shared / backlog.folder / name
        if number < copied:
            shutil.copyfile(path, directory / name)
            size += path.stat().st_size
        else:
            os.link(path, directory / name)
    accepted = _apart("accept", directory, str(len(names)), str(_QUICK_ACCEPTED if place.quick else ACCEPTED))
    del accepted["per_s"]
    delivered = _apart("deliver", directory, str(place.own / "events.db"), str(reduced.delivered))
    return accepted | delivered | {"bytes": size / min(len(names), copied) / backlog.batch}


def _apart(what: str, directory: Path, *more: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.pending", what, str(directory), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return dict(json.loads(done.stdout))


_MOST, _MOST_FILES = LARGE[-1].name, MANY[-1].name

ABOUT = f"""
An outbox on a directory in which so many sealed files wait; the system has their names and sizes in its cache. First without a
sink: once the files are counted, {ACCEPTED:,} events are enqueued, sealing included. Then with SQLite as the sink: at
most {FILES_DELIVERED} of the oldest files are delivered, of those of one event {FILES_OF_ONE_DELIVERED:,}, for at most
{pending.DELIVER_S:g} s; fewer than {pending.FILES_TIMED} are not timed. Each in a process of its own: the memory is the most
that the one that delivers ever had, interpreter and libraries included. To the first event that is accepted, and to the first
that is sent, it is from opening the outbox.
"""

SECTION = Section(
    key="scale",
    title="As the backlog grows",
    about=ABOUT,
    rounds=3,
    contestants=tuple(Contestant(one.name, partial(run, backlog=one), ours=True) for one in (*LARGE, *MANY)),
    columns=(
        Column("mean_us", "accepting, mean, us", 2),
        Column("p99_us", "p99, us", 1),
        Column("p999_us", "p99.9, us", 1),
        Column("per_s", "delivered, events/s", 0),
        Column("cpu_s", "processor, s a million delivered", 2),
        Column("open_s", "to the first accepted, s", 3),
        Column("begin_s", "to the first sent, s", 3),
        Column("rss_mib", "resident, MiB", 1),
        Column("bytes", "bytes an event", 0),
    ),
    goals=(
        Goal("accepting beside 10^7 events: of beside 10^4", ratio(_MOST, LARGE[0].name, "mean_us"), 1.25),
        Goal("accepting beside 200,000 files: of beside 2,000", ratio(_MOST_FILES, MANY[0].name, "mean_us"), 1.25),
        Goal("delivering of 10^7 events, processor: of 10^5", ratio(_MOST, LARGE[1].name, "cpu_s"), 1.25),
        Goal("delivering of 200,000 files, processor: of 2,000", ratio(_MOST_FILES, MANY[0].name, "cpu_s"), 1.25),
        Goal("resident memory, 10^7 events", figure(_MOST, "rss_mib"), 60, unit="MiB"),
        Goal("resident memory, 200,000 files", figure(_MOST_FILES, "rss_mib"), 60, unit="MiB"),
        Goal("to the first accepted, 10^7 events", figure(_MOST, "open_s"), 1, unit="s"),
        Goal("to the first accepted, 200,000 files", figure(_MOST_FILES, "open_s"), 3, unit="s"),
        Goal("to the first sent, 200,000 files", figure(_MOST_FILES, "begin_s"), 3, unit="s"),
    ),
    prepare=prepare,
    budget_s=120,
)
