"""The benchmark's contestants that need no package, its goals, and the sets of packages that build on one another."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from bench import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REQUIREMENTS = Path(__file__).parents[1] / "requirements"


def lines(outbox_dir: Path) -> list[bytes]:
    return [line for path in outbox_dir.glob("sealed-*.ndjson") for line in path.read_bytes().splitlines()]


def rows(outbox_dir: Path) -> list[bytes]:
    with closing(sqlite3.connect(outbox_dir / "events.db")) as database:
        return [body for (body,) in database.execute("SELECT body FROM event")]


@pytest.mark.parametrize(
    ("opening", "stored"),
    [
        (peers.pillarbox, lines),
        (partial(peers.pillarbox, durability="power"), lines),
        (peers.made_in_the_call, lines),
        (partial(peers.sqlite, synchronous="NORMAL"), rows),
        (partial(peers.sqlite, synchronous="FULL"), rows),
    ],
)
def test_each_call_of_a_contestant_stores_one_event(
    opening: peers.Open, stored: Callable[[Path], Sequence[bytes]], tmp_path: Path
) -> None:
    """What is measured is done."""
    with opening(tmp_path) as opened:
        for _ in range(3):
            opened.put()
    found = stored(tmp_path)
    assert len(found) == 3
    assert all(b'"event_key":"page_view"' in event for event in found)


def test_the_floor_writes_the_event_as_json_and_nothing_else(tmp_path: Path) -> None:
    """Three calls, three times the same bytes."""
    with peers.floor(tmp_path) as opened:
        for _ in range(3):
            opened.put()
    assert (tmp_path / "events.ndjson").read_bytes() == msgspec.json.encode(peers.ONE) * 3


def test_a_goal_is_held_against_the_fastest_of_its_round() -> None:
    """Another one for each metric, if so it is."""
    found = {peer.name: {"median_us": 100.0 - at, "p99_us": 100.0 + at} for at, peer in enumerate(peers.FROM_PYPI)}
    found[peers.OURS] = {"median_us": 2.0, "p99_us": 4.0}
    assert [goal.ratio(found) for goal in peers.QUEUES.goals] == [(100 - len(peers.FROM_PYPI) + 1) / 2, 25]


@pytest.mark.parametrize(("part", "whole"), [("run", "test"), ("test", "bench")])
def test_each_set_of_packages_contains_the_one_before(part: str, whole: str) -> None:
    """So that `make test` after `make bench` installs nothing, and takes nothing away."""
    pins = {
        name: set(re.findall(r"^(\S+==\S+)", (REQUIREMENTS / f"{name}.txt").read_text(), re.MULTILINE))
        for name in (part, whole)
    }
    assert pins[part]
    assert pins[part] <= pins[whole]
