"""What every command owes the shell that it is typed into: completion, plain text in a pipe, JSON, and a quiet end at Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pillarbox.cli.main import app
from pillarbox.store import record
from tests.cli.test_commands import CLEAN, PILLARBOX, bare, run

if TYPE_CHECKING:
    import typer

SHELLS = ["bash", "zsh", "fish"]
# What it prints is source text.
WITHOUT_JSON = {"spacetimedb scaffold"}
BATCH = "sealed-1700000000000000-x"
# Says when the command starts to load: before that, Ctrl-C would meet the interpreter while it starts.
ANNOUNCED = """
import sys
from pillarbox.cli import main
class Announcer:
    def find_spec(self, name, *_):
        if name == "pillarbox.cli.main":
            print("up", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Announcer())
main()
"""


def commands(app: typer.Typer, words: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Every command's words, and the names of its parameters."""
    found = {
        " ".join((*words, command.name or "")): set(command.callback.__annotations__)
        for command in app.registered_commands
        if command.callback is not None
    }
    for group in app.registered_groups:
        if group.typer_instance is not None:
            found |= commands(group.typer_instance, (*words, group.typer_instance.info.name or ""))
    return found


COMMANDS = commands(app)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An outbox directory in which something waits and something is set aside, and a file of events beside it."""
    made = tmp_path / "box"
    made.mkdir(mode=0o700)
    (made / f"{BATCH}.ndjson").write_bytes(record.line(b'{"event_id":"e"}'))
    (made / f"corrupt-{BATCH}.ndjson").write_bytes(b"\x1b[31mrubbish\n")
    (tmp_path / "events.ndjson").write_bytes(bare(1))
    return made


def offered(shell: str, typed: str, cwd: Path) -> set[str]:
    """What a shell is told that may stand at the end of a line."""
    words = typed.split(" ")
    environ = {"_PILLARBOX_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environ |= {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    else:
        environ |= {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = run(cwd=cwd, environ=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    if shell == "zsh":
        text = text.replace(r"\\:", ":")  # a colon would begin a description
        return set(re.findall(r'^(?:_arguments .*\(\()?"([^"]*)"', text, re.MULTILINE))
    return {line.partition("\t")[0] for line in text.splitlines() if line}


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_values_are_completed(box: Path, shell: str) -> None:
    """By the protocol that the script of `--show-completion` uses."""
    folder = box.parent
    assert {"seal", "status", "spacetimedb"} <= offered(shell, "pillarbox s", folder)
    assert offered(shell, "pillarbox doctor --durability p", folder) == {"process", "power"}
    assert offered(shell, "pillarbox doctor --sink sq", folder) == {"sqlite://"}


def test_schemes_are_completed_behind_the_name_of_a_sink_too(box: Path) -> None:
    """And as what is to be checked."""
    assert offered("fish", "pillarbox deliver --sink live=http", box.parent) == {"live=http://", "live=https://"}
    assert offered("fish", "pillarbox check sp", box.parent) == {"spacetimedb://", "spacetimedb+https://"}


def test_batches_are_completed_from_the_directory_that_was_typed(box: Path) -> None:
    """Those of which something is set aside; without a directory none, and not a word."""
    assert offered("bash", "pillarbox quarantine list -d box --batch sea", box.parent) == {BATCH}
    assert offered("fish", "pillarbox dead list -d box --batch sea", box.parent) == set()
    assert offered("fish", "pillarbox quarantine list -d missing --batch sea", box.parent) == set()
    (box / "sink-live").mkdir()
    (box / "sink-live" / f"dead-{BATCH}.ndjson").write_bytes(b"")
    assert offered("fish", "pillarbox dead list -d box --batch sea", box.parent) == {BATCH}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell_is_shown(tmp_path: Path, shell: str) -> None:
    """It names the command and the protocol; `--install-completion` puts it where the shell looks."""
    done = run("--show-completion", cwd=tmp_path, environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    if done.returncode:  # without detection, the shell is to be named
        done = run("--show-completion", shell, cwd=tmp_path, environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    text = done.stdout.decode()
    assert f"complete_{shell}" in text
    assert "pillarbox" in text
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert run("--install-completion", shell, cwd=tmp_path, environ=home).returncode == 0
    assert any(f"complete_{shell}" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_what_prints_a_table_prints_json_too() -> None:
    """All others are listed here."""
    assert {command for command, parameters in COMMANDS.items() if "json" not in parameters} == WITHOUT_JSON


@pytest.mark.parametrize(
    "command",
    [
        "status", "doctor", "verify", "seal", "flush --timeout 0.2", "quarantine list", "quarantine show", "dead list",
        "inspect e", "sinks list", "redeliver --all",
    ],
)  # fmt: skip
def test_in_a_pipe_text_has_no_colours_and_json_is_json(box: Path, command: str) -> None:
    """Nor does what is damaged bring any."""
    words = [*command.split(), "-d", "box"]
    plain = run(*words, cwd=box.parent, environ={"TERM": "xterm-256color"})
    assert plain.returncode in (0, 1), plain.stderr
    assert b"\x1b" not in plain.stdout + plain.stderr
    done = run(*words, "--json", cwd=box.parent)
    assert done.returncode in (0, 1), done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "status --watch",
        "doctor",
        "verify",
        "seal",
        "flush",
        "dead list",
        "dead replay --all --yes",
        "quarantine list",
        "quarantine repair --all --yes",
        "quarantine purge --all --yes",
        "import events.ndjson",
        "inspect e",
        "redeliver --all --yes",
        "sinks list",
        "sinks add new",
        "check sqlite:///events.db",
        "tail",
        "export",
        "deliver",
    ],
)
def test_ctrl_c_ends_every_command_without_a_trace(box: Path, command: str) -> None:
    """As soon as the interpreter is up; later it is done, or interrupted, and nothing is damaged."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    words = [*command.split(), *(["-d", "box"] if not command.startswith("check") else [])]
    words += ["--sink", "sqlite:///missing/x.db"] if command == "deliver" else []
    process = subprocess.Popen(
        [PILLARBOX[0], "-c", ANNOUNCED, *words], cwd=box.parent, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 1, 130)
    assert b"Traceback" not in said
    after = {file.name: file.read_bytes() for file in box.iterdir() if file.is_file()}
    gone = before.keys() - after.keys()
    assert gone <= ({f"corrupt-{BATCH}.ndjson"} if "purge" in command else set())  # where the interrupt came when it was done
    assert before.items() - after.items() <= {(name, before[name]) for name in gone}
