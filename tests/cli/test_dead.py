"""`pillarbox dead`, as an operator types it: real processes on what a real destination refused."""

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

SIX = [*(event_json(number, 5) for number in range(5)), event_json(5, 5, key="sell")]


def mended_and_arrived(folder: Path) -> list[str]:
    """The events that were dead letters and have arrived, after what waits is delivered."""
    deliver_pending(folder / "box", folder / "events.db")
    return sorted(one for one, _ in delivered_rows(folder / "events.db") if one.startswith("w-"))


def test_list_adds_up_what_is_of_one_kind(tmp_path: Path) -> None:
    """As text and as JSON; it changes nothing."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    before = sorted(box.iterdir())
    text = run("dead", "list", "-d", "box", cwd=tmp_path)
    assert text.returncode == 0
    first, *_, last = text.stdout.decode().splitlines()[1:]
    assert first.split()[:4] == ["5", "wrong_type", "buy", f"sqlite:///{tmp_path}/events.db"]
    assert "Expected `str`, got `int` - at `$.scope_id`" in first
    assert last == "6 dead letters in 2 files"
    found = json.loads(run("dead", "list", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert [(group["count"], group["event_key"]) for group in found["groups"]] == [(5, "buy"), (1, "sell")]
    assert (found["records"], found["files"], found["items"], found["problems"]) == (6, 2, [], [])
    assert sorted(box.iterdir()) == before


def test_each_record_has_a_name_by_which_it_can_be_shown(tmp_path: Path) -> None:
    """In full, with the event as it stands."""
    outbox_with_dead_letters(tmp_path, SIX)
    listed = json.loads(run("dead", "list", "-d", "box", "--each", "--json", "--limit", 2, cwd=tmp_path).stdout)
    assert (listed["records"], len(listed["items"])) == (6, 2)
    name = listed["items"][1]["record"]
    (shown,) = json.loads(run("dead", "show", "-d", "box", name, "--json", cwd=tmp_path).stdout)
    assert (shown["event_id"], shown["event"]["scope_id"], shown["code"]) == ("w-000001", 5, "wrong_type")
    text = run("dead", "show", "-d", "box", name, cwd=tmp_path).stdout.decode()
    assert text.startswith(f"{name}\n  wrong_type: Expected")
    assert '"scope_id": 5' in text
    assert "w-000002" not in text


def test_what_could_move_the_cursor_is_escaped(tmp_path: Path) -> None:
    """An event may hold anything; C1 controls and overrides of direction too."""
    outbox_with_dead_letters(tmp_path, [event_json(1, 5, key="a\\u001b[31m\u009b31m\u202e[/red]")])
    for command in (["list"], ["list", "--each"], ["show"], ["purge", "--all"]):
        out = run("dead", *command, "-d", "box", cwd=tmp_path).stdout.decode()
        assert "[31m" in out
        assert "[/red]" in out
        assert not {"\x1b", "\x9b", "\u202e"} & set(out)


def test_without_yes_nothing_is_done(tmp_path: Path) -> None:
    """It says what would be, and how to have it done."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    for words in (["edit", "--all", "--set", "scope_id=s"], ["replay", "--all"], ["purge", "--event-key", "sell"]):
        done = run("dead", *words, "-d", "box", cwd=tmp_path)
        assert b"add --yes to do it" in done.stdout or b"nothing to do" in done.stdout
    assert {file.name: file.read_bytes() for file in box.iterdir()} == before


@pytest.mark.parametrize("words", [["replay"], ["edit", "--set", "scope_id=s"], ["purge"]])
def test_what_changes_something_must_be_told_what(tmp_path: Path, words: list[str]) -> None:
    """--all means everything."""
    outbox_with_dead_letters(tmp_path, SIX)
    done = run("dead", *words, "-d", "box", "--yes", cwd=tmp_path)
    assert done.returncode == 2
    assert b"--all" in done.stderr


def test_edited_events_are_delivered_under_their_own_ids(tmp_path: Path) -> None:
    """Chosen by key; the others stay."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    done = run("dead", "edit", "-d", "box", "--event-key", "buy", "--set", "scope_id=7", "--yes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines()[-1] == "5 events from 2 files replayed"
    assert mended_and_arrived(tmp_path) == [f"w-{number:06d}" for number in range(5)]
    assert all(scope == "7" for one, scope in delivered_rows(tmp_path / "events.db") if one.startswith("w-"))
    (left,) = file_lines(box, "dead-*")
    assert b"sell" in left


TYPES = """
import msgspec
class Big(msgspec.Struct):
    event_id: str
    number: int
"""


def test_what_the_destination_can_take_by_now_is_replayed_as_it_is(tmp_path: Path) -> None:
    """And what it still refuses is a dead letter again, once."""
    (tmp_path / "shop_types.py").write_text(TYPES)
    events = [{"event_id": "a", "number": 13}, {"event_id": "b", "number": 2**63}, {"event_id": "c", "number": 1}]
    options = ["-d", "box", "--event-type", "shop_types:Big"]
    sink = ["--sink", "sqlite:///events.db", "--once"]
    python = "import sqlite3; c = sqlite3.connect('events.db'); c.execute({!r}); c.commit()"
    table = "CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER CHECK (number <> 13))"
    subprocess.run([sys.executable, "-c", python.format(table)], cwd=tmp_path, check=True)
    run("enqueue", *options, cwd=tmp_path, stdin=b"".join(json.dumps(one).encode() + b"\n" for one in events))
    run("deliver", *options, *sink, cwd=tmp_path)
    codes = json.loads(run("dead", "list", *options, "--json", cwd=tmp_path).stdout)["groups"]
    assert sorted(group["code"] for group in codes) == ["out_of_range", "refused_by_table"]
    for statement in ("ALTER TABLE big RENAME TO old", "CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER)"):
        subprocess.run([sys.executable, "-c", python.format(statement)], cwd=tmp_path, check=True)
    assert run("enqueue", *options, cwd=tmp_path, stdin=b'{"event_id":"d","number":2}\n').returncode == 0
    assert run("dead", "replay", *options, "--all", "--yes", cwd=tmp_path).returncode == 0
    run("deliver", *options, *sink, cwd=tmp_path)
    count = "print([r[0] for r in c.execute('SELECT event_id FROM big ORDER BY 1')])"
    found = subprocess.run(
        [sys.executable, "-c", python.format("SELECT 1") + ";" + count], cwd=tmp_path, capture_output=True, check=True
    )
    assert found.stdout.decode().strip() == "['a', 'd']"
    listed = json.loads(run("dead", "list", *options, "--each", "--json", cwd=tmp_path).stdout)
    assert [(one["event_id"], one["code"]) for one in listed["items"]] == [("b", "out_of_range")]


def test_what_the_event_type_does_not_take_is_named_and_stays(tmp_path: Path) -> None:
    """Replaying it as it is would only make a dead letter of it again."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), b"5", event_json(2, 5).replace(b'"event_id":"w-000002",', b"")])
    done = run("dead", "replay", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"nothing was changed\n")
    said = done.stderr.decode()
    assert said.count("left as is: the event is not a") == 3
    assert len(file_lines(box, "dead-*")) == 3


def test_purged_is_gone_and_in_the_ledger(tmp_path: Path) -> None:
    """Only what was chosen."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    assert run("dead", "purge", "-d", "box", "--event-id", "w-000003", "--yes", cwd=tmp_path).returncode == 0
    assert [b"w-000003" in line for line in file_lines(box, "dead-*")] == [False] * 5
    assert [b'"events":1' in line for line in file_lines(box, "ledger.ndjson") if b'"entry":"purged"' in line] == [True]
    done = run("dead", "purge", "-d", "box", "--all", "--yes", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["applied"], answer["events"], len(answer["items"])) == (True, 5, 5)
    assert not list(box.glob("dead-*"))


# Waits for ever at one point of the work, so that the kill finds it exactly there.
HALT = """
import sys, threading
from pillarbox.cli import main
def halt(*_, **__):
    print("there", flush=True)
    threading.Event().wait()
import {module} as module
module.{name} = halt
sys.argv = ["pillarbox", *{arguments!r}]
main()
"""
POINTS = [
    ("pillarbox.outbox", "Outbox.enqueue_json"),
    ("pillarbox.store.ledger", "LedgerWriter.write"),
    ("pillarbox.admin.replay", "DeadLetterReplayer._rewrite"),
    ("pillarbox.store.directory", "Directory._write_and_rename"),
    ("pillarbox.outbox", "Outbox.close"),
]


@pytest.mark.parametrize(("module", "name"), POINTS)
def test_killed_anywhere_in_a_replay_everything_is_there_once_in_the_end(tmp_path: Path, module: str, name: str) -> None:
    """Kill -9, then the same command again."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    arguments = ["dead", "edit", "-d", "box", "--event-key", "buy", "--set", "scope_id=s", "--yes"]
    program = HALT.format(module=module, name=name, arguments=arguments)
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"there\n":
            assert process.poll() is None
        process.kill()
    accounted = {
        json.loads(line)["event"]["event_id"]
        for line in file_lines(box, "*ed-*.ndjson") + file_lines(box, "active-*") + file_lines(box, "dead-*")
    }
    assert accounted >= {f"w-{number:06d}" for number in range(6)}
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert mended_and_arrived(tmp_path) == [f"w-{number:06d}" for number in range(5)]
    assert [b"sell" in line for line in file_lines(box, "dead-*")] == [True]


def test_interrupted_it_ends_after_the_step_under_way(tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, and what went in has left the dead letters."""
    box = outbox_with_dead_letters(tmp_path, SIX)
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
        while process.stdout.readline() != b"there\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"\n\n\n\n", timeout=60)
    assert process.returncode == 130, err
    assert b"6 events from 1 file replayed" in out
    assert b"Traceback" not in err
    assert not list(box.glob("dead-*"))
    assert len(mended_and_arrived(tmp_path)) == 6


def test_a_second_command_does_not_wait_and_says_why(tmp_path: Path) -> None:
    """Looking is free, and so is a dry run."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    outbox_dir = Directory(str(box), OsFilesystem(), SystemClock())
    taken = acquire_lock(outbox_dir)
    assert taken is not None
    refused = run("dead", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"another command" in refused.stderr
    assert run("dead", "list", "-d", "box", cwd=tmp_path).returncode == 0
    assert run("dead", "purge", "-d", "box", "--all", cwd=tmp_path).returncode == 0
    outbox_dir.filesystem.close(taken.fd)
    assert len(file_lines(box, "dead-*")) == 6


def test_a_batch_that_the_deliverer_is_not_done_with_is_left_alone(tmp_path: Path) -> None:
    """It would write the dead letters again, and they would come twice."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    waiting = seal_batch(box, good=1)
    (file,) = box.glob("dead-*")
    file.rename(box / f"dead-{waiting.name}")
    done = run("dead", "purge", "-d", "box", "--all", "--yes", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"nothing was changed\n")
    assert b"6 dead letters left as is: the batch is still pending" in done.stderr
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
    """Exit code 1, and no traceback; a directory under the name too."""
    box = outbox_with_dead_letters(tmp_path, [*SIX, event_json(6)[:-1] + b',"scope_id":5}'])
    (file,) = box.glob("dead-*")
    torn = file.read_bytes()[:-20]
    file.write_bytes(torn)
    bad = torn.split(b"\n")[-1]
    (box / "dead-sealed-link.ndjson").symlink_to("/etc/hostname")
    done = run("dead", *command, "-d", "box", cwd=tmp_path)
    assert done.returncode == 1
    assert f"{file.name}, line 7: not a dead letter".encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert file.read_bytes().endswith(bad)


def test_dead_letters_of_the_older_systems_directory_come_back(existing: Path, tmp_path: Path) -> None:
    """What it had written wrongly is mended and delivered with all else."""
    oldest = min(existing.glob("sealed-*"))
    with oldest.open("ab") as out:
        out.write(b'{"event":%b}\n' % event_json(1, 5))
    sink = ["--sink", "sqlite:///events.db", "--once"]
    assert run("deliver", "-d", existing, *sink, cwd=tmp_path).returncode == 0
    mended = run("dead", "edit", "-d", existing, "--since", "1h", "--set", "scope_id=s", "--yes", cwd=tmp_path)
    assert mended.returncode == 0, mended.stderr
    assert run("deliver", "-d", existing, *sink, cwd=tmp_path).returncode == 0
    came = [one for one, _ in delivered_rows(tmp_path / "events.db")]
    assert came == [*(event["event_id"] for event in existing_events()), "w-000001"]


def editor(folder: Path, code: str) -> dict[str, str]:
    """An editor that does to the `text` what the code says."""
    script = folder / "editor.py"
    script.write_text(f"import sys\ntext = open(sys.argv[1]).read()\n{code}\nopen(sys.argv[1], 'w').write(text)\n")
    return {"EDITOR": f"'{sys.executable}' '{script}'"}


def test_what_was_changed_in_the_editor_goes_in_and_the_rest_stays(tmp_path: Path) -> None:
    """What is not valid is named, and the text is kept until all of it went in."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    code = "lines = text.replace(':5,', ':\"5\",', 2).splitlines(True)\nlines[3] = lines[3].replace('w-000003', 'w-9').replace(':5,', ':\"5\",')\nlines[4] = 'oops\\n'\ntext = ''.join(lines)"
    done = run("dead", "edit", "-d", "box", "--all", "--yes", cwd=tmp_path, environ=editor(tmp_path, code))
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "2 events from 1 file replayed" in done.stdout.decode()
    assert "must keep its event_id w-000003" in said
    assert "line 5: not a dead letter" in said
    (kept,) = box.glob("mend-*.ndjson")
    assert f"--from box/{kept.name}" in said
    assert kept.stat().st_mode & 0o777 == 0o600
    assert mended_and_arrived(tmp_path) == ["w-000000", "w-000001"]
    assert len(file_lines(box, "dead-*")) == 4


def test_a_dry_run_in_the_editor_is_carried_out_from_its_text(tmp_path: Path) -> None:
    """And the text goes once all of it went in."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    environ = editor(tmp_path, "text = text.replace(':5,', ':\"5\",')")
    dry = run("dead", "edit", "-d", "box", "--all", cwd=tmp_path, environ=environ)
    (kept,) = box.glob("mend-*.ndjson")
    assert (
        f"6 events from 1 file would be replayed; to do it: pillarbox dead edit --from box/{kept.name} --yes"
        in dry.stdout.decode()
    )
    assert len(file_lines(box, "dead-*")) == 6
    assert run("dead", "edit", "-d", "box", "--from", kept, "--yes", cwd=tmp_path).returncode == 0
    assert not kept.exists()
    assert not list(box.glob("dead-*"))
    assert len(mended_and_arrived(tmp_path)) == 6


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("", 0, "nothing was edited"),
        ("sys.exit(3)", 0, "nothing was edited"),
        ("open(sys.argv[1], 'w').write('x'); sys.exit(3)", 2, "exited with 3"),
    ],
)
def test_an_editor_that_changes_nothing_or_fails_does_nothing(tmp_path: Path, code: str, exit_code: int, said: str) -> None:
    """What it leaves is kept where it differs."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    done = run("dead", "edit", "-d", "box", "--all", "--yes", cwd=tmp_path, environ=editor(tmp_path, code))
    assert done.returncode == exit_code
    assert said in (done.stdout + done.stderr).decode()
    assert len(list(box.glob("mend-*.ndjson"))) == (exit_code == 2)
    assert len(file_lines(box, "dead-*")) == 6
    lost = run("dead", "edit", "-d", "box", "--all", "--editor", "/no/such/editor", cwd=tmp_path)
    assert (lost.returncode, b"cannot be started" in lost.stderr) == (2, True)


def test_a_reader_that_goes_away_does_not_end_the_work(tmp_path: Path) -> None:
    """`pillarbox dead replay --yes | head -1` sends all."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=3)
    command = [*PILLARBOX, "dead", "edit", "-d", "box", "--all", "--set", "scope_id=s", "--yes"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) in (0, 1)
    assert not list(box.glob("dead-*"))
    assert len(mended_and_arrived(tmp_path)) == 6
