"""What `close` and the end of a program leave behind, and how long they take."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pillarbox import Outbox
from tests.conftest import event, open_files_below
from tests.sinks.http_server import HANG, Server


def test_no_thread_and_no_descriptor_outlives_close(tmp_path: Path) -> None:
    """Also not the one that commits for coroutines."""

    async def use(outbox: Outbox) -> None:
        assert all(await asyncio.gather(*(outbox.enqueue_async(event(number)) for number in range(5))))

    threads = set(threading.enumerate())
    for number in range(3):
        with Outbox(tmp_path / str(number), sink=f"sqlite:///{tmp_path}/{number}.db", durability="power") as outbox:
            asyncio.run(use(outbox))
            assert outbox.flush(60)
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
    assert set(threading.enumerate()) <= threads
    assert not open_files_below(tmp_path)


OPEN_AT_EXIT = """
import sys
from pillarbox import Outbox
from tests.conftest import event
outboxes = [Outbox(f"box-{number}", sink=sys.argv[1]) for number in range(8)]
assert all(outbox.enqueue(event(number)) for number, outbox in enumerate(outboxes))
print("stored", flush=True)
"""


@pytest.mark.slow
def test_outboxes_that_are_open_at_the_exit_share_its_time(tmp_path: Path) -> None:
    """With a destination that hangs, eight of them take no longer than one; all seal their events."""
    with Server(lambda _request: HANG) as server:
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", OPEN_AT_EXIT, server.url("#timeout=600")]
        with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stored\n"
            begin = time.monotonic()
            assert process.wait(60) == 0
            assert time.monotonic() - begin < 8.0  # one after the other they take 16 s and more
    for number in range(8):
        names = os.listdir(tmp_path / f"box-{number}")
        assert [name for name in names if name.startswith("sealed-")], names
