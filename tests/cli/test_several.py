"""The operators' commands on a directory with several sinks, one of which is down: real processes beside a real delivery worker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox.admin.status import read_status
from pillarbox.clock import SystemClock
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock
from tests.cli.test_commands import CLEAN, NO_SEAL_BY_AGE, PILLARBOX, delivered_event_ids, event_line, run
from tests.cli.test_doctor import LIMITS, Findings, check_directory, doctor, failed_checks
from tests.cli.test_status import output_on_terminal, without_escape_codes
from tests.conftest import wait_until
from tests.sinks.http_server import closed_port_url

EVENTS = 20
WAREHOUSE = "warehouse=sqlite:///warehouse.db"
# Runs a command as on a file system without hard links.
WITHOUT_LINKS = """
import errno
from pillarbox.cli.main import run
from pillarbox.store.os_filesystem import OsFilesystem
def reject_link(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")
OsFilesystem.link = staticmethod(reject_link)
run()
"""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An outbox directory with one pending batch."""
    enqueued = run("enqueue", "-d", "box", cwd=tmp_path, stdin=b"".join(map(event_line, range(EVENTS))), environ=NO_SEAL_BY_AGE)
    assert enqueued.returncode == 0
    return tmp_path / "box"


def open_directory(box: Path) -> Directory:
    return Directory(str(box), OsFilesystem(), SystemClock())


@contextlib.contextmanager
def delivering(box: Path, unreachable_url: str) -> Iterator[None]:
    """Deliver to two sinks: the warehouse has everything, and `live` is down."""
    command = [*PILLARBOX, "deliver", "-q", "-d", "box", "--sink", f"live={unreachable_url}", "--sink", WAREHOUSE]
    process = subprocess.Popen(command, cwd=box.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    try:
        wait_until(lambda: heartbeats(box) == {"live": ("waiting", 0), "warehouse": ("idle", EVENTS)})
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


def heartbeats(box: Path) -> dict[str, tuple[str, int]]:
    """The state and the number of delivered events in the latest heartbeat of each worker."""
    sinks = read_status(open_directory(box), SystemClock(), "process").sinks
    heartbeats_by_sink = {sink.name: sink.heartbeat for sink in sinks}
    return {
        name: (heartbeat.state.name, heartbeat.delivered)
        for name, heartbeat in heartbeats_by_sink.items()
        if heartbeat is not None
    }


def batch_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if layout.kind_of(name) is layout.Kind.SEALED]


def sinks_by_name(status: dict[str, Any]) -> dict[str, Any]:
    return {sink["name"]: sink for sink in status["sinks"]}


def test_status_shows_each_sink_and_flush_names_the_one_that_is_down(box: Path) -> None:
    """As text, as JSON, as a line of --watch, and on a terminal of 80 columns. The exit code of flush is 1."""
    unreachable_url = closed_port_url()
    with delivering(box, unreachable_url):
        status = json.loads(run("status", "-d", "box", "--json", cwd=box.parent).stdout)
        sinks = sinks_by_name(status)
        assert (sinks["live"]["backlog_files"], sinks["warehouse"]["backlog_files"]) == (1, 0)
        assert (status["pending_files"], sinks["live"]["backlog_bytes"]) == (1, status["pending_bytes"])
        assert sinks["warehouse"]["heartbeat"]["delivered"] == EVENTS
        assert sinks["live"]["heartbeat"]["state"]["name"] == "waiting"
        text = run("status", "-d", "box", cwd=box.parent).stdout.decode()
        assert re.search(r"^sink live +1 file, [\d,]+ bytes pending; process \d+, sink .*waiting: ", text, re.MULTILINE)
        assert re.search(
            r"^sink warehouse +0 files, 0 bytes pending; process \d+, sink .*(: |last state )idle; 20 events delivered",
            text,
            re.MULTILINE,
        )
        watch = ("status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1")
        samples = run(*watch, "--json", cwd=box.parent).stdout.splitlines()
        assert [set(json.loads(sample)["rates"]["sinks"]) for sample in samples] == [{"live", "warehouse"}] * 2
        assert b"live: 1 file pending, oldest" in run(*watch, cwd=box.parent).stdout
        code, terminal_output = output_on_terminal(box.parent, *watch)
        screen = without_escape_codes(terminal_output).split("\r\n")
        assert (code, max(map(len, screen)) <= 80) == (0, True)
        assert {"live", "warehouse"} <= {line.split()[0] for line in screen if line.strip()}
        completed = run("flush", "-d", "box", "--timeout", "0.3", "--json", cwd=box.parent)
        flushed = json.loads(completed.stdout)
        assert (completed.returncode, flushed["pending_batches"], flushed["pending_sinks"]) == (1, 1, ["live"])
        assert "; live: process" in flushed["reason"]
        assert "warehouse" not in flushed["reason"]
    assert delivered_event_ids(box.parent / "warehouse.db") == [f"e-{number:06d}" for number in range(EVENTS)]


def test_doctor_checks_every_sink_and_knows_all_queues(box: Path) -> None:
    """It names the sink that is down, and for a queue without a sink the command that removes it."""
    unreachable_url = closed_port_url()
    with delivering(box, unreachable_url):
        sinks = ("--sink", f"live={unreachable_url}", "--sink", WAREHOUSE)
        code, findings = doctor("-d", "box", *sinks, "--timeout", "60", cwd=box.parent)
        assert (code, failed_checks(findings)) == (1, {"delivery", "destination"})
        assert {text.partition(":")[0]: ok for ok, text in findings["destination"]} == {"live": False, "warehouse": True}
        assert findings["files"] == [(True, "the store can use every file that has one of its names")]
        assert findings["hard link"] == [(True, "can be created, and is counted")]
        assert [text.partition(":")[0] for _, text in findings["delivery"]] == ["live", "warehouse"]
        os.link(box / "sink-live" / batch_files(box / "sink-live")[0], box / "sink-warehouse" / "sealed-x.ndjson")
        _, findings = doctor("-d", "box", "--sink", WAREHOUSE, cwd=box.parent)
        assert "files" not in failed_checks(findings)
        ((_, text),) = findings["queue"]
        assert text.startswith("box/sink-live belongs to no sink of the settings, 1 batch pending")
        assert text.endswith("pillarbox sinks remove live")


def test_unusable_files_in_and_instead_of_a_queue_are_reported(box: Path) -> None:
    """Symbolic links and directories with names of the store, and a requested queue whose sink is not configured."""
    queue = box / "sink-live"
    queue.mkdir(mode=0o700)
    (queue / "dead-x.ndjson").symlink_to("nowhere")
    (queue / "notes").symlink_to("nowhere")
    (box / "sink-warehouse").symlink_to(box.parent)
    (box / "ledger.lock").unlink(missing_ok=True)
    (box / "ledger.lock").symlink_to("nowhere")
    (box / "sink-new.adding").mkdir(mode=0o700)
    _, findings = doctor("-d", "box", "--sink", "live=sqlite:///live.db", cwd=box.parent)
    assert sorted(text.partition(",")[0] for _, text in findings["files"]) == [
        "box/ledger.lock is a symbolic link",
        "box/sink-live/dead-x.ndjson is a symbolic link",
        "box/sink-warehouse is a symbolic link",
    ]
    ((_, text),) = findings["queue"]
    assert text.startswith("a queue for sink new was requested, but the settings have no such sink")


def test_dead_letters_and_quarantine_of_queues_count_against_the_limits_of_each_queue(box: Path) -> None:
    """The delivery worker of each queue applies the limits in the same way."""
    for name, size in (("live", 90), ("warehouse", 40)):
        queue = box / layout.queue_name(name)
        queue.mkdir(mode=0o700)
        (queue / "dead-a.ndjson").write_bytes(b"x" * size)
        (queue / "corrupt-a.ndjson").write_bytes(b"x" * (size // 2))
    (box / "dead-b.ndjson").write_bytes(b"x" * 7)
    usage = open_directory(box).disk_usage()
    assert (usage.dead_files, usage.dead_bytes, usage.corrupt_files, usage.corrupt_bytes) == (3, 137, 2, 65)
    status = read_status(open_directory(box), SystemClock(), "process")
    assert (status.dead_bytes, [sink.dead_bytes for sink in status.sinks]) == (137, [90, 40])
    limits = LIMITS._replace(max_dead_bytes=100, max_quarantine_bytes=100)
    findings: Findings = check_directory(box, limits=limits, clock=ManualClock(SystemClock().micros()))
    assert failed_checks(findings) == {"dead letters"}
    assert [ok for ok, _ in findings["dead letters"]] == [True, False, True]
    assert findings["dead letters"][0] == (True, "7 of 100 bytes (max_dead_bytes)")
    assert findings["dead letters"][1][1].startswith("live: 90 of 100 bytes")
    assert f"pillarbox dead list -d {box}/sink-live" in findings["dead letters"][1][1]


def test_without_hard_links_doctor_fails_for_named_sinks_only(box: Path) -> None:
    """Whether the sinks are in the settings or on disk. No batch is pending, because doctor would report a batch that waits longer than ten seconds."""
    for name in batch_files(box):
        (box / name).unlink()

    def failed_without_links(*options: str) -> set[str]:
        command = [PILLARBOX[0], "-c", WITHOUT_LINKS, "doctor", "-d", "box", "--json", *options]
        completed = subprocess.run(command, cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False)
        return {finding["check"] for finding in json.loads(completed.stdout) if not finding["ok"]}

    assert failed_without_links("--sink", "sqlite:///live.db", "--timeout", "60") == set()
    assert failed_without_links("--sink", "live=sqlite:///live.db", "--timeout", "60") == {"hard link"}
    (box / "sink-live").mkdir(mode=0o700)
    assert "hard link" in failed_without_links()
