"""What every command must do in a shell: completion, plain text in a pipe, JSON, and a clean end after SIGINT."""

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
from tests.cli.test_commands import CLEAN, PILLARBOX, event_line, run

if TYPE_CHECKING:
    import typer

SHELLS = ["bash", "zsh", "fish"]
# It prints source code.
WITHOUT_JSON = {"spacetimedb scaffold"}
BATCH = "sealed-1700000000000000-x"
# Prints a line when the command starts to load: an earlier SIGINT would interrupt the start of the interpreter.
WITH_START_NOTICE = """
import sys
from pillarbox.cli import start
class Announcer:
    def find_spec(self, name, *_):
        if name == "pillarbox.cli.main":
            print("up", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Announcer())
start()
"""


def parameters_by_command(app: typer.Typer, words: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """The parameter names of every command, by its words."""
    parameters = {
        " ".join((*words, command.name or "")): set(command.callback.__annotations__)
        for command in app.registered_commands
        if command.callback is not None
    }
    for group in app.registered_groups:
        if group.typer_instance is not None:
            parameters |= parameters_by_command(group.typer_instance, (*words, group.typer_instance.info.name or ""))
    return parameters


COMMANDS = parameters_by_command(app)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An outbox directory with a pending batch and quarantined bytes, and a file of events beside it."""
    directory = tmp_path / "box"
    directory.mkdir(mode=0o700)
    (directory / f"{BATCH}.ndjson").write_bytes(record.line(b'{"event_id":"e"}'))
    (directory / f"corrupt-{BATCH}.ndjson").write_bytes(b"\x1b[31mrubbish\n")
    (tmp_path / "events.ndjson").write_bytes(event_line(1))
    return directory


def completions(shell: str, typed: str, cwd: Path) -> set[str]:
    """The completions that a shell gets for the last word of a line."""
    words = typed.split(" ")
    environ = {"_PILLARBOX_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environ |= {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    else:
        environ |= {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    completed = run(cwd=cwd, environ=environ)
    assert (completed.returncode, completed.stderr) == (0, b"")
    text = completed.stdout.decode()
    if shell == "zsh":
        text = text.replace(r"\\:", ":")  # a colon would begin a description
        return set(re.findall(r'^(?:_arguments .*\(\()?"([^"]*)"', text, re.MULTILINE))
    return {line.partition("\t")[0] for line in text.splitlines() if line}


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_and_values_are_completed(box: Path, shell: str) -> None:
    """By the protocol that the script of `--show-completion` uses."""
    folder = box.parent
    assert {"seal", "status", "spacetimedb"} <= completions(shell, "pillarbox s", folder)
    assert completions(shell, "pillarbox doctor --durability p", folder) == {"process", "power"}
    assert completions(shell, "pillarbox doctor --sink sq", folder) == {"sqlite://"}


def test_url_schemes_are_completed_also_after_the_name_of_a_sink(box: Path) -> None:
    """And for the argument of `pillarbox check`."""
    assert completions("fish", "pillarbox deliver --sink live=http", box.parent) == {"live=http://", "live=https://"}
    assert completions("fish", "pillarbox check sp", box.parent) == {"spacetimedb://", "spacetimedb+https://"}


def test_batches_are_completed_from_the_given_directory(box: Path) -> None:
    """Batches with dead letters or quarantined bytes. For a missing directory, there is no completion and no error."""
    assert completions("bash", "pillarbox quarantine list -d box --batch sea", box.parent) == {BATCH}
    assert completions("fish", "pillarbox dead list -d box --batch sea", box.parent) == set()
    assert completions("fish", "pillarbox quarantine list -d missing --batch sea", box.parent) == set()
    (box / "sink-live").mkdir()
    (box / "sink-live" / f"dead-{BATCH}.ndjson").write_bytes(b"")
    assert completions("fish", "pillarbox dead list -d box --batch sea", box.parent) == {BATCH}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell_is_shown(tmp_path: Path, shell: str) -> None:
    """It names the command and the protocol; `--install-completion` writes it to the file that the shell loads."""
    completed = run("--show-completion", cwd=tmp_path, environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    if completed.returncode:  # without detection, the shell must be named
        completed = run("--show-completion", shell, cwd=tmp_path, environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    text = completed.stdout.decode()
    assert f"complete_{shell}" in text
    assert "pillarbox" in text
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert run("--install-completion", shell, cwd=tmp_path, environ=home).returncode == 0
    assert any(f"complete_{shell}" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_all_commands_but_the_listed_ones_have_json_output() -> None:
    """WITHOUT_JSON lists the exceptions."""
    assert {command for command, parameters in COMMANDS.items() if "json" not in parameters} == WITHOUT_JSON


@pytest.mark.parametrize(
    "command",
    [
        "status", "doctor", "verify", "seal", "flush --timeout 0.2", "quarantine list", "quarantine show", "dead list",
        "inspect e", "sinks list", "redeliver --all",
    ],
)  # fmt: skip
def test_in_a_pipe_text_has_no_colours_and_json_is_valid(box: Path, command: str) -> None:
    """Damaged bytes with escape codes do not bring any colours either."""
    words = [*command.split(), "-d", "box"]
    plain = run(*words, cwd=box.parent, environ={"TERM": "xterm-256color"})
    assert plain.returncode in (0, 1), plain.stderr
    assert b"\x1b" not in plain.stdout + plain.stderr
    completed = run(*words, "--json", cwd=box.parent)
    assert completed.returncode in (0, 1), completed.stderr
    json.loads(completed.stdout)


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
def test_sigint_ends_every_command_without_a_traceback(box: Path, command: str) -> None:
    """SIGINT comes as soon as the command loads. It is interrupted or completes, and no file is damaged."""
    before = {file.name: file.read_bytes() for file in box.iterdir()}
    words = [*command.split(), *(["-d", "box"] if not command.startswith("check") else [])]
    words += ["--sink", "sqlite:///missing/x.db"] if command == "deliver" else []
    process = subprocess.Popen(
        [PILLARBOX[0], "-c", WITH_START_NOTICE, *words],
        cwd=box.parent,
        env=CLEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 1, 130)
    assert b"Traceback" not in errors
    after = {file.name: file.read_bytes() for file in box.iterdir() if file.is_file()}
    deleted = before.keys() - after.keys()
    assert deleted <= (
        {f"corrupt-{BATCH}.ndjson"} if "purge" in command else set()
    )  # if the command completed before the signal
    assert before.items() - after.items() <= {(name, before[name]) for name in deleted}
