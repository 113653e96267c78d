"""A log line names the right problem: that of the event, the disk or the sink."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox import Outbox
from tests.conftest import event, wait_until
from tests.delivery.fanout_setup import enqueue_files
from tests.sinks.http_server import closed_port_url

FORK_SCRIPT = """
import ctypes, logging, os, sys
from pillarbox import Outbox, TrackingEvent
from pillarbox.sinks import make_sink
folder, in_c = sys.argv[1], sys.argv[2] == "c"
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(process)d %(message)s")
outbox = Outbox(f"{folder}/box", sink=make_sink(f"sqlite:///{folder}/x.db", TrackingEvent))
def make():
    return TrackingEvent(event_key="k", scope_kind="Site", scope_id="s")
assert outbox.enqueue(make())
assert outbox.flush(60)  # no other thread is logging when the process forks
pid = ctypes.PyDLL(None).fork() if in_c else os.fork()
if not pid:
    outcomes = [outbox.enqueue(make()), *outbox.enqueue_many([make()]), outbox.enqueue(make(), durability="power")]
    assert all(outcomes)
    assert not any(outbox.stats().dropped.values())
    outbox.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
outbox.close()
"""


@pytest.mark.parametrize("fork", ["python", "c"])
def test_no_line_says_that_an_accepted_event_was_dropped_after_a_fork_with_a_sink_object(tmp_path: Path, fork: str) -> None:
    """The child says that the sink cannot be used, and stores its events."""
    command = [sys.executable, "-c", FORK_SCRIPT, str(tmp_path), fork]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "a sink object cannot be used after fork; this process only stores events" in completed.stdout
    assert "drop" not in completed.stdout
    assert "invalid" not in completed.stdout


def test_an_outbox_that_cannot_start_says_what_is_wrong_with_its_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the directory became a file, the line does not say that it cannot be listed."""
    box = tmp_path / "box"
    outbox = Outbox(str(box))
    box.rmdir()
    box.write_bytes(b"")
    assert outbox.enqueue(event()).reason == "io_error"  # type: ignore[union-attr]  # mypy: it is `Dropped`
    entry, *others = [entry for entry in caplog.records if entry.levelno >= logging.ERROR]
    assert "drops events until it can start" in entry.message
    assert "listed" not in entry.message
    assert [other.message.partition("could not be written")[0][-11:] for other in others] == ["the ledger "]
    assert "box" in entry.message.partition("start: ")[2]


def test_the_end_of_a_problem_with_fanning_out_names_that_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A queue without a delivery worker filled up and was emptied. All batches were fanned out the whole time."""
    caplog.set_level(logging.INFO, "pillarbox")
    box = tmp_path / "box"
    with Outbox(str(box), sinks={"a": f"sqlite:///{tmp_path}/a.db", "b": closed_port_url()}) as outbox:
        enqueue_files(outbox, 1)
        wait_until(lambda: any((box / "sink-b").glob("sealed-*")) if (box / "sink-b").exists() else False)
    caplog.clear()
    with Outbox(str(box), sinks={"a": f"sqlite:///{tmp_path}/a.db"}) as outbox:
        outbox.flush(0)
        wait_until(lambda: any("filling up" in entry.message for entry in caplog.records))
        for file in (box / "sink-b").glob("sealed-*"):
            file.unlink()
        wait_until(lambda: any(": over after" in entry.message for entry in caplog.records))
    begin, end = [entry for entry in caplog.records if "filling up" in entry.message]
    assert begin.levelname == end.levelname == "ERROR"
    assert not [entry for entry in caplog.records if "fanned out again" in entry.message]
