"""The ledger has the entry of a batch, durably, before its file is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillarbox.delivery.config import DEFAULT_LIMITS, SettlementLimits
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.settlement import GROUP_FILES_MAX
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import SinkCapabilities
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import reconcile
from pillarbox.testing import ManualClock, RecordingSink
from tests.delivery.worker_setup import QUICK_CONFIG, PoisonedSink, drain_worker, remaining_files, seal_batch


class LedgerWatchingFilesystem(OsFilesystem):
    """Checks at each deletion or retention of a batch file whether its ledger entry was synced."""

    def __init__(self) -> None:
        super().__init__()
        self.ledgers: set[int] = set()
        self.durable = b""
        self.syncs = 0
        self.has_entry: dict[str, bool] = {}

    def open_append(self, path: str) -> int:
        fd = super().open_append(path)
        self.ledgers.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.ledgers.discard(fd)
        super().close(fd)

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        if fd in self.ledgers:
            self.durable = self.read_all(fd)
            self.syncs += 1

    def unlink(self, path: str) -> None:  # type: ignore[override]
        self._note_removal(Path(path).name)
        super().unlink(path)

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        self._note_removal(Path(source).name)
        super().rename(source, target)

    def _note_removal(self, name: str) -> None:
        if layout.kind_of(name) is layout.Kind.SEALED:
            self.has_entry[name] = b'"entry":"settled"' in self.durable and layout.batch_id(name).encode() in self.durable


def watched_worker(
    outbox_dir: Directory, sink: RecordingSink, kept: SettlementLimits = DEFAULT_LIMITS
) -> tuple[Worker, LedgerWatchingFilesystem, Directory]:
    watching = LedgerWatchingFilesystem()
    clock = ManualClock()  # it stands still, so only the size of the group triggers the settlement
    directory = Directory(outbox_dir.path, watching, clock)
    sink.capabilities = SinkCapabilities(deduplicates_by="event_id", survives="process")
    ledger = LedgerWriter(directory, clock)
    return (
        Worker(directory, NamedSink(sink, "test"), clock, QUICK_CONFIG._replace(limits=kept), ledger=ledger),
        watching,
        directory,
    )


@pytest.mark.parametrize("kept", [DEFAULT_LIMITS, DEFAULT_LIMITS._replace(keep_delivered_s=60.0)], ids=["goes", "is kept"])
def test_a_file_is_deleted_after_its_ledger_entry_is_synced_with_others(outbox_dir: Directory, kept: SettlementLimits) -> None:
    """Also with dead letters and damaged bytes. One sync covers many entries."""
    count = 3 * GROUP_FILES_MAX
    for stamp in range(1, count + 1):
        seal_batch(outbox_dir, stamp, b"%d" % stamp, b'"poison"', raw=b"damaged\n" if stamp % 7 == 0 else b"")
    worker, watching, directory = watched_worker(outbox_dir, PoisonedSink(), kept)
    drain_worker(worker)
    assert len(watching.has_entry) == count
    assert all(watching.has_entry.values())
    assert watching.syncs <= 3 + 1
    found = reconcile(directory)
    assert found.balances
    assert (found.reconciliation.total.delivered, found.reconciliation.total.dead) == (count, count)


def test_on_a_full_disk_files_are_deleted_before_the_ledger_and_the_entries_follow(outbox_dir: Directory) -> None:
    """Freeing space must not need space."""
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b"%d" % stamp)
    worker, watching, directory = watched_worker(outbox_dir, RecordingSink())
    in_the_way = Path(outbox_dir.path_of(layout.LEDGER))
    in_the_way.mkdir()
    drain_worker(worker)
    assert not any(layout.kind_of(name) is layout.Kind.SEALED for name in remaining_files(outbox_dir))
    assert not any(watching.has_entry.values())
    in_the_way.rmdir()
    seal_batch(outbox_dir, 6, b"6")
    drain_worker(worker)
    assert reconcile(directory).reconciliation.total.delivered == 6
