"""An error of the disk is a sentence and exit code 2, whichever command meets it and wherever."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pillarbox.cli.failures import describe_os_error
from pillarbox.cli.main import app
from tests.cli.test_commands import CLEAN, PILLARBOX, event_line, run
from tests.cli.test_import_path import ARGUMENTS, all_commands

COMMANDS = [command for command in all_commands(app) if not command.startswith("spacetimedb") and command != "check"]


def a_file(box: Path) -> None:
    shutil.rmtree(box)
    box.write_text("")


def a_loop(box: Path) -> None:
    shutil.rmtree(box)
    box.symlink_to(box.name)


def control_files_are_directories(box: Path) -> None:
    for name in ("ledger.ndjson", "ledger.lock", "deliver.lock", "evict.lock", "mend.lock", "change.lock", "seal.request"):
        (box / name).unlink(missing_ok=True)
        (box / name).mkdir()


def control_files_are_loops(box: Path) -> None:
    for name in ("ledger.ndjson", "ledger.lock", "deliver.lock", "evict.lock", "mend.lock", "change.lock", "seal.request"):
        (box / name).unlink(missing_ok=True)
        (box / name).symlink_to(name)


DAMAGES: list[Callable[[Path], None]] = [a_file, a_loop, control_files_are_directories, control_files_are_loops]


def arguments_of(command: str) -> list[str]:
    arguments = [*command.split(), *ARGUMENTS.get(command, ["-d", "box"])]
    return [*arguments, "--timeout", "0.3"] if command in ("deliver", "flush", "seal") else arguments


def fill(folder: Path) -> Path:
    (folder / "events.ndjson").write_bytes(event_line(1))
    assert run("enqueue", "-d", "box", cwd=folder, stdin=event_line(1)).returncode == 0
    return folder / "box"


def check_ending(completed: subprocess.CompletedProcess[bytes]) -> None:
    assert b"Traceback" not in completed.stderr, completed.stderr
    assert completed.returncode in (0, 1, 2), completed.stderr
    if completed.returncode == 2:
        assert completed.stderr.startswith((b"pillarbox: ", b"Usage: ", b"ERROR", b"WARNING")), completed.stderr


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_ends_with_a_traceback(tmp_path: Path, command: str, damage: Callable[[Path], None]) -> None:
    """Where a file or the directory is not what it should be."""
    damage(fill(tmp_path))
    check_ending(run(*arguments_of(command), cwd=tmp_path))


def with_few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))


def change_owner(box: Path, mode: int) -> None:
    """Give the outbox to another user."""
    for path in (box, *box.iterdir()):
        os.chown(path, 12345, 12345)
    box.chmod(mode)


# Root without the right to read and write other users' files, as in a container: the system answers as to any other user.
AS_SOMEBODY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can give up rights of root")
@pytest.mark.parametrize(
    ("command", "mode"),
    [
        *((command, 0o755) for command in COMMANDS),
        ("status", 0o700),
        ("verify", 0o700),
        ("enqueue", 0o700),
        ("sinks list", 0o700),
    ],
)
def test_another_users_outbox_is_a_sentence(tmp_path: Path, command: str, mode: int) -> None:
    """Whether its directory or only its files cannot be opened."""
    change_owner(fill(tmp_path), mode)
    completed = subprocess.run(
        [*AS_SOMEBODY, *PILLARBOX, *arguments_of(command)],
        cwd=tmp_path, env=CLEAN, input=b"", capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    check_ending(completed)
    if mode == 0o700:
        assert completed.returncode
        assert b"box" in completed.stderr + completed.stdout


@pytest.mark.parametrize("command", ["status", "verify", "doctor", "sinks list", "inspect"])
def test_a_lack_of_descriptors_is_a_sentence(tmp_path: Path, command: str) -> None:
    """The message says which limit to raise."""
    fill(tmp_path)
    completed = run_with(with_few_descriptors, *arguments_of(command), cwd=tmp_path)
    check_ending(completed)


def run_with(prepare: Callable[[], None], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PILLARBOX, *arguments],
        cwd=cwd,
        env=CLEAN,
        input=b"",
        capture_output=True,
        timeout=60,
        check=False,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize("arguments", [["status"], ["export"], ["tail"], ["verify"], ["dead", "list", "--json"], ["--version"]])
def test_a_full_standard_output_is_a_sentence(tmp_path: Path, arguments: list[str]) -> None:
    """What a shell redirects to a full disk is incomplete, so the exit code must say so."""
    fill(tmp_path)
    directory = [] if arguments == ["--version"] else ["-d", "box"]
    with Path("/dev/full").open("wb") as full:
        completed = subprocess.run(
            [*PILLARBOX, *arguments, *directory],
            cwd=tmp_path,
            env=CLEAN,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert completed.returncode == 2
    assert completed.stderr == b"pillarbox: No space left on device: free space on the volume, and inodes\n"


@pytest.mark.parametrize("arguments", [["status"], ["tail"], ["verify"], ["status", "--json"]])
def test_a_closed_standard_output_is_no_traceback(tmp_path: Path, arguments: list[str]) -> None:
    """As from a cron job that closes it."""
    fill(tmp_path)
    shell = 'exec "$@" >&- 2>errors'
    command = ["sh", "-c", shell, "sh", *PILLARBOX, *arguments, "-d", "box"]
    completed = subprocess.run(command, cwd=tmp_path, env=CLEAN, timeout=60, check=False)
    assert (completed.returncode, (tmp_path / "errors").read_bytes()) == (0, b"")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(5, "Input/output error", "/a"), "/a: Input/output error: replace the disk; the kernel log shows its errors"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a to b: Invalid cross-device link: put the outbox"),
        (OSError("odd"), "odd: run pillarbox doctor -d DIR"),
        (OSError(13, "Permission denied", b"\xff"), "\\xff: Permission denied: run the command as the owner"),
    ],
)
def test_a_sentence_says_what_failed_where_and_what_to_do(error: Any, text: str) -> None:
    """For every error number there is something to do."""
    assert describe_os_error(error).startswith(text)


def test_a_name_that_is_not_utf_8_is_printed_as_text_and_as_json(tmp_path: Path) -> None:
    """Such a name cannot be encoded as it is."""
    name = b"box-\xff".decode(errors="surrogateescape")
    assert run("enqueue", "-d", name, cwd=tmp_path, stdin=event_line(1)).returncode == 0 if sys.platform == "linux" else True
    for arguments in (
        ["status"],
        ["status", "--json"],
        ["verify", "--json"],
        ["sinks", "list", "--json"],
        ["doctor", "--json"],
    ):
        completed = run(*arguments, "-d", name, cwd=tmp_path)
        assert b"Traceback" not in completed.stderr
        assert completed.returncode in (0, 1), completed.stderr
