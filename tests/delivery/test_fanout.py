"""Fan-out stops when it is told to. Errors and kills during fan-out are tested in `tests/crash`."""

from __future__ import annotations

import contextlib
import threading
from itertools import islice
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.delivery.fanout import GROUP_MAX_FILES, FanOut
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock, RecordingSink
from tests.delivery.fanout_setup import open_directory
from tests.delivery.worker_setup import drain_worker, make_worker, seal_batch

FILES = 3 * GROUP_MAX_FILES + 1


@pytest.fixture
def box(tmp_path: Path) -> Path:
    path = tmp_path / "box"
    path.mkdir()
    for number in range(FILES):
        (path / f"sealed-{number:016d}-x.ndjson").write_bytes(b'{"event":{"event_id":"e"}}\n')
    return path


def names_in(path: Path) -> list[str]:
    return sorted(one.name for one in path.glob("sealed-*"))


def test_fan_out_can_stop_between_two_groups(box: Path) -> None:
    """So the heartbeat is written in time, and the process can end. The oldest batches come first."""
    outbox_dir, clock = open_directory(box), ManualClock()
    fan_out = FanOut(outbox_dir, ["live"], clock, LedgerWriter(outbox_dir, clock))
    assert list(islice(fan_out.distribute(), 2)) == [GROUP_MAX_FILES, GROUP_MAX_FILES]
    assert names_in(box) == names_in(box / "sink-live")[2 * GROUP_MAX_FILES :]
    assert fan_out.distribute_all() == FILES - 2 * GROUP_MAX_FILES
    assert names_in(box) == []
    assert len(names_in(box / "sink-live")) == FILES


def test_a_new_sink_gets_its_queue_after_the_earlier_batches_are_fanned_out(box: Path) -> None:
    """These batches are not for the new sink, even if their fan-out takes several groups."""
    outbox_dir, clock = open_directory(box), ManualClock()
    ledger = LedgerWriter(outbox_dir, clock)
    (box / "sink-warehouse").mkdir()
    fan_out = FanOut(outbox_dir, ["warehouse", "live"], clock, ledger)
    assert next(fan_out.distribute()) == GROUP_MAX_FILES
    assert not (box / "sink-live").exists()
    assert fan_out.distribute_all() == FILES - GROUP_MAX_FILES
    assert names_in(box / "sink-live") == []
    assert len(names_in(box / "sink-warehouse")) == FILES


def test_of_two_sinks_that_settle_a_batch_at_once_one_releases_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each removes its link and then checks for others; both would find none if they did so at once."""
    outbox_dir, clock = Directory(str(tmp_path / "box"), OsFilesystem(), SystemClock()), SystemClock()
    outbox_dir.ensure_usable()
    seal_batch(outbox_dir, 1, b'{"event_id":"e"}')
    size = outbox_dir.disk_usage().pending_bytes
    FanOut(outbox_dir, ["live", "slow"], clock, LedgerWriter(outbox_dir, clock)).distribute_all()
    both_removed = threading.Barrier(2)
    remove = Directory.remove

    def remove_and_wait(directory: Directory, name: str) -> None:
        remove(directory, name)
        if name.startswith("sealed-"):
            with contextlib.suppress(threading.BrokenBarrierError):
                both_removed.wait(1.0)  # wait: for the other thread, which must not get here meanwhile

    monkeypatch.setattr(Directory, "remove", remove_and_wait)
    released_bytes: list[int] = []
    workers = [make_worker(outbox_dir.queue(sink), RecordingSink(), released_bytes) for sink in ("live", "slow")]
    threads = [threading.Thread(target=drain_worker, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert released_bytes == [size]
