"""`pillarbox inspect`: wherever an event, a batch or a file may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, seal_batch
from tests.cli.running_processes import names, only_looks
from tests.cli.test_commands import run
from tests.conftest import event


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose `box` has had one batch delivered, with a dead letter and damaged bytes; another one waits."""
    box = tmp_path / "box"
    seal_batch(box, record.line(event_json(2, 17)), record.line(event_json(3))[:-4] + b'0"}\n', good=2)
    run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path)
    seal_batch(box, good=1, first=9)
    return tmp_path


def inspected(folder: Path, name: object) -> dict[str, Any]:
    """What it answers; its exit code fits."""
    done = run("inspect", name, "-d", "box", "--json", cwd=folder)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == int(answer["kind"] == "unknown" or bool(answer["problems"])), done
    return answer


def facts(answer: dict[str, Any]) -> list[str]:
    return [entry["state"] for story in answer["batches"] for entry in story["entries"]]


def test_an_event_that_waits_is_found_with_its_batch(folder: Path) -> None:
    """By file and place."""
    answer = inspected(folder, "e-000009")
    (seen,) = answer["events"]
    data = (folder / "box" / seen["file"]).read_bytes()
    assert (seen["state"], data[seen["offset"] :].count(b"\n"), seen["event"]["event_id"]) == ("pending", 1, "e-000009")
    assert facts(answer) == ["sealed", "pending"]
    assert answer["problems"] == []
    said = run("inspect", "e-000009", "-d", "box", cwd=folder).stdout.decode()
    assert "e-000009: pending, in sealed-" in said
    assert "sealed by writer " in said


def test_an_event_that_was_refused_is_found_with_the_reason(folder: Path) -> None:
    """And the command that shows more."""
    answer = inspected(folder, "w-000002")
    (seen,) = answer["events"]
    assert (seen["state"], seen["code"]) == ("dead", "wrong_type")
    assert facts(answer)[:2] == ["sealed", "settled"]
    said = run("inspect", "w-000002", "-d", "box", cwd=folder).stdout.decode()
    assert f"pillarbox dead show {seen['record']}" in said
    assert "delivered to sqlite:///events.db: 2 events, rejected: 1, damaged byte ranges: 1" in said
    assert run("dead", "show", seen["record"], "-d", "box", cwd=folder).returncode == 0


def test_an_event_in_damaged_bytes_is_told_of(folder: Path) -> None:
    """Nobody can be sure of it."""
    (seen,) = inspected(folder, "w-000003")["events"]
    assert (seen["state"], seen["reason"], seen["event"]) == ("quarantined", "bad_checksum", None)


def test_an_event_that_is_not_sealed_and_one_that_is_kept_are_found(folder: Path) -> None:
    """Each in its file."""
    (folder / "box" / "delivered-0000000000000001-u.ndjson").write_bytes(record.line(event_json(4)))
    assert [seen["state"] for seen in inspected(folder, "w-000004")["events"]] == ["retained"]
    with Outbox(str(folder / "box"), flush_interval=3600.0) as outbox:
        outbox.enqueue(event(20))
        (seen,) = inspected(folder, "e-000020")["events"]
        assert (seen["state"], seen["batch"]) == ("active", "")
        (file,) = inspected(folder, seen["file"])["files"]
        assert (file["events"], file["writer"] in seen["file"], file["unfinished_bytes"]) == (1, True, 0)


def test_what_was_delivered_is_known_by_its_batch_only(folder: Path) -> None:
    """The ledger knows batches, not events, and that is said."""
    done = run("inspect", "e-000000", "-d", "box", cwd=folder)
    assert done.returncode == 1
    assert b"The ledger has batches, not events" in done.stdout
    batch = next((folder / "box").glob("dead-*")).name.removeprefix("dead-").removesuffix(".ndjson")
    for name in (batch, f"{batch}#0", f"{batch}.ndjson"):
        answer = inspected(folder, name)
        assert answer["kind"] == "batch"
        assert sorted(facts(answer)) == ["dead", "quarantined", "quarantined", "sealed", "settled"]


def test_a_file_is_read(folder: Path) -> None:
    """Its events, their times, and what is damaged; a batch's other files beside it."""
    (waiting,) = (folder / "box").glob("sealed-*")
    with waiting.open("ab") as file:
        file.write(b"nonsense\n")
    for name in (waiting.name, waiting):
        (found,) = inspected(folder, name)["files"]
        assert (found["state"], found["events"], found["first_micros"], found["last_micros"]) == ("pending", 1, 9, 9)
        assert [(span["length"], span["reason"]) for span in found["damaged"]] == [(9, "bad_json")]
    (dead,) = (folder / "box").glob("dead-*")
    (found,) = inspected(folder, dead.name)["files"]
    assert (found["state"], found["events"]) == ("dead", 1)


def test_it_only_looks(folder: Path) -> None:
    """At all that there is."""
    before = names(folder / "box")
    assert only_looks("inspect", "no-such-event", "-d", "box", folder=folder).returncode == 1
    assert names(folder / "box") == before
