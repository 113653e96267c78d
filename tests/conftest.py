"""Fixtures, marks and helpers that all tests share."""

from __future__ import annotations

import contextlib
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

# A shell that runs the tests in the background makes them ignore SIGINT, and the commands that they start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, without deadlines, because the machine may be slow. `--hypothesis-profile=default` tries others.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

ROOT = Path(__file__).parent
DATA = ROOT / "data"

# Marks by folder or file; the longest match wins. A test adds its own with a decorator. `pyproject.toml` explains them.
MARKS = {
    "cli": pytest.mark.slow,
    "crash": pytest.mark.proof,
    "crash/test_compiled_order.py": pytest.mark.slow,
    "crash/test_mutants.py": pytest.mark.slow,
    "delivery": pytest.mark.slow,
    "deploy": pytest.mark.slow,
    "exporters": pytest.mark.slow,
    "surroundings": pytest.mark.slow,
    "sinks/spacetimedb": pytest.mark.server,
    "store/test_group_commit_interrupts.py": pytest.mark.slow,
    "store/test_interrupts.py": pytest.mark.slow,
    "test_benchmarks.py": pytest.mark.slow,
    "test_docs.py": pytest.mark.slow,
    "test_recovery.py": pytest.mark.slow,
    "torture": pytest.mark.proof,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder or file."""
    for item in items:
        name = item.path.relative_to(ROOT).as_posix()
        prefix = max(
            (candidate for candidate in MARKS if name == candidate or name.startswith(f"{candidate}/")), key=len, default=""
        )
        if prefix:
            item.add_marker(MARKS[prefix])


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
    """A copy of a directory of the older system: two batches and a segment with 127 events."""
    return Path(shutil.copytree(DATA / "existing-outbox", tmp_path / "existing"))


def existing_events() -> list[dict[str, object]]:
    """The events of that directory in the order in which they were written, parsed by the standard library."""
    folder = DATA / "existing-outbox"
    files = [*sorted(folder.glob("sealed-*")), folder / "active.ndjson"]
    return [json.loads(line)["event"] for file in files for line in file.read_bytes().split(b"\n") if line]


UNUSABLE_KINDS = ("symlink", "hardlink", "fifo", "directory")


def create_unusable_file(kind: str, path: Path, victim: Path) -> None:
    """Create a file of one of the `UNUSABLE_KINDS`, which the store must not use. Links lead to `victim`.

    A second hard link is unusable only where others may write to the directory, and so may have planted it.
    """
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "hardlink":
        path.hardlink_to(victim)
        path.parent.chmod(0o777)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()


def event(number: int = 0, **changes: object) -> TrackingEvent:
    """An event with a number in its id."""
    fields = {
        "event_id": f"e-{number:06d}",
        "event_key": "click",
        "scope_kind": "Site",
        "scope_id": "site",
        "occurred_at_micros": number,
    }
    fields |= changes
    return TrackingEvent(**fields)  # type: ignore[arg-type]


def open_files_below(folder: Path) -> list[str]:
    """The open files of this process in a folder. Those of other tests in the same process do not count."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor that lists them is closed already
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in paths if path.startswith(f"{folder}/")]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll a condition every 10 ms. The limit allows for processes that start slowly on a busy machine."""
    for _ in range(int(seconds * 100)):
        if condition():
            return
        # wait: the pause between two polls of a condition
        threading.Event().wait(0.01)
    raise AssertionError(f"the condition was not true within {seconds:g} s")
