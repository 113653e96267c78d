"""`pillarbox inspect`: finds an event, a batch or a file in any state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, seal_batch
from tests.cli.running_processes import file_contents, run_read_only
from tests.cli.test_commands import run
from tests.conftest import event


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `box` has a delivered batch with a dead letter and damaged bytes, and a pending batch."""
    box = tmp_path / "box"
    seal_batch(box, record.line(event_json(2, 17)), record.line(event_json(3))[:-4] + b'0"}\n', good=2)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path)
    seal_batch(box, good=1, first=9)
    return tmp_path


def inspect_json(folder: Path, name: object) -> dict[str, Any]:
    """The JSON output of `inspect`, after a check of the exit code."""
    completed = run("inspect", name, "-d", "box", "--json", cwd=folder)
    answer: dict[str, Any] = json.loads(completed.stdout)
    assert completed.returncode == int(answer["kind"] == "unknown" or bool(answer["problems"])), completed
    return answer


def history_states(answer: dict[str, Any]) -> list[str]:
    return [entry["state"] for history in answer["batches"] for entry in history["entries"]]


def test_a_pending_event_is_located_with_its_batch(folder: Path) -> None:
    """By file and offset."""
    answer = inspect_json(folder, "e-000009")
    (location,) = answer["events"]
    data = (folder / "box" / location["file"]).read_bytes()
    assert (location["state"], data[location["offset"] :].count(b"\n"), location["event"]["event_id"]) == (
        "pending",
        1,
        "e-000009",
    )
    assert history_states(answer) == ["sealed", "pending"]
    assert answer["problems"] == []
    output = run("inspect", "e-000009", "-d", "box", cwd=folder).stdout.decode()
    assert "e-000009: pending, in sealed-" in output
    assert "sealed by writer " in output


def test_a_rejected_event_is_located_with_the_reason(folder: Path) -> None:
    """The output names the command that shows more."""
    answer = inspect_json(folder, "w-000002")
    (location,) = answer["events"]
    assert (location["state"], location["code"]) == ("dead", "wrong_type")
    assert history_states(answer)[:2] == ["sealed", "settled"]
    output = run("inspect", "w-000002", "-d", "box", cwd=folder).stdout.decode()
    assert f"pillarbox dead show {location['record']}" in output
    assert "delivered to sqlite:///events.db: 2 events, rejected: 1, damaged byte ranges: 1" in output
    assert run("dead", "show", location["record"], "-d", "box", cwd=folder).returncode == 0


def test_an_event_in_damaged_bytes_is_located(folder: Path) -> None:
    """Its content is not shown, because it may be wrong."""
    (location,) = inspect_json(folder, "w-000003")["events"]
    assert (location["state"], location["reason"], location["event"]) == ("quarantined", "bad_checksum", None)


def test_events_in_segments_and_in_retained_batches_are_located(folder: Path) -> None:
    """Each with its file."""
    (folder / "box" / "delivered-0000000000000001-u.ndjson").write_bytes(record.line(event_json(4)))
    assert [location["state"] for location in inspect_json(folder, "w-000004")["events"]] == ["retained"]
    with Outbox(str(folder / "box"), flush_interval=3600.0) as outbox:
        outbox.enqueue(event(20))
        (location,) = inspect_json(folder, "e-000020")["events"]
        assert (location["state"], location["batch"]) == ("active", "")
        (file,) = inspect_json(folder, location["file"])["files"]
        assert (file["events"], file["writer"] in location["file"], file["unfinished_bytes"]) == (1, True, 0)


def test_a_delivered_event_can_be_traced_only_by_its_batch(folder: Path) -> None:
    """The ledger has entries for batches, not events, and the output says so."""
    completed = run("inspect", "e-000000", "-d", "box", cwd=folder)
    assert completed.returncode == 1
    assert b"The ledger has batches, not events" in completed.stdout
    batch = next((folder / "box").glob("dead-*")).name.removeprefix("dead-").removesuffix(".ndjson")
    for name in (batch, f"{batch}#0", f"{batch}.ndjson"):
        answer = inspect_json(folder, name)
        assert answer["kind"] == "batch"
        assert sorted(history_states(answer)) == ["dead", "quarantined", "quarantined", "sealed", "settled"]


def test_the_commands_in_the_history_of_a_batch_work(folder: Path) -> None:
    """They show its dead letters and its damaged bytes."""
    batch = next((folder / "box").glob("dead-*")).name.removeprefix("dead-").removesuffix(".ndjson")
    (history,) = inspect_json(folder, batch)["batches"]
    commands = [text for entry in history["entries"] if (text := entry["text"].partition("to show them: pillarbox ")[2])]
    assert [command.split()[:2] for command in commands] == [["quarantine", "show"], ["dead", "show"]]
    for command in commands:
        completed = run(*command.split(), "-d", "box", cwd=folder)
        assert completed.returncode == 0, completed.stderr
        assert batch.encode() in completed.stdout


def test_a_file_is_summarized(folder: Path) -> None:
    """Its events, their times and its damaged byte ranges; for a batch, also its other files."""
    (pending,) = (folder / "box").glob("sealed-*")
    with pending.open("ab") as file:
        file.write(b"nonsense\n")
    for name in (pending.name, pending):
        (summary,) = inspect_json(folder, name)["files"]
        assert (summary["state"], summary["events"], summary["first_micros"], summary["last_micros"]) == ("pending", 1, 9, 9)
        assert [(byte_range["length"], byte_range["reason"]) for byte_range in summary["damaged"]] == [(9, "bad_json")]
    (dead,) = (folder / "box").glob("dead-*")
    (summary,) = inspect_json(folder, dead.name)["files"]
    assert (summary["state"], summary["events"]) == ("dead", 1)


def test_inspect_changes_nothing(folder: Path) -> None:
    """Even if it has to search everything."""
    before = file_contents(folder / "box")
    assert run_read_only("inspect", "no-such-event", "-d", "box", folder=folder).returncode == 1
    assert file_contents(folder / "box") == before
