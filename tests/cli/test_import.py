"""`pillarbox import`: valid and invalid input, complete and interrupted imports."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from pillarbox import Outbox
from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, outbox_with_dead_letters
from tests.cli.running_processes import file_contents
from tests.cli.test_commands import CLEAN, PILLARBOX, event_line, run
from tests.conftest import event, existing_events


def pending_events(folder: Path, box: str = "box") -> list[dict[str, Any]]:
    """The pending events of an outbox."""
    return [json.loads(line) for line in run("export", "-d", box, cwd=folder).stdout.splitlines()]


def pending_event_ids(folder: Path, box: str = "box") -> list[str]:
    return [event["event_id"] for event in pending_events(folder, box)]


def test_events_and_records_are_imported_unchanged(tmp_path: Path) -> None:
    """Ids and unknown fields are kept; an event without an id or a time gets one."""
    with_unknown_field = event_json(1).replace(b'"event_key"', b'"more":{"b":1,"a":2},"event_key"')
    lines = [
        with_unknown_field,
        record.line(event_json(2)).rstrip(b"\n"),
        b'{"event": ' + event_json(3) + b"}",
        b"",
        event_line(4).rstrip(),
    ]
    (tmp_path / "in.ndjson").write_bytes(b"\n".join(lines))
    completed = run("import", "in.ndjson", "-d", "box", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (0, b"accepted 4 events, dropped 0\n")
    written = run("export", "-d", "box", cwd=tmp_path).stdout.splitlines()
    assert written[:3] == [with_unknown_field, event_json(2), event_json(3)]
    assert json.loads(written[3])["occurred_at_micros"] > 0
    assert run("verify", "-d", "box", cwd=tmp_path).returncode == 0


def test_invalid_lines_are_reported_counted_and_written_to_a_file(tmp_path: Path) -> None:
    """The other events are stored."""
    wrong_checksum = record.line(event_json(2)).replace(b"buy", b"bye")
    lines = [
        event_line(1),
        b"nonsense\n",
        wrong_checksum,
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","colour":1}\n',
        event_line(3),
    ]
    completed = run("import", "-", "-d", "box", "--rejects", "bad", "--json", cwd=tmp_path, stdin=b"".join(lines))
    answer = json.loads(completed.stdout)
    assert completed.returncode == 1
    assert (answer["accepted"], answer["dropped"], answer["processed"], answer["complete"]) == (2, 3, 5, True)
    assert [problem["line"] for problem in answer["problems"]] == [2, 3, 4]
    errors = completed.stderr.decode()
    assert "line 3: bad_checksum" in errors
    assert "line 4: colour: TrackingEvent has no such field" in errors
    assert (tmp_path / "bad").read_bytes() == b"".join(lines[1:4])
    assert (tmp_path / "bad").stat().st_mode & 0o777 == 0o600
    assert pending_event_ids(tmp_path) == ["e-000001", "e-000003"]


def test_a_csv_file_names_the_fields_in_its_first_row(tmp_path: Path) -> None:
    """A cell of a text field is text; an empty cell leaves the field out."""
    text = (
        "\ufeffevent_id,event_key,scope_kind,scope_id,user_id,metadata_json,occurred_at_micros\r\n"
        'e-1,"a ""b"", c\nd",Site,17,null,"{""x"":1}",5\r\n'
        "e-2,k,Site,,,,\r\n"
        "e-3,k,Site,s,,,soon\r\n"
        "e-4,k\r\n"
    )
    (tmp_path / "in.csv").write_text(text, newline="")
    completed = run("import", "in.csv", "-d", "box", "--rejects", "bad.csv", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, b"accepted 2 events, dropped 2\n")
    assert b"line 3: occurred_at_micros: 'soon' is not a value of this field\nline 4: 2 cells" in completed.stderr
    first, second = pending_events(tmp_path)
    assert list(first.values()) == ["e-1", 'a "b", c\nd', "Site", "17", "null", None, None, None, '{"x":1}', 5]
    assert (second["scope_id"], second["user_id"], second["metadata_json"]) == ("", None, "{}")
    assert (tmp_path / "bad.csv").read_text() == "e-3,k,Site,s,,,soon\ne-4,k\n"
    (tmp_path / "unknown.csv").write_text("event_id,colour\n1,2\n")
    unknown_field = run("import", "unknown.csv", "-d", "box", cwd=tmp_path)
    assert (unknown_field.returncode, b"has no field 'colour'" in unknown_field.stderr) == (2, True)


def test_exported_events_can_be_imported(tmp_path: Path) -> None:
    """As NDJSON and as CSV."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1, user_id="u", metadata_json='{"a":"b\\n"}'))
        outbox.enqueue(event(2, event_key='k,"\n'))
    for kind in ("ndjson", "csv"):
        run("export", "-d", "box", "--format", kind, "-o", f"out.{kind}", cwd=tmp_path)
        assert run("import", f"out.{kind}", "-d", kind, cwd=tmp_path).returncode == 0
        assert pending_events(tmp_path, kind) == pending_events(tmp_path)


def test_another_outbox_can_be_imported_and_is_not_changed(tmp_path: Path, existing: Path) -> None:
    """Also a directory of the older system; with --what dead, the dead letters."""
    before = file_contents(existing)
    assert run("import", existing, "-d", "box", cwd=tmp_path).stdout == b"accepted 127 events, dropped 0\n"
    assert pending_event_ids(tmp_path) == [event["event_id"] for event in existing_events()]
    assert file_contents(existing) == before
    outbox_with_dead_letters(tmp_path / "other", [event_json(1), event_json(2, 17)])
    completed = run("import", "other/box", "-d", "third", "--what", "dead", cwd=tmp_path)
    assert completed.returncode == 1
    assert b"scope_id" in completed.stderr
    same = run("import", "box", "-d", "box", cwd=tmp_path)
    assert (same.returncode, b"both the source and the target" in same.stderr) == (2, True)


def test_an_import_into_a_full_outbox_can_be_continued_with_skip(tmp_path: Path) -> None:
    """No event is left out, and none is stored twice."""
    (tmp_path / "in.ndjson").write_bytes(b"".join(map(event_line, range(3000))))
    environ = {"PILLARBOX_MAX_BYTES": "200000", "PILLARBOX_WHEN_FULL": "drop_oldest"}
    full = run("import", "in.ndjson", "-d", "box", "--json", cwd=tmp_path, environ=environ)
    answer = json.loads(full.stdout)
    assert full.returncode == 1
    assert (answer["outbox_dropped"], answer["complete"]) == ("max_bytes", False)
    assert 0 < answer["accepted"] == answer["processed"] < 3000
    continued = run("import", "in.ndjson", "-d", "box", "--skip", answer["processed"], cwd=tmp_path)
    assert continued.returncode == 0
    assert pending_event_ids(tmp_path) == [f"e-{number:06d}" for number in range(3000)]


def test_sigint_reports_how_many_events_were_imported(tmp_path: Path) -> None:
    """Also while the command waits for input. Exactly the reported events are stored."""
    process = subprocess.Popen(
        [*PILLARBOX, "import", "-", "-d", "box"], cwd=tmp_path, env=CLEAN, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(map(event_line, range(1700))))
    process.stdin.flush()
    while not list((tmp_path / "box").glob("sealed-*")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    accepted = int(output.decode().rpartition("--skip ")[2].split()[0])
    assert output.startswith(f"accepted {accepted:,} events, dropped 0\ninterrupted".encode())
    assert pending_event_ids(tmp_path) == [f"e-{number:06d}" for number in range(accepted)]


def test_a_dry_run_stores_nothing(tmp_path: Path) -> None:
    """It reports how many events would be accepted."""
    completed = run("import", "-", "-d", "box", "--dry-run", cwd=tmp_path, stdin=event_line(1) + b"no\n")
    assert (completed.returncode, completed.stdout) == (1, b"would accept 1 event, dropped 1\n")
    assert not (tmp_path / "box").exists()


def test_an_invalid_source_is_reported(tmp_path: Path) -> None:
    """The exit code is 2."""
    (tmp_path / "file").write_bytes(b"")
    for arguments, error in [(["missing"], b"missing: No such file"), (["file", "--format", "outbox"], b"an outbox directory")]:
        completed = run("import", *arguments, "-d", "box", cwd=tmp_path)
        assert (completed.returncode, error in completed.stderr) == (2, True), completed
