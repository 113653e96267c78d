"""gevent patches threads, locks, sockets and more of the standard library. Delivery uses those of the system."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.surroundings.server import check_delivery, free_port

pytestmark = pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed")

PATCH = "from gevent import monkey; monkey.patch_all()"
SERVE = (
    "from gevent.pywsgi import WSGIServer; WSGIServer(('127.0.0.1', int(sys.argv[1])), application, log=None).serve_forever()"
)
USE = "from tests.surroundings.wsgi_app import application"
PROGRAMS = {
    "patched first": f"import sys; {PATCH}\n{USE}\n{SERVE}",
    "patched after the import": f"import sys, pillarbox; {PATCH}\n{USE}\n{SERVE}",
    "patched after the first event": f"import os, sys; os.environ['USE_AT_IMPORT'] = '1'\n{USE}\n{PATCH}\n{SERVE}",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_each_event_of_a_gevent_server_arrives_once_at_each_sink(tmp_path: Path, program: str, deliver: str) -> None:
    """It makes no difference when the standard library was patched. Coroutines of the application run meanwhile."""
    port = free_port()
    log = check_delivery([sys.executable, "-c", program, str(port)], port, tmp_path, deliver=deliver)
    assert "Traceback" not in log


def run_program(program: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


WAIT = """
import gevent, pillarbox, socket

def event():
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="s")

silent = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{{silent.getsockname()[1]}}/"
outbox = pillarbox.Outbox("box", sink=url, when_full="block", block_timeout=1.0, max_bytes=4000)
turns = []

def count_turns():
    while True:
        turns.append(1)
        gevent.sleep(0.01)

counter = gevent.spawn(count_turns)
{wait}
assert len(turns) > 20, len(turns)
counter.kill()
outbox.close(0.5)
"""
WAITS = {
    "flush": "outbox.enqueue(event()); assert not gevent.spawn(outbox.flush, 1.0).get()",
    "close": "outbox.enqueue(event()); gevent.spawn(outbox.close, 1.0).get()",
    "a full outbox": "while not (outcome := gevent.spawn(outbox.enqueue, event()).get()) is None and outcome: pass",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_other_greenlets_run_while_one_waits(tmp_path: Path, wait: str) -> None:
    """The greenlet waits for delivery, for the end, or for room."""
    run_program(f"{PATCH}\n{WAIT.format(wait=wait)}", tmp_path)


HOOKS = """
import gevent, pillarbox

def event(number):
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id=str(number))

def before_send(event):
    gevent.sleep(0.01)
    called.append(event.scope_id)
    return event

called = []
outbox = pillarbox.Outbox("box", before_send=before_send)
gevent.joinall([gevent.spawn(outbox.enqueue, event(number)) for number in range(20)], raise_error=True)
assert len(called) == 20, called
outbox.close()
"""


def test_before_send_is_called_for_each_event_although_it_lets_other_greenlets_run(tmp_path: Path) -> None:
    """Whether a hook runs is recorded for the greenlet, not for its thread."""
    run_program(f"{PATCH}\n{HOOKS}", tmp_path)


FORK = """
import os, gevent, pillarbox, sys

def event(number):
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id=str(number))

outbox = pillarbox.Outbox("box", sink="sqlite:///events.db", flush_interval=0.1, **{settings})
assert outbox.enqueue(event(0)) and outbox.flush(20)
pid = os.fork()
if pid == 0:
    assert outbox.enqueue(event(1)) and outbox.flush(20)
    outbox.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert outbox.enqueue(event(2)) and outbox.flush(20)
outbox.close()
"""


@pytest.mark.parametrize("settings", [{}, {"deliver": "process"}], ids=str)
def test_a_child_forked_under_gevent_delivers(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Like a worker of gunicorn, whose master loaded the application."""
    run_program(f"{PATCH}\n{FORK.format(settings=settings)}", tmp_path)
