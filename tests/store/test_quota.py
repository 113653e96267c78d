"""Full directories: dropped events, eviction, blocking and raising, and limits across processes."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from pillarbox import Dropped, Enqueued, Outbox, OutboxFullError
from pillarbox.clock import SystemClock
from pillarbox.sinks.base import Retry
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import event, wait_until

LINE_BYTES = 240  # about; of a line with `event(n)`


def ids_on_disk(path: Path) -> list[str]:
    """The ids of all pending events, oldest file first."""
    ids: list[str] = []
    for name in sorted(os.listdir(path), key=lambda name: (not name.startswith("sealed-"), name)):
        if layout.kind_of(name) in (layout.Kind.SEALED, layout.Kind.ACTIVE):
            ids += [line.split(b'"event_id":"')[1].split(b'"')[0].decode() for line in (path / name).read_bytes().splitlines()]
    return ids


def pending_bytes(path: str) -> int:
    """The bytes of all pending files in a directory."""
    return Directory(path, OsFilesystem(), SystemClock()).disk_usage().pending_bytes


def test_drop_oldest_evicts_whole_batches_and_counts_their_events(tmp_path: Path) -> None:
    """The newest events remain, without a gap; accepted = pending + evicted."""
    with Outbox(str(tmp_path / "outbox"), when_full="drop_oldest", max_bytes=100 * LINE_BYTES, flush_interval=0.05) as outbox:
        accepted = [f"e-{number:06d}" for number in range(2000)]
        for number in range(2000):
            # The sealer needs time to evict.
            wait_until(lambda number=number: bool(outbox.enqueue(event(number))))  # type: ignore[misc]  # mypy: a default of a lambda
        wait_until(lambda: outbox.stats().pending_bytes <= 100 * LINE_BYTES)
    stats = outbox.stats()
    remaining = ids_on_disk(tmp_path / "outbox")
    assert remaining == accepted[-len(remaining) :]
    assert stats.evicted == len(accepted) - len(remaining)
    assert stats.evicted > 1000
    assert len(remaining) > 40
    assert stats.accepted == len(accepted)


def test_a_suspended_process_that_holds_the_lock_for_eviction_does_not_stop_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise all other processes would drop every event until that process continues."""
    folder, stored_after = tmp_path / "outbox", 0
    with Outbox(str(folder), when_full="drop_oldest", max_bytes=100 * LINE_BYTES, flush_interval=0.02) as outbox:
        assert outbox.enqueue(event(0))
        holder = Directory(str(folder), OsFilesystem(), SystemClock())
        lock = holder.acquire_lock_file(layout.EVICT_LOCK)
        assert lock is not None
        numbers = iter(range(1, 10**6))

        def is_evicting() -> bool:
            nonlocal stored_after
            stored = outbox.enqueue(event(next(numbers)))
            stored_after += bool(stored) and outbox.stats().evicted > 0
            return stored_after > 300

        wait_until(is_evicting)
        assert "evicting without evict.lock" in caplog.text
        assert "may be suspended" in caplog.text
        holder.filesystem.close(lock.fd)
        wait_until(lambda: is_evicting() and "evict.lock can be locked again" in caplog.text)
    assert caplog.text.count("evicting without") == 1


def test_a_batch_that_is_being_delivered_is_not_evicted(outbox_dir: Directory, clock: ManualClock) -> None:
    """The delivery holds its lock; the next batch is evicted."""
    for number in range(3):
        Path(outbox_dir.path_of(layout.sealed_name(number, "x"))).write_bytes(b"12345678\n" * 10)
    locked = outbox_dir.lock_existing(layout.sealed_name(0, "x"))
    assert locked is not None
    writer = Writer(outbox_dir, WriterLimits(500, 10**6, 200), lambda: None)
    writer.start(270, 3)
    quota = QuotaEnforcer(outbox_dir, writer, clock, 0, evicts=True)
    quota.enforce()
    assert outbox_dir.batch_names() == [layout.sealed_name(0, "x")]
    assert quota.evicted_events == 20
    assert writer.pending_counts()[:2] == (90, 1)
    outbox_dir.filesystem.close(locked.fd)


def test_exceeding_max_files_causes_eviction(outbox_dir: Directory, clock: ManualClock) -> None:
    """As exceeding `max_bytes` does."""
    for number in range(20):
        Path(outbox_dir.path_of(layout.sealed_name(number, "x"))).write_bytes(b"1\n")
    writer = Writer(outbox_dir, WriterLimits(500, 10**6, 10**6, 16), lambda: None)
    writer.start(40, 20)
    quota = QuotaEnforcer(outbox_dir, writer, clock, 0, evicts=True)
    quota.enforce()
    assert len(outbox_dir.batch_names()) == 14
    assert outbox_dir.batch_names()[0] == layout.sealed_name(6, "x")


def test_a_batch_that_cannot_be_deleted_does_not_keep_the_others_from_being_evicted(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be immutable; it is tried last from then on, and logged once."""
    for number in range(20):
        Path(outbox_dir.path_of(layout.sealed_name(number, "x"))).write_bytes(b"1\n")
    immutable, unlink = layout.sealed_name(0, "x"), outbox_dir.filesystem.unlink

    def fail_for_one(path: str) -> None:
        if path.endswith(immutable):
            raise PermissionError(path)
        unlink(path)

    monkeypatch.setattr(outbox_dir.filesystem, "unlink", fail_for_one)
    writer = Writer(outbox_dir, WriterLimits(500, 10**6, 10**6, 16), lambda: None)
    writer.start(40, 20)
    quota = QuotaEnforcer(outbox_dir, writer, clock, 0, evicts=True)
    for _ in range(3):
        quota.enforce()
        clock.advance(10)
    assert outbox_dir.batch_names() == [immutable, *(layout.sealed_name(number, "x") for number in range(7, 20))]
    assert sum("cannot evict" in entry.message for entry in caplog.records) == 1


def test_two_processes_that_evict_at_once_do_not_evict_twice_as_much(outbox_dir: Directory, clock: ManualClock) -> None:
    """One process holds the lock. The other one recounts the files before it evicts."""
    for number in range(10):
        Path(outbox_dir.path_of(layout.sealed_name(number, "x"))).write_bytes(b"x" * 99 + b"\n")
    quotas = []
    for _ in range(2):
        writer = Writer(outbox_dir, WriterLimits(500, 10**6, 800), lambda: None)
        writer.start(1000, 10)
        quotas.append(QuotaEnforcer(outbox_dir, writer, clock, 0, evicts=True))
    lock = outbox_dir.acquire_lock_file(layout.EVICT_LOCK)
    assert lock is not None
    quotas[0].enforce()
    assert len(outbox_dir.batch_names()) == 10
    outbox_dir.filesystem.close(lock.fd)
    for quota in quotas:
        quota.enforce()
    assert len(outbox_dir.batch_names()) == 7
    assert [quota.evicted_events for quota in quotas] == [3, 0]


def test_without_drop_oldest_nothing_is_evicted(tmp_path: Path) -> None:
    """New events are dropped instead."""
    with Outbox(str(tmp_path / "outbox"), max_bytes=10 * LINE_BYTES) as outbox:
        outcomes = [outbox.enqueue(event(number)) for number in range(50)]
        assert outcomes[-1] == Dropped("max_bytes")
        assert outbox.stats().evicted == 0
        assert ids_on_disk(tmp_path / "outbox")[0] == "e-000000"


def test_when_full_raise_raises_with_the_reason(tmp_path: Path) -> None:
    """For one event, for several, and in a coroutine. An event of the wrong type is still only dropped."""
    with Outbox(str(tmp_path / "outbox"), max_bytes=0, when_full="raise") as outbox:
        with pytest.raises(OutboxFullError, match="max_bytes"):
            outbox.enqueue(event(1))
        with pytest.raises(OutboxFullError):
            outbox.enqueue_many([event(1)])
        with pytest.raises(OutboxFullError):
            asyncio.run(outbox.enqueue_async(event(1)))
        with pytest.raises(OutboxFullError):
            asyncio.run(outbox.enqueue_async(event(1), durability="power"))
        assert outbox.enqueue("no event") == Dropped("invalid")  # type: ignore[arg-type]
        assert outbox.stats().dropped["max_bytes"] == 4


def test_when_full_block_waits_for_room(tmp_path: Path) -> None:
    """Once the destination works again, a batch is delivered and the event is stored. Attempts do not count as drops."""
    sink = RecordingSink([Retry("unavailable", 0.3)])
    path = str(tmp_path / "outbox")
    with Outbox(path, sink, when_full="block", block_timeout=60, max_bytes=10 * LINE_BYTES, flush_interval=0.05) as outbox:
        outcomes = [outbox.enqueue(event(number)) for number in range(60)]
        assert outcomes == [Enqueued()] * 60
        assert outbox.flush(60)
        assert sum(outbox.stats().dropped.values()) == 0
    assert len(sink.payloads) == 60


def test_when_full_block_drops_after_its_timeout_and_at_once_on_an_event_loop(tmp_path: Path) -> None:
    """A call in an event loop must not block it; a coroutine waits without stopping other coroutines."""
    with Outbox(str(tmp_path / "outbox"), when_full="block", block_timeout=0.5, max_bytes=0) as outbox:
        assert outbox.enqueue(event(1)) == Dropped("timeout")
        assert outbox.enqueue_many([event(1), event(2)]) == [Dropped("timeout")] * 2

        async def enqueue_in_loop() -> list[object]:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    # wait: the loop ticks while the caller waits
                    await asyncio.sleep(0.01)

            ticking = asyncio.create_task(tick())
            outcomes: list[object] = [outbox.enqueue(event(1)), await outbox.enqueue_async(event(1))]
            ticking.cancel()
            assert ticks > 3
            return outcomes

        assert asyncio.run(enqueue_in_loop()) == [Dropped("would_block"), Dropped("timeout")]
        dropped = {reason: count for reason, count in outbox.stats().dropped.items() if count}
        assert dropped == {"timeout": 4, "would_block": 1}


def test_when_full_block_ends_when_the_outbox_is_closed(tmp_path: Path) -> None:
    """The waiting call returns `Dropped("closed")`."""
    outbox = Outbox(str(tmp_path / "outbox"), when_full="block", block_timeout=60, max_bytes=0)
    outcomes: list[object] = []
    waiting = threading.Thread(target=lambda: outcomes.append(outbox.enqueue(event(1))))
    waiting.start()
    wait_until(lambda: outbox._started)
    outbox.close()
    waiting.join(60)
    assert outcomes == [Dropped("closed")]


def test_limits_apply_to_the_directory_not_to_the_process(tmp_path: Path) -> None:
    """Two outboxes on one directory, as in two processes, together exceed the limit by at most one recount."""
    path, limit = str(tmp_path / "outbox"), 400 * LINE_BYTES
    with Outbox(path, max_bytes=limit, batch_size=20) as first, Outbox(path, max_bytes=limit, batch_size=20) as second:
        for number in range(0, 1000, 2):
            first.enqueue(event(number))
            second.enqueue(event(number + 1))
            if number % 40 == 38:
                # A batch of each outbox. They list for a share of their time, which may be little on a busy machine.
                size = pending_bytes(path)
                wait_until(lambda size=size: min(box.stats().pending_bytes for box in (first, second)) > size - limit / 10)  # type: ignore[misc]
        wait_until(lambda: first.enqueue(event(1)) == second.enqueue(event(1)) == Dropped("max_bytes"))
        size = pending_bytes(path)
    assert limit * 0.9 < size < limit * 1.25
