"""The contestants of the benchmark that need no package, the goals of `peers`, and the requirement files."""

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
    ("open_store", "read_stored"),
    [
        (peers.pillarbox, lines),
        (partial(peers.pillarbox, durability="power"), lines),
        (peers.pillarbox_with_new_events, lines),
        (partial(peers.sqlite, synchronous="NORMAL"), rows),
        (partial(peers.sqlite, synchronous="FULL"), rows),
    ],
)
def test_each_call_of_a_contestant_stores_one_event(
    open_store: peers.Open, read_stored: Callable[[Path], Sequence[bytes]], tmp_path: Path
) -> None:
    """So the benchmark measures what it claims."""
    with open_store(tmp_path) as store:
        for _ in range(3):
            store.put()
    events = read_stored(tmp_path)
    assert len(events) == 3
    assert all(b'"event_key":"page_view"' in event for event in events)


def test_the_baseline_writes_only_the_json_of_the_event(tmp_path: Path) -> None:
    """Three calls write the same bytes three times."""
    with peers.encode_and_write(tmp_path) as store:
        for _ in range(3):
            store.put()
    assert (tmp_path / "events.ndjson").read_bytes() == msgspec.json.encode(peers.EVENT) * 3


def test_a_goal_compares_pillarbox_with_the_fastest_of_each_round() -> None:
    """The fastest may be another one for each metric."""
    figures = {peer.name: {"median_us": 100.0 - index, "p99_us": 100.0 + index} for index, peer in enumerate(peers.FROM_PYPI)}
    figures[peers.OURS] = {"median_us": 2.0, "p99_us": 4.0}
    assert [goal.ratio(figures) for goal in peers.QUEUES.goals] == [(100 - len(peers.FROM_PYPI) + 1) / 2, 25]


@pytest.mark.parametrize(("part", "whole"), [("run", "test"), ("test", "bench")])
def test_each_requirements_file_contains_the_previous_one(part: str, whole: str) -> None:
    """So `make test` after `make bench` neither installs nor removes packages."""
    pins = {
        name: set(re.findall(r"^(\S+==\S+)", (REQUIREMENTS / f"{name}.txt").read_text(), re.MULTILINE))
        for name in (part, whole)
    }
    assert pins[part]
    assert pins[part] <= pins[whole]
