"""Batches that several sinks have delivered and retain: counted once, redelivered to one or all sinks, and deleted together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.admin.scan import try_read_file
from pillarbox.clock import SystemClock
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.fanout import FanOut
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.delivery.worker import Worker
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import DiskSpace
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import REDELIVERY_WRITER, LedgerEntry, RedeliveredEntry, SealedEntry, SettledEntry
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import RECENT_BATCHES_MAX, WRITERS_MAX, compact_entries, reconcile_entries
from pillarbox.store.retention import evict_delivered
from pillarbox.testing import ManualClock, RecordingSink
from tests.cli.test_commands import CLEAN, PILLARBOX, run
from tests.conftest import wait_until
from tests.delivery.fanout_setup import balanced_totals, enqueue_files, event_ids, open_directory, stored_event_ids
from tests.delivery.test_redelivery import BOX, KEEPING, quota_of
from tests.delivery.worker_setup import QUICK_CONFIG, drain_worker, seal_batch

SINKS = ("live", "warehouse")


@pytest.fixture
def outbox_dir(tmp_path: Path) -> Directory:
    """A directory with two empty queues."""
    directory = open_directory(tmp_path / "box")
    directory.ensure_usable()
    for sink in SINKS:
        directory.queue(sink).ensure_usable()
    return directory


def fan_out_all(outbox_dir: Directory) -> None:
    """Fan out all sealed batches."""
    FanOut(outbox_dir, SINKS, SystemClock(), LedgerWriter(outbox_dir, SystemClock())).distribute_all()


def deliver_queue(outbox_dir: Directory, sink: str, released: list[int] | None = None) -> RecordingSink:
    """Deliver and retain the pending batches of a sink."""
    queue, taken, clock = outbox_dir.queue(sink), RecordingSink(), SystemClock()
    callbacks = DeliveryCallbacks((released if released is not None else []).append)
    drain_worker(
        Worker(
            queue,
            NamedSink(taken, sink),
            clock,
            QUICK_CONFIG._replace(limits=KEEPING),
            callbacks,
            LedgerWriter(queue, clock),
        )
    )
    return taken


def retained(outbox_dir: Directory, sink: str) -> list[str]:
    """The batches that a sink retains."""
    return [layout.batch_id(file.name) for file in outbox_dir.queue(sink).delivered_files()]


def sink_urls(folder: Path) -> dict[str, str]:
    """Two real destinations."""
    return {sink: f"sqlite:///{folder}/{sink}.db" for sink in SINKS}


def deliver(folder: Path) -> None:
    """Let a process deliver the pending batches to both sinks."""
    sinks = [word for sink, url in sink_urls(folder).items() for word in ("--sink", f"{sink}={url}")]
    completed = run("deliver", *BOX, *sinks, "--once", cwd=folder, environ={"PILLARBOX_KEEP_DELIVERED": "24h"})
    assert completed.returncode == 0, completed.stderr


def verify_json(folder: Path) -> dict[str, Any]:
    """The output of `verify` for each sink."""
    completed = run("verify", *BOX, "--json", cwd=folder)
    answer = json.loads(completed.stdout)
    assert completed.returncode == int(not answer["balances"])
    return {sink: one["reconciliation"] | {"balances": one["balances"]} for sink, one in answer["sinks"].items()}


@pytest.fixture
def with_data_loss(tmp_path: Path) -> Path:
    """Thirty events are delivered to both sinks. Then the warehouse is restored from a copy with ten, and live loses all."""
    with Outbox(str(tmp_path / "box"), sinks=sink_urls(tmp_path), keep_delivered="24h", flush_interval=0.05) as outbox:
        enqueue_files(outbox, 1)
        assert outbox.flush(60)
        shutil.copy(tmp_path / "warehouse.db", tmp_path / "copy.db")
        enqueue_files(outbox, 2, first=10)
        assert outbox.flush(60)
        assert outbox.stats().pending_bytes == 0
    for left in [*tmp_path.glob("warehouse.db*"), *tmp_path.glob("live.db*")]:
        left.unlink()
    shutil.copy(tmp_path / "copy.db", tmp_path / "warehouse.db")
    return tmp_path


def test_batches_can_be_redelivered_to_one_sink_only(with_data_loss: Path) -> None:
    """With new names that are only in its queue, by real processes. The counts balance before, between and after."""
    outbox_dir = open_directory(with_data_loss / "box")
    before = retained(outbox_dir, "live")
    assert len(before) == 3
    balanced_totals(with_data_loss / "box")
    completed = run("redeliver", *BOX, "--since", "2h", "--sink", "warehouse", "--yes", "--json", cwd=with_data_loss)
    assert completed.returncode == 0
    items = json.loads(completed.stdout)["items"]
    assert [(item["batch"], item["sink"], item["events"]) for item in items] == [
        (one, "warehouse", 10) for one in sorted(before)
    ]
    waiting = [layout.batch_id(name) for name in outbox_dir.queue("warehouse").batch_names()]
    assert waiting == [item["redelivered_as"] for item in items]
    assert not set(waiting) & set(before)
    assert (outbox_dir.batch_names(), outbox_dir.queue("live").batch_names(), retained(outbox_dir, "warehouse")) == ([], [], [])
    balanced_totals(with_data_loss / "box")
    deliver(with_data_loss)
    assert stored_event_ids(with_data_loss / "warehouse.db") == event_ids(30)
    assert not (with_data_loss / "live.db").exists() or stored_event_ids(with_data_loss / "live.db") == []
    assert (retained(outbox_dir, "warehouse"), retained(outbox_dir, "live")) == (waiting, before)
    accounts = verify_json(with_data_loss)
    assert {sink: one["resent_on_request"] for sink, one in accounts.items()} == {"live": 0, "warehouse": 30}
    assert all(one["balances"] for one in accounts.values())


def test_without_a_sink_name_all_sinks_are_redelivered(with_data_loss: Path) -> None:
    """Each in its own queue, and retained again."""
    text = run("redeliver", *BOX, "--all", "--yes", cwd=with_data_loss).stdout.decode()
    assert "60 events in 6 batches pending again" in text
    assert (text.count("  to live"), text.count("  to warehouse")) == (3, 3)
    outbox_dir = open_directory(with_data_loss / "box")
    assert not set(outbox_dir.queue("live").batch_names()) & set(outbox_dir.queue("warehouse").batch_names())
    deliver(with_data_loss)
    assert stored_event_ids(with_data_loss / "warehouse.db") == stored_event_ids(with_data_loss / "live.db") == event_ids(30)
    assert (len(retained(outbox_dir, "live")), len(retained(outbox_dir, "warehouse"))) == (3, 3)
    assert {sink: one["resent_on_request"] for sink, one in verify_json(with_data_loss).items()} == {
        "live": 30,
        "warehouse": 30,
    }


def test_the_error_for_an_unknown_sink_lists_the_known_ones(with_data_loss: Path) -> None:
    """Nothing is redelivered."""
    completed = run("redeliver", *BOX, "--all", "--sink", "wharehouse", "--yes", cwd=with_data_loss)
    assert (completed.returncode, b"its sinks are live, warehouse" in completed.stderr) == (2, True)
    assert len(retained(open_directory(with_data_loss / "box"), "live")) == 3


def test_the_error_for_a_queue_directory_names_the_sink_option(with_data_loss: Path) -> None:
    """Its files have links in other queues, which only the outbox directory shows."""
    completed = run("redeliver", "-d", "box/sink-live", "--all", cwd=with_data_loss)
    assert completed.returncode == 2
    assert "use -d box --sink live" in " ".join(completed.stderr.decode().split())


def test_batches_retained_for_a_single_sink_are_redelivered_to_all_and_expire(tmp_path: Path) -> None:
    """The process that fans out deletes them."""
    box = tmp_path / "box"
    with Outbox(str(box), RecordingSink(), keep_delivered="24h") as outbox:
        enqueue_files(outbox, 2)
        assert outbox.flush(60)
    one, _ = sorted(box.glob("delivered-*"))
    assert run("redeliver", *BOX, "--batch", layout.batch_id(one.name), "--yes", cwd=tmp_path).returncode == 0
    with Outbox(str(box), sinks=sink_urls(tmp_path), keep_delivered=0.01, flush_interval=0.05) as outbox:
        assert outbox.flush(60)
        wait_until(lambda: not list(box.rglob("delivered-*")))
    assert stored_event_ids(tmp_path / "live.db") == stored_event_ids(tmp_path / "warehouse.db") == event_ids(10)
    balanced_totals(box)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_after_an_interruption_each_queue_has_each_file_once(outbox_dir: Directory, number: signal.Signals) -> None:
    """Either retained or pending; the next command continues."""
    folder = Path(outbox_dir.path).parent
    for stamp in range(200):
        seal_batch(outbox_dir, stamp + 1, b'{"n":%d}' % stamp)
    fan_out_all(outbox_dir)
    for sink in SINKS:
        deliver_queue(outbox_dir, sink)
    contents = {sink: sorted(contents_of(outbox_dir.queue(sink))) for sink in SINKS}
    assert [len(one) for one in contents.values()] == [200, 200]
    process = subprocess.Popen(
        [*PILLARBOX, "redeliver", *BOX, "--all", "--yes"], cwd=folder, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: bool(outbox_dir.queue("live").batch_names()))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert {sink: sorted(contents_of(outbox_dir.queue(sink))) for sink in SINKS} == contents
    balanced_totals(Path(outbox_dir.path))
    assert run("redeliver", *BOX, "--all", "--yes", cwd=folder).returncode == 0
    assert [len(outbox_dir.queue(sink).batch_names()) for sink in SINKS] == [200, 200]
    assert [len(deliver_queue(outbox_dir, sink).payloads) for sink in SINKS] == [200, 200]
    balanced_totals(Path(outbox_dir.path))


def contents_of(queue: Directory) -> list[bytes]:
    """The contents of the pending and retained files of a queue."""
    names = [*queue.batch_names(), *(file.name for file in queue.delivered_files())]
    return [Path(queue.path_of(name)).read_bytes() for name in names]


# Counts.


def test_a_batch_that_both_sinks_retain_is_not_pending_and_counts_once(outbox_dir: Directory) -> None:
    """As soon as the last sink has delivered it; until then it counts as pending. Both can read it, whatever links it has."""
    batch = seal_batch(outbox_dir, 1, b'{"n":1}')
    size = Path(outbox_dir.path_of(f"{batch}.ndjson")).stat().st_size
    fan_out_all(outbox_dir)
    released: list[int] = []
    deliver_queue(outbox_dir, "live", released)
    first = outbox_dir.disk_usage()
    assert (released, first.pending_files, first.pending_bytes, first.delivered_files) == ([], 1, size, 0)
    deliver_queue(outbox_dir, "warehouse", released)
    both = outbox_dir.disk_usage()
    assert (released, both.pending_files, both.delivered_files, both.delivered_bytes) == ([size], 0, 1, size)
    for sink in SINKS:
        queue = outbox_dir.queue(sink)
        (file,) = queue.delivered_files()
        assert try_read_file(queue, file.name) == Path(queue.path_of(file.name)).read_bytes()
        assert queue.disk_usage().delivered_files == 1


class SimultaneousChecks(OsFilesystem):
    """Lets two threads that have deleted a link check at the same moment whether the file has other names."""

    def __init__(self) -> None:
        super().__init__()
        self._both = threading.Barrier(2)

    def has_name(self, fd: int) -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both.wait(0.3)  # with the lock, only one thread gets here, so the wait needs a limit
        return super().has_name(fd)


def test_if_two_sinks_deliver_a_file_at_the_same_time_its_bytes_are_released_once(outbox_dir: Directory) -> None:
    """Exactly one of them counts as the last."""
    batch = seal_batch(outbox_dir, 1, b'{"n":1}')
    size = Path(outbox_dir.path_of(f"{batch}.ndjson")).stat().st_size
    fan_out_all(outbox_dir)
    outbox_dir = Directory(outbox_dir.path, SimultaneousChecks(), SystemClock())
    released: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        assert all(sink.payloads for sink in pool.map(lambda sink: deliver_queue(outbox_dir, sink, released), SINKS))
    assert (released, outbox_dir.disk_usage().pending_files) == ([size], 0)


def test_a_redelivered_batch_is_pending_whatever_the_other_sinks_retain(outbox_dir: Directory) -> None:
    """Until it is delivered."""
    batch = seal_batch(outbox_dir, 1, b'{"n":1}')
    fan_out_all(outbox_dir)
    for sink in SINKS:
        deliver_queue(outbox_dir, sink)
    queue = outbox_dir.queue("live")
    new_name = queue.reseal(queue.delivered_files()[0].name)
    assert new_name is not None
    found = outbox_dir.disk_usage()
    assert (found.pending_files, found.delivered_files, queue.batch_names(), outbox_dir.queue("warehouse").batch_names()) == (
        1,
        1,
        [new_name],
        [],
    )
    released: list[int] = []
    assert deliver_queue(outbox_dir, "live", released).payloads == [b'{"n":1}']
    assert (released, outbox_dir.disk_usage().pending_files, outbox_dir.disk_usage().delivered_files) == (
        [found.pending_bytes],
        0,
        2,
    )
    assert retained(outbox_dir, "warehouse") == [batch]


def test_compressed_copies_in_queues_count_separately(outbox_dir: Directory) -> None:
    """Even with the same name. A compressed file that was fanned out is one file."""
    name = layout.compressed_name(layout.sealed_name(1, "u"))
    one, other = (Path(outbox_dir.queue(sink).path_of(name)) for sink in SINKS)
    one.write_bytes(b"12345")
    other.write_bytes(b"12345")
    assert (outbox_dir.disk_usage().pending_files, outbox_dir.disk_usage().pending_bytes) == (2, 10)
    other.unlink()
    os.link(one, other)
    assert (outbox_dir.disk_usage().pending_files, outbox_dir.disk_usage().pending_bytes) == (1, 5)


# Missing batches.


@pytest.mark.parametrize("again", [False, True])
def test_a_batch_that_is_missing_in_a_queue_is_reported(with_data_loss: Path, *, again: bool) -> None:
    """Also if as many events were redelivered since."""
    assert run("redeliver", *BOX, "--all", "--sink", "live", "--yes", cwd=with_data_loss).returncode == 0 if again else True
    ledger = with_data_loss / "box" / "sink-live" / layout.LEDGER
    outbox_dir = open_directory(with_data_loss / "box")
    batch = retained(outbox_dir, "warehouse")[1]
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(line for line in lines if b'"batch":"' + batch.encode() not in line))
    for file in outbox_dir.queue("live").delivered_files():
        if layout.batch_id(file.name) == batch:
            outbox_dir.queue("live").remove(file.name)
    account = verify_json(with_data_loss)["live"]
    assert not account["balances"]
    assert [(wrong["events"], wrong["problem"]) for wrong in account["discrepancies"]] == [
        (10, "fanned out, but not in the ledger of the sink")
    ]


def test_fanned_out_batches_are_counted_separately_in_a_compacted_ledger() -> None:
    """However many writers there were."""
    entries: list[LedgerEntry] = [RedeliveredEntry(0, "r", "s", 5), SettledEntry(0, "r", "live", 5, 0, 0, 0)]
    for number in range(WRITERS_MAX + 10):
        writer = "handed over" if not number else f"w{number}"
        entries += [SealedEntry(0, f"b{number}", writer, 1, 9), SettledEntry(0, f"b{number}", "live", 1, 0, 0, 0)]
    entries += [SettledEntry(0, f"c{number}", "live", 1, 0, 0, 0) for number in range(RECENT_BATCHES_MAX)]
    summed = reconcile_entries(compact_entries(entries, set(), 1), {}, [])
    rows = {row.writer: row.accepted for row in summed.writers}
    assert summed.balances
    assert (rows["handed over"], rows["unknown"], summed.resent_on_request) == (1, RECENT_BATCHES_MAX, 5)
    assert REDELIVERY_WRITER not in rows or rows[REDELIVERY_WRITER] == 5


# Making room.


def test_a_batch_that_several_sinks_retain_is_deleted_from_all_their_queues(outbox_dir: Directory) -> None:
    """Those delivered first, and their bytes count once. A file that is pending for another sink comes last."""
    waits = seal_batch(outbox_dir, 1, b'"0"')
    fan_out_all(outbox_dir)
    deliver_queue(outbox_dir, "live")
    blocked = outbox_dir.queue("warehouse").lock_existing(f"{waits}.ndjson")
    assert blocked is not None
    batches = [seal_batch(outbox_dir, stamp, b'"%d"' % stamp) for stamp in (2, 3)]
    fan_out_all(outbox_dir)
    deliver_queue(outbox_dir, "live")
    outbox_dir.filesystem.close(blocked.fd)
    os.rename(outbox_dir.queue("warehouse").path_of(f"{waits}.ndjson"), outbox_dir.path_of("elsewhere"))
    deliver_queue(outbox_dir, "warehouse")
    os.rename(outbox_dir.path_of("elsewhere"), outbox_dir.queue("warehouse").path_of(f"{waits}.ndjson"))
    assert (retained(outbox_dir, "live"), retained(outbox_dir, "warehouse")) == ([waits, *batches], batches)
    size = outbox_dir.queue("live").delivered_files()[1].size
    assert evict_delivered(outbox_dir, lambda released: released >= size) == 1
    assert (retained(outbox_dir, "live"), retained(outbox_dir, "warehouse")) == ([waits, batches[1]], [batches[1]])
    assert evict_delivered(outbox_dir, lambda _gone: False) == 2
    assert (retained(outbox_dir, "live"), retained(outbox_dir, "warehouse")) == ([], [])
    assert outbox_dir.queue("warehouse").batch_names() == [f"{waits}.ndjson"]


class SmallVolumeWithLinks(OsFilesystem):
    """A volume of 1,000,000 bytes on which a file with several links is stored once."""

    def disk_space(self, path: str) -> DiskSpace:
        used = {os.stat(file).st_ino: os.stat(file).st_size for file in Path(path).rglob("delivered-*")}
        return DiskSpace(max(0, 1_000_000 - sum(used.values())), 1_000_000)


def test_batches_retained_in_queues_are_deleted_before_events_are_dropped(outbox_dir: Directory, clock: ManualClock) -> None:
    """As many files as needed, each from all queues."""
    outbox_dir = Directory(outbox_dir.path, SmallVolumeWithLinks(), clock)
    for number in range(20):
        first, other = (
            outbox_dir.queue(sink).path_of(layout.delivered_name(layout.sealed_name(number, "u"), 2 * number + later))
            for later, sink in enumerate(SINKS)
        )
        Path(first).write_bytes(b"1234567890" * 5000)
        os.link(first, other)
    capacity, writer = quota_of(outbox_dir, clock, evicts=True)
    capacity.enforce()
    assert (
        retained(outbox_dir, "live")
        == retained(outbox_dir, "warehouse")
        == [layout.batch_id(layout.sealed_name(n, "u")) for n in range(2, 20)]
    )
    assert (writer.dropped["disk_low"], capacity.evicted_events) == (0, 0)
