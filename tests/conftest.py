"""What the tests share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pillarbox import TrackingEvent
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.testing import ManualClock

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the commands that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, however slow the machine is at that moment. `--hypothesis-profile=default` looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

ROOT = Path(__file__).parent
DATA = ROOT / "data"

# Marks by folder or file, the longest match first; a test adds its own with a decorator. `pyproject.toml` says what they mean.
MARKS = {
    "cli": pytest.mark.slow,
    "crash": pytest.mark.proof,
    "crash/test_compiled_order.py": pytest.mark.slow,
    "crash/test_mutants.py": pytest.mark.slow,
    "delivery": pytest.mark.slow,
    "deploy": pytest.mark.slow,
    "exporters": pytest.mark.slow,
    "sinks/spacetimedb": pytest.mark.server,
    "store/test_group_commit_interrupts.py": pytest.mark.slow,
    "store/test_interrupts.py": pytest.mark.slow,
    "test_benchmarks.py": pytest.mark.slow,
    "test_docs.py": pytest.mark.slow,
    "test_recovery.py": pytest.mark.slow,
    "torture": pytest.mark.proof,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by where it stands."""
    for item in items:
        name = item.path.relative_to(ROOT).as_posix()
        found = max(
            (outbox_dir for outbox_dir in MARKS if name == outbox_dir or name.startswith(f"{outbox_dir}/")), key=len, default=""
        )
        if found:
            item.add_marker(MARKS[found])


@pytest.fixture
def clock() -> ManualClock:
    """A clock that is set by hand."""
    return ManualClock()


@pytest.fixture
def outbox_dir(tmp_path: Path, clock: ManualClock) -> Directory:
    """An empty outbox directory."""
    directory = Directory(str(tmp_path / "outbox"), local_filesystem(), clock)
    directory.ensure_usable()
    return directory


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A copy of a directory as the older system leaves it: two sealed files and an active one, 127 events."""
    return Path(shutil.copytree(DATA / "existing-outbox", tmp_path / "existing"))


def existing_events() -> list[dict[str, object]]:
    """Its events, in the order in which they were written; parsed by the standard library."""
    folder = DATA / "existing-outbox"
    files = [*sorted(folder.glob("sealed-*")), folder / "active.ndjson"]
    return [json.loads(line)["event"] for file in files for line in file.read_bytes().split(b"\n") if line]


PLANTED = ("symlink", "hardlink", "fifo", "directory")


def plant(what: str, path: Path, victim: Path) -> None:
    """Put something of `PLANTED` under a name of ours; the links lead to the victim."""
    if what == "symlink":
        path.symlink_to(victim)
    elif what == "hardlink":
        path.hardlink_to(victim)
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()


def event(number: int = 0, **members: object) -> TrackingEvent:
    """An event with a number in its id."""
    chosen = {
        "event_id": f"e-{number:06d}",
        "event_key": "click",
        "scope_kind": "Site",
        "scope_id": "site",
        "occurred_at_micros": number,
    }
    chosen |= members
    return TrackingEvent(**chosen)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again every 10 ms until something is true; for as long as a process may take to start where others do too."""
    for _ in range(int(seconds * 100)):
        if condition():
            return
        # wait: the pause between two polls of a condition
        threading.Event().wait(0.01)
    raise AssertionError("it never came true")
