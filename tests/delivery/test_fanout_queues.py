"""Queues of several sinks: full disks, several processes, and sinks that are added, renamed or removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.delivery.lease import read_heartbeat
from tests.conftest import event, wait_until
from tests.delivery.fanout_setup import (
    balanced_totals,
    batch_files,
    enqueue_events,
    enqueue_files,
    event_ids,
    open_directory,
    received_counts,
    stored_event_ids,
)
from tests.sinks.http_server import HANG, CannedResponse, Request, Server, closed_port_url

ROOT = Path(__file__).parents[2]
DELIVER = "import sys, threading, json; from pillarbox import Outbox\n"
HOLD = """
outbox = Outbox(sys.argv[1], sinks=json.loads(sys.argv[2]), flush_interval=0.05, backoff_max=0.05)
outbox.__enter__()
print("up", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def database(box: Path, name: str) -> str:
    return f"sqlite:///{box.parent}/{name}.db"


def two(box: Path) -> dict[str, str]:
    return {"live": database(box, "live"), "warehouse": database(box, "warehouse")}


def pillarbox(box: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pillarbox", *words, "-d", str(box)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def enqueue_until_evicted(outbox: Outbox, first: int, least: int, may_continue: Callable[[], bool] = lambda: True) -> list[str]:
    """Enqueue files of ten events while `goes_on` is true, until so many events were evicted; returns the accepted ids."""
    accepted = []
    for number in range(first, 100_000):
        if outbox.enqueue(event(number)):
            accepted.append(f"e-{number:06d}")
        if number % 10 == 0:
            assert outbox._sealer.seal_now("manual", 60)
            wait_until(may_continue)
            if outbox.stats().evicted >= least:
                return accepted
    raise AssertionError("nothing is given up")


def test_an_eviction_deletes_a_file_from_all_queues(box: Path) -> None:
    """The directory stays below its limit, the healthy sink gets every event, and every ledger has the evictions."""
    sinks = {"live": closed_port_url(), "slow": closed_port_url(), "warehouse": database(box, "warehouse")}
    with Outbox(str(box), sinks=sinks, when_full="drop_oldest", max_bytes=30_000, flush_interval=0.05) as outbox:
        accepted = enqueue_until_evicted(
            outbox, 0, 200, lambda: not batch_files(box) and not batch_files(box / "sink-warehouse")
        )
        wait_until(lambda: stored_event_ids(box.parent / "warehouse.db") == accepted)
        wait_until(
            lambda: (
                not batch_files(box) and outbox.stats().pending_bytes == open_directory(box).disk_usage().pending_bytes < 30_000
            )
        )
    evicted = outbox.stats().evicted
    assert batch_files(box / "sink-live") == batch_files(box / "sink-slow")
    rows = balanced_totals(box)
    found = {name: (rows[name].evicted, rows[name].pending) for name in sinks}
    left = len(accepted) - evicted
    assert found == {"live": (evicted, left), "slow": (evicted, left), "warehouse": (0, 0)}


def test_a_file_that_one_sink_is_sending_is_not_evicted(box: Path) -> None:
    """However many events come after it."""
    asked: list[Request] = []

    def hang(request: Request) -> CannedResponse:
        asked.append(request)
        return HANG

    with Server(hang) as server:
        sinks = {"live": server.url("#timeout=600"), "slow": closed_port_url()}
        common: dict[str, Any] = {"when_full": "drop_oldest", "max_bytes": 10_000, "flush_interval": 0.05}
        with Outbox(str(box), sinks=sinks, call_timeout=600, **common) as outbox:
            enqueue_events(outbox, 1)
            wait_until(lambda: bool(asked))
            (sent,) = batch_files(box / "sink-live")
            enqueue_until_evicted(outbox, 1, 50)
            assert sent in batch_files(box / "sink-live")
            assert sent in batch_files(box / "sink-slow")
            outbox.close(0.1)
    rows = balanced_totals(box)
    evicted_before_fan_out = rows[""].evicted
    assert rows["live"].evicted == rows["slow"].evicted == outbox.stats().evicted - evicted_before_fan_out


@pytest.fixture
def other_process(box: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that fans out and delivers to both sinks, until it is killed."""
    command = [sys.executable, "-c", DELIVER + HOLD, str(box), json.dumps(two(box))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield process
    process.kill()
    process.communicate()


def test_after_the_delivering_process_is_killed_another_takes_over(box: Path, other_process: subprocess.Popen[str]) -> None:
    """It delivers what was fanned out and what was not, within about a second and without a notification."""
    wait_until(lambda: (beat := read_heartbeat(open_directory(box))) is not None and beat.pid == other_process.pid)
    with Outbox(str(box), sinks=two(box), flush_interval=0.05, batch_size=10) as outbox:
        enqueue_events(outbox, 200)
        assert outbox.flush(60)
        wait_until(lambda: {sink.state.name for sink in outbox.stats().sinks.values()} == {"standby"})
        assert outbox.stats().delivered == 0
        other_process.send_signal(signal.SIGSTOP)  # it keeps its locks and does nothing
        os.waitpid(other_process.pid, os.WUNTRACED)
        enqueue_events(outbox, 200, 200)
        assert not outbox.flush(0.2)
        os.kill(other_process.pid, signal.SIGKILL)
        other_process.wait()
        wait_until(lambda: not open_directory(box).waiting_batch_ids())
        assert outbox.flush(60)
        assert {name: sink.delivered for name, sink in outbox.stats().sinks.items()} == {"live": 200, "warehouse": 200}
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(400)
    balanced_totals(box)


def test_a_sink_that_is_added_later_gets_only_later_batches(box: Path) -> None:
    """Pending batches of another sink are not for it."""
    with Outbox(str(box), sinks={"live": closed_port_url()}) as outbox:
        enqueue_files(outbox, 3)
        wait_until(lambda: not batch_files(box) and len(batch_files(box / "sink-live")) == 3)
    with Outbox(str(box), sinks=two(box)) as outbox:
        wait_until((box / "sink-warehouse").exists)
        enqueue_files(outbox, 2, first=30)
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "live.db") == event_ids(50)
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(20, 30)
    balanced_totals(box)


def test_a_sink_added_with_the_command_begins_with_the_backlog(box: Path) -> None:
    """The batches in another sink's queue and those not fanned out yet; both ledgers have them."""
    with Outbox(str(box), sinks={"live": closed_port_url()}) as outbox:
        enqueue_files(outbox, 3)
        wait_until(lambda: not batch_files(box) and len(batch_files(box / "sink-live")) == 3)
    with Outbox(str(box)) as outbox:
        enqueue_files(outbox, 2, first=30)
    done = pillarbox(box, "sinks", "add", "warehouse")
    assert (done.returncode, done.stdout) == (
        0,
        "warehouse will start with the current backlog; deliver to it with --sink warehouse=URL\n",
    )
    with Outbox(str(box), sinks=two(box)) as outbox:
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(50)
    balanced_totals(box)


def test_several_sinks_that_replace_a_single_one_begin_with_the_backlog(box: Path) -> None:
    """The directory had a single sink before."""
    with Outbox(str(box), sink=closed_port_url()) as outbox:
        enqueue_files(outbox, 3)
    with Outbox(str(box), sinks=two(box)) as outbox:
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(30)
    balanced_totals(box)


def test_a_single_sink_does_not_deliver_existing_queues_and_reports_them(box: Path) -> None:
    """New batches are not delivered either. With several sinks again, delivery continues."""
    with Outbox(str(box), sinks={"live": closed_port_url(), "warehouse": closed_port_url()}) as outbox:
        enqueue_files(outbox, 2)
        wait_until(lambda: not batch_files(box) and len(batch_files(box / "sink-live")) == 2)
    with Outbox(str(box), sink=database(box, "single")) as outbox:
        enqueue_files(outbox, 1, first=20)
        wait_until(lambda: outbox.stats().state.name == "stopped")
        assert outbox.stats().state.reason == (
            "the directory has queues of several sinks (live, warehouse): "
            "name all of them in sinks, or remove one with pillarbox sinks remove NAME"
        )
    assert not (box.parent / "single.db").exists()
    with Outbox(str(box), sinks=two(box)) as outbox:
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "live.db") == stored_event_ids(box.parent / "warehouse.db") == event_ids(30)


def test_a_queue_without_a_configured_sink_is_reported(box: Path) -> None:
    """It fills up. The state is degraded and names the command that removes the queue; the other sinks are delivered."""
    with Outbox(str(box), sinks=two(box)) as outbox:
        enqueue_files(outbox, 1)
        assert outbox.flush(60)
    with Outbox(str(box), sinks={"live": database(box, "live")}, flush_interval=0.05) as outbox:
        enqueue_files(outbox, 2, first=10)
        wait_until(lambda: outbox.stats().sinks["live"].delivered == 20)
        wait_until(lambda: outbox.stats().state.name == "degraded")
        assert "pillarbox sinks remove warehouse" in outbox.stats().state.reason
        assert "pillarbox sinks remove warehouse" in outbox.stats().last_error
        assert not outbox.flush(0.2)  # its batches are not delivered
    assert len(batch_files(box / "sink-warehouse")) == 2
    removed = pillarbox(box, "sinks", "remove", "warehouse", "--discard")
    assert (removed.returncode, removed.stdout) == (0, "removed warehouse; 2 batches deleted\n")
    with Outbox(str(box), sinks={"live": database(box, "live")}) as outbox:
        enqueue_files(outbox, 1, first=30)
        assert outbox.flush(60)
        assert outbox.stats().state.name in ("idle", "draining")
    assert stored_event_ids(box.parent / "live.db") == event_ids(40)
    balanced_totals(box)


def test_a_renamed_queue_belongs_to_the_new_sink(box: Path) -> None:
    """With its pending batches."""
    with Outbox(str(box), sinks={"live": closed_port_url(), "warehouse": database(box, "warehouse")}) as outbox:
        enqueue_files(outbox, 3)
        wait_until(lambda: outbox.stats().sinks["warehouse"].delivered == 30)
    assert pillarbox(box, "sinks", "rename", "live", "fresh").stdout == "renamed live to fresh\n"
    with Outbox(str(box), sinks={"fresh": database(box, "fresh"), "warehouse": database(box, "warehouse")}) as outbox:
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "fresh.db") == event_ids(30)
    balanced_totals(box)


@pytest.mark.parametrize("change", [("remove", "live"), ("rename", "live", "fresh")])
def test_a_sink_may_have_the_name_of_an_earlier_one(box: Path, change: tuple[str, ...]) -> None:
    """Batches that were fanned out to the old sink are not missing in the counts of the new one."""
    sinks = {"live": database(box, "live"), "warehouse": database(box, "warehouse")}
    with Outbox(str(box), sinks=sinks) as outbox:
        enqueue_files(outbox, 1)
        assert outbox.flush(60)
    assert pillarbox(box, "sinks", *change).returncode == 0
    with Outbox(str(box), sinks=sinks | {name: database(box, name) for name in change[2:]}) as outbox:
        wait_until((box / "sink-live").exists)
        enqueue_files(outbox, 1, first=10)
        assert outbox.flush(60)
    assert balanced_totals(box)["live"].delivered == 10


def test_the_batches_of_the_last_queue_return_to_a_single_sink(box: Path) -> None:
    """It then delivers them."""
    with Outbox(str(box), sinks={"live": closed_port_url()}) as outbox:
        enqueue_files(outbox, 3)
        wait_until(lambda: not batch_files(box) and len(batch_files(box / "sink-live")) == 3)
    assert (
        pillarbox(box, "sinks", "remove", "live", "--return-batches").stdout
        == "removed live; 3 batches returned to the outbox\n"
    )
    assert not (box / "sink-live").exists()
    with Outbox(str(box), sink=database(box, "single")) as outbox:
        assert outbox.flush(60)
    assert stored_event_ids(box.parent / "single.db") == event_ids(30)
    balanced_totals(box)


def test_a_forked_child_stores_and_delivers_to_all_sinks(box: Path) -> None:
    """The parent's batches stay with the parent, and no sink gets an event twice."""
    script = DELIVER + (
        "import os; from tests.conftest import event\n"
        "outbox = Outbox(sys.argv[1], sinks=json.loads(sys.argv[2]), flush_interval=0.05)\n"
        "[outbox.enqueue(event(number)) for number in range(50)]\n"
        "assert outbox.flush(60)\n"
        "child = os.fork()\n"
        "[outbox.enqueue(event(number)) for number in (range(100, 150) if child else range(50, 100))]\n"
        "if not child:\n"
        "    print(outbox.flush(60), flush=True); outbox.close(); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(outbox.flush(60), flush=True)\n"
        "outbox.close()\n"
    )
    with Server() as server:
        sinks = {"live": server.url(), "warehouse": database(box, "warehouse")}
        command = [sys.executable, "-c", script, str(box), json.dumps(sinks)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        assert done.stdout.split() == ["True", "True"], done.stderr
        assert received_counts(server.requests) == dict.fromkeys(event_ids(150), 1)
    assert stored_event_ids(box.parent / "warehouse.db") == event_ids(150)
    balanced_totals(box)
