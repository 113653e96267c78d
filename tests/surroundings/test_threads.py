"""Properties of the threads of Pillarbox in any environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sinks.http_server import Server

IMPORTS = """
import sys, threading
import pillarbox

outbox = pillarbox.Outbox("box", flush_interval=0.05, sinks={"table": "sqlite:///events.db", "web": sys.argv[1]}, deliver=sys.argv[2])
events = [pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="s") for _ in range(10)]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            print(threading.current_thread().name, "imports", name)

sys.meta_path.insert(0, Finder())
for event in events:
    assert outbox.enqueue(event)
assert outbox.flush(30)
outbox.close()
"""


@pytest.mark.parametrize("deliver", ["thread", "process"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_thread_of_pillarbox_imports_a_module(tmp_path: Path, deliver: str, host: str) -> None:
    """If the process forks or gevent patches meanwhile, the import lock would never be released."""
    with Server() as server:
        url = server.url().replace("127.0.0.1", host)
        command = [sys.executable, "-c", IMPORTS, url, deliver]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


TIMEOUT = """
import socket; socket.setdefaulttimeout(0.2)
import pillarbox

outbox = pillarbox.Outbox("box", flush_interval=0.05, sink="sqlite:///events.db", deliver="process")
event = lambda: pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="s")
assert outbox.enqueue(event()) and outbox.flush(30)
pid = outbox._link.runner._child.pid
outbox._link.runner._stopping.wait(1)
assert outbox.enqueue(event()) and outbox.flush(30)
assert outbox._link.runner._child.pid == pid
outbox.close()
"""


def test_the_default_timeout_of_sockets_does_not_end_the_child_process(tmp_path: Path) -> None:
    """It would make both ends of the socket to the child non-blocking."""
    done = subprocess.run(
        [sys.executable, "-c", TIMEOUT], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
