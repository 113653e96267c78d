"""Files that are larger than a window: sent as several batches, settled as one."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.delivery.config import SettlementLimits
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, PartialFailure, Retry, UnconfirmedError
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SealedEntry
from pillarbox.store.reconciliation import reconcile
from pillarbox.store.windows import WINDOW_BYTES
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until
from tests.delivery.worker_setup import QUICK_CONFIG, REJECTION, drain_worker, make_worker, remaining_files, seal_batch

PADDING = "x" * 10_000
EVENTS = 600  # with the padding: three windows
MIB = 2**20


def large_payloads(poison_every: int = 0) -> list[bytes]:
    return [
        msgspec.json.encode({"n": number, "poison" if poison_every and number % poison_every == 0 else "text": PADDING})
        for number in range(EVENTS)
    ]


class ByIndexSink(RecordingSink):
    """Rejects poisoned records by index."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        await super().deliver(batch)
        rejected = {index: REJECTION for index, payload in enumerate(batch.payloads) if b'"poison"' in payload}
        return PartialFailure(rejected, len(batch) - len(rejected)) if rejected else Delivered(len(batch))


def windows_of(batch: str, calls: list[str]) -> list[tuple[int, int]]:
    """The first and last record of each call."""
    assert all(call.startswith(f"{batch}:") for call in calls)
    ranges = [call.removeprefix(f"{batch}:").split("-") for call in calls]
    return [(int(first), int(last)) for first, last in ranges]


def test_a_large_file_is_sent_in_windows_whose_ids_name_their_records(outbox_dir: Directory) -> None:
    payloads = large_payloads()
    batch = seal_batch(outbox_dir, 1, *payloads)
    following = seal_batch(outbox_dir, 2, b'"next"')
    sink, released = RecordingSink(), list[int]()
    drain_worker(make_worker(outbox_dir, sink, released))
    assert sink.payloads == [*payloads, b'"next"']
    assert sink.calls[-1] == following
    ranges = windows_of(batch, sink.calls[:-1])
    assert len(ranges) == 3
    assert [index for first, last in ranges for index in range(first, last + 1)] == list(range(EVENTS))
    assert remaining_files(outbox_dir) == []
    assert len(released) == 2


def test_a_file_that_is_sent_again_has_the_same_windows(outbox_dir: Directory) -> None:
    batch = seal_batch(outbox_dir, 1, *large_payloads())

    class Unreachable(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            await super().deliver(batch)
            return Retry("down") if len(self.calls) in (2, 3) else Delivered(len(batch))

    sink = Unreachable()
    drain_worker(make_worker(outbox_dir, sink))
    first, second, third = sorted(set(windows_of(batch, sink.calls)))
    assert windows_of(batch, sink.calls) == [first, second, second, second, third]


def test_dead_letters_and_damaged_bytes_of_all_windows_are_kept_and_counted_once(outbox_dir: Directory) -> None:
    name, payloads = layout.sealed_name(1, "u"), large_payloads(poison_every=100)
    lines = [record.line(payload) for payload in payloads]
    damaged = [b"damaged at first\n", b"in the middle\n", b"and torn"]
    data = b"".join([damaged[0], *lines[:300], damaged[1], *lines[300:], damaged[2]])
    Path(outbox_dir.path_of(name)).write_bytes(data)
    ledger = LedgerWriter(outbox_dir, SystemClock())
    ledger.add(SealedEntry(1, layout.batch_id(name), "w", EVENTS + 3, len(data)))
    sink = ByIndexSink()
    worker = Worker(outbox_dir, NamedSink(sink, "test"), SystemClock(), QUICK_CONFIG, ledger=ledger)
    drain_worker(worker)
    batch = layout.batch_id(name)
    letters = [json.loads(line) for line in Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes().splitlines()]
    assert [(letter["index"], letter["event"]["n"]) for letter in letters] == [(n, n) for n in range(0, EVENTS, 100)]
    assert Path(outbox_dir.path_of(layout.corrupt_name(batch))).read_bytes() == b"".join(damaged)
    ranges = json.loads(Path(outbox_dir.path_of(layout.ranges_name(batch))).read_bytes())
    assert [data[each["offset"] : each["offset"] + each["length"]] for each in ranges] == damaged
    assert (worker.counters.delivered, worker.counters.dead, worker.counters.quarantined) == (EVENTS - 6, 6, 3)
    report = reconcile(outbox_dir)
    assert report.balances, report
    assert (report.reconciliation.total.delivered, report.reconciliation.total.dead) == (EVENTS - 6, 6)


def test_a_file_whose_rejects_exceed_a_limit_is_held_or_its_rejects_are_discarded(outbox_dir: Directory) -> None:
    """The limit counts the dead letters and damaged bytes of earlier windows."""
    payloads = large_payloads(poison_every=50)
    batch = seal_batch(outbox_dir, 1, *payloads)
    seal_batch(outbox_dir, 2, b'"next"')
    sink = ByIndexSink()
    worker = make_worker(outbox_dir, sink, limits=SettlementLimits(max_dead_bytes=9 * len(PADDING)))
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: b'"next"' in sink.payloads and worker.state.name == "degraded")
    thread.stop(5)
    assert f"{batch}{layout.SUFFIX}" in remaining_files(outbox_dir)
    assert "max_dead_bytes" in worker.state.reason
    assert not [name for name in remaining_files(outbox_dir) if name.startswith("dead-")]
    limits = SettlementLimits(max_dead_bytes=9 * len(PADDING), discard_when_full=True)
    worker = make_worker(outbox_dir, sink, limits=limits)
    drain_worker(worker)
    assert remaining_files(outbox_dir) == []
    assert (worker.counters.dead, worker.counters.discarded) == (12, 12)


def test_a_file_whose_records_are_all_rejected_and_whose_last_window_has_none_is_deferred(outbox_dir: Directory) -> None:
    """Its end is damaged. Another batch goes ahead, and then it becomes dead letters."""
    lines = [record.line(payload) for payload in large_payloads(poison_every=1)]
    first = b"".join(lines[: WINDOW_BYTES // len(lines[0])])
    Path(outbox_dir.path_of(layout.sealed_name(1, "u"))).write_bytes(first + b"x" * len(lines[0]) + b"\n")
    following = seal_batch(outbox_dir, 2, b'"next"')
    sink = ByIndexSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert sink.calls.count(following) == 1
    assert worker.state.name == "idle", worker.state
    assert (worker.counters.dead, worker.counters.quarantined) == (first.count(b"\n"), 1)


def test_a_large_file_that_is_wholly_rejected_waits_for_another_batch(outbox_dir: Directory) -> None:
    batch = seal_batch(outbox_dir, 1, *large_payloads(poison_every=1))
    sink = ByIndexSink()
    worker = make_worker(outbox_dir, sink)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "degraded")
    assert remaining_files(outbox_dir) == [f"{batch}{layout.SUFFIX}"]
    seal_batch(outbox_dir, 2, b'"next"')
    worker.notify()
    wait_until(lambda: worker.counters.dead == EVENTS)
    thread.stop(5)
    assert len(Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes().splitlines()) == EVENTS


class ConfirmingSink(RecordingSink):
    """Loses unconfirmed events once: when it is first asked to confirm a second window."""

    def __init__(self) -> None:
        super().__init__(needs_confirmation=True, unconfirmed_max=8)
        self.durable: list[str] = []
        self.unconfirmed: list[str] = []
        self.failed = False

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.unconfirmed.append(batch.id)
        return await super().deliver(batch)

    async def confirm(self, batches: Sequence[Batch]) -> int:
        await asyncio.sleep(0)
        if self.durable and not self.failed:
            self.failed, self.unconfirmed = True, []
            raise UnconfirmedError("restarted")
        self.durable += [batch.id for batch in batches]
        return len(batches)


def test_a_window_that_is_not_confirmed_is_sent_again_before_the_file_is_settled(outbox_dir: Directory) -> None:
    batch = seal_batch(outbox_dir, 1, *large_payloads())
    sink = ConfirmingSink()
    drain_worker(make_worker(outbox_dir, sink))
    first, second, third = sorted(set(windows_of(batch, sink.calls)))
    assert windows_of(batch, sink.calls) == [first, second, first, second, third]
    assert windows_of(batch, sink.durable) == [first, first, second, third]
    assert remaining_files(outbox_dir) == []


def seal_large_file(folder: Path, events: int, padding: int) -> list[str]:
    """Write a batch file. Returns the ids of its events."""
    folder.mkdir(mode=0o700)
    ids = [f"e{number:08d}" for number in range(events)]
    text = '{"text":"' + "x" * padding + '"}'
    with (folder / layout.sealed_name(1_700_000_000_000_000, "u")).open("wb") as file:
        for number, event_id in enumerate(ids):
            file.write(record.line(msgspec.json.encode(event(number, event_id=event_id, metadata_json=text))))
    return ids


DELIVER = [sys.executable, "-m", "pillarbox", "deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", "-q"]


def stored_ids(database: Path) -> list[str]:
    if not database.exists():
        return []
    with closing(sqlite3.connect(database)) as connection:
        try:
            return sorted(row[0] for row in connection.execute("SELECT event_id FROM tracking_event"))
        except sqlite3.OperationalError:
            return []  # the table does not exist yet


def test_a_file_of_several_hundred_megabytes_is_delivered_in_little_memory(tmp_path: Path) -> None:
    """The memory that a file of one event takes is subtracted."""
    seal_large_file(tmp_path / "small", 1, 10)
    small = subprocess.run([*DELIVER[:4], "-d", "small", *DELIVER[6:]], cwd=tmp_path, check=True, timeout=60)
    assert small.returncode == 0
    base = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    ids = seal_large_file(tmp_path / "box", 6000, 50_000)
    assert sum(file.stat().st_size for file in (tmp_path / "box").iterdir()) > 280 * MIB
    limit = 400 * MIB  # of addresses; the interpreter and its libraries take most of them
    limited = ["/bin/sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh"]
    for command in ("tail", "-d", "box", "-n", "1"), ("verify", "-d", "box"):
        subprocess.run([*limited, *DELIVER[:3], *command], cwd=tmp_path, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert subprocess.run([*limited, *DELIVER], cwd=tmp_path, check=False, timeout=300).returncode == 0
    grown = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - base
    assert grown * 1024 < 64 * MIB, f"{grown / 1024:.0f} MiB more than for one event"
    assert stored_ids(tmp_path / "events.db")[-6000:] == ids


def test_a_kill_between_two_windows_loses_and_repeats_nothing(tmp_path: Path) -> None:
    ids = seal_large_file(tmp_path / "box", 12_000, 2000)
    database, kills, before = tmp_path / "events.db", 0, 0
    for _ in range(2):
        with subprocess.Popen(DELIVER, cwd=tmp_path) as process:
            wait_until(lambda: process.poll() is not None or len(stored_ids(database)) > before)  # noqa: B023
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        before = len(stored_ids(database))
        assert stored_ids(database) == ids[:before], "a window was lost or repeated"
        assert before == len(ids) or list((tmp_path / "box").glob("sealed-*"))
    assert kills >= 1
    assert subprocess.run(DELIVER, cwd=tmp_path, check=False, timeout=120).returncode == 0
    assert stored_ids(database) == ids
    verify = subprocess.run([*DELIVER[:3], "verify", "-d", "box"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert verify.returncode == 0, verify.stdout
