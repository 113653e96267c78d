"""What `close` and the end of a program leave behind, and how long they take."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from tests.conftest import event, open_files_below, wait_until
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


def drop(objects: list[Any]) -> None:
    """Drop outboxes and collect them as garbage."""
    objects.clear()
    gc.collect()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"durability": "power"},
        {"deliver": "process"},
        {"on_drop": print, "when_full": "block"},
        {"when_full": "drop_oldest"},
    ],
    ids=str,
)
def test_an_outbox_that_is_dropped_without_close_warns_and_ends_its_threads(tmp_path: Path, settings: dict[str, Any]) -> None:
    """It delivers its events, and keeps no file open."""
    threads = set(threading.enumerate())
    outboxes = [Outbox(tmp_path / "box", sink=f"sqlite:///{tmp_path}/events.db", **settings)]
    assert outboxes[0].enqueue(event(1))
    with pytest.warns(ResourceWarning, match="was dropped without close; use it in a `with` block, or call close"):
        drop(outboxes)
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert not open_files_below(tmp_path)
    with sqlite3.connect(tmp_path / "events.db") as database:
        assert database.execute("SELECT count(*) FROM tracking_event").fetchone() == (1,)
    database.close()


def test_an_outbox_that_was_never_used_or_is_closed_warns_of_nothing(tmp_path: Path) -> None:
    """It has no thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outbox = Outbox(tmp_path / "unused")
        del outbox
        with Outbox(tmp_path / "closed") as outbox:
            assert outbox.enqueue(event(1))
        del outbox
        gc.collect()


def test_an_event_loop_runs_on_while_an_outbox_flushes_and_closes(tmp_path: Path) -> None:
    """With a destination that hangs, each takes its timeout."""

    async def use(url: str) -> tuple[int, bool]:
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                # wait: the loop is asked whether it runs while the outbox waits for real time
                await asyncio.sleep(0.01)

        counting = asyncio.create_task(count_turns())
        async with Outbox(tmp_path / "box", sink=url) as outbox:
            assert await outbox.enqueue_async(event(1))
            flushed = await outbox.aflush(0.5)
            await outbox.aclose(0.5)
        counting.cancel()
        return turns, flushed

    with Server(lambda _request: HANG) as server:
        turns, flushed = asyncio.run(use(server.url("#timeout=600")))
    assert not flushed
    assert turns > 30


def test_aclose_delivers_and_seals(tmp_path: Path) -> None:
    """It does what `close` does. A second call does nothing."""

    async def use() -> None:
        async with Outbox(tmp_path / "box", sink=f"sqlite:///{tmp_path}/events.db") as outbox:
            assert await outbox.enqueue_async(event(1))
            assert await outbox.aflush(60)
            assert await outbox.enqueue_async(event(2))
        await outbox.aclose()
        assert not await outbox.enqueue_async(event(3))

    asyncio.run(use())
    with sqlite3.connect(tmp_path / "events.db") as database:
        assert database.execute("SELECT count(*) FROM tracking_event").fetchone() == (2,)
    database.close()
