"""Reading an outbox with several sinks, where a batch file has a name in each queue."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from tests.cli.running_processes import file_contents, run_read_only, running_process, writer_command
from tests.cli.test_commands import PILLARBOX, run
from tests.cli.test_tail import tailing
from tests.conftest import event

SINKS = ("--sink", "live=sqlite:///live.db", "--sink", "warehouse=sqlite:///no/such/folder.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `box` has three events, delivered to `live` and pending for `warehouse`."""
    with Outbox(str(tmp_path / "box")) as outbox:
        for number in range(3):
            outbox.enqueue(event(number))
    run("deliver", "-d", "box", *SINKS, "--once", cwd=tmp_path)
    assert list((tmp_path / "box" / "sink-warehouse").glob("sealed-*"))
    return tmp_path


def ids(output: bytes) -> list[str]:
    return [json.loads(line)["event_id"] for line in output.splitlines()]


def test_a_batch_that_is_pending_for_one_sink_is_read_once(folder: Path) -> None:
    """By tail and export, which change nothing."""
    before = file_contents(folder / "box")
    shown = [json.loads(line) for line in run_read_only("tail", "-d", "box", "--json", folder=folder).stdout.splitlines()]
    assert [line["event"]["event_id"] for line in shown] == ["e-000000", "e-000001", "e-000002"]
    assert {Path(line["file"]).parent.name for line in shown} == {"sink-warehouse"}
    assert ids(run_read_only("export", "-d", "box", "--what", "all", folder=folder).stdout) == [f"e-00000{n}" for n in range(3)]
    assert file_contents(folder / "box") == before


def test_inspect_names_the_sinks_that_have_an_event_and_those_that_do_not(folder: Path) -> None:
    """From the queues and their ledgers."""
    answer: dict[str, Any] = json.loads(run("inspect", "e-000001", "-d", "box", "--json", cwd=folder).stdout)
    assert [seen["state"] for seen in answer["events"]] == ["pending"]
    (history,) = answer["batches"]
    entries = {(entry["state"], entry["sink"]) for entry in history["entries"]}
    assert {("settled", "live"), ("pending", "warehouse")} <= entries
    assert ("pending", "live") not in entries


def test_tail_shows_each_event_once_while_it_moves_through_the_queues(tmp_path: Path) -> None:
    """One sink delivers, and the other does not."""
    deliver = ("deliver", "-d", "box", "-q", *SINKS)
    with tailing(tmp_path) as tail, running_process(*PILLARBOX, *deliver, folder=tmp_path):
        with running_process(*writer_command("a", 1000, 0.01), folder=tmp_path) as process:
            assert process.wait(60) == 0
        tail.wait_for(1000)
        assert max(Counter(tail.ids()).values()) == 1
        assert len(tail.ids()) == 1000
