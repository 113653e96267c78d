"""Several sinks with delivery by other processes, each at the speed of its destination."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pillarbox import ConfigurationError, Outbox
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.testing import RecordingSink
from tests.cli.test_commands import CLEAN, PILLARBOX
from tests.conftest import wait_until
from tests.delivery.fanout_setup import (
    BUSY_RESPONSE,
    balanced_totals,
    batch_files,
    enqueue_files,
    event_ids,
    open_directory,
    received_counts,
    stored_event_ids,
)
from tests.sinks.http_server import CannedResponse, Server, always, closed_port_url


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def database(box: Path, name: str) -> str:
    return f"sqlite:///{box.parent}/{name}.db"


def test_a_child_delivers_to_all_sinks_and_reports_each(box: Path) -> None:
    """A sink that is down does not delay the others. If the child is killed, the next one continues for both."""
    with Server(always(BUSY_RESPONSE)) as server:
        sinks = {"live": server.url(), "warehouse": database(box, "warehouse")}
        with Outbox(str(box), sinks=sinks, deliver="process", flush_interval=0.05, backoff_max=0.05) as outbox:
            enqueue_files(outbox, 5)
            wait_until(lambda: outbox.stats().sinks["warehouse"].delivered == 50)
            wait_until(lambda: outbox.stats().sinks["live"].state.name == "waiting")
            assert outbox.stats().state.reason.startswith("live: ")
            assert len(batch_files(box / "sink-live")) == 5
            wait_until(lambda: outbox.stats().pending_files == 5)
            beat = read_heartbeat(open_directory(box))
            assert beat is not None
            assert beat.pid != os.getpid()
            os.kill(beat.pid, signal.SIGKILL)
            server.respond = always(CannedResponse())
            enqueue_files(outbox, 5, first=50)
            assert outbox.flush(60)
            wait_until(lambda: outbox.stats().sinks["live"].delivered >= 90)
            assert {*received_counts(server.requests)} == {*event_ids(100)}
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(100)
    balanced_totals(box)


def test_a_process_that_only_stores_sees_the_state_of_each_sink(box: Path) -> None:
    """`deliver="external"`, with `pillarbox deliver` running."""
    with Outbox(str(box), deliver="external", flush_interval=0.05) as outbox:
        enqueue_files(outbox, 2)
        assert outbox.stats().sinks == {}
        options = ["--sink", f"live={closed_port_url()}", "--sink", "warehouse=sqlite:///w.db"]
        process = subprocess.Popen([*PILLARBOX, "deliver", "-d", "box", *options, "-q"], cwd=box.parent, env=CLEAN)
        try:
            wait_until(lambda: not batch_files(box) and not batch_files(box / "sink-warehouse"))
            wait_until(lambda: outbox.stats().sinks["live"].state.name == "waiting")
            wait_until(lambda: outbox.stats().sinks["warehouse"].state.name == "idle")
            assert outbox.stats().state.reason.startswith("live: cannot connect to ")
            assert not outbox.flush(0.2)
        finally:
            process.kill()
            process.wait()
    assert stored_event_ids(box.parent / "w.db") == event_ids(20)


def test_sink_objects_are_rejected_if_another_process_delivers(box: Path) -> None:
    """Also as one of several sinks."""
    with pytest.raises(ConfigurationError, match="a Sink object cannot be used in another process"):
        Outbox(str(box), sinks={"mine": RecordingSink(), "warehouse": database(box, "w")}, deliver="process")


def test_different_processes_can_deliver_different_queues(box: Path) -> None:
    """One process fans out and two deliver; none needs both locks."""
    script = (
        "import sys, threading; from pillarbox import Outbox\n"
        "outbox = Outbox(sys.argv[1], sink=sys.argv[2], flush_interval=0.05); outbox.__enter__()\n"
        "print('up', flush=True); threading.Event().wait()\n"
    )
    sinks = {"live": database(box, "live"), "warehouse": database(box, "warehouse")}
    with Outbox(str(box), sinks=sinks) as outbox:
        enqueue_files(outbox, 1)
        assert outbox.flush(60)
    command = [sys.executable, "-c", script, str(box / "sink-live"), sinks["live"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        wait_until(lambda: (beat := read_heartbeat(open_directory(box).queue("live"))) is not None and beat.pid == process.pid)
        with Outbox(str(box), sinks=sinks) as outbox:
            enqueue_files(outbox, 3, first=10)
            assert outbox.flush(60)
            stats = outbox.stats()
            assert (stats.sinks["live"].delivered, stats.sinks["warehouse"].delivered) == (0, 30)
            wait_until(lambda: outbox.stats().sinks["live"].state.name == "standby")
    finally:
        process.kill()
        process.communicate()
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(40)
    balanced_totals(box)


def test_each_sink_is_paced_by_itself(box: Path) -> None:
    """After an outage of one sink its drain is paced, and the other is delivered at full speed."""
    down = threading.Event()
    down.set()
    with Server() as server:
        accept = server.respond
        server.respond = lambda request: BUSY_RESPONSE if down.is_set() else accept(request)
        sinks = {"live": server.url(), "warehouse": database(box, "warehouse")}
        with Outbox(str(box), sinks=sinks, flush_interval=0.05, backoff_max=0.05, max_rate=400) as outbox:
            enqueue_files(outbox, 3)
            wait_until(lambda: outbox.stats().sinks["live"].failed_flushes > 3)
            assert {name: sink.rate for name, sink in outbox.stats().sinks.items()}["warehouse"] == 400
            wait_until(lambda: (outbox.stats().sinks["live"].rate or 400) < 400)
            wait_until(lambda: outbox.stats().sinks["warehouse"].delivered == 30)
            down.clear()
            assert outbox.flush(120)  # after a slow answer the first pauses are long
    assert received_counts(server.requests)[event_ids(1)[0]] == 1
    balanced_totals(box)
