"""Helpers for read-only commands: writer and delivery processes that run meanwhile, and a check of every system call with strace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.test_commands import CLEAN, PILLARBOX

WRITE = """
import sys, threading
from pillarbox import Outbox
from tests.conftest import event
name, count, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with Outbox("box", batch_size=50, flush_interval=0.02) as outbox:
    for number in range(count):
        assert outbox.enqueue(event(number, event_id=f"{name}-{number:06d}"))
        if pause and number % 10 == 9:
            threading.Event().wait(pause)
"""
DELIVER = [*PILLARBOX, "deliver", "-d", "box", "--sink", "sqlite:///events.db", "-q"]
_WRITE_FLAGS = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")
_TRACED_CALLS = (
    "openat,open,creat,flock,fcntl,rename,renameat,renameat2,unlink,unlinkat,link,linkat,mkdir,mkdirat,truncate,ftruncate"
)


@contextmanager
def running_process(*command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background; it is killed at the end of the block if it still runs."""
    environment = CLEAN | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)


def writer_command(name: str, count: int, pause: float = 0.0) -> tuple[str, ...]:
    """The command of a process that writes `count` events and pauses after every ten."""
    return sys.executable, "-c", WRITE, name, str(count), str(pause)


def run_read_only(*arguments: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command and check that it neither changes nor locks anything in `box`."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace = folder / "trace"
    command = ["strace", "-f", "-y", "-e", f"trace={_TRACED_CALLS}", "-o", str(trace), *PILLARBOX, *arguments]
    environment = CLEAN | {"PYTHONDONTWRITEBYTECODE": "1"}
    completed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
    calls = [line for line in trace.read_text().splitlines() if "box/" in line]
    assert calls, "the command made no system call on the directory"
    for call in calls:
        assert " openat(" in call or " fcntl(" in call or "LOCK_UN" in call, call  # each file is unlocked before it is closed
        assert not _WRITE_FLAGS.search(call), call
        assert "F_SETLK" not in call, call
    trace.unlink()
    return completed


def file_contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder that are not empty. Empty spare segments come and go, so they are left out."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in contents.items() if content}
