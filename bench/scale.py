"""Cost, time to open, memory and disk must not depend on the backlog: up to 10^7 events and up to 200,000 files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from bench import sample, scale_process
from bench.definitions import Column, Contestant, Goal, Section, figure, ratio

if TYPE_CHECKING:
    from pathlib import Path

    from bench.definitions import Figures, RoundPaths

ACCEPTED = 200_000  # events
FILES_DELIVERED = 400  # limit for each backlog
FILES_OF_ONE_DELIVERED = 8_000  # limit with one event per file: fewer are delivered too fast to time
_QUICK_ACCEPTED, _QUICK_FILES = 20_000, 120


class Backlog(NamedTuple):
    """Number of batch files, and events in each."""

    files: int
    batch: int

    @property
    def name(self) -> str:
        """Its name in the table."""
        of = "1 event" if self.batch == 1 else f"{self.batch} events"
        return f"{self.files * self.batch:,} events: {self.files:,} files of {of}"

    @property
    def delivered(self) -> int:
        """Limit of the files to deliver."""
        return min(self.files, FILES_OF_ONE_DELIVERED if self.batch == 1 else FILES_DELIVERED)

    @property
    def folder(self) -> str:
        """Its directory."""
        return f"{self.files}-{self.batch}"


LARGE = tuple(Backlog(files, sample.BATCH) for files in (20, 200, 2_000, 20_000))
MANY = tuple(Backlog(files, 1) for files in (2_000, 200_000))


def _reduced(backlog: Backlog, quick: bool) -> Backlog:
    return backlog._replace(files=min(backlog.files, _QUICK_FILES)) if quick else backlog


def prepare(shared: Path, quick: bool) -> None:
    """Write all backlogs."""
    for backlog in (*LARGE, *MANY):
        files, batch = _reduced(backlog, quick)
        sample.sealed_files(shared / backlog.folder, files, batch)


def run(workdir: RoundPaths, backlog: Backlog) -> Figures:
    """Enqueue with the backlog pending and nothing delivered, then deliver a part of it."""
    directory = workdir.own / "outbox"
    directory.mkdir(mode=0o700)
    size, reduced = 0, _reduced(backlog, workdir.quick)
    copied = 2 * reduced.delivered  # the other files are hard links to the shared files: they are listed but never read
    names = sorted(os.listdir(workdir.shared / backlog.folder))
    for number, name in enumerate(names):
        path = workdir.shared / backlog.folder / name
        if number < copied:
            shutil.copyfile(path, directory / name)
            size += path.stat().st_size
        else:
            os.link(path, directory / name)
    accepted = _run_process("accept", directory, str(len(names)), str(_QUICK_ACCEPTED if workdir.quick else ACCEPTED))
    del accepted["per_s"]
    delivered = _run_process("deliver", directory, str(workdir.own / "events.db"), str(reduced.delivered))
    return accepted | delivered | {"bytes": size / min(len(names), copied) / backlog.batch}


def _run_process(task: str, directory: Path, *arguments: str) -> dict[str, float]:
    """Run `bench.scale_process`; returns its figures."""
    command = [sys.executable, "-m", "bench.scale_process", task, str(directory), *arguments]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return dict(json.loads(completed.stdout))


_MOST, _MOST_FILES = LARGE[-1].name, MANY[-1].name

ABOUT = f"""
An outbox on a directory with that many pending batches; the system has cached their names and sizes. First without a sink:
after the files are counted, {ACCEPTED:,} events are enqueued, sealing included. Then with SQLite as the sink: at most
{FILES_DELIVERED} of the oldest files are delivered (of one event each, {FILES_OF_ONE_DELIVERED:,}), for at most
{scale_process.DELIVER_S:g} s; fewer than {scale_process.FILES_TIMED} are not timed. Each runs in a process of its own. Memory
is the peak of the process that delivers, including interpreter and libraries. The times to the first accepted and to the first
sent event start when the outbox is opened.
"""

SECTION = Section(
    key="scale",
    title="Growing backlog",
    about=ABOUT,
    rounds=3,
    contestants=tuple(Contestant(one.name, partial(run, backlog=one), ours=True) for one in (*LARGE, *MANY)),
    columns=(
        Column("mean_us", "accepting, mean, us", 2),
        Column("p99_us", "p99, us", 1),
        Column("p999_us", "p99.9, us", 1),
        Column("per_s", "delivered, events/s", 0),
        Column("cpu_s", "CPU, s per million delivered", 2),
        Column("open_s", "to first accepted, s", 3),
        Column("begin_s", "to first sent, s", 3),
        Column("rss_mib", "resident, MiB", 1),
        Column("bytes", "bytes per event", 0),
    ),
    goals=(
        Goal("mean of accepting with 10^7 events pending, relative to 10^4", ratio(_MOST, LARGE[0].name, "mean_us"), 1.25),
        Goal(
            "mean of accepting with 200,000 files pending, relative to 2,000", ratio(_MOST_FILES, MANY[0].name, "mean_us"), 1.25
        ),
        Goal("CPU of delivering with 10^7 events pending, relative to 10^5", ratio(_MOST, LARGE[1].name, "cpu_s"), 1.25),
        Goal(
            "CPU of delivering with 200,000 files pending, relative to 2,000", ratio(_MOST_FILES, MANY[0].name, "cpu_s"), 1.25
        ),
        Goal("resident memory with 10^7 events pending", figure(_MOST, "rss_mib"), 60, unit="MiB"),
        Goal("resident memory with 200,000 files pending", figure(_MOST_FILES, "rss_mib"), 60, unit="MiB"),
        Goal("time to the first accepted event, 10^7 events pending", figure(_MOST, "open_s"), 1, unit="s"),
        Goal("time to the first accepted event, 200,000 files pending", figure(_MOST_FILES, "open_s"), 3, unit="s"),
        Goal("time to the first sent event, 200,000 files pending", figure(_MOST_FILES, "begin_s"), 3, unit="s"),
    ),
    prepare=prepare,
    budget_s=120,
)
