"""Tests that `status`, `verify`, `doctor` and metrics show the drops and the outages of other processes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from pillarbox import Outbox
from pillarbox.admin import backlog
from pillarbox.admin.backlog import LedgerFacts
from pillarbox.admin.status import read_status
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import Lease
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.drops import DropRecorder
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import DroppedEntry, SealedEntry, parse_ledger
from pillarbox.testing import ManualClock
from tests.cli.test_commands import CLEAN, NO_SEAL_BY_AGE, PILLARBOX, event_line, run
from tests.conftest import event, wait_until
from tests.delivery.fanout_setup import open_directory
from tests.sinks.http_server import closed_port_url


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def dropped_entries(box: Path) -> list[DroppedEntry]:
    entries, _ = parse_ledger((box / layout.LEDGER).read_bytes())
    return [entry for entry in entries if isinstance(entry, DroppedEntry)]


def test_drops_of_a_process_that_has_ended_are_shown_by_every_command(box: Path) -> None:
    """`status`, `verify` and `doctor` show how many, why and when. `doctor` fails and says what to do."""
    with Outbox(str(box), max_bytes=2000, min_free_bytes=0) as outbox:
        dropped = sum(not outbox.enqueue(event(number)) for number in range(100))
    assert dropped > 80
    status = json.loads(run("status", "-d", "box", "--json", cwd=box.parent).stdout)
    assert {reason: total["events"] for reason, total in status["dropped"].items()} == {"max_bytes": dropped}
    assert status["pending_events"] == 100 - dropped
    text = run("status", "-d", "box", cwd=box.parent).stdout.decode()
    assert re.search(rf"^dropped +{dropped} events \(max_bytes {dropped}\), the last \d+ s ago$", text, re.MULTILINE)
    assert "events were dropped in the last day (max_bytes)" in text
    verified = run("verify", "-d", "box", cwd=box.parent)
    assert verified.returncode == 0
    assert f"{dropped} events dropped and never accepted: max_bytes {dropped}" in verified.stdout.decode()
    checked = run("doctor", "-d", "box", cwd=box.parent)
    assert checked.returncode == 1
    assert f"BAD  drops: {dropped} events (max_bytes {dropped})" in checked.stdout.decode()
    assert "have the backlog delivered, or raise the limit" in checked.stdout.decode()


def test_drops_are_in_the_ledger_while_the_process_runs_and_bounded_in_rate(box: Path) -> None:
    """Whatever the number of dropped events, there is one entry for each reason in ten seconds, and one at the end."""
    with Outbox(str(box), max_bytes=2000, min_free_bytes=0) as outbox:
        for number in range(5000):
            outbox.enqueue(event(number))
        wait_until(lambda: bool(LedgerFacts(open_directory(box), SystemClock().micros()).dropped))
        total = outbox.stats().dropped["max_bytes"]
        assert len(dropped_entries(box)) <= 2
    entries = dropped_entries(box)
    assert sum(entry.events for entry in entries) == total
    assert len(entries) <= 3


@pytest.mark.parametrize("ending", ["close", "exit"])
def test_drops_without_an_accepted_event_and_after_the_close_are_in_the_ledger(box: Path, ending: str) -> None:
    """Invalid events alone, a start that fails, and events after `close`, also of a program that just exits."""
    subprocess.run([sys.executable, "-c", _DROPS_WITHOUT_SEALER, str(box), ending], check=True, timeout=60)
    recorded = Counter({"invalid": 0})
    for entry in dropped_entries(box):
        recorded[entry.reason] += entry.events
    assert recorded == {"invalid": 3, "io_error": 2, "closed": 4}


_DROPS_WITHOUT_SEALER: Final = """
import sys
from pillarbox import Outbox, TrackingEvent

directory, ending = sys.argv[1:]
invalid = Outbox(directory)
for _ in range(3):
    assert not invalid.enqueue("no event")
unstarted = Outbox(directory)
unstarted._sealer.start = lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
closed = Outbox(directory)
closed.flush()
closed.close()
for outbox, count in ((unstarted, 2), (closed, 4)):
    for _ in range(count):
        assert not outbox.enqueue(TrackingEvent(event_key="k", scope_kind="user", scope_id="1"))
if ending == "close":
    invalid.close()
    unstarted.close()
"""


def test_of_a_large_ledger_the_latest_entries_are_read(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest ones say nothing about what is pending now."""
    ledger = LedgerWriter(outbox_dir, clock)
    for number in range(100):
        ledger.add(SealedEntry(clock.micros(), f"batch-{number}", "w", number, 10))
    assert ledger.write(sync=True)
    monkeypatch.setattr(backlog, "_LEDGER_BYTES_MAX", 1000)
    known = LedgerFacts(outbox_dir, clock.micros()).events_by_batch
    assert 1 < len(known) < 20
    assert known["batch-99"] == 99


def test_drops_are_recorded_again_after_ten_seconds(outbox_dir: Directory, clock: ManualClock) -> None:
    """Only new drops are recorded, and no drop that `when_full="block"` subtracts again."""
    totals = {"max_bytes": 5, "io_error": 0}
    ledger = LedgerWriter(outbox_dir, clock)
    reporter = DropRecorder(outbox_dir.path, "w", clock, ledger, lambda: totals)
    blocking = DropRecorder(outbox_dir.path, "w", clock, ledger, lambda: totals, {"max_bytes"})
    assert reporter.report()
    assert not blocking.report()
    totals["max_bytes"] = 9
    assert not reporter.report()
    clock.advance(10.0)
    assert reporter.report()
    totals["io_error"] = 1
    assert reporter.report(is_last=True)
    assert ledger.write(sync=True)
    recorded = [(entry.reason, entry.events) for entry in dropped_entries(Path(outbox_dir.path))]
    assert recorded == [("max_bytes", 5), ("max_bytes", 4), ("io_error", 1)]


def test_the_end_of_drops_is_logged_at_the_level_of_their_beginning(
    outbox_dir: Directory, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has their number and duration. A short pause between two drops is not the end."""
    caplog.set_level(logging.DEBUG, "pillarbox")
    totals = {"disk_full": 0}
    reporter = DropRecorder("box", "w", clock, None, lambda: totals)
    for _ in range(5):
        totals["disk_full"] += 7
        reporter.report()
        clock.advance(9.0)
    reporter.report()
    clock.advance(9.0)
    reporter.report()
    assert [(entry.levelname, entry.message) for entry in caplog.records] == [
        ("WARNING", "box: dropping events: disk_full"),
        (
            "WARNING",
            "box: dropped no event for 18 s for this reason: disk_full; 35 were dropped within 36 s, and 35 since the start",
        ),
    ]


def test_an_outage_is_shown_with_its_duration_and_what_to_do(box: Path) -> None:
    """Also after the process was replaced by another one, for which the destination fails too."""
    run("enqueue", "-d", "box", cwd=box.parent, stdin=b"".join(map(event_line, range(20))), environ=NO_SEAL_BY_AGE)
    command = [*PILLARBOX, "deliver", "-q", "-d", "box", "--sink", closed_port_url()]
    since = []
    for _ in range(2):
        process = subprocess.Popen(command, cwd=box.parent, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=CLEAN)
        try:
            wait_until(lambda pid=process.pid: is_failing(box, pid))  # type: ignore[misc]  # mypy: a default of a lambda
            text = run("status", "-d", "box", cwd=box.parent).stdout.decode()
            checked = run("doctor", "-d", "box", cwd=box.parent)
        finally:
            process.terminate()
            process.communicate(timeout=60)
        heartbeat = read_status(open_directory(box), SystemClock(), "process").heartbeat
        assert heartbeat is not None
        since.append(heartbeat.failing_since_micros)
    assert since[0] == since[1]
    assert re.search(r"^events +20 pending$", text, re.MULTILINE)
    assert re.search(r"^limit +0.0 % of max_bytes \(536,870,912 bytes\)", text, re.MULTILINE)
    assert re.search(r"waiting: cannot connect .*, failing for \d+ s, since 20", text)
    assert "to do" in text
    assert "check the destination with pillarbox check" in text
    assert checked.returncode == 1
    assert re.search(r"BAD  delivery: .*failing for \d+ s: check the destination", checked.stdout.decode())


def is_failing(box: Path, pid: int) -> bool:
    heartbeat = read_status(open_directory(box), SystemClock(), "process").heartbeat
    return heartbeat is not None and heartbeat.pid == pid and heartbeat.state.name == "waiting"


def test_the_time_until_full_follows_from_what_comes_in_and_goes_out(outbox_dir: Directory, clock: ManualClock) -> None:
    """100 events of 100 bytes each in 100 s, nothing delivered: a limit of 110,000 bytes is reached in 1,000 s."""
    from pillarbox.store.ledger_entries import SealedEntry, SettledEntry

    ledger = LedgerWriter(outbox_dir, clock)
    for number in range(100):
        name = layout.sealed_name(clock.micros(), f"{number}")
        Path(outbox_dir.path_of(name)).write_bytes(b"x" * 99 + b"\n")
        ledger.add(SealedEntry(clock.micros(), layout.batch_id(name), "w", 1, 100))
        clock.advance(1.0)
    assert ledger.write(sync=True)
    status = read_status(outbox_dir, clock, "process", 110_000)
    assert (status.pending_events, status.pending_events_exact) == (100, True)
    assert status.full_in_s == pytest.approx(1000.0)
    for name in sorted(outbox_dir.batch_names()):
        ledger.add(SettledEntry(clock.micros(), layout.batch_id(name), "s", 1, 0, 0, 0))
        outbox_dir.remove(name)
    assert ledger.write(sync=True)
    status = read_status(outbox_dir, clock, "process", 110_000)
    assert (status.pending_events, status.full_in_s) == (0, None)


def test_memory_and_the_layer_of_a_container_are_warned_of(tmp_path: Path) -> None:
    """The exit code is 0 with durability "process", because the configured guarantee holds until a restart."""
    folder = Path("/dev/shm") / f"pillarbox-{tmp_path.name}"
    folder.mkdir(mode=0o700)
    try:
        completed = run("doctor", "-d", folder, cwd=tmp_path)
        assert (
            b"WARN filesystem: tmpfs is in memory: a restart of the machine or container deletes all pending"
            in completed.stdout
        )
        finding = next(one for one in json.loads(run("doctor", "-d", folder, "--json", cwd=tmp_path).stdout) if one["warning"])
        assert (finding["check"], finding["ok"]) == ("filesystem", True)
    finally:
        folder.rmdir()


def test_a_lease_takes_over_since_when_delivery_fails(outbox_dir: Directory, clock: ManualClock) -> None:
    """A heartbeat without the field, of an older version, says nothing."""
    lease = Lease(outbox_dir, "s", clock)
    Path(outbox_dir.path_of(layout.DELIVER_LOCK)).write_bytes(
        b'{"pid":1,"sink":"s","state":{"name":"idle"},"at_micros":1,"delivered":0}\n'
    )
    assert lease.acquire()
    assert lease.failing_since_micros is None
