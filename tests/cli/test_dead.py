"""`pillarbox dead`, run as an operator runs it: real processes on records that a real destination rejected."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox.admin.changes import acquire_lock
from pillarbox.clock import SystemClock
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from tests.admin.prepared_outboxes import (
    deliver_pending,
    delivered_rows,
    event_json,
    file_lines,
    outbox_with_dead_letters,
    seal_batch,
)
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.conftest import existing_events

SIX_BAD_EVENTS = [*(event_json(number, 5) for number in range(5)), event_json(5, 5, key="sell")]


def delivered_after_repair(folder: Path) -> list[str]:
    """Deliver the pending batches, and return the ids of the former dead letters that the destination now has."""
    deliver_pending(folder / "box", folder / "events.db")
    return sorted(event_id for event_id, _ in delivered_rows(folder / "events.db") if event_id.startswith("w-"))


def test_list_groups_dead_letters_by_reason_and_key(tmp_path: Path) -> None:
    """As text and as JSON. Listing changes nothing."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS, files=2)
    before = sorted(box.iterdir())
    text = run("dead", "list", "-d", "box", cwd=tmp_path)
    assert text.returncode == 0
    first, *_, last = text.stdout.decode().splitlines()[1:]
    assert first.split()[:4] == ["5", "wrong_type", "buy", f"sqlite:///{tmp_path}/events.db"]
    assert "Expected `str`, got `int` - at `$.scope_id`" in first
    assert last == "6 dead letters in 2 files"
    listing = json.loads(run("dead", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [(group["count"], group["event_key"]) for group in listing["groups"]] == [(5, "buy"), (1, "sell")]
    assert (listing["records"], listing["files"], listing["items"], listing["problems"]) == (6, 2, [], [])
    assert sorted(box.iterdir()) == before


def test_a_record_can_be_shown_by_its_name(tmp_path: Path) -> None:
    """`dead show` prints it in full, with the event as it was enqueued."""
    outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    listed = json.loads(run("dead", "list", "-d", "box", "--each", "--json", "--limit", 2, cwd=tmp_path).stdout)
    assert (listed["records"], len(listed["items"])) == (6, 2)
    name = listed["items"][1]["record"]
    (shown,) = json.loads(run("dead", "show", "-d", "box", name, "--json", cwd=tmp_path).stdout)
    assert (shown["event_id"], shown["event"]["scope_id"], shown["code"]) == ("w-000001", 5, "wrong_type")
    text = run("dead", "show", "-d", "box", name, cwd=tmp_path).stdout.decode()
    assert text.startswith(f"{name}\n  wrong_type: Expected")
    assert '"scope_id": 5' in text
    assert "w-000002" not in text


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    """An event may contain any text, also C1 controls and bidirectional overrides."""
    outbox_with_dead_letters(tmp_path, [event_json(1, 5, key="a\\u001b[31m\u009b31m\u202e[/red]")])
    for command in (["list"], ["list", "--each"], ["show"], ["purge", "--all"]):
        out = run("dead", *command, "-d", "box", cwd=tmp_path).stdout.decode()
        assert "[31m" in out
        assert "[/red]" in out
        assert not {"\x1b", "\x9b", "\u202e"} & set(out)


def test_without_yes_nothing_changes(tmp_path: Path) -> None:
    """The output says what would change, and names --yes."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    for command in (["edit", "--all", "--set", "scope_id=s"], ["replay", "--all"], ["purge", "--event-key", "sell"]):
        completed = run("dead", *command, "-d", "box", cwd=tmp_path)
        assert b"add --yes to do it" in completed.stdout or b"nothing to do" in completed.stdout
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


@pytest.mark.parametrize("command", [["replay"], ["edit", "--set", "scope_id=s"], ["purge"]])
def test_a_command_that_changes_records_needs_a_filter(tmp_path: Path, command: list[str]) -> None:
    """Without a filter, --all is required."""
    outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    completed = run("dead", *command, "-d", "box", "--yes", cwd=tmp_path)
    assert completed.returncode == 2
    assert b"--all" in completed.stderr


def test_edited_events_are_delivered_under_their_own_ids(tmp_path: Path) -> None:
    """Only the records with the chosen key are edited; the others stay dead letters."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS, files=2)
    completed = run("dead", "edit", "-d", "box", "--event-key", "buy", "--set", "scope_id=7", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert completed.stdout.decode().splitlines()[-1] == "5 events from 2 files replayed"
    assert delivered_after_repair(tmp_path) == [f"w-{number:06d}" for number in range(5)]
    assert all(scope == "7" for event_id, scope in delivered_rows(tmp_path / "events.db") if event_id.startswith("w-"))
    (remaining,) = file_lines(box, "dead-*")
    assert b"sell" in remaining


TYPES = """
import msgspec
class Big(msgspec.Struct):
    event_id: str
    number: int
"""


def test_after_the_destination_changed_dead_letters_are_replayed_unchanged(tmp_path: Path) -> None:
    """A record that the destination still rejects becomes a dead letter again, once."""
    (tmp_path / "shop_types.py").write_text(TYPES)
    events = [{"event_id": "a", "number": 13}, {"event_id": "b", "number": 2**63}, {"event_id": "c", "number": 1}]
    options = ["-d", "box", "--event-type", "shop_types:Big"]
    sink = ["--sink", "sqlite:///events.db", "--once"]
    python = "import sqlite3; c = sqlite3.connect('events.db'); c.execute({!r}); c.commit()"
    table = "CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER CHECK (number <> 13))"
    subprocess.run([sys.executable, "-c", python.format(table)], cwd=tmp_path, check=True)
    run("enqueue", *options, cwd=tmp_path, stdin=b"".join(json.dumps(event).encode() + b"\n" for event in events))
    run("deliver", *options, *sink, cwd=tmp_path)
    codes = json.loads(run("dead", "list", *options, "--json", cwd=tmp_path).stdout)["groups"]
    assert sorted(group["code"] for group in codes) == ["out_of_range", "refused_by_table"]
    for statement in ("ALTER TABLE big RENAME TO old", "CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER)"):
        subprocess.run([sys.executable, "-c", python.format(statement)], cwd=tmp_path, check=True)
    assert run("enqueue", *options, cwd=tmp_path, stdin=b'{"event_id":"d","number":2}\n').returncode == 0
    assert run("dead", "replay", *options, "--all", "--yes", cwd=tmp_path).returncode == 0
    run("deliver", *options, *sink, cwd=tmp_path)
    select_ids = "print([r[0] for r in c.execute('SELECT event_id FROM big ORDER BY 1')])"
    query = subprocess.run(
        [sys.executable, "-c", python.format("SELECT 1") + ";" + select_ids], cwd=tmp_path, capture_output=True, check=True
    )
    assert query.stdout.decode().strip() == "['a', 'd']"
    listed = json.loads(run("dead", "list", *options, "--each", "--json", cwd=tmp_path).stdout)
    assert [(item["event_id"], item["code"]) for item in listed["items"]] == [("b", "out_of_range")]


def test_a_record_that_is_invalid_for_the_event_type_is_not_replayed(tmp_path: Path) -> None:
    """Replaying it unchanged would only make a dead letter of it again."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), b"5", event_json(2, 5).replace(b'"event_id":"w-000002",', b"")])
    completed = run("dead", "replay", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, b"nothing was changed\n")
    errors = completed.stderr.decode()
    assert errors.count("left as is: the event is not a") == 3
    assert len(file_lines(box, "dead-*")) == 3


def test_purge_deletes_the_chosen_records_and_writes_a_ledger_entry(tmp_path: Path) -> None:
    """The other records stay."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    assert run("dead", "purge", "-d", "box", "--event-id", "w-000003", "--yes", cwd=tmp_path).returncode == 0
    assert [b"w-000003" in line for line in file_lines(box, "dead-*")] == [False] * 5
    assert [b'"events":1' in line for line in file_lines(box, "ledger.ndjson") if b'"entry":"purged"' in line] == [True]
    completed = run("dead", "purge", "-d", "box", "--all", "--yes", "--json", cwd=tmp_path)
    answer = json.loads(completed.stdout)
    assert (answer["applied"], answer["events"], len(answer["items"])) == (True, 5, 5)
    assert not list(box.glob("dead-*"))


# Replaces a function with one that blocks, so that the kill or signal arrives exactly at that call.
HALT = """
import sys, threading
from pillarbox.cli import start
def halt(*_, **__):
    print("halted", flush=True)
    threading.Event().wait()
import {module} as module
module.{name} = halt
sys.argv = ["pillarbox", *{arguments!r}]
start()
"""
HALT_POINTS = [
    ("pillarbox.outbox", "Outbox.enqueue_json"),
    ("pillarbox.store.ledger", "LedgerWriter.write"),
    ("pillarbox.admin.replay", "DeadLetterReplayer._rewrite"),
    ("pillarbox.store.directory", "Directory._write_and_rename"),
    ("pillarbox.outbox", "Outbox.close"),
]


@pytest.mark.parametrize(("module", "name"), HALT_POINTS)
def test_a_replay_that_was_killed_can_be_repeated_without_loss_or_duplicates(tmp_path: Path, module: str, name: str) -> None:
    """SIGKILL at each step, then the same command again."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS, files=2)
    arguments = ["dead", "edit", "-d", "box", "--event-key", "buy", "--set", "scope_id=s", "--yes"]
    program = HALT.format(module=module, name=name, arguments=arguments)
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"halted\n":
            assert process.poll() is None
        process.kill()
    stored_ids = {
        json.loads(line)["event"]["event_id"]
        for line in file_lines(box, "*ed-*.ndjson") + file_lines(box, "active-*") + file_lines(box, "dead-*")
    }
    assert stored_ids >= {f"w-{number:06d}" for number in range(6)}
    second = run(*arguments, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert delivered_after_repair(tmp_path) == [f"w-{number:06d}" for number in range(5)]
    assert [b"sell" in line for line in file_lines(box, "dead-*")] == [True]


def test_sigint_ends_a_replay_after_the_current_step(tmp_path: Path) -> None:
    """The exit code is 130, and the replayed events are no longer dead letters."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    program = HALT.format(
        module="pillarbox.store.ledger",
        name="Nothing",
        arguments=["dead", "edit", "-d", "box", "--all", "--set", "scope_id=s", "--yes"],
    )
    program = program.replace("threading.Event().wait()", "sys.stdin.readline(); return write(*_, **__)")
    program = program.replace("module.Nothing = halt", "write = module.LedgerWriter.write; module.LedgerWriter.write = halt")
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"halted\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"\n\n\n\n", timeout=60)
    assert process.returncode == 130, err
    assert b"6 events from 1 file replayed" in out
    assert b"Traceback" not in err
    assert not list(box.glob("dead-*"))
    assert len(delivered_after_repair(tmp_path)) == 6


def test_a_second_command_that_changes_records_fails_at_once(tmp_path: Path) -> None:
    """`dead list` and a dry run need no lock."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    outbox_dir = Directory(str(box), OsFilesystem(), SystemClock())
    lock = acquire_lock(outbox_dir)
    assert lock is not None
    purge = run("dead", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (purge.returncode, purge.stdout) == (1, b"")
    assert b"another command" in purge.stderr
    assert run("dead", "list", "-d", "box", cwd=tmp_path).returncode == 0
    assert run("dead", "purge", "-d", "box", "--all", cwd=tmp_path).returncode == 0
    outbox_dir.filesystem.close(lock.fd)
    assert len(file_lines(box, "dead-*")) == 6


def test_dead_letters_of_a_pending_batch_are_not_changed(tmp_path: Path) -> None:
    """The delivery worker would write them again, and they would be replayed twice."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    pending = seal_batch(box, good=1)
    (file,) = box.glob("dead-*")
    file.rename(box / f"dead-{pending.name}")
    completed = run("dead", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, b"nothing was changed\n")
    assert b"6 dead letters left as is: the batch is still pending" in completed.stderr
    assert len(file_lines(box, "dead-*")) == 6
    assert run("dead", "list", "-d", "box", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ["list"],
        ["show"],
        ["replay", "--all", "--yes"],
        ["edit", "--all", "--set", "scope_id=s", "--yes"],
        ["purge", "--all", "--yes"],
    ],
)
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, command: list[str]) -> None:
    """The exit code is 1 without a traceback. This holds for a symbolic link with the name of a dead-letter file, too."""
    box = outbox_with_dead_letters(tmp_path, [*SIX_BAD_EVENTS, event_json(6)[:-1] + b',"scope_id":5}'])
    (file,) = box.glob("dead-*")
    torn = file.read_bytes()[:-20]
    file.write_bytes(torn)
    torn_line = torn.split(b"\n")[-1]
    (box / "dead-sealed-link.ndjson").symlink_to("/etc/hostname")
    completed = run("dead", *command, "-d", "box", cwd=tmp_path)
    assert completed.returncode == 1
    assert f"{file.name}, line 7: not a dead letter".encode() in completed.stderr
    assert b"Traceback" not in completed.stderr
    assert file.read_bytes().endswith(torn_line)


def test_dead_letters_from_a_directory_of_the_older_system_can_be_edited(existing: Path, tmp_path: Path) -> None:
    """A wrong event of the older system is corrected and delivered after its other events."""
    oldest = min(existing.glob("sealed-*"))
    with oldest.open("ab") as out:
        out.write(b'{"event":%b}\n' % event_json(1, 5))
    sink = ["--sink", "sqlite:///events.db", "--once"]
    assert run("deliver", "-d", existing, *sink, cwd=tmp_path).returncode == 0
    edited = run("dead", "edit", "-d", existing, "--since", "1h", "--set", "scope_id=s", "--yes", cwd=tmp_path)
    assert edited.returncode == 0, edited.stderr
    assert run("deliver", "-d", existing, *sink, cwd=tmp_path).returncode == 0
    delivered = [event_id for event_id, _ in delivered_rows(tmp_path / "events.db")]
    assert delivered == [*(event["event_id"] for event in existing_events()), "w-000001"]


def editor(folder: Path, code: str) -> dict[str, str]:
    """Environment variables with an editor that runs `code` on the variable `text`."""
    script = folder / "editor.py"
    script.write_text(f"import sys\ntext = open(sys.argv[1]).read()\n{code}\nopen(sys.argv[1], 'w').write(text)\n")
    return {"EDITOR": f"'{sys.executable}' '{script}'"}


def test_events_changed_in_the_editor_are_replayed_and_the_others_stay(tmp_path: Path) -> None:
    """Invalid lines are named, and the edited text is kept until all of it is replayed."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    code = "lines = text.replace(':5,', ':\"5\",', 2).splitlines(True)\nlines[3] = lines[3].replace('w-000003', 'w-9').replace(':5,', ':\"5\",')\nlines[4] = 'oops\\n'\ntext = ''.join(lines)"
    completed = run("dead", "edit", "-d", "box", "--all", "--yes", cwd=tmp_path, environ=editor(tmp_path, code))
    errors = completed.stderr.decode()
    assert completed.returncode == 1
    assert "2 events from 1 file replayed" in completed.stdout.decode()
    assert "must keep its event_id w-000003" in errors
    assert "line 5: not a dead letter" in errors
    (edited_text,) = box.glob("mend-*.ndjson")
    assert f"--from box/{edited_text.name}" in errors
    assert edited_text.stat().st_mode & 0o777 == 0o600
    assert delivered_after_repair(tmp_path) == ["w-000000", "w-000001"]
    assert len(file_lines(box, "dead-*")) == 4


def test_the_text_of_a_dry_run_can_be_replayed_later(tmp_path: Path) -> None:
    """The text is deleted once all of it is replayed."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    environ = editor(tmp_path, "text = text.replace(':5,', ':\"5\",')")
    dry = run("dead", "edit", "-d", "box", "--all", cwd=tmp_path, environ=environ)
    (edited_text,) = box.glob("mend-*.ndjson")
    assert (
        f"6 events from 1 file would be replayed; to do it: pillarbox dead edit --from box/{edited_text.name} --yes"
        in dry.stdout.decode()
    )
    assert len(file_lines(box, "dead-*")) == 6
    assert run("dead", "edit", "-d", "box", "--from", edited_text, "--yes", cwd=tmp_path).returncode == 0
    assert not edited_text.exists()
    assert not list(box.glob("dead-*"))
    assert len(delivered_after_repair(tmp_path)) == 6


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("", 0, "nothing was edited"),
        ("sys.exit(3)", 0, "nothing was edited"),
        ("open(sys.argv[1], 'w').write('x'); sys.exit(3)", 2, "exited with 3"),
    ],
)
def test_if_the_editor_changes_nothing_or_fails_nothing_is_replayed(
    tmp_path: Path, code: str, exit_code: int, message: str
) -> None:
    """If the editor failed after a change, its text is kept."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS)
    completed = run("dead", "edit", "-d", "box", "--all", "--yes", cwd=tmp_path, environ=editor(tmp_path, code))
    assert completed.returncode == exit_code
    assert message in (completed.stdout + completed.stderr).decode()
    assert len(list(box.glob("mend-*.ndjson"))) == (exit_code == 2)
    assert len(file_lines(box, "dead-*")) == 6
    missing = run("dead", "edit", "-d", "box", "--all", "--editor", "/no/such/editor", cwd=tmp_path)
    assert (missing.returncode, b"cannot be started" in missing.stderr) == (2, True)


def test_a_closed_pipe_does_not_end_a_replay(tmp_path: Path) -> None:
    """`pillarbox dead replay --yes | head -1` replays all records."""
    box = outbox_with_dead_letters(tmp_path, SIX_BAD_EVENTS, files=3)
    command = [*PILLARBOX, "dead", "edit", "-d", "box", "--all", "--set", "scope_id=s", "--yes"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) in (0, 1)
    assert not list(box.glob("dead-*"))
    assert len(delivered_after_repair(tmp_path)) == 6
