"""A section for the tests of the benchmark's runner: some of its contestants fail."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from bench.plan import Column, Contestant, Figures, Goal, RoundPaths, Section, UnavailableError, ratio

UNPREPARED = "PILLARBOX_TEST_UNPREPARED"  # where it is set, `prepare` fails
LEFT_BEHIND = "PILLARBOX_TEST_LEFT_BEHIND"  # names the file that takes the ids of the processes that nobody ends


def prepare(shared: Path, quick: bool) -> None:
    if UNPREPARED in os.environ:
        raise UnavailableError("nothing to measure with")
    (shared / "what").write_text(f"{quick}")


def two(folder: RoundPaths) -> Figures:
    """With a look at what was prepared and at the settings of whoever runs it."""
    assert (folder.shared / "what").read_text() == f"{folder.quick}"
    assert not [*folder.own.iterdir(), *(name for name in os.environ if name == "PILLARBOX_BATCH_SIZE")]
    (folder.own / "file").touch()
    assert os.environ["OF_TWO"] == "2"
    sys.stdout.write("not an answer")
    return {"mean_us": 2.0, "pid": os.getpid()}


def one(folder: RoundPaths) -> Figures:
    assert "OF_TWO" not in os.environ
    return {"mean_us": 1.0, "pid": os.getpid()}


def without_its_package(folder: RoundPaths) -> Figures:
    importlib.import_module("no_such_package")
    raise AssertionError


def without_a_server(folder: RoundPaths) -> Figures:
    raise UnavailableError("no server")


def killed(folder: RoundPaths) -> Figures:
    os.write(2, b"on the way out")
    os.kill(os.getpid(), 9)
    raise AssertionError


def hanging(folder: RoundPaths) -> Figures:
    """With a process of its own that would outlive it."""
    # wait: a process that outlives the section
    started = subprocess.Popen(["sleep", "1000"])
    with Path(os.environ[LEFT_BEHIND]).open("a") as file:
        file.write(f"{started.pid}\n")
    threading.Event().wait()
    raise AssertionError


SECTION = Section(
    key="tiny",
    title="Tiny",
    about="Nothing\nis measured.",
    rounds=3,
    contestants=(
        Contestant("one", one, packages=("msgspec", "no-such-package")),
        Contestant("two", two, ours=True, environment=(("OF_TWO", "2"),)),
        Contestant("without its package", without_its_package),
        Contestant("without a server", without_a_server),
        Contestant("killed", killed),
        Contestant("hanging", hanging),
    ),
    columns=(Column("mean_us", "mean, us", 1),),
    goals=(
        Goal("of one", ratio("two", "one", "mean_us"), 2.0),
        Goal("at least", ratio("two", "one", "mean_us"), 2.5, at_least=True),
        Goal("of nobody", ratio("killed", "one", "mean_us"), 2.0),
    ),
    prepare=prepare,
    chart="mean_us",
    timeout_s=5.0,
)
