"""The delivery loop on a real directory, with a sink that returns the results that a test chooses."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.config import DeliveryConfig
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.lease import Lease, read_heartbeat
from pillarbox.delivery.runner import ThreadRunner
from pillarbox.delivery.worker import Worker
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks.base import Batch, DeliveryResult, Misconfigured, PartialFailure, Retry, UnconfirmedError
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.dirscan import FileEntry, PortableScanOps
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import create_unusable_file, wait_until
from tests.delivery.worker_setup import (
    QUICK_CONFIG,
    REJECTION,
    PoisonedSink,
    drain_worker,
    make_worker,
    remaining_files,
    seal_batch,
)


def test_batches_are_delivered_in_order_and_their_files_deleted(outbox_dir: Directory) -> None:
    """A file is a batch; its bytes are released."""
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp, b"0") for stamp in (3, 1, 2)]
    size = sum(entry.size for entry in outbox_dir.filesystem.list_files(outbox_dir.path))
    released: list[int] = []
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink, released)
    drain_worker(worker)
    assert sink.calls == sorted(batches)
    assert sink.payloads == [b"1", b"0", b"2", b"0", b"3", b"0"]
    assert (remaining_files(outbox_dir), sum(released), worker.counters.delivered) == ([], size, 6)


def test_a_file_stays_and_is_retried_without_limit_after_failures(outbox_dir: Directory) -> None:
    """An exception of the sink counts as a failure."""
    batch = seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink([Retry("busy"), OSError("cut"), *[Retry("busy")] * 20])
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert sink.calls == [batch] * 23
    assert worker.counters.failed_flushes == 22
    assert (worker.counters.delivered, remaining_files(outbox_dir)) == (1, [])


def test_a_damaged_line_is_quarantined_and_the_other_lines_and_files_are_delivered(outbox_dir: Directory) -> None:
    """The bytes are kept unchanged, with their byte range and the reason."""
    batch = seal_batch(outbox_dir, 1, b"1", raw=b'rubbish\n{"event":2,"crc":"00000000"}\n' + record.line(b"3") + b"torn")
    seal_batch(outbox_dir, 2, b"4")
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert sink.payloads == [b"1", b"3", b"4"]
    assert remaining_files(outbox_dir) == [layout.corrupt_name(batch), layout.ranges_name(batch)]
    assert Path(outbox_dir.path_of(layout.corrupt_name(batch))).read_bytes() == b'rubbish\n{"event":2,"crc":"00000000"}\ntorn'
    byte_ranges = json.loads(Path(outbox_dir.path_of(layout.ranges_name(batch))).read_bytes())
    assert [(byte_range["offset"], byte_range["length"], byte_range["reason"]) for byte_range in byte_ranges] == [
        (len(record.line(b"1")), 8, "bad_json"),
        (len(record.line(b"1")) + 8, 29, "bad_checksum"),
        (len(record.line(b"1")) + 37 + len(record.line(b"3")), 4, "torn: bad_json"),
    ]
    assert (worker.counters.quarantined, worker.counters.delivered) == (3, 3)
    assert outbox_dir.disk_usage().pending_bytes == 0


def test_a_file_without_records_is_deleted_without_a_call(outbox_dir: Directory) -> None:
    """An empty file, or one with blank lines only."""
    seal_batch(outbox_dir, 1)
    seal_batch(outbox_dir, 2, raw=b"\n  \n\n")
    sink = RecordingSink()
    drain_worker(make_worker(outbox_dir, sink))
    assert (sink.calls, remaining_files(outbox_dir)) == ([], [])


def test_a_file_with_only_damaged_lines_is_quarantined(outbox_dir: Directory) -> None:
    """Without a call."""
    batch = seal_batch(outbox_dir, 1, raw=b"active\n")
    sink = RecordingSink()
    drain_worker(make_worker(outbox_dir, sink))
    assert (sink.calls, remaining_files(outbox_dir)) == ([], [layout.corrupt_name(batch), layout.ranges_name(batch)])


def test_rejected_records_become_dead_letters_with_their_reason(outbox_dir: Directory) -> None:
    """The other records are delivered."""
    batch = seal_batch(outbox_dir, 1, b'"a"', b'"b"', b'"c"')
    worker = make_worker(outbox_dir, RecordingSink([Retry("busy"), PartialFailure({1: REJECTION}, accepted=2)]))
    drain_worker(worker)
    (dead,) = Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes().splitlines()
    letter = json.loads(dead)
    assert (letter["event"], letter["code"], letter["reason"], letter["sink"]) == ("b", "no", "it says so", "test")
    assert (letter["index"], letter["attempts"]) == (1, 2)
    assert letter["first_at_micros"] <= letter["last_at_micros"]
    assert (worker.counters.delivered, worker.counters.dead, remaining_files(outbox_dir)) == (2, 1, [layout.dead_name(batch)])


def test_after_a_rolled_back_call_the_records_around_the_rejected_one_are_sent(outbox_dir: Directory) -> None:
    """In runs, with ids that say which records they have."""
    batch = seal_batch(outbox_dir, 1, *(b"%d" % number for number in range(5)))
    sink = RecordingSink([PartialFailure({1: REJECTION})])
    drain_worker(make_worker(outbox_dir, sink))
    assert sink.calls == [batch, f"{batch}:0-0", f"{batch}:2-4"]
    assert sink.payloads == [b"0", b"2", b"3", b"4"]


@pytest.mark.parametrize("poison_index", [0, 1, 249, 250, 499])
def test_one_poisoned_record_of_500_takes_at_most_18_extra_calls(outbox_dir: Directory, poison_index: int) -> None:
    """Twice the binary logarithm of 500, rounded up."""
    payloads = [b"%d" % number for number in range(500)]
    payloads[poison_index] = b'"poison"'
    batch = seal_batch(outbox_dir, 1, *payloads)
    sink = PoisonedSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert len(sink.calls) <= 1 + 18
    assert sink.payloads == [payload for payload in payloads if payload != b'"poison"']
    (dead,) = Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes().splitlines()
    assert json.loads(dead)["index"] == poison_index


def test_a_misconfiguration_stops_delivery_with_an_error_and_delivery_resumes_by_itself(
    outbox_dir: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """There are no dead letters, and one line is logged, not one per attempt."""
    caplog.set_level(logging.INFO, "pillarbox")
    seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink([Misconfigured("no such table")] * 30)
    drain_worker(make_worker(outbox_dir, sink))
    assert (sink.payloads, remaining_files(outbox_dir)) == ([b"1"], [])
    said = [entry.message for entry in caplog.records if "no such table" in entry.message]
    assert len(said) == 1
    assert said[0].startswith("test: stopped: no such table")


def test_an_unreadable_file_is_skipped(outbox_dir: Directory, tmp_path: Path) -> None:
    """It is reported; the files after it are delivered."""
    (tmp_path / "elsewhere").write_bytes(record.line(b"1"))
    create_unusable_file("hardlink", Path(outbox_dir.path_of(layout.sealed_name(1, "u"))), tmp_path / "elsewhere")
    seal_batch(outbox_dir, 2, b"2")
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    drain_worker(worker)
    assert sink.payloads == [b"2"]
    assert worker.state.name == "degraded"
    assert "hard link" in worker.state.reason


def test_files_of_a_dead_writer_are_recovered_while_delivering(outbox_dir: Directory) -> None:
    """Also by a process that does not enqueue."""
    Path(outbox_dir.path_of("active-w-1.ndjson")).write_bytes(record.line(b"1"))
    sink = RecordingSink()
    drain_worker(make_worker(outbox_dir, sink))
    assert sink.payloads == [b"1"]


def test_one_process_delivers_and_another_takes_over(outbox_dir: Directory) -> None:
    """The lock decides; the heartbeat of its holder can be read."""
    lease = Lease(outbox_dir, "other", SystemClock())
    assert lease.acquire()
    seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "standby")
    # wait: nothing may happen in this time
    assert not worker.idle.wait(0.1)  # long enough to deliver it, if that were wrong
    assert sink.calls == []
    lease.release()
    assert worker.idle.wait(60)
    assert sink.payloads == [b"1"]
    beat = read_heartbeat(outbox_dir)
    assert beat is not None
    assert (beat.pid, beat.sink) == (os.getpid(), "test")
    assert thread.stop(30)


def test_a_file_that_another_process_has_locked_is_not_delivered(outbox_dir: Directory) -> None:
    """For example, during an eviction."""
    batch = seal_batch(outbox_dir, 1, b"1")
    locked_file = outbox_dir.lock_existing(f"{batch}.ndjson")
    assert locked_file is not None
    sink = RecordingSink()
    drain_worker(make_worker(outbox_dir, sink))
    assert (sink.calls, remaining_files(outbox_dir)) == ([], [f"{batch}.ndjson"])
    outbox_dir.filesystem.close(locked_file.fd)


def test_a_file_that_is_unlocked_after_a_moment_is_not_overtaken(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies or has just sealed the file keeps the lock a little longer than the old name."""
    monkeypatch.setattr("pillarbox.delivery.fetcher._LOCK_WAIT_S", 60.0)  # so that the wait is long enough to observe
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in (1, 2, 3)]
    locked_file = outbox_dir.lock_existing(f"{batches[0]}.ndjson")
    assert locked_file is not None
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    thread = ThreadRunner(worker)
    thread.start()
    # wait: nothing may happen in this time
    assert not worker.idle.wait(0.1)  # long enough to deliver it, if that were wrong
    assert sink.calls == []
    outbox_dir.filesystem.close(locked_file.fd)
    assert worker.idle.wait(60)
    assert sink.calls == batches
    assert thread.stop(30)


class _MissingFirstBatch(PortableScanOps, OsFilesystem):
    """Its first listing of batches misses the first one, as a listing may during a rename."""

    def __init__(self) -> None:
        super().__init__()
        self.listings = 0

    def list_files(self, path: str) -> Iterator[FileEntry]:
        found = sorted(super().list_files(path))
        self.listings += any(entry.name.startswith("sealed-") for entry in found)
        return (entry for entry in found if self.listings != 2 or not entry.name.startswith("sealed-0000000000000001"))


def test_a_batch_that_a_listing_misses_is_not_overtaken(outbox_dir: Directory) -> None:
    """The first listing is for recovery, the second for batches, and a third one shows all of them."""
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in (1, 2, 3)]
    sink = RecordingSink()
    drain_worker(make_worker(Directory(outbox_dir.path, _MissingFirstBatch(), SystemClock()), sink))
    assert sink.calls == batches


def test_many_batches_may_be_unconfirmed(outbox_dir: Directory) -> None:
    """None is deleted before it is confirmed; one confirmation covers all of them."""
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = _ConfirmingSink(window=8)
    worker = make_worker(outbox_dir, sink)

    async def scenario() -> None:
        running = asyncio.create_task(worker.run())
        await asyncio.wait_for(sink.all_sent.wait(), 60)
        assert len(outbox_dir.batch_names()) == 5
        sink.sure.set()
        await asyncio.wait_for(asyncio.to_thread(worker.idle.wait), 60)
        worker.end()
        await running

    asyncio.run(scenario())
    assert (remaining_files(outbox_dir), worker.counters.delivered) == ([], 5)
    assert sum(sink.groups) == 5
    assert len(sink.groups) <= 3  # the first, those sent meanwhile, and one that was in flight


class _ConfirmingSink(RecordingSink):
    """Confirms when the test allows it."""

    def __init__(self, window: int) -> None:
        super().__init__(needs_confirmation=True, unconfirmed_max=window)
        self.sure = asyncio.Event()
        self.all_sent = asyncio.Event()
        self.groups: list[int] = []

    async def deliver(self, batch: Batch) -> DeliveryResult:
        answer = await super().deliver(batch)
        if len(self.calls) == 5:
            self.all_sent.set()
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        await self.sure.wait()
        self.groups.append(len(batches))
        return len(batches)


def test_a_part_of_the_sent_batches_may_be_confirmed(outbox_dir: Directory) -> None:
    """The sink is asked again for the rest, which is not sent again."""
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in range(1, 8)]
    sink = RecordingSink(needs_confirmation=True, unconfirmed_max=7)
    sink.confirmations.extend([1, 2, 1])
    drain_worker(make_worker(outbox_dir, sink))
    assert remaining_files(outbox_dir) == []
    assert sink.calls == batches


def test_one_batch_at_a_time_is_confirmed_too(outbox_dir: Directory) -> None:
    """A window of one does not disable confirmations."""
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in range(1, 4)]
    sink = RecordingSink(needs_confirmation=True, unconfirmed_max=1)
    sink.confirmations.extend([0, UnconfirmedError("the server is another one")])
    drain_worker(make_worker(outbox_dir, sink))
    assert remaining_files(outbox_dir) == []
    assert sink.calls == [batches[0], *batches]


def test_a_misconfiguration_that_prevents_confirmations_stops_delivery(
    outbox_dir: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    """The state has the reason, and nothing is deleted until it is fixed."""
    batch = seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink(needs_confirmation=True, unconfirmed_max=4)
    sink.confirmations.append(SinkUnusableError("the query is not allowed"))
    drain_worker(make_worker(outbox_dir, sink))
    assert "stopped: the query is not allowed" in caplog.text
    assert (sink.calls, remaining_files(outbox_dir)) == ([batch] * 2, [])


def test_unconfirmed_batches_are_sent_again_in_order(outbox_dir: Directory) -> None:
    """With the same ids."""
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in (1, 2, 3)]
    sink = RecordingSink(needs_confirmation=True, unconfirmed_max=3)
    sink.confirmations.extend([UnconfirmedError("gone"), OSError("cut"), 0])
    drain_worker(make_worker(outbox_dir, sink))
    assert remaining_files(outbox_dir) == []
    assert set(sink.calls) == set(batches)
    assert sink.calls.count(batches[0]) >= 2
    assert list(sink.batches) == batches


def test_dead_letters_are_not_duplicated_after_a_kill_before_the_deletion(outbox_dir: Directory) -> None:
    """The same files are overwritten with the same content."""
    payloads = [b'"a"', b'"b"']
    batch = seal_batch(outbox_dir, 1, *payloads, raw=b"rubbish\n")
    drain_worker(make_worker(outbox_dir, RecordingSink([PartialFailure({1: REJECTION}, accepted=1)])))
    before = {name: Path(outbox_dir.path_of(name)).read_bytes() for name in remaining_files(outbox_dir) if "dead" not in name}
    seal_batch(outbox_dir, 1, *payloads, raw=b"rubbish\n")
    drain_worker(make_worker(outbox_dir, RecordingSink([PartialFailure({1: REJECTION}, accepted=1)])))
    assert {
        name: Path(outbox_dir.path_of(name)).read_bytes() for name in remaining_files(outbox_dir) if "dead" not in name
    } == before
    dead = msgspec.json.decode(Path(outbox_dir.path_of(layout.dead_name(batch))).read_bytes())
    assert dead["event"] == "b"


def test_a_hanging_sink_does_not_delay_the_end(outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is cancelled, and the file stays."""
    monkeypatch.setattr("pillarbox.delivery.runner._CANCEL_GRACE_S", 60.0)  # generous, because the machine may be busy
    batch = seal_batch(outbox_dir, 1, b"1")
    sink = _HangingSink()
    thread = ThreadRunner(make_worker(outbox_dir, sink))
    thread.start()
    assert sink.entered.wait(60)
    assert thread.stop(0.05)
    assert remaining_files(outbox_dir) == [f"{batch}.ndjson"]


class _HangingSink(RecordingSink):
    """Never returns a result."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self.entered.set()
        await asyncio.Event().wait()
        return await super().deliver(batch)


class _FailingDeletions(OsFilesystem):
    """Fails to delete batch files a few times."""

    refusals = 3

    def unlink(self, path: str) -> None:  # type: ignore[override]
        if self.refusals and "sealed-" in path:
            self.refusals -= 1
            raise OSError(30, "Read-only file system")
        os.unlink(path)


def test_a_failed_settlement_is_retried_without_limit(outbox_dir: Directory) -> None:
    """It is counted, and its reason is reported."""
    batch = seal_batch(outbox_dir, 1, b"1")
    clinging = Directory(outbox_dir.path, _FailingDeletions(), SystemClock())
    sink = RecordingSink()
    worker = make_worker(clinging, sink)
    drain_worker(worker)
    assert (sink.calls, remaining_files(outbox_dir)) == ([batch] * 4, [])
    assert worker.counters.failed_flushes == 3
    assert "or its file not deleted: " in worker.last_error


def test_a_file_that_cannot_be_settled_does_not_delay_others(outbox_dir: Directory) -> None:
    """A directory has the name of its quarantine file. The file is held, the others are delivered, and the state names the reason."""
    stuck = seal_batch(outbox_dir, 1, b"1", raw=b"damage\n")
    for number in range(2, 12):
        seal_batch(outbox_dir, number, b'{"event":{"n":%d}}' % number)
    os.makedirs(outbox_dir.path_of(f"corrupt-{stuck}.ndjson/x"))
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: outbox_dir.batch_names() == [f"{stuck}.ndjson"] and worker.state.name == "degraded")
    assert "its dead letters or damaged bytes could not be written" in worker.state.reason
    assert not worker.idle.is_set()
    os.rmdir(outbox_dir.path_of(f"corrupt-{stuck}.ndjson/x"))
    os.rmdir(outbox_dir.path_of(f"corrupt-{stuck}.ndjson"))
    assert worker.idle.wait(60)
    assert (outbox_dir.batch_names(), worker.state.name) == ([], "idle")
    assert thread.stop(30)
    assert Path(outbox_dir.path_of(f"corrupt-{stuck}.ndjson")).read_bytes() == b"damage\n"


def test_a_worker_can_be_run_again(outbox_dir: Directory) -> None:
    """On another event loop, with the sink opened again."""
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    for stamp in (1, 2):
        batch = seal_batch(outbox_dir, stamp, b"%d" % stamp)
        worker.idle.clear()
        drain_worker(worker)
        assert sink.calls[-1] == batch
    assert (sink.open_count, remaining_files(outbox_dir)) == (2, [])


def test_a_batch_sealed_just_before_the_end_is_delivered(outbox_dir: Directory) -> None:
    """A regression test: the notification and the request to end arrive at the same moment."""
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(poll_interval_s=60.0))
    thread = ThreadRunner(worker)
    thread.start()
    assert worker.idle.wait(60)
    seal_batch(outbox_dir, 1, b"1")
    thread.notify()
    assert thread.stop(60)
    assert sink.payloads == [b"1"]


def test_delivery_is_taken_over_within_a_second_whatever_the_poll_interval(outbox_dir: Directory) -> None:
    """`flush_interval` may be a day. The shortest of several measurements counts, because the machine may be busy."""

    def taken_over_after() -> float:
        lease, sink, clock = Lease(outbox_dir, "other", SystemClock()), RecordingSink(), SystemClock()
        assert lease.acquire()
        seal_batch(outbox_dir, 1, b"1")
        worker = Worker(outbox_dir, NamedSink(sink, "test"), clock, DeliveryConfig(poll_interval_s=86_400.0))
        thread = ThreadRunner(worker)
        thread.start()
        wait_until(lambda: worker.state.name == "standby")
        lease.release()
        began = clock.monotonic()
        assert worker.idle.wait(60)
        took = clock.monotonic() - began
        assert sink.payloads == [b"1"]
        assert thread.stop(30)
        return took

    assert any(taken_over_after() < 1.0 for _ in range(10))


def test_a_planted_link_as_lock_file_is_reported_until_it_is_deleted(outbox_dir: Directory, tmp_path: Path) -> None:
    """The state names it, and nothing is written to its target."""
    (tmp_path / "victim").write_bytes(b"precious")
    planted = Path(outbox_dir.path_of(layout.DELIVER_LOCK))
    create_unusable_file("hardlink", planted, tmp_path / "victim")
    seal_batch(outbox_dir, 1, b"1")
    sink = RecordingSink()
    worker = make_worker(outbox_dir, sink)
    thread = ThreadRunner(worker)
    thread.start()
    wait_until(lambda: worker.state.name == "degraded")
    # wait: nothing may happen in this time
    assert not worker.idle.wait(0.1)  # long enough to deliver it, if that were wrong
    assert "hard link" in worker.state.reason
    assert sink.calls == []
    planted.unlink()
    assert worker.idle.wait(60)
    assert (sink.payloads, (tmp_path / "victim").read_bytes()) == ([b"1"], b"precious")
    assert thread.stop(30)


class _DeletionTracingFilesystem(OsFilesystem):
    """Records deletions and directory syncs."""

    def __init__(self) -> None:
        super().__init__()
        self.verbs: list[str] = []

    def unlink(self, path: str) -> None:  # type: ignore[override]
        os.unlink(path)
        if "sealed-" in path:
            self.verbs.append("remove")

    def sync_directory(self, path: str) -> None:
        self.verbs.append("sync")
        super().sync_directory(path)


def test_deletions_are_synced_together_before_the_worker_idles(outbox_dir: Directory, clock: ManualClock) -> None:
    """So a settled batch does not reappear after a power loss, and no batch is sent before its name is durable."""
    for stamp in (1, 2, 3):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    tracing = _DeletionTracingFilesystem()
    drain_worker(make_worker(Directory(outbox_dir.path, tracing, clock), RecordingSink(), clock=clock))
    assert tracing.verbs == ["sync", "remove", "remove", "remove", "sync"]


def test_deletions_are_synced_once_a_second_during_a_drain(outbox_dir: Directory, clock: ManualClock) -> None:
    """If the sync fails, delivery continues."""

    class Passing(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            clock.advance(0.6)
            return await super().deliver(batch)

    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    tracing = _DeletionTracingFilesystem()
    worker = Worker(
        Directory(outbox_dir.path, tracing, clock),
        NamedSink(Passing(), "test"),
        clock,
        QUICK_CONFIG,
    )
    drain_worker(worker)
    assert tracing.verbs == ["sync", "remove", "remove", "remove", "sync", "remove", "remove", "sync"]
