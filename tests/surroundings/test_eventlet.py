"""eventlet patches threads, locks, sockets and more of the standard library. Delivery uses those of the system."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.surroundings.server import check_delivery, free_port

pytestmark = pytest.mark.skipif(
    find_spec("eventlet") is None, reason="eventlet is not installed"
)  # an import warns of each fork

PATCH = "import eventlet; eventlet.monkey_patch()"
SERVE = "import eventlet.wsgi; eventlet.wsgi.server(eventlet.listen(('127.0.0.1', int(sys.argv[1]))), application, log_output=False)"
USE = "from tests.surroundings.wsgi_app import application"
PROGRAMS = {
    "patched first": f"import sys; {PATCH}\n{USE}\n{SERVE}",
    "patched after the import": f"import sys, pillarbox; {PATCH}\n{USE}\n{SERVE}",
    "patched after the first event": f"import os, sys; os.environ['USE_AT_IMPORT'] = '1'\n{USE}\n{PATCH}\n{SERVE}",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_each_event_of_an_eventlet_server_arrives_once_at_each_sink(tmp_path: Path, program: str, deliver: str) -> None:
    """It makes no difference when the standard library was patched."""
    port = free_port()
    check_delivery([sys.executable, "-c", program, str(port)], port, tmp_path, deliver=deliver)


LOG = """
import sys, logging, pillarbox, threading
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("%(threadName)s %(message)s"))
logging.basicConfig(level=logging.INFO, handlers=[handler])

def event(number):
    return pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id=str(number))

class SlowHandler(logging.Handler):
    \"\"\"Lets other greenlets run while it holds its lock, as one that sends records to a server does.\"\"\"

    def emit(self, record):
        eventlet.sleep(0.02)
        threads.add(threading.get_ident())

threads = set()
logging.getLogger().addHandler(SlowHandler())
outbox = pillarbox.Outbox("box", sink="http://127.0.0.1:9/", backoff_max=0.1, flush_interval=0.05)

def log_much():
    for number in range(20):
        logging.warning("application %d", number)

greenlets = [eventlet.spawn(log_much) for _ in range(4)]
for number in range(20):
    outbox.enqueue(event(number))
    eventlet.sleep(0.02)
for greenlet in greenlets:
    greenlet.wait()
assert not outbox.flush(1.0)
outbox.close(0.5)
eventlet.sleep(0.1)
"""


def test_log_lines_of_delivery_are_written_where_greenlets_may_wait_for_the_handler(tmp_path: Path) -> None:
    """The lock of a handler works among greenlets only: a thread of the system would wait for it forever."""
    program = f"{PATCH}\n{LOG}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("application") == 80
    assert "pillarbox-delivery http://127.0.0.1:9/: waiting" in done.stdout
    assert "different thread" not in done.stdout + done.stderr
