"""No command prints what a terminal would obey: names of files, events and answers of servers are other people's text."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from pillarbox.cli.main import app
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.cli.test_import_path import ARGUMENTS, all_commands
from tests.sinks.http_server import CannedResponse, Server, always, closed_port_url

EVIL = "x\x1b[2J\nforged\r\u202e\x9b"
EVENT = json.dumps({"event_id": EVIL, "event_key": EVIL, "scope_kind": "Site", "scope_id": EVIL, "user_id": EVIL}).encode()
BOX = f"box{EVIL}"
# Bytes that must not appear: escape, C1 controls and the right-to-left override in UTF-8, and a line that data has begun.
FORBIDDEN = (b"\x1b", b"\xc2\x9b", b"\xe2\x80\xae", b"\nforged", b"\rforged")


def check_output(*outputs: bytes) -> None:
    for output in outputs:
        assert not [piece for piece in FORBIDDEN if piece in output], output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outbox of which everything is hostile: its name, events, dead letters, damaged bytes, foreign files."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "events.ndjson").write_bytes(EVENT + b"\n" + json.dumps({EVIL: 1}).encode() + b"\n")
    reject = CannedResponse(422, json.dumps({"refused": [{"index": 0, "code": EVIL, "reason": EVIL}]}).encode())
    with Server(always(reject)) as server:
        enqueued = run("enqueue", "events.ndjson", "-d", BOX, cwd=folder)
        check_output(enqueued.stdout, enqueued.stderr)
        (folder / BOX / "sealed-0000000000000001-x.ndjson").write_bytes(EVENT + EVIL.encode() + b"\n")
        environ = {"PILLARBOX_STOP_AFTER_REJECTED_BATCHES": "0"}
        sink = f"{server.url()}#format=json"
        delivered = run("deliver", "--once", "--timeout", "5", "-d", BOX, "--sink", sink, cwd=folder, environ=environ)
        check_output(delivered.stdout, delivered.stderr)
    assert run("enqueue", "-d", BOX, cwd=folder, stdin=EVENT + b"\n").returncode == 0
    box = folder / BOX
    (box / f"sealed-0000000000000002-{EVIL}.ndjson").write_bytes(b'{"event":' + EVENT + b"}\n")
    (box / f"sealed-0000000000000003-{EVIL}.ndjson").symlink_to("/dev/null")
    (box / f"dead-0000000000000004-{EVIL}.ndjson").write_bytes(EVIL.encode())
    (box / f"corrupt-0000000000000005-{EVIL}.ndjson").write_bytes(EVIL.encode())
    return folder


@pytest.mark.parametrize("output", ["text", "json"])
@pytest.mark.parametrize("command", [command for command in all_commands(app) if command != "spacetimedb scaffold"])
def test_no_command_prints_an_escape_sequence_or_a_forged_line(folder: Path, command: str, output: str) -> None:
    """As text, or as JSON, in which such characters are escapes."""
    arguments = [BOX if argument == "box" else argument for argument in ARGUMENTS.get(command, ["-d", "box"])]
    if "-d" not in arguments and command not in ("check", "spacetimedb publish"):
        arguments += ["-d", BOX]
    if command == "inspect":
        arguments = [EVIL, "-d", BOX]
    if command == "deliver":
        arguments = ["-d", BOX, "--once", "--timeout", "0.2", "--sink", closed_port_url()]
    if command in ("flush", "seal"):
        arguments += ["--timeout", "0.3"]
    completed = run(*command.split(), *arguments, *["--json"] * (output == "json"), cwd=folder)
    assert b"Traceback" not in completed.stderr
    # `export` and `enqueue` write events and ids for programs: what a program reads stays as it is.
    check_output(*([] if command in ("export", "enqueue") else [completed.stdout]), completed.stderr)


@pytest.mark.parametrize(
    "arguments", [["dead", "show"], ["quarantine", "show"], ["tail"], ["status"], ["dead", "list", "--each"]]
)
def test_what_is_escaped_is_still_shown(folder: Path, arguments: list[str]) -> None:
    """Otherwise an operator could not tell what is there."""
    completed = run(*arguments, "-d", BOX, cwd=folder)
    assert b"\\x1b[2J" in completed.stdout


@pytest.mark.parametrize("status", [200, 400, 401, 404, 503])
def test_the_answer_of_a_server_is_printed_escaped(folder: Path, status: int) -> None:
    """By `check`, and by `doctor`, which asks too."""
    headers = {"Content-Type": "text/plain", "Allow": "GET \x1b[2J"}
    with Server(always(CannedResponse(status, EVIL.encode() * 3, headers))) as server:
        checked = run("check", server.url(), cwd=folder)
        diagnosed = run("doctor", "-d", BOX, "--sink", f"spacetimedb://127.0.0.1:{server.port}/d", cwd=folder)
    check_output(checked.stdout, checked.stderr, diagnosed.stdout, diagnosed.stderr)


def terminal_output(*arguments: str, folder: Path) -> bytes:
    """What a command writes on a terminal."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen([*PILLARBOX, *arguments], cwd=folder, env=CLEAN, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    output = b""
    while True:
        try:
            data = os.read(mine, 65536)
        except OSError:
            break
        if not data:
            break
        output += data
    os.close(mine)
    process.wait(60)
    return output


@pytest.mark.parametrize("arguments", [["export", "--format", "csv"], ["export"], ["quarantine", "show", "--raw"]])
def test_data_is_escaped_on_a_terminal_and_unchanged_in_a_pipe(folder: Path, arguments: list[str]) -> None:
    """A program gets every byte."""
    on_terminal = terminal_output(*arguments, "-d", BOX, "-q" if arguments[0] == "export" else "--limit=0", folder=folder)
    assert b"\x1b" not in on_terminal
    piped = run(*arguments, "-d", BOX, cwd=folder).stdout
    raw = "\x1b[2J" if "csv" in arguments or "--raw" in arguments else "\\u001b[2J"
    assert raw.encode() in piped


def test_a_shell_completes_no_name_that_controls_the_terminal(folder: Path) -> None:
    """A shell prints what it completes."""
    environ = {
        "_PILLARBOX_COMPLETE": "complete_bash",
        "COMP_WORDS": f"pillarbox dead list -d '{BOX}' --batch ",
        "COMP_CWORD": "6",
    }
    completed = run(cwd=folder, environ=environ)
    check_output(completed.stdout, completed.stderr)
