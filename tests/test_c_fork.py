"""A fork that C code makes, as uWSGI does, calls no hook of Python's: it is noticed at the next use of the outbox."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

FORK = """
import asyncio, ctypes, json, os, sys
import pillarbox

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
