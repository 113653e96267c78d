"""What the tests of the commands that only look share: directories with processes at work in them, and proof of only looking."""

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
_CHANGES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")
_VERBS = "openat,open,creat,flock,fcntl,rename,renameat,renameat2,unlink,unlinkat,link,linkat,mkdir,mkdirat,truncate,ftruncate"


@contextmanager
def at_work(*command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that goes on meanwhile, and is killed at the end if it has not ended."""
    environment = CLEAN | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)


def writer(name: str, count: int, pause: float = 0.0) -> tuple[str, ...]:
    """The command of a process that writes so many events, ten at a time."""
    return sys.executable, "-c", WRITE, name, str(count), str(pause)


def only_looks(*arguments: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command, and hold that it opens nothing in `box` for writing, and locks, makes, renames and removes nothing."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace = folder / "trace"
    command = ["strace", "-f", "-y", "-e", f"trace={_VERBS}", "-o", str(trace), *PILLARBOX, *arguments]
    environment = CLEAN | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
    calls = [line for line in trace.read_text().splitlines() if "box/" in line]
    assert calls, "it has not looked at the directory at all"
    for call in calls:
        assert " openat(" in call or " fcntl(" in call, call
        assert not _CHANGES.search(call), call
        assert "F_SETLK" not in call, call
    trace.unlink()
    return done


def names(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that has content, and that; a writer's spares come and go."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if content}
