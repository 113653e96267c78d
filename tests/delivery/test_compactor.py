"""Pending batches are compressed while the destination is down, and are delivered unchanged."""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pillarbox import Outbox, TrackingEvent
from pillarbox.delivery.compactor import PLAIN_FILES_AT_HEAD, Compactor
from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.event import new_event_id, now_micros
from pillarbox.sinks import sqlite
from pillarbox.sinks.base import Batch, DeliveryResult, Rejected, Retry
from pillarbox.store import compression, layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.dirscan import FileEntry, PortableScanOps
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SealedEntry
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.queue_changes import create_requested_queue, request_queue
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.store.reconciliation import _reconcile_once, reconcile
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import existing_events, wait_until
from tests.delivery.worker_setup import REJECTION, drain_worker, make_worker, remaining_files, seal_batch
from tests.sinks.http_server import CannedResponse, Server, always

RULES = DeliveryConfig(poll_interval_s=0.05, recheck_s=0.3, backoff=Backoff(base_s=0.3, max_s=0.3), compress_after_s=0.001)
REAL = [msgspec.convert(found, TrackingEvent) for found in existing_events()]
PLAIN = b"".join(record.line(b'{"n":%d,"what":"some event or other"}' % number) for number in range(100))


def seal_batches(outbox_dir: Directory, files: int) -> list[str]:
    """Seal files of a hundred events each."""
    names = [layout.sealed_name(number, "x") for number in range(1, files + 1)]
    for name in names:
        Path(outbox_dir.path_of(name)).write_bytes(PLAIN)
    return names


def make_compactor(outbox_dir: Directory, clock: ManualClock, in_use: str = "", after_s: float = 60.0) -> Compactor:
    return Compactor(outbox_dir, clock, after_s, lambda name: name == in_use, lambda _size: None)


def compress_all(compressor: Compactor) -> int:
    return sum(1 for _ in itertools.takewhile(bool, (compressor.compress_next()[0] for _ in itertools.count())))


def compressed_files(outbox_dir: Directory) -> list[str]:
    return [name for name in outbox_dir.batch_names() if name.endswith(layout.COMPRESSED_SUFFIX)]


# Which batches, and when.


def test_the_newest_batches_are_compressed_first_and_the_oldest_few_stay_plain(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """The oldest are sent first when the destination is back."""
    names = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 3)
    compressor = make_compactor(outbox_dir, clock)
    order = []
    while compressor.compress_next()[0]:
        order += [name for name in compressed_files(outbox_dir) if name not in order]
    assert order == [f"{name}.zst" for name in reversed(names[PLAIN_FILES_AT_HEAD:])]


def test_a_young_batch_stays_plain(outbox_dir: Directory, clock: ManualClock) -> None:
    """The seal time decides. A file without a seal time in its name is never compressed."""
    seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD)
    young = layout.sealed_name(clock.micros() - 59_000_000, "x")
    for name in (young, "sealed-by-hand.ndjson"):
        Path(outbox_dir.path_of(name)).write_bytes(PLAIN)
    compressor = make_compactor(outbox_dir, clock)
    assert compress_all(compressor) == 0
    clock.advance(2.0)
    assert compress_all(compressor) == 1
    assert compressed_files(outbox_dir) == [layout.compressed_name(young)]


def test_a_batch_in_use_stays_plain(outbox_dir: Directory, clock: ManualClock) -> None:
    """It is locked by the worker that sends it, or in use by its name."""
    *_, sent, remembered = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 2)
    locked_file = outbox_dir.lock_existing(sent)
    assert locked_file is not None
    assert compress_all(make_compactor(outbox_dir, clock, remembered)) == 0
    outbox_dir.filesystem.close(locked_file.fd)


def test_a_batch_that_one_of_several_sinks_is_sending_stays_plain_for_all(outbox_dir: Directory, clock: ManualClock) -> None:
    """Links to a file share its lock. Once it is unlocked, compressing one link leaves the others plain."""
    *_, name = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 1)
    queues = []
    for sink in ("a", "b"):
        request_queue(outbox_dir, sink)
        create_requested_queue(outbox_dir, sink)
        queues.append(outbox_dir.queue(sink))
    for sealed in outbox_dir.batch_names():
        outbox_dir.remove(sealed)
    locked_file = queues[0].lock_existing(name)
    assert locked_file is not None
    assert [compress_all(make_compactor(queue, clock)) for queue in queues] == [0, 0]
    outbox_dir.filesystem.close(locked_file.fd)
    assert compress_all(make_compactor(queues[1], clock)) == 1
    assert [name in queue.batch_names() for queue in queues] == [True, False]
    assert compressed_files(queues[1]) == [layout.compressed_name(name)]


def test_an_incompressible_batch_stays_plain_and_is_not_tried_again(outbox_dir: Directory, clock: ManualClock) -> None:
    """So does a batch that is too large to be decompressed."""
    names = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 2)
    Path(outbox_dir.path_of(names[-1])).write_bytes(os.urandom(1000))
    with Path(outbox_dir.path_of(names[-2])).open("wb") as file:
        file.truncate(compression.PLAIN_BYTES_MAX + 1)
    compressor = make_compactor(outbox_dir, clock)
    for _ in range(3):
        assert compress_all(compressor) == 0
        clock.advance(2.0)
    assert compressor._incompressible == set(names[-2:])
    os.remove(outbox_dir.path_of(names[-1]))
    compressor.compress_next()
    assert compressor._incompressible == {names[-2]}


def test_the_compactor_works_half_of_the_time_and_lists_rarely(outbox_dir: Directory, clock: ManualClock) -> None:
    """If there is nothing to do, it returns when to call it again."""
    assert make_compactor(outbox_dir, clock).compress_next() == (False, 1.0)


# During delivery.


class UnavailableSink(RecordingSink):
    """Returns the same result for every call until it is available again."""

    def __init__(self, answer: DeliveryResult) -> None:
        super().__init__()
        self.answer: DeliveryResult | None = answer

    async def deliver(self, batch: Batch) -> DeliveryResult:
        return await super().deliver(batch) if self.answer is None else self.answer


@pytest.mark.parametrize("answer", [Retry("not now"), Rejected(REJECTION)], ids=["waiting", "stopped"])
def test_batches_are_compressed_while_delivery_waits_and_arrive_unchanged(
    outbox_dir: Directory, answer: Retry | Rejected
) -> None:
    """Each is delivered once, in order, with its id. A rejected batch keeps its history, and the quota is told of the saved bytes."""
    names = seal_batches(outbox_dir, 30)
    before = outbox_dir.disk_usage().pending_bytes
    sink = UnavailableSink(answer)
    shrunk: list[int] = []
    gone: list[int] = []
    worker = make_worker(outbox_dir, sink, gone, RULES, on_bytes_saved=shrunk.append)
    thread = ThreadRunner(worker)
    thread.start()
    try:
        wait_until(lambda: len(compressed_files(outbox_dir)) >= 30 - PLAIN_FILES_AT_HEAD - 4)
        # The worker's thread may be compressing another batch, or about to report the bytes saved.
        wait_until(lambda: before - sum(shrunk) == outbox_dir.disk_usage().pending_bytes)
        assert reconcile(outbox_dir).reconciliation.total.pending == 3000
        sink.answer = None
        wait_until(lambda: not outbox_dir.batch_names())
    finally:
        thread.stop(60.0)
    assert list(sink.batches) == [layout.batch_id(name) for name in names] or isinstance(answer, Rejected)
    assert sorted(sink.batches) == [layout.batch_id(name) for name in names]
    assert worker.counters.delivered == 3000
    assert worker.counters.dead == 0
    assert sum(gone) + sum(shrunk) == before
    assert remaining_files(outbox_dir) == []


def test_a_damaged_compressed_file_is_delivered_up_to_the_damage(outbox_dir: Directory) -> None:
    """The file is quarantined unchanged, and delivery goes on."""
    name = layout.compressed_name(layout.sealed_name(1, "x"))
    lines = b"".join(record.line(b'{"n":%d,"x":"%s"}' % (number, os.urandom(30).hex().encode())) for number in range(9000))
    data = compression.compress(name, lines)
    data = data[: len(data) // 2]
    Path(outbox_dir.path_of(name)).write_bytes(data)
    seal_batch(outbox_dir, 2, b'{"n":-1}')
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert len(sink.payloads) > 3000
    assert sink.payloads[-1] == b'{"n":-1}'
    corrupt = Path(outbox_dir.path_of(layout.corrupt_name(layout.batch_id(name)))).read_bytes()
    assert corrupt.endswith(data)
    assert lines.startswith(b"".join(map(record.line, sink.payloads[:-1])) + corrupt.removesuffix(data))


def test_without_zstd_a_compressed_file_is_skipped_and_the_state_says_what_to_install(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other batches are delivered. Once zstd is installed, this one is delivered too, and nothing is quarantined."""
    name = layout.compressed_name(layout.sealed_name(1, "x"))
    Path(outbox_dir.path_of(name)).write_bytes(compression.compress(name, PLAIN))
    seal_batch(outbox_dir, 2, b"{}")
    sink = RecordingSink()
    with monkeypatch.context() as patch:
        patch.setattr(compression, "_zstd_module", lambda: None)
        worker = make_worker(outbox_dir, sink)
        drain_worker(worker)
        assert (worker.state.name, sink.payloads, remaining_files(outbox_dir)) == ("degraded", [b"{}"], [name])
        assert "pip install 'pillarbox[zstd]'" in worker.state.reason
        assert reconcile(outbox_dir).unreadable == [name]
    drain_worker(make_worker(outbox_dir, sink))
    assert (len(sink.payloads), remaining_files(outbox_dir)) == (101, [])


def test_the_events_in_an_evicted_compressed_file_are_counted(outbox_dir: Directory, clock: ManualClock) -> None:
    """A damaged file is left to the worker, because the number of its events is unknown."""
    names = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 2)
    compress_all(make_compactor(outbox_dir, clock))
    damaged = layout.compressed_name(names[-1])
    Path(outbox_dir.path_of(damaged)).write_bytes(b"x")
    usage = outbox_dir.disk_usage()
    writer = Writer(outbox_dir, WriterLimits(500, 10**6, 1), lambda: None)
    writer.start(usage.pending_bytes, usage.pending_files)
    capacity = QuotaEnforcer(outbox_dir, writer, clock, 0, evicts=True)
    capacity.enforce()
    assert outbox_dir.batch_names() == [damaged]
    assert capacity.evicted_events == 100 * (PLAIN_FILES_AT_HEAD + 1)
    assert writer.pending_counts()[:2] == (1, 1)


class RacyListingFilesystem(PortableScanOps, OsFilesystem):
    """Its first listing misses both names of a batch that is compressed meanwhile."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._missed = {name}

    def list_files(self, path: str) -> Iterator[FileEntry]:
        entries = [entry for entry in super().list_files(path) if entry.name.removesuffix(".zst") not in self._missed]
        if self._missed and entries:
            self._missed.clear()
        return iter(entries)


def test_a_batch_compressed_during_a_listing_is_not_missing(outbox_dir: Directory, clock: ManualClock) -> None:
    """Neither for `flush`, which would count it as delivered, nor for the counts."""
    names = seal_batches(outbox_dir, PLAIN_FILES_AT_HEAD + 1)
    ledger = LedgerWriter(outbox_dir, clock)
    ledger.add(*(SealedEntry(1, layout.batch_id(name), "w", 100, len(PLAIN)) for name in names))
    assert ledger.write(sync=True)
    compress_all(make_compactor(outbox_dir, clock))
    assert Directory(outbox_dir.path, RacyListingFilesystem(names[-1]), clock).waiting_batch_ids() == set(
        map(layout.batch_id, names)
    )
    assert _reconcile_once(
        Directory(outbox_dir.path, RacyListingFilesystem(names[-1]), clock), lambda _done, _total: None, {}
    ).balances


# An outage of real destinations.


def real_event(number: int) -> TrackingEvent:
    """A realistic event, with its own id and time."""
    return msgspec.structs.replace(REAL[number % len(REAL)], event_id=new_event_id(), occurred_at_micros=now_micros())


def wait_for_compression(outbox: Outbox) -> float:
    """Wait until all eligible batches are compressed; returns the compression ratio."""
    outbox_dir = outbox._directory
    wait_until(lambda: len(outbox_dir.batch_names()) - len(compressed_files(outbox_dir)) <= PLAIN_FILES_AT_HEAD)
    files = {name: Path(outbox_dir.path_of(name)).read_bytes() for name in compressed_files(outbox_dir)}
    assert len(files) > PLAIN_FILES_AT_HEAD
    return sum(len(compression.decompressed_lines(name, data)) for name, data in files.items()) / sum(map(len, files.values()))


def test_ten_times_the_outage_of_an_http_server_fits_into_the_same_bytes(tmp_path: Path) -> None:
    """The server responds 503. Once it works again, it gets every event once and in order."""
    with (
        Server() as server,
        Outbox(
            str(tmp_path / "outbox"),
            server.url("/in"),
            batch_size=200,
            flush_interval=0.1,
            backoff_max=0.5,
            compress_after=0.01,
        ) as outbox,
    ):
        server.respond = always(CannedResponse(503))
        events = [real_event(number) for number in range(6000)]
        plain = sum(len(record.line(msgspec.json.encode(one))) for one in events)
        for number, one in enumerate(events, 1):
            assert outbox.enqueue(one)
            if number % 200 == 0:
                assert outbox._sealer.seal_now("manual", 60.0)
        assert wait_for_compression(outbox) > 8
        wait_until(lambda: outbox.stats().pending_bytes < plain / 2)
        assert reconcile(outbox._directory).balances
        server.respond = always(CannedResponse())
        assert outbox.flush(60)
        wait_until(lambda: outbox.stats().pending_bytes == 0)
        assert reconcile(outbox._directory).balances
    accepted = {request.idempotency_key: request.events for request in server.requests}
    assert [one["event_id"] for batch in accepted.values() for one in batch] == [one.event_id for one in events]


def test_each_of_several_sinks_has_its_queue_compressed_and_gets_every_event_once(tmp_path: Path) -> None:
    """Both are down. A file that one of them is about to send stays plain for both."""
    events = [real_event(number) for number in range(600)]
    with (
        Server(always(CannedResponse(503))) as first,
        Server(always(CannedResponse(503))) as second,
        Outbox(
            str(tmp_path / "outbox"),
            sinks={"first": first.url("/in"), "second": second.url("/in")},
            flush_interval=0.1,
            backoff_max=0.5,
            compress_after=0.01,
        ) as outbox,
    ):
        for number, one in enumerate(events, 1):
            assert outbox.enqueue(one)
            if number % 30 == 0:
                assert outbox._sealer.seal_now("manual", 60.0)
        # Twenty, or more if some were sealed by age.
        queues = outbox._directory.queues()
        wait_until(
            lambda: all(
                len(queue.batch_names()) - PLAIN_FILES_AT_HEAD == len(compressed_files(queue)) >= 20 - PLAIN_FILES_AT_HEAD
                for queue in queues
            )
        )
        assert outbox.stats().pending_bytes >= 0
        first.respond = second.respond = always(CannedResponse())
        assert outbox.flush(60)
        assert outbox.stats().pending_bytes >= 0
        wait_until(lambda: outbox.stats().pending_bytes == 0)
        assert reconcile(outbox._directory).balances
    for server in (first, second):
        accepted = {request.idempotency_key: request.events for request in server.requests}
        assert [one["event_id"] for batch in accepted.values() for one in batch] == [one.event_id for one in events]


def test_an_sqlite_file_that_is_locked_gets_every_event_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program holds its lock for a while."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.1)
    file = tmp_path / "events.db"
    events = [real_event(number) for number in range(1001)]
    with Outbox(
        str(tmp_path / "outbox"), f"sqlite:///{file}", batch_size=50, flush_interval=0.1, backoff_max=0.5, compress_after=0.01
    ) as outbox:
        outbox.enqueue(events[0])
        assert outbox.flush(60)
        holder = sqlite3.connect(file, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        for number, one in enumerate(events[1:], 1):
            assert outbox.enqueue(one)
            if number % 50 == 0:
                assert outbox._sealer.seal_now("manual", 60.0)
        wait_for_compression(outbox)
        holder.execute("ROLLBACK")
        holder.close()
        assert outbox.flush(60)
    with sqlite3.connect(file) as reader:
        (table,) = reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchone()
        found = [row[0] for row in reader.execute(f"SELECT event_id FROM {table} ORDER BY rowid")]
    reader.close()
    assert found == [one.event_id for one in events]
