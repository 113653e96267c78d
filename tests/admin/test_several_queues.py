"""A directory with several sinks, in which a file has a name in each queue."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from tests.cli.test_commands import PILLARBOX, run
from tests.cli.test_tail import tailing
from tests.cli.watching import at_work, names, only_looks, writer
from tests.conftest import event

SINKS = ("--sink", "live=sqlite:///live.db", "--sink", "warehouse=sqlite:///no/such/folder.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `box` has three events, delivered to `live`, that wait for `warehouse`."""
    with Outbox(str(tmp_path / "box")) as outbox:
        for number in range(3):
            outbox.enqueue(event(number))
    run("deliver", "-d", "box", *SINKS, "--once", cwd=tmp_path)
    assert list((tmp_path / "box" / "sink-warehouse").glob("sealed-*"))
    return tmp_path


def ids(output: bytes) -> list[str]:
    return [json.loads(line)["event_id"] for line in output.splitlines()]


def test_what_waits_for_one_of_them_is_shown_and_exported_once(folder: Path) -> None:
    """And nothing is touched."""
    before = names(folder / "box")
    shown = [json.loads(line) for line in only_looks("tail", "-d", "box", "--json", folder=folder).stdout.splitlines()]
    assert [line["event"]["event_id"] for line in shown] == ["e-000000", "e-000001", "e-000002"]
    assert {Path(line["file"]).parent.name for line in shown} == {"sink-warehouse"}
    assert ids(only_looks("export", "-d", "box", "--what", "all", folder=folder).stdout) == [f"e-00000{n}" for n in range(3)]
    assert names(folder / "box") == before


def test_inspect_says_for_whom_an_event_waits_and_who_has_it(folder: Path) -> None:
    """From the queues and their ledgers."""
    answer: dict[str, Any] = json.loads(run("inspect", "e-000001", "-d", "box", "--json", cwd=folder).stdout)
    assert [seen["state"] for seen in answer["events"]] == ["pending"]
    (story,) = answer["batches"]
    facts = {(entry["state"], entry["sink"]) for entry in story["entries"]}
    assert {("settled", "live"), ("pending", "warehouse")} <= facts
    assert ("pending", "live") not in facts


def test_tail_shows_each_event_once_on_its_way_through_the_queues(tmp_path: Path) -> None:
    """While one sink takes them and the other does not."""
    deliverer = ("deliver", "-d", "box", "-q", *SINKS)
    with tailing(tmp_path) as tail, at_work(*PILLARBOX, *deliverer, folder=tmp_path):
        with at_work(*writer("a", 1000, 0.01), folder=tmp_path) as process:
            assert process.wait(60) == 0
        tail.wait_for(1000)
        assert max(Counter(tail.ids()).values()) == 1
        assert len(tail.ids()) == 1000
