"""The operators' commands on a directory with several sinks, one of which is down: real processes beside a real deliverer."""

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
from tests.cli.test_commands import CLEAN, PILLARBOX, UNHURRIED, bare, ids, run
from tests.cli.test_doctor import LIMITS, Found, bad, doctor, examined
from tests.cli.test_status import on_terminal, plain
from tests.conftest import wait_until
from tests.sinks.http_server import closed_port_url

EVENTS = 20
WAREHOUSE = "warehouse=sqlite:///warehouse.db"
# As where the file system has no hard links.
WITHOUT_LINKS = """
import errno
from pillarbox.cli.main import run
from pillarbox.store.os_filesystem import OsFilesystem
def refuse(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")
OsFilesystem.link = staticmethod(refuse)
run()
"""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An outbox directory with events that wait, in one file."""
    made = run("enqueue", "-d", "box", cwd=tmp_path, stdin=b"".join(map(bare, range(EVENTS))), environ=UNHURRIED)
    assert made.returncode == 0
    return tmp_path / "box"


def place_of(box: Path) -> Directory:
    return Directory(str(box), OsFilesystem(), SystemClock())


@contextlib.contextmanager
def delivering(box: Path, down: str) -> Iterator[None]:
    """A deliverer of two sinks that has delivered all to the warehouse, and waits for the other one."""
    command = [*PILLARBOX, "deliver", "-q", "-d", "box", "--sink", f"live={down}", "--sink", WAREHOUSE]
    process = subprocess.Popen(command, cwd=box.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    try:
        wait_until(lambda: standing(box) == {"live": ("waiting", 0), "warehouse": ("idle", EVENTS)})
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


def standing(box: Path) -> dict[str, tuple[str, int]]:
    """What each deliverer wrote down last."""
    sinks = read_status(place_of(box), SystemClock(), "process").sinks
    beats = {sink.name: sink.heartbeat for sink in sinks}
    return {name: (beat.state.name, beat.delivered) for name, beat in beats.items() if beat is not None}


def sealed(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if layout.kind_of(name) is layout.Kind.SEALED]


def by_name(status: dict[str, Any]) -> dict[str, Any]:
    return {sink["name"]: sink for sink in status["sinks"]}


def test_each_sink_has_its_row_and_the_one_that_is_down_is_the_one_that_flush_names(box: Path) -> None:
    """As text, as JSON, as a line, and on a terminal of 80 columns; exit code 1 of flush."""
    down = closed_port_url()
    with delivering(box, down):
        status = json.loads(run("status", "-d", "box", "--json", cwd=box.parent).stdout)
        sinks = by_name(status)
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
        words = ("status", "-d", "box", "--watch", "--samples", "2", "--interval", "0.1")
        looks = run(*words, "--json", cwd=box.parent).stdout.splitlines()
        assert [set(json.loads(one)["rates"]["sinks"]) for one in looks] == [{"live", "warehouse"}] * 2
        assert b"live: 1 file pending, oldest" in run(*words, cwd=box.parent).stdout
        code, seen = on_terminal(box.parent, *words)
        screen = plain(seen).split("\r\n")
        assert (code, max(map(len, screen)) <= 80) == (0, True)
        assert {"live", "warehouse"} <= {line.split()[0] for line in screen if line.strip()}
        done = run("flush", "-d", "box", "--timeout", "0.3", "--json", cwd=box.parent)
        flushed = json.loads(done.stdout)
        assert (done.returncode, flushed["pending_batches"], flushed["pending_sinks"]) == (1, 1, ["live"])
        assert "; live: process" in flushed["reason"]
        assert "warehouse" not in flushed["reason"]
    assert ids(box.parent / "warehouse.db") == [f"e-{number:06d}" for number in range(EVENTS)]


def test_doctor_asks_every_sink_and_takes_no_queue_for_a_stranger(box: Path) -> None:
    """The one that is down is named; one that the settings leave out is told with the command that removes its queue."""
    down = closed_port_url()
    with delivering(box, down):
        sinks = ("--sink", f"live={down}", "--sink", WAREHOUSE)
        code, found = doctor("-d", "box", *sinks, "--timeout", "60", cwd=box.parent)
        assert (code, bad(found)) == (1, {"destination"})
        assert {text.partition(":")[0]: ok for ok, text in found["destination"]} == {"live": False, "warehouse": True}
        assert found["files"] == [(True, "the store can use every file that has one of its names")]
        assert found["hard link"] == [(True, "can be created, and is counted")]
        assert [text.partition(":")[0] for _, text in found["delivery"]] == ["live", "warehouse", "all sinks"]
        os.link(box / "sink-live" / sealed(box / "sink-live")[0], box / "sink-warehouse" / "sealed-x.ndjson")
        _, found = doctor("-d", "box", "--sink", WAREHOUSE, cwd=box.parent)
        assert "files" not in bad(found)
        ((_, text),) = found["queue"]
        assert text.startswith("box/sink-live belongs to no sink of the settings, 1 batch pending")
        assert text.endswith("pillarbox sinks remove live")


def test_what_is_planted_in_a_queue_or_in_its_place_is_named(box: Path) -> None:
    """Links and directories under our names; a queue that was asked for and that nobody makes."""
    queue = box / "sink-live"
    queue.mkdir(mode=0o700)
    (queue / "dead-x.ndjson").symlink_to("nowhere")
    (queue / "notes").symlink_to("nowhere")
    (box / "sink-warehouse").symlink_to(box.parent)
    (box / "ledger.lock").unlink(missing_ok=True)
    (box / "ledger.lock").symlink_to("nowhere")
    (box / "sink-new.adding").mkdir(mode=0o700)
    _, found = doctor("-d", "box", "--sink", "live=sqlite:///live.db", cwd=box.parent)
    assert sorted(text.partition(",")[0] for _, text in found["files"]) == [
        "box/ledger.lock is a symbolic link",
        "box/sink-live/dead-x.ndjson is a symbolic link",
        "box/sink-warehouse is a symbolic link",
    ]
    ((_, text),) = found["queue"]
    assert text.startswith("a queue for sink new was requested, but the settings have no such sink")


def test_what_is_set_aside_in_queues_is_in_the_account_and_held_against_the_limits_queue_by_queue(box: Path) -> None:
    """As the deliverer of each does."""
    for name, kept in (("live", 90), ("warehouse", 40)):
        queue = box / layout.queue_name(name)
        queue.mkdir(mode=0o700)
        (queue / "dead-a.ndjson").write_bytes(b"x" * kept)
        (queue / "corrupt-a.ndjson").write_bytes(b"x" * (kept // 2))
    (box / "dead-b.ndjson").write_bytes(b"x" * 7)
    account = place_of(box).disk_usage()
    assert (account.dead_files, account.dead_bytes, account.corrupt_files, account.corrupt_bytes) == (3, 137, 2, 65)
    status = read_status(place_of(box), SystemClock(), "process")
    assert (status.dead_bytes, [sink.dead_bytes for sink in status.sinks]) == (137, [90, 40])
    limits = LIMITS._replace(max_dead_bytes=100, max_quarantine_bytes=100)
    found: Found = examined(box, limits=limits, clock=ManualClock(SystemClock().micros()))
    assert bad(found) == {"dead letters"}
    assert [ok for ok, _ in found["dead letters"]] == [True, False, True]
    assert found["dead letters"][0] == (True, "7 of 100 bytes (max_dead_bytes)")
    assert found["dead letters"][1][1].startswith("live: 90 of 100 bytes")
    assert f"pillarbox dead list -d {box}/sink-live" in found["dead letters"][1][1]


def test_without_hard_links_several_sinks_are_refused_and_one_is_not(box: Path) -> None:
    """Whether they are of the settings or on disk; nothing waits, which after ten seconds would be bad as well."""
    for name in sealed(box):
        (box / name).unlink()

    def without(*words: str) -> set[str]:
        command = [PILLARBOX[0], "-c", WITHOUT_LINKS, "doctor", "-d", "box", "--json", *words]
        done = subprocess.run(command, cwd=box.parent, env=CLEAN, capture_output=True, timeout=60, check=False)
        return {finding["check"] for finding in json.loads(done.stdout) if not finding["ok"]}

    assert without("--sink", "sqlite:///live.db", "--timeout", "60") == set()
    assert without("--sink", "live=sqlite:///live.db", "--timeout", "60") == {"hard link"}
    (box / "sink-live").mkdir(mode=0o700)
    assert "hard link" in without()
