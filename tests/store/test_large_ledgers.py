"""Ledgers larger than the memory are read in parts, with the same totals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox.clock import SystemClock
from pillarbox.store import layout, ledger, ledger_reader, reconciliation
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import LedgerEntry, PurgedEntry, SealedEntry, SettledEntry, encode_entries, parse_ledger
from pillarbox.store.ledger_reader import read_parts
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import read_ledger, reconcile

MIB = 2**20


def batch_entries(number: int) -> list[LedgerEntry]:
    batch = f"sealed-{number:016d}-u"
    return [SealedEntry(number, batch, "w", 10, 2000), SettledEntry(number, batch, "test", 10, 1, 0, 0)]


def write_ledger(outbox_dir: Directory, data: bytes) -> None:
    Path(outbox_dir.path_of(layout.LEDGER)).write_bytes(data)


@pytest.mark.parametrize("part_bytes", [7, 100, 1000])
def test_a_ledger_that_is_read_in_parts_has_the_same_entries(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """This holds also for damaged lines, and for a part that ends in the middle of a line."""
    monkeypatch.setattr(ledger_reader, "PART_BYTES", part_bytes)
    entries = [entry for number in range(30) for entry in batch_entries(number)]
    lines = encode_entries(entries).splitlines(keepends=True)
    data = b"".join([*lines[:7], b"damaged\n", b"\n", *lines[7:], b"torn"])
    write_ledger(outbox_dir, data)
    fd = outbox_dir.open_existing(layout.LEDGER)
    parts = list(read_parts(outbox_dir.filesystem, fd))
    outbox_dir.filesystem.close(fd)
    assert [entry for part in parts for entry in part.entries] == parse_ledger(data)[0] == entries
    assert sum(part.unread for part in parts) == parse_ledger(data)[1] == 2


def test_a_line_of_any_length_costs_one_unreadable_line(outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_reader, "PART_BYTES", 500)
    monkeypatch.setattr(ledger_reader, "LINE_BYTES_MAX", 2000)
    first, second = batch_entries(1), batch_entries(2)
    write_ledger(outbox_dir, encode_entries(first) + b"\0" * 10_000 + b"\n" + encode_entries(second))
    assert read_ledger(outbox_dir) == ([*first, *second], 1)


def test_the_totals_stay_the_same_however_many_entries_are_kept(outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that exist or are unfinished are not summed up."""
    name = layout.sealed_name(5, "u")
    entries = [entry for number in range(3000) for entry in batch_entries(number)]
    entries += [PurgedEntry(1, "sealed-x", "dead", 2000), SealedEntry(9, "sealed-9999999999999999-u", "w", 7, 10)]
    write_ledger(outbox_dir, encode_entries(entries))
    Path(outbox_dir.path_of(name)).write_bytes(b"")
    usual = reconcile(outbox_dir)
    monkeypatch.setattr(reconciliation, "_ENTRIES_MAX", 100)
    monkeypatch.setattr(ledger_reader, "PART_BYTES", 10_000)
    bounded = read_ledger(outbox_dir).entries
    assert len(bounded) < 2500 < len(entries)
    assert {"sealed-0000000000000005-u", "sealed-9999999999999999-u"} <= {getattr(entry, "batch", "") for entry in bounded}
    report = reconcile(outbox_dir)
    assert report.reconciliation.total == usual.reconciliation.total
    assert report.reconciliation.purged_dead == usual.reconciliation.purged_dead == 2000


def test_a_ledger_of_a_gigabyte_is_verified_and_compacted_in_little_memory(tmp_path: Path) -> None:
    """Entries of 100,000 batches, and a gigabyte of NUL bytes as a file system leaves them after a power loss."""
    box = tmp_path / "box"
    box.mkdir(mode=0o700)
    path = box / layout.LEDGER
    with path.open("wb") as file:
        for number in range(0, 100_000, 1000):
            file.write(encode_entries(entry for each in range(number, number + 1000) for entry in batch_entries(each)))
        file.seek(1024 * MIB)
        file.write(b"\n" + encode_entries(batch_entries(100_000)))
    limit = ["/bin/sh", "-c", f'ulimit -v {300 * 1024}; exec "$@"', "sh", sys.executable, "-m", "pillarbox"]
    command = [*limit, "verify", "-d", "box", "--json"]
    verified = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert '"delivered":1000010' in verified.stdout.replace(" ", ""), verified.stdout + verified.stderr
    writer = LedgerWriter(Directory(str(box), OsFilesystem(), SystemClock()), SystemClock())
    writer.add(*batch_entries(100_001))
    assert writer.write(sync=True)
    assert path.stat().st_size < ledger.COMPACT_BYTES
