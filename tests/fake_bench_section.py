"""A section for the tests of the benchmark's runner. Some of its contestants fail."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from bench.definitions import Column, Contestant, Figures, Goal, RoundPaths, Section, UnavailableError, ratio

FAIL_PREPARE_VARIABLE = "PILLARBOX_TEST_UNPREPARED"  # if it is set, `prepare` fails
PID_FILE_VARIABLE = "PILLARBOX_TEST_LEFT_BEHIND"  # path of the file for the ids of processes that the contestants leave running


def prepare(shared: Path, quick: bool) -> None:
    if FAIL_PREPARE_VARIABLE in os.environ:
        raise UnavailableError("nothing to measure with")
    (shared / "quick").write_text(f"{quick}")


def run_two(folder: RoundPaths) -> Figures:
    """Checks the prepared file and the environment."""
    assert (folder.shared / "quick").read_text() == f"{folder.quick}"
    assert not [*folder.own.iterdir(), *(name for name in os.environ if name == "PILLARBOX_BATCH_SIZE")]
    (folder.own / "file").touch()
    assert os.environ["OF_TWO"] == "2"
    sys.stdout.write("not a result")
    return {"mean_us": 2.0, "pid": os.getpid()}


def run_one(folder: RoundPaths) -> Figures:
    assert "OF_TWO" not in os.environ
    return {"mean_us": 1.0, "pid": os.getpid()}


def run_without_package(folder: RoundPaths) -> Figures:
    importlib.import_module("no_such_package")
    raise AssertionError


def run_without_server(folder: RoundPaths) -> Figures:
    raise UnavailableError("no server")


def run_killed(folder: RoundPaths) -> Figures:
    os.write(2, b"last words")
    os.kill(os.getpid(), 9)
    raise AssertionError


def run_hanging(folder: RoundPaths) -> Figures:
    """Starts a process that would outlive it, and waits for ever."""
    # wait: a process that outlives the section
    process = subprocess.Popen(["sleep", "1000"])
    with Path(os.environ[PID_FILE_VARIABLE]).open("a") as file:
        file.write(f"{process.pid}\n")
    threading.Event().wait()
    raise AssertionError


SECTION = Section(
    key="tiny",
    title="Tiny",
    about="Nothing\nis measured.",
    rounds=3,
    contestants=(
        Contestant("one", run_one, packages=("msgspec", "no-such-package")),
        Contestant("two", run_two, ours=True, environment=(("OF_TWO", "2"),)),
        Contestant("without its package", run_without_package),
        Contestant("without a server", run_without_server),
        Contestant("killed", run_killed),
        Contestant("hanging", run_hanging),
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
