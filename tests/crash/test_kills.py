"""A fixed part of the torture by `kill -9`, and tests of its oracle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.store import layout
from tests.crash import kills

ROOT = Path(__file__).parents[2]
SECONDS = 11.0
KILLS_MIN = 150
ACKNOWLEDGED_MIN = 1_000


def test_acknowledged_events_survive_every_kill(tmp_path: Path) -> None:
    """It runs in its own process, because a process with threads must not fork."""
    seed = "20260"
    command = [
        sys.executable,
        "-m",
        "tests.crash.kills",
        "--minutes",
        str(SECONDS / 60),
        "--seed",
        seed,
        "--directory",
        str(tmp_path),
        "--kills-min",
        str(KILLS_MIN),
        "--acknowledged-min",
        str(ACKNOWLEDGED_MIN),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    figures = dict(
        part.split("=") for part in process.stdout.splitlines()[-1].removeprefix("KillReport(").rstrip(")").split(", ")
    )
    assert int(figures["kills"]) >= KILLS_MIN
    assert int(figures["acknowledged"]) >= ACKNOWLEDGED_MIN
    assert int(figures["delivered"]) >= int(figures["acknowledged"])


@pytest.fixture
def scene(tmp_path: Path) -> tuple[kills.Oracle, Path, Path]:
    """An oracle with five events of life 7, which all arrived. All are acknowledged but the last, which was only attempted."""
    oracle = kills.Oracle(1)
    note = oracle.notes(0)
    for number in range(5):
        note(number, kills.ACKNOWLEDGED if number < 4 else kills.BEGUN)
    oracle.bury(0, 7)
    deliver(tmp_path, [(7, number) for number in range(5)])
    return oracle, tmp_path / "destination.db", tmp_path / "outbox"


def deliver(folder: Path, events: list[tuple[int, int]]) -> None:
    with Outbox(str(folder / "outbox"), f"sqlite:///{folder / 'destination.db'}", min_free_bytes=0) as outbox:
        outbox.enqueue_many([kills.make_event(life, number) for life, number in events])
        assert outbox.flush()


def test_complete_delivery_has_no_violation(scene: tuple[kills.Oracle, Path, Path]) -> None:
    """An event that was attempted and not acknowledged may arrive too."""
    oracle, database, outbox = scene
    assert oracle.check(database, outbox, [kills.ACKNOWLEDGED]) == []
    assert (oracle.events, oracle.acknowledged, oracle.delivered) == (5, 4, 5)


def test_an_event_that_was_never_attempted_is_invented(scene: tuple[kills.Oracle, Path, Path]) -> None:
    """So is an event of an earlier round, which was delivered then."""
    oracle, database, outbox = scene
    deliver(outbox.parent, [(7, 5), (3, 0)])
    assert [text.partition(",")[0] for text in oracle.check(database, outbox, [])] == ["invented: 7-5", "invented: 3-0"]
    deliver(outbox.parent, [(7, 0)])
    assert [text.partition(",")[0] for text in oracle.check(database, outbox, [])] == ["invented: 7-0"]


def test_an_acknowledged_event_that_did_not_arrive_is_lost(tmp_path: Path) -> None:
    """An event that was only attempted is not lost."""
    oracle = kills.Oracle(2)
    oracle.notes(1)(0, kills.BEGUN)
    oracle.notes(1)(2, kills.POWER)
    oracle.bury(1, 4)
    deliver(tmp_path, [])
    violations = oracle.check(tmp_path / "destination.db", tmp_path / "outbox", [kills.ACKNOWLEDGED, kills.POWER])
    assert violations == [f"lost: 4-2, in state {kills.POWER}"]


def test_remaining_files_and_acknowledged_events_in_quarantine_are_violations(
    scene: tuple[kills.Oracle, Path, Path],
) -> None:
    """A torn line of a killed append is not a violation."""
    oracle, database, outbox = scene
    (outbox / "sealed-x.ndjson").touch()
    (outbox / layout.corrupt_name("a")).write_bytes(b'{"event":{"event_id":"7-4","event_k')
    (outbox / layout.corrupt_name("b")).write_bytes(b'{"event":{"event_id":"7-3","event_k')
    violations = oracle.check(database, outbox, [kills.ACKNOWLEDGED])
    assert violations == ["in quarantine though acknowledged: 7-3", "left behind: sealed-x.ndjson"]


def test_a_child_that_raises_writes_its_traceback(tmp_path: Path) -> None:
    """The parent finds the failure by the exit status."""
    pid = kills.fork(tmp_path, lambda: os.kill(-1 << 40, signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == kills.FAILED
    assert "OverflowError" in next(tmp_path.iterdir()).read_text()
