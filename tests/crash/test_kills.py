"""A fixed part of the torture by `kill -9`, and that its oracle sees what it is there to see."""

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


def test_what_was_acknowledged_survives_every_kill(tmp_path: Path) -> None:
    """In a process of its own: a parent with threads must not fork."""
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
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = dict(part.split("=") for part in done.stdout.splitlines()[-1].removeprefix("KillReport(").rstrip(")").split(", "))
    assert int(figures["kills"]) >= KILLS_MIN
    assert int(figures["acknowledged"]) > 1_000
    assert int(figures["delivered"]) >= int(figures["acknowledged"])


@pytest.fixture
def scene(tmp_path: Path) -> tuple[kills.Oracle, Path, Path]:
    """An oracle that was told of five events of life 7, all of which arrived: acknowledged but the last, which was only begun."""
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


def test_nothing_is_wrong_where_everything_arrived(scene: tuple[kills.Oracle, Path, Path]) -> None:
    """And an event that was begun and not acknowledged may arrive."""
    oracle, database, outbox = scene
    assert oracle.check(database, outbox, [kills.ACKNOWLEDGED]) == []
    assert (oracle.events, oracle.acknowledged, oracle.delivered) == (5, 4, 5)


def test_an_event_that_nobody_began_is_invented(scene: tuple[kills.Oracle, Path, Path]) -> None:
    """So is one of an earlier round, which is settled."""
    oracle, database, outbox = scene
    deliver(outbox.parent, [(7, 5), (3, 0)])
    assert [text.partition(",")[0] for text in oracle.check(database, outbox, [])] == ["invented: 7-5", "invented: 3-0"]
    deliver(outbox.parent, [(7, 0)])
    assert [text.partition(",")[0] for text in oracle.check(database, outbox, [])] == ["invented: 7-0"]


def test_an_acknowledged_event_that_did_not_arrive_is_lost(tmp_path: Path) -> None:
    """One that was only begun is not."""
    oracle = kills.Oracle(2)
    oracle.notes(1)(0, kills.BEGUN)
    oracle.notes(1)(2, kills.POWER)
    oracle.bury(1, 4)
    deliver(tmp_path, [])
    found = oracle.check(tmp_path / "destination.db", tmp_path / "outbox", [kills.ACKNOWLEDGED, kills.POWER])
    assert found == [f"lost: 4-2, in state {kills.POWER}"]


def test_what_is_left_behind_is_wrong_and_so_is_quarantine_of_what_was_acknowledged(
    scene: tuple[kills.Oracle, Path, Path],
) -> None:
    """A torn line of a killed append is not."""
    oracle, database, outbox = scene
    (outbox / "sealed-x.ndjson").touch()
    (outbox / layout.corrupt_name("a")).write_bytes(b'{"event":{"event_id":"7-4","event_k')
    (outbox / layout.corrupt_name("b")).write_bytes(b'{"event":{"event_id":"7-3","event_k')
    found = oracle.check(database, outbox, [kills.ACKNOWLEDGED])
    assert found == ["in quarantine though acknowledged: 7-3", "left behind: sealed-x.ndjson"]


def test_a_child_that_raises_leaves_its_trace(tmp_path: Path) -> None:
    """A failure to open is found by the status of the child."""
    pid = kills.fork(tmp_path, lambda: os.kill(-1 << 40, signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == kills.FAILED
    assert "OverflowError" in next(tmp_path.iterdir()).read_text()
