"""A fork that C code makes, as uWSGI does, calls no hook of Python's: it is noticed at the next use of the outbox."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pillarbox import Outbox, forks
from pillarbox._native import COMPILED
from tests.conftest import wait_until

FORK = """
import asyncio, ctypes, json, os, sys, time
import pillarbox

# A child stands still if another thread had asked for the GIL when it was forked: before anything of Pillarbox runs.
sys.setswitchinterval(60)

def event():
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="s")

def store(count):
    events = [event() for _ in range(count)]
    assert all([outbox.enqueue(event) for event in events[:count // 3]])
    assert all(outbox.enqueue_many(events[count // 3:count // 2]))
    async def rest():
        assert all(await asyncio.gather(*(outbox.enqueue_async(event) for event in events[count // 2:])))
    asyncio.run(rest())
    return [event.event_id for event in events]

first_use, settings = sys.argv[1], json.loads(sys.argv[2])
outbox = pillarbox.Outbox("box", sink="sqlite:///events.db", flush_interval=0.05, **settings)
ids = store(50) if first_use == "before" else []
library = ctypes.PyDLL(None)
children = []
for number in range(3):
    time.sleep(0.02)  # until no thread asks any more
    pid = library.fork()
    if pid == 0:
        ids = store(200)
        assert outbox.flush(60), outbox.stats()
        outbox.close()
        with open(f"ids-{number}", "w") as file:
            json.dump(ids, file)
        os._exit(0)
    children.append(pid)
ids += store(200)
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert outbox.flush(60)
outbox.close()
with open("ids-parent", "w") as file:
    json.dump(ids, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pure_python", ["", "1"], ids=["compiled", "Python"])
@pytest.mark.parametrize("first_use", ["before", "after"])
@pytest.mark.parametrize("settings", [{}, {"durability": "power"}, {"deliver": "process"}], ids=str)
def test_events_of_children_forked_in_c_have_their_own_ids_and_arrive_once(
    tmp_path: Path, pure_python: str, first_use: str, settings: dict[str, str]
) -> None:
    """Whether the outbox was used before the fork or not; and the counts balance."""
    environ = os.environ | {"PILLARBOX_PURE_PYTHON": pure_python}
    command = [sys.executable, "-c", FORK, first_use, json.dumps(settings)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ids = [event_id for path in tmp_path.glob("ids-*") for event_id in json.loads(path.read_text())]
    assert len(ids) == 800 + 50 * (first_use == "before")
    with sqlite3.connect(tmp_path / "events.db") as database:
        arrived = [row[0] for row in database.execute("SELECT event_id FROM tracking_event")]
    assert Counter(arrived) == Counter(set(ids)) == Counter(ids)
    verify = [sys.executable, "-m", "pillarbox", "verify", "-d", "box"]
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True, timeout=60, check=False).returncode == 0


IDLE_CHILD = """
import ctypes, json, os, signal, sys
import pillarbox

outbox = pillarbox.Outbox("box", flush_interval=60, **json.loads(sys.argv[1]))
assert outbox.enqueue(pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="s"))
reader, writer = os.pipe()
child = ctypes.PyDLL(None).fork()
if child == 0:
    os.write(writer, b"-")
    signal.pause()
os.read(reader, 1)  # the child runs, and so it has closed the files of its parent
print(child, outbox.flush(20) if sys.argv[2] == "flush" else "", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def idle_child(folder: Path, pure_python: str, sinks: dict[str, object], *, flush: bool) -> Iterator[str]:
    """A process stores an event, forks a child in C, and is killed. The child waits. Yields what `flush` returned."""
    environ = os.environ | {"PILLARBOX_PURE_PYTHON": pure_python}
    command = [sys.executable, "-c", IDLE_CHILD, json.dumps(sinks), "flush" if flush else ""]
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child, _, answer = process.stdout.readline().strip().partition(" ")
        process.wait(60)
    try:
        yield answer
    finally:
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("pure_python", ["", "1"], ids=["compiled", "Python"])
@pytest.mark.parametrize(
    "sinks",
    [{"sink": "sqlite:///one.db"}, {"sinks": {"a": "sqlite:///one.db", "b": "sqlite:///two.db"}}],
    ids=["sink", "sinks"],
)
def test_a_child_forked_in_c_that_never_uses_the_outbox_holds_up_no_delivery(
    tmp_path: Path, pure_python: str, sinks: dict[str, object]
) -> None:
    """A worker of uWSGI may get no request for hours."""
    with idle_child(tmp_path, pure_python, sinks, flush=True) as answer:
        assert answer == "True"


@pytest.mark.skipif(not COMPILED, reason="without the extension nothing runs in such a child")
def test_a_child_forked_in_c_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    """What the parent stored is recovered and delivered by the next process."""
    with (
        idle_child(tmp_path, "", {"sink": "sqlite:///one.db"}, flush=False),
        Outbox(tmp_path / "box", sink=f"sqlite:///{tmp_path}/one.db") as outbox,
    ):
        wait_until(lambda: outbox.stats().delivered == 1, 20)


def test_nothing_gives_up_the_gil_before_the_interpreter_is_reset() -> None:
    """The threads that waited for it do not exist in the child, so none of them would give it back."""
    turns, interval = itertools.count(), sys.getswitchinterval()
    is_over = threading.Event()

    def take_turns() -> None:
        # wait: the thread gives up the GIL, and asks for it again at once
        while not is_over.wait(0.0001):
            next(turns)

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        sys.setswitchinterval(60)  # from now on nobody is made to give it up
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
        before = next(turns)
        for _ in range(1000):
            forks._is_only_thread()
        assert next(turns) == before + 1
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        thread.join()
