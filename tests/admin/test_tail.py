"""The tailer, with changes to the files between its scans."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import TrackingEvent
from pillarbox.admin import scan, tail
from pillarbox.admin.filters import EventFilter, EventHeaderDecoder
from pillarbox.admin.tail import Tailer
from pillarbox.store import compression, record
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import AdoptedEntry, SealedEntry
from pillarbox.testing import ManualClock

SCANS = 8  # more scans than a change needs to be noticed


@pytest.fixture
def folder(outbox_dir: Directory) -> Path:
    """The path of the outbox directory."""
    return Path(outbox_dir.path)


@pytest.fixture
def tailer(outbox_dir: Directory, clock: ManualClock) -> Iterator[Tailer]:
    """A tailer that has not scanned yet."""
    tailer = Tailer(outbox_dir, clock, EventHeaderDecoder(TrackingEvent), EventFilter())
    yield tailer
    tailer.close()


def lines(*numbers: int) -> bytes:
    return b"".join(record.line(b'{"event_id":"e-%d"}' % number) for number in numbers)


def append(path: Path, *numbers: int) -> None:
    with path.open("ab") as file:
        file.write(lines(*numbers))


def backlog(tailer: Tailer, count: int | None = None) -> list[str | None]:
    return [event.header.event_id for event in tailer.read_backlog(count)]


def new_events(tailer: Tailer) -> list[str | None]:
    return [event.header.event_id for event in tailer.read_new()]


def sealed(number: int) -> str:
    return f"sealed-{number:016d}-u.ndjson"


def test_a_segment_that_is_sealed_and_deleted_between_two_scans_is_read_to_its_end(tailer: Tailer, folder: Path) -> None:
    """It is held open, and its ledger entry is not a gap."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(tailer) == ["e-1"]
    append(active, 2)
    active.rename(folder / sealed(1))
    (folder / sealed(1)).unlink()
    assert [new_events(tailer) for _ in range(SCANS)] == [["e-2"]] + [[]] * (SCANS - 1)


def test_a_batch_is_read_once_wherever_it_moves(tailer: Tailer, folder: Path) -> None:
    """Sealed, and then retained."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(tailer) == ["e-1"]
    active.rename(folder / sealed(1))
    assert new_events(tailer) == []
    (folder / sealed(1)).rename(folder / "delivered-0000000000000002-0000000000000001-u.ndjson")
    assert new_events(tailer) == []
    append(folder / sealed(2), 2)
    assert new_events(tailer) == ["e-2"]


def test_a_batch_that_is_compressed_is_read_once(tailer: Tailer, folder: Path) -> None:
    """Before compression, while both files exist, and afterwards."""
    append(folder / sealed(1), 1, 2)
    assert backlog(tailer) == ["e-1", "e-2"]
    (folder / f"{sealed(1)}.zst").write_bytes(compression.compress("x", lines(1, 2)))
    assert new_events(tailer) == []
    (folder / sealed(1)).unlink()
    assert new_events(tailer) == []
    (folder / f"{sealed(2)}.zst").write_bytes(compression.compress("x", lines(3, 4)))
    assert [(event.header.event_id, event.offset) for event in tailer.read_new()] == [("e-3", 0), ("e-4", len(lines(3)))]


def test_the_events_of_a_writer_keep_their_order_across_its_segments(tailer: Tailer, folder: Path) -> None:
    """Those of a retired segment come before later ones, sealed or not."""
    append(folder / "active-w-9.ndjson", 1)
    assert backlog(tailer) == ["e-1"]
    append(folder / "active-w-9.ndjson", 2)
    append(folder / "active-w-10.ndjson", 3)
    assert new_events(tailer) == ["e-2", "e-3"]
    append(folder / "active-w-11.ndjson", 6)
    append(folder / "active-w-9.ndjson", 4)
    (folder / "active-w-9.ndjson").rename(folder / sealed(5))
    append(folder / "active-w-10.ndjson", 5)
    assert new_events(tailer) == ["e-4", "e-5", "e-6"]


def test_a_reused_inode_number_is_not_taken_for_the_deleted_file(tailer: Tailer, folder: Path) -> None:
    """Filesystems reuse inode numbers at once."""
    append(folder / sealed(1), 1)
    assert backlog(tailer) == ["e-1"]
    for number in range(2, 6):
        (folder / sealed(number - 1)).unlink()
        append(folder / sealed(number), number)
        assert new_events(tailer) == [f"e-{number}"]


def test_reading_continues_after_a_segment_is_rewritten(tailer: Tailer, folder: Path) -> None:
    """As after a failed fsync."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(tailer) == ["e-1"]
    append(folder / "aside", 1, 2)
    (folder / "aside").rename(active)
    assert new_events(tailer) == ["e-2"]
    append(active, 3)
    assert new_events(tailer) == ["e-3"]


def test_the_next_segment_of_a_legacy_writer_is_read_from_its_beginning(tailer: Tailer, folder: Path) -> None:
    """All its segments have the same name."""
    active = folder / "active.ndjson"
    append(active, 1)
    assert backlog(tailer) == ["e-1"]
    append(active, 2)
    active.rename(folder / sealed(1))
    append(active, 3)
    assert new_events(tailer) == ["e-2", "e-3"]


def test_a_truncated_append_is_read_once_it_is_repeated(tailer: Tailer, folder: Path) -> None:
    """From where the file was truncated."""
    active = folder / "active-w-1.ndjson"
    append(active, 1, 2)
    assert backlog(tailer) == ["e-1", "e-2"]
    os.truncate(active, len(lines(1)))
    assert new_events(tailer) == []
    append(active, 3)
    assert new_events(tailer) == ["e-3"]


def test_the_newest_events_are_read_from_the_end(tailer: Tailer, folder: Path) -> None:
    """From as many files as it takes."""
    append(folder / sealed(1), 1, 2)
    append(folder / sealed(2), 3, 4)
    append(folder / "active-w-1.ndjson", 5)
    assert backlog(tailer, 4) == ["e-2", "e-3", "e-4", "e-5"]
    assert new_events(tailer) == []


def test_a_batch_that_came_and_went_between_two_scans_is_a_gap(
    tailer: Tailer, outbox_dir: Directory, clock: ManualClock
) -> None:
    """The ledger has the number of events. A gap is reported once, and a batch that was read is none."""
    ledger = LedgerWriter(outbox_dir, clock)
    ledger.add(SealedEntry(clock.micros() - 1, "sealed-before", "w", 7, 70))
    ledger.write(sync=False)
    clock.advance(1)
    assert backlog(tailer) == []
    ledger.add(
        SealedEntry(clock.micros(), sealed(2).removesuffix(".ndjson"), "w", 7, 70),
        AdoptedEntry(clock.micros(), "sealed-3", "v"),
    )
    ledger.add(SealedEntry(clock.micros(), sealed(4).removesuffix(".ndjson"), "w", 1, len(lines(4))))
    ledger.write(sync=False)
    append(Path(outbox_dir.path) / sealed(4), 4)
    assert [new_events(tailer) for _ in range(SCANS)] == [["e-4"]] + [[]] * (SCANS - 1)
    assert [(gap.batch, gap.events) for gap in tailer.gap_detector.gaps] == [
        ("sealed-0000000000000002-u", 7),
        ("sealed-3", None),
    ]
    (Path(outbox_dir.path) / sealed(4)).unlink()
    for _ in range(3):
        clock.advance(50)
        assert new_events(tailer) == []
    assert len(tailer.gap_detector.gaps) == 2


def test_a_batch_that_is_deleted_between_the_scan_and_reading_is_a_gap(
    tailer: Tailer, outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was listed, but not read."""
    assert backlog(tailer) == []
    first, second = Path(outbox_dir.path) / sealed(1), Path(outbox_dir.path) / sealed(2)

    def scan_while_it_is_delivered(directory: Directory) -> list[scan.FileRef]:
        files = scan.scan_files(directory)
        first.unlink(missing_ok=True)
        return files

    monkeypatch.setattr(tail, "scan_files", scan_while_it_is_delivered)
    append(first, 1)
    append(second, 2)
    ledger = LedgerWriter(outbox_dir, clock)
    for number, file in enumerate((first, second), 1):
        ledger.add(SealedEntry(clock.micros(), file.name.removesuffix(".ndjson"), "w", 1, len(lines(number))))
    ledger.write(sync=False)
    assert [new_events(tailer) for _ in range(SCANS)] == [["e-2"]] + [[]] * (SCANS - 1)
    assert [(gap.batch, gap.events) for gap in tailer.gap_detector.gaps] == [(first.name.removesuffix(".ndjson"), 1)]
    assert tailer.vanished_batches == 1


def test_a_segment_that_was_deleted_under_its_active_name_is_not_a_gap(
    tailer: Tailer, outbox_dir: Directory, clock: ManualClock
) -> None:
    """Its writer and size identify its ledger entry."""
    active = Path(outbox_dir.path) / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(tailer) == ["e-1"]
    active.unlink()
    ledger = LedgerWriter(outbox_dir, clock)
    ledger.add(SealedEntry(clock.micros(), "sealed-1", "w", 1, len(lines(1))))
    ledger.write(sync=False)
    assert [new_events(tailer) for _ in range(SCANS)] == [[]] * SCANS
    assert tailer.gap_detector.gaps == []


def test_reading_continues_after_the_directory_is_deleted_and_created_again(tailer: Tailer, folder: Path) -> None:
    """A writer creates it again."""
    assert backlog(tailer) == []
    folder.rmdir()
    assert new_events(tailer) == []
    folder.mkdir()
    append(folder / sealed(1), 1)
    assert new_events(tailer) == ["e-1"]
