"""`pillarbox import`: what was written elsewhere, good and bad, whole and interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from pillarbox import Outbox
from pillarbox.store import record
from tests.admin.prepared_outboxes import event_json, outbox_with_dead_letters
from tests.cli.running_processes import names
from tests.cli.test_commands import CLEAN, PILLARBOX, bare, run
from tests.conftest import event, existing_events


def stored(folder: Path, box: str = "box") -> list[dict[str, Any]]:
    """What waits in the outbox."""
    return [json.loads(line) for line in run("export", "-d", box, cwd=folder).stdout.splitlines()]


def ids(folder: Path, box: str = "box") -> list[str]:
    return [event["event_id"] for event in stored(folder, box)]


def test_events_and_records_are_stored_as_they_stand(tmp_path: Path) -> None:
    """Under the ids they have, further members included; what has no id or time gets one."""
    further = event_json(1).replace(b'"event_key"', b'"more":{"b":1,"a":2},"event_key"')
    lines = [further, record.line(event_json(2)).rstrip(b"\n"), b'{"event": ' + event_json(3) + b"}", b"", bare(4).rstrip()]
    (tmp_path / "in.ndjson").write_bytes(b"\n".join(lines))
    done = run("import", "in.ndjson", "-d", "box", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"accepted 4 events, dropped 0\n")
    written = run("export", "-d", "box", cwd=tmp_path).stdout.splitlines()
    assert written[:3] == [further, event_json(2), event_json(3)]
    assert json.loads(written[3])["occurred_at_micros"] > 0
    assert run("verify", "-d", "box", cwd=tmp_path).returncode == 0


def test_what_is_no_event_is_named_counted_and_put_aside(tmp_path: Path) -> None:
    """And the rest is in."""
    changed = record.line(event_json(2)).replace(b"buy", b"bye")
    lines = [bare(1), b"nonsense\n", changed, b'{"event_key":"k","scope_kind":"Site","scope_id":"s","colour":1}\n', bare(3)]
    done = run("import", "-", "-d", "box", "--rejects", "bad", "--json", cwd=tmp_path, stdin=b"".join(lines))
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    assert (answer["accepted"], answer["dropped"], answer["processed"], answer["complete"]) == (2, 3, 5, True)
    assert [trouble["line"] for trouble in answer["problems"]] == [2, 3, 4]
    said = done.stderr.decode()
    assert "line 3: bad_checksum" in said
    assert "line 4: colour: TrackingEvent has no such field" in said
    assert (tmp_path / "bad").read_bytes() == b"".join(lines[1:4])
    assert (tmp_path / "bad").stat().st_mode & 0o777 == 0o600
    assert ids(tmp_path) == ["e-000001", "e-000003"]


def test_a_csv_names_members_in_its_first_row(tmp_path: Path) -> None:
    """Text is text where the member takes it; an empty cell is a member that is left out."""
    text = (
        "\ufeffevent_id,event_key,scope_kind,scope_id,user_id,metadata_json,occurred_at_micros\r\n"
        'e-1,"a ""b"", c\nd",Site,17,null,"{""x"":1}",5\r\n'
        "e-2,k,Site,,,,\r\n"
        "e-3,k,Site,s,,,soon\r\n"
        "e-4,k\r\n"
    )
    (tmp_path / "in.csv").write_text(text, newline="")
    done = run("import", "in.csv", "-d", "box", "--rejects", "bad.csv", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"accepted 2 events, dropped 2\n")
    assert b"line 3: occurred_at_micros: 'soon' is not a value of this field\nline 4: 2 cells" in done.stderr
    first, second = stored(tmp_path)
    assert list(first.values()) == ["e-1", 'a "b", c\nd', "Site", "17", "null", None, None, None, '{"x":1}', 5]
    assert (second["scope_id"], second["user_id"], second["metadata_json"]) == ("", None, "{}")
    assert (tmp_path / "bad.csv").read_text() == "e-3,k,Site,s,,,soon\ne-4,k\n"
    (tmp_path / "odd.csv").write_text("event_id,colour\n1,2\n")
    odd = run("import", "odd.csv", "-d", "box", cwd=tmp_path)
    assert (odd.returncode, b"has no field 'colour'" in odd.stderr) == (2, True)


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    """As CSV too."""
    with Outbox(str(tmp_path / "box")) as outbox:
        outbox.enqueue(event(1, user_id="u", metadata_json='{"a":"b\\n"}'))
        outbox.enqueue(event(2, event_key='k,"\n'))
    for kind in ("ndjson", "csv"):
        run("export", "-d", "box", "--format", kind, "-o", f"out.{kind}", cwd=tmp_path)
        assert run("import", f"out.{kind}", "-d", kind, cwd=tmp_path).returncode == 0
        assert stored(tmp_path, kind) == stored(tmp_path)


def test_another_outbox_is_read_and_left_as_it_is(tmp_path: Path, existing: Path) -> None:
    """What the older system left too; dead letters where they are asked for."""
    before = names(existing)
    assert run("import", existing, "-d", "box", cwd=tmp_path).stdout == b"accepted 127 events, dropped 0\n"
    assert ids(tmp_path) == [event["event_id"] for event in existing_events()]
    assert names(existing) == before
    outbox_with_dead_letters(tmp_path / "other", [event_json(1), event_json(2, 17)])
    done = run("import", "other/box", "-d", "third", "--what", "dead", cwd=tmp_path)
    assert done.returncode == 1
    assert b"scope_id" in done.stderr
    same = run("import", "box", "-d", "box", cwd=tmp_path)
    assert (same.returncode, b"both the source and the target" in same.stderr) == (2, True)


def test_a_full_outbox_says_what_is_in_and_skip_goes_on_from_there(tmp_path: Path) -> None:
    """Nothing is left out, and nothing is in twice."""
    (tmp_path / "in.ndjson").write_bytes(b"".join(map(bare, range(3000))))
    environ = {"PILLARBOX_MAX_BYTES": "200000", "PILLARBOX_WHEN_FULL": "drop_oldest"}
    full = run("import", "in.ndjson", "-d", "box", "--json", cwd=tmp_path, environ=environ)
    answer = json.loads(full.stdout)
    assert full.returncode == 1
    assert (answer["outbox_dropped"], answer["complete"]) == ("max_bytes", False)
    assert 0 < answer["accepted"] == answer["processed"] < 3000
    again = run("import", "in.ndjson", "-d", "box", "--skip", answer["processed"], cwd=tmp_path)
    assert again.returncode == 0
    assert ids(tmp_path) == [f"e-{number:06d}" for number in range(3000)]


def test_ctrl_c_says_how_far_it_came(tmp_path: Path) -> None:
    """Also while it waits for its input; what it says is in, and no more."""
    process = subprocess.Popen(
        [*PILLARBOX, "import", "-", "-d", "box"], cwd=tmp_path, env=CLEAN, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(map(bare, range(1700))))
    process.stdin.flush()
    while not list((tmp_path / "box").glob("sealed-*")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    number = int(said.decode().rpartition("--skip ")[2].split()[0])
    assert said.startswith(f"accepted {number:,} events, dropped 0\ninterrupted".encode())
    assert ids(tmp_path) == [f"e-{one:06d}" for one in range(number)]


def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    """And says what would be accepted."""
    done = run("import", "-", "-d", "box", "--dry-run", cwd=tmp_path, stdin=bare(1) + b"no\n")
    assert (done.returncode, done.stdout) == (1, b"would accept 1 event, dropped 1\n")
    assert not (tmp_path / "box").exists()


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    """With exit code 2."""
    (tmp_path / "file").write_bytes(b"")
    for arguments, said in [(["missing"], b"missing: No such file"), (["file", "--format", "outbox"], b"an outbox directory")]:
        done = run("import", *arguments, "-d", "box", cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (2, True), done
