"""However delivery ends, it releases the lease, the locks of the files, and their file descriptors."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pillarbox import Outbox
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, PartialFailure, Rejection, SinkCapabilities
from pillarbox.store import layout, reader
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until
from tests.delivery.test_hostile_sinks import deliver_all, running_worker
from tests.delivery.worker_setup import QUICK_CONFIG, REJECTION, make_worker, remaining_files, seal_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pillarbox.store.directory import Directory

DESCRIPTORS = Path("/proc/self/fd")
OPEN_MAX = 800  # file descriptors of a worker; a process usually may have 1024

pytestmark = pytest.mark.skipif(not DESCRIPTORS.exists(), reason="needs /proc, which lists open descriptors")


def open_files(outbox_dir: Directory) -> list[str]:
    """The names of the files in a directory that this process has open."""
    found = []
    for descriptor in os.listdir(DESCRIPTORS):
        try:
            target = os.readlink(DESCRIPTORS / descriptor)
        except OSError:
            continue  # the descriptor of the listing itself
        if target.startswith(outbox_dir.path + "/"):
            found.append(os.path.basename(target))
    return sorted(found)


class HangingSink(RecordingSink):
    """Never returns a result, and ignores a cancellation if `uncancellable`."""

    def __init__(self, *, uncancellable: bool = False, confirms: bool = False, hangs_in: str = "deliver") -> None:
        super().__init__(needs_confirmation=confirms, unconfirmed_max=4)
        self.capabilities = self.capabilities._replace(concurrent=True)
        self.uncancellable = uncancellable
        self.hangs_in = hangs_in
        self.under_way = 0
        self.over = threading.Event()

    async def _hang(self, where: str) -> None:
        if where != self.hangs_in:
            return
        self.under_way += 1
        while not self.over.is_set():
            try:
                # wait: the call is under way while the test acts
                await asyncio.sleep(0.02)  # it polls, because it swallows the cancellation
            except asyncio.CancelledError:
                if not self.uncancellable:
                    raise

    async def open(self) -> None:
        await self._hang("open")

    async def deliver(self, batch: Batch) -> DeliveryResult:
        await self._hang("deliver")
        return await super().deliver(batch)

    async def confirm(self, batches: Sequence[Batch]) -> int:
        await self._hang("confirm")
        return await super().confirm(batches)

    async def close(self) -> None:
        await self._hang("close")


def can_take_over(outbox_dir: Directory) -> bool:
    """Whether another worker in this process can deliver the remaining batches."""
    worker = make_worker(outbox_dir, RecordingSink())
    with running_worker(worker):
        return worker.idle.wait(60) and remaining_files(outbox_dir) == []


@pytest.mark.parametrize("uncancellable", [False, True])
@pytest.mark.parametrize(
    ("hangs_in", "in_flight"), [("deliver", 1), ("deliver", 4), ("confirm", 1), ("confirm", 4), ("close", 1)]
)
def test_a_forced_end_releases_everything(outbox_dir: Directory, hangs_in: str, in_flight: int, *, uncancellable: bool) -> None:
    """Wherever the sink hangs, another worker can start at once and gets every file."""
    for stamp in range(1, 8):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = HangingSink(uncancellable=uncancellable, confirms=True, hangs_in=hangs_in)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(max_in_flight=in_flight))
    with running_worker(worker) as thread:
        wait_until(
            lambda: (
                worker.idle.is_set() if hangs_in == "close" else sink.under_way == (in_flight if hangs_in == "deliver" else 1)
            )
        )
        thread.stop(0.1)
        try:
            # On a busy machine, the thread may still be running when `stop` returns.
            wait_until(lambda: (worker.lease.is_held, open_files(outbox_dir)) == (False, []))
            assert can_take_over(outbox_dir)
        finally:
            sink.over.set()


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), SystemExit(1)], ids=repr)
def test_a_sink_that_fails_to_close_is_dropped(outbox_dir: Directory, error: BaseException) -> None:
    """Its exception has no other effect."""

    class Stuck(RecordingSink):
        closed = 0

        async def close(self) -> None:
            self.closed += 1
            raise error

    seal_batch(outbox_dir, 1, b"1")
    sink = Stuck()
    worker = make_worker(outbox_dir, sink)
    with running_worker(worker):
        assert worker.idle.wait(60)
    assert (sink.closed, worker.lease.is_held, open_files(outbox_dir)) == (1, False, [])
    seal_batch(outbox_dir, 2, b"2")
    assert can_take_over(outbox_dir)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_an_outbox_is_closed_during_a_call_and_opened_again(tmp_path: Path, in_flight: int) -> None:
    """In one process. The second outbox delivers what the first did not."""
    path = str(tmp_path / "outbox")
    hanging = HangingSink()
    with Outbox(path, sink=hanging, max_in_flight=in_flight, flush_interval=0.05) as outbox:
        outbox.enqueue(event(1))
        wait_until(lambda: hanging.under_way > 0)
        outbox.close(0.1)
    sink = RecordingSink()
    with Outbox(path, sink=sink, flush_interval=0.05) as outbox:
        outbox.enqueue(event(2))
        assert outbox.flush(60)
    assert len(sink.payloads) == 2


def make_call_fail(monkeypatch: pytest.MonkeyPatch, module: object, name: str, error: BaseException, call: int) -> list[int]:
    """Let one call of a function raise; returns a list that grows with each call."""
    real: Callable[..., object] = getattr(module, name)
    calls: list[int] = []

    def failing(*values: object) -> object:
        calls.append(len(calls) + 1)
        if calls[-1] == call:
            raise error
        return real(*values)

    monkeypatch.setattr(module, name, failing)
    return calls


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a defect"), OSError("unreadable")], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize(("in_flight", "combines"), [(1, False), (4, False), (1, True)])
def test_a_file_whose_reading_fails_is_released(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch, error: Exception, call: int, in_flight: int, *, combines: bool
) -> None:
    """Whatever the error and whichever the file: all are delivered in the end, and none stays locked."""
    monkeypatch.setattr("pillarbox.delivery.runner._RESTART_S", 0.01)
    calls = make_call_fail(monkeypatch, reader, "read_lines", error, call)
    for stamp in range(1, 5):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    sink = RecordingSink()
    sink.capabilities = sink.capabilities._replace(concurrent=True, combines_files=combines)
    worker = make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(max_in_flight=in_flight))
    with running_worker(worker):
        wait_until(lambda: remaining_files(outbox_dir) == [])
        wait_until(lambda: open_files(outbox_dir) == [layout.DELIVER_LOCK])
    assert len(calls) > 4
    assert sorted(set(sink.payloads)) == [b"1", b"2", b"3", b"4"]
    assert open_files(outbox_dir) == []


@pytest.mark.parametrize("name", ["write_dead_letters", "write_quarantine"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a defect"), OSError("full")], ids=repr)
@pytest.mark.parametrize("confirms", [False, True])
def test_a_file_whose_settlement_fails_is_released(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, *, confirms: bool
) -> None:
    """It is sent again with the same id, and then settled. The others do not wait for it."""
    from pillarbox.delivery import settlement

    calls = make_call_fail(monkeypatch, settlement, name, error, 1)

    class PartlyRejectingSink(RecordingSink):
        async def deliver(self, batch: Batch) -> DeliveryResult:
            bad = [index for index, payload in enumerate(batch.payloads) if payload == b'"bad"']
            answer = PartialFailure(dict.fromkeys(bad, REJECTION), len(batch) - len(bad)) if bad else Delivered(len(batch))
            self.results.append(answer)
            return await super().deliver(batch)

    first = seal_batch(outbox_dir, 1, b'"good"', b'"bad"', raw=b"torn\n")
    second = seal_batch(outbox_dir, 2, b'"next"')
    sink = PartlyRejectingSink(needs_confirmation=confirms, unconfirmed_max=4)
    worker = make_worker(outbox_dir, sink)
    with running_worker(worker):
        wait_until(
            lambda: (
                remaining_files(outbox_dir)
                == sorted([layout.dead_name(first), layout.corrupt_name(first), layout.ranges_name(first)])
            )
        )
        wait_until(lambda: open_files(outbox_dir) == [layout.DELIVER_LOCK])
    assert len(calls) == 2
    assert sink.calls.count(first) == 2
    assert sink.batches[second] == [b'"next"']


def test_an_invalid_rejection_leaves_no_descriptor_open(outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink returns text in place of a Rejection. The file stays, and another process can lock it."""
    monkeypatch.setattr("pillarbox.delivery.runner._RESTART_S", 0.01)
    wrong: dict[int, Rejection] = {1: "no such scope"}  # type: ignore[dict-item]
    batch = seal_batch(outbox_dir, 1, b'"good"', b'"bad"')
    sink = RecordingSink([PartialFailure(wrong, 1)] * 3)
    worker = make_worker(outbox_dir, sink)
    with running_worker(worker):
        wait_until(lambda: remaining_files(outbox_dir) == [])
    assert set(sink.calls) == {batch}
    assert open_files(outbox_dir) == []


def lock_file(outbox_dir: Directory, batch: str) -> int:
    """Lock a file as another process would; returns the file descriptor."""
    descriptor = os.open(outbox_dir.path_of(batch + layout.SUFFIX), os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@pytest.mark.parametrize("combines", [False, True])
def test_locked_files_do_not_stop_delivery_and_are_reported(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch, *, combines: bool
) -> None:
    """Other files overtake two locked ones, the state names them, and they are delivered once they are unlocked."""
    monkeypatch.setattr("pillarbox.delivery.fetcher._LOCK_WAIT_S", 0.2)
    batches = [seal_batch(outbox_dir, stamp, b"%d" % stamp) for stamp in range(1, 6)]
    locked_files = [lock_file(outbox_dir, batch) for batch in batches[:3:2]]
    sink = RecordingSink()
    sink.capabilities = sink.capabilities._replace(combines_files=combines)
    worker = make_worker(outbox_dir, sink)
    with running_worker(worker):
        wait_until(lambda: set(sink.payloads) == {b"2", b"4", b"5"})
        wait_until(lambda: "(1 more warning)" in worker.state.reason)  # before, it was degraded for one of them
        assert worker.state.name == "degraded"
        assert f"{batches[0]}.ndjson: locked by another process" in worker.state.reason
        for descriptor in locked_files:
            os.close(descriptor)
        wait_until(lambda: worker.state.name == "idle")
    assert (sorted(sink.payloads), remaining_files(outbox_dir)) == ([b"1", b"2", b"3", b"4", b"5"], [])


def test_a_worker_whose_lease_file_was_deleted_releases_the_lease(outbox_dir: Directory) -> None:
    """After `deliver.lock` is deleted, only one of two workers continues."""
    first, second = make_worker(outbox_dir, RecordingSink()), make_worker(outbox_dir, RecordingSink())
    with running_worker(first), running_worker(second):
        wait_until(lambda: {first.state.name, second.state.name} == {"idle", "standby"})
        os.unlink(outbox_dir.path_of(layout.DELIVER_LOCK))
        wait_until(lambda: os.path.exists(outbox_dir.path_of(layout.DELIVER_LOCK)))
        wait_until(lambda: first.lease.is_held != second.lease.is_held)
        wait_until(lambda: {first.state.name, second.state.name} == {"idle", "standby"})
        seal_batch(outbox_dir, 1, b"1")
        wait_until(lambda: remaining_files(outbox_dir) == [])
    assert first.counters.delivered + second.counters.delivered == 1


class DescriptorCountingSink(RecordingSink):
    """Counts the open file descriptors during its calls."""

    def __init__(self, *, confirms: bool, combines: bool) -> None:
        super().__init__()
        self.capabilities = SinkCapabilities(
            "event_id", "power", confirms, 64 if confirms else 1, concurrent=True, combines_files=combines
        )
        self.most = 0
        self.taken = 0

    async def deliver(self, batch: Batch) -> DeliveryResult:
        # wait: the call is under way while the test acts
        await asyncio.sleep(0.002)  # several calls are in flight at the same time
        self.most = max(self.most, len(os.listdir(DESCRIPTORS)))
        self.taken += len(batch)
        return Delivered(len(batch))

    async def confirm(self, batches: Sequence[Batch]) -> int:
        # wait: the call is under way while the test acts
        await asyncio.sleep(0.05)  # batches pile up unconfirmed meanwhile
        return len(batches)


@pytest.mark.parametrize(
    ("confirms", "in_flight", "combines"),
    [(False, 1, True), (False, 16, True), (True, 1, True), (True, 16, True), (True, 16, False)],
)
def test_few_files_are_open_however_many_small_ones_are_pending(
    outbox_dir: Directory, in_flight: int, *, confirms: bool, combines: bool
) -> None:
    """The application needs file descriptors for itself."""
    files = 2000 if combines else 300
    for stamp in range(1, files + 1):
        seal_batch(outbox_dir, stamp, b"1")
    sink = DescriptorCountingSink(confirms=confirms, combines=combines)
    before = len(os.listdir(DESCRIPTORS))
    deliver_all(make_worker(outbox_dir, sink, config=QUICK_CONFIG._replace(max_in_flight=in_flight)))
    assert (sink.taken, remaining_files(outbox_dir)) == (files, [])
    assert sink.most - before <= OPEN_MAX
    assert open_files(outbox_dir) == []
