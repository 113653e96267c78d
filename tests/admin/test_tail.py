"""The follower, between whose looks anything may happen to the files."""

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

LOOKS = 8  # more than anything takes to be noticed


@pytest.fixture
def folder(place: Directory) -> Path:
    """Where the files are."""
    return Path(place.path)


@pytest.fixture
def follower(place: Directory, clock: ManualClock) -> Iterator[Tailer]:
    """One that has not looked yet."""
    found = Tailer(place, clock, EventHeaderDecoder(TrackingEvent), EventFilter())
    yield found
    found.close()


def lines(*numbers: int) -> bytes:
    return b"".join(record.line(b'{"event_id":"e-%d"}' % number) for number in numbers)


def append(path: Path, *numbers: int) -> None:
    with path.open("ab") as file:
        file.write(lines(*numbers))


def backlog(follower: Tailer, count: int | None = None) -> list[str | None]:
    return [event.header.event_id for event in follower.read_backlog(count)]


def news(follower: Tailer) -> list[str | None]:
    return [event.header.event_id for event in follower.read_new()]


def sealed(number: int) -> str:
    return f"sealed-{number:016d}-u.ndjson"


def test_what_is_sealed_and_removed_between_two_looks_is_read_to_its_end(follower: Tailer, folder: Path) -> None:
    """For it is held open; and the ledger's entry of it is no gap."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(follower) == ["e-1"]
    append(active, 2)
    active.rename(folder / sealed(1))
    (folder / sealed(1)).unlink()
    assert [news(follower) for _ in range(LOOKS)] == [["e-2"]] + [[]] * (LOOKS - 1)


def test_a_batch_is_shown_once_wherever_it_goes(follower: Tailer, folder: Path) -> None:
    """Sealed, and kept as delivered."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(follower) == ["e-1"]
    active.rename(folder / sealed(1))
    assert news(follower) == []
    (folder / sealed(1)).rename(folder / "delivered-0000000000000002-0000000000000001-u.ndjson")
    assert news(follower) == []
    append(folder / sealed(2), 2)
    assert news(follower) == ["e-2"]


def test_a_batch_that_is_compressed_is_read_once(follower: Tailer, folder: Path) -> None:
    """Before, meanwhile, when both files are there, and after."""
    append(folder / sealed(1), 1, 2)
    assert backlog(follower) == ["e-1", "e-2"]
    (folder / f"{sealed(1)}.zst").write_bytes(compression.compress("x", lines(1, 2)))
    assert news(follower) == []
    (folder / sealed(1)).unlink()
    assert news(follower) == []
    (folder / f"{sealed(2)}.zst").write_bytes(compression.compress("x", lines(3, 4)))
    assert [(event.header.event_id, event.offset) for event in follower.read_new()] == [("e-3", 0), ("e-4", len(lines(3)))]


def test_a_writers_events_keep_their_order_over_its_files(follower: Tailer, folder: Path) -> None:
    """What was retired comes before what came later, sealed or not."""
    append(folder / "active-w-9.ndjson", 1)
    assert backlog(follower) == ["e-1"]
    append(folder / "active-w-9.ndjson", 2)
    append(folder / "active-w-10.ndjson", 3)
    assert news(follower) == ["e-2", "e-3"]
    append(folder / "active-w-11.ndjson", 6)
    append(folder / "active-w-9.ndjson", 4)
    (folder / "active-w-9.ndjson").rename(folder / sealed(5))
    append(folder / "active-w-10.ndjson", 5)
    assert news(follower) == ["e-4", "e-5", "e-6"]


def test_the_inode_of_a_removed_file_means_nothing_to_the_next(follower: Tailer, folder: Path) -> None:
    """Numbers come again at once."""
    append(folder / sealed(1), 1)
    assert backlog(follower) == ["e-1"]
    for number in range(2, 6):
        (folder / sealed(number - 1)).unlink()
        append(folder / sealed(number), number)
        assert news(follower) == [f"e-{number}"]


def test_a_file_that_is_written_anew_under_its_name_is_read_on(follower: Tailer, folder: Path) -> None:
    """As after a sync that failed."""
    active = folder / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(follower) == ["e-1"]
    append(folder / "aside", 1, 2)
    (folder / "aside").rename(active)
    assert news(follower) == ["e-2"]
    append(active, 3)
    assert news(follower) == ["e-3"]


def test_an_older_writers_file_that_begins_anew_is_read_from_its_beginning(follower: Tailer, folder: Path) -> None:
    """Its name is used again and again."""
    active = folder / "active.ndjson"
    append(active, 1)
    assert backlog(follower) == ["e-1"]
    append(active, 2)
    active.rename(folder / sealed(1))
    append(active, 3)
    assert news(follower) == ["e-2", "e-3"]


def test_an_append_that_was_cut_off_again_is_shown_when_it_is_done(follower: Tailer, folder: Path) -> None:
    """From where the file was cut."""
    active = folder / "active-w-1.ndjson"
    append(active, 1, 2)
    assert backlog(follower) == ["e-1", "e-2"]
    os.truncate(active, len(lines(1)))
    assert news(follower) == []
    append(active, 3)
    assert news(follower) == ["e-3"]


def test_the_newest_are_taken_from_the_end(follower: Tailer, folder: Path) -> None:
    """Over as many files as it takes."""
    append(folder / sealed(1), 1, 2)
    append(folder / sealed(2), 3, 4)
    append(folder / "active-w-1.ndjson", 5)
    assert backlog(follower, 4) == ["e-2", "e-3", "e-4", "e-5"]
    assert news(follower) == []


def test_what_came_and_went_between_two_looks_is_a_gap(follower: Tailer, place: Directory, clock: ManualClock) -> None:
    """The ledger has the number; it is told once, and a batch that was seen is none."""
    pen = LedgerWriter(place, clock)
    pen.add(SealedEntry(clock.micros() - 1, "sealed-before", "w", 7, 70))
    pen.write(sync=False)
    clock.advance(1)
    assert backlog(follower) == []
    pen.add(
        SealedEntry(clock.micros(), sealed(2).removesuffix(".ndjson"), "w", 7, 70),
        AdoptedEntry(clock.micros(), "sealed-3", "v"),
    )
    pen.add(SealedEntry(clock.micros(), sealed(4).removesuffix(".ndjson"), "w", 1, len(lines(4))))
    pen.write(sync=False)
    append(Path(place.path) / sealed(4), 4)
    assert [news(follower) for _ in range(LOOKS)] == [["e-4"]] + [[]] * (LOOKS - 1)
    assert [(gap.batch, gap.events) for gap in follower.gap_detector.gaps] == [
        ("sealed-0000000000000002-u", 7),
        ("sealed-3", None),
    ]
    (Path(place.path) / sealed(4)).unlink()
    for _ in range(3):
        clock.advance(50)
        assert news(follower) == []
    assert len(follower.gap_detector.gaps) == 2


def test_what_went_between_the_look_and_the_reading_is_a_gap(
    follower: Tailer, place: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was listed, but not seen."""
    assert backlog(follower) == []
    first, second = Path(place.path) / sealed(1), Path(place.path) / sealed(2)

    def look_while_it_is_delivered(directory: Directory) -> list[scan.FileRef]:
        sights = scan.scan_files(directory)
        first.unlink(missing_ok=True)
        return sights

    monkeypatch.setattr(tail, "scan_files", look_while_it_is_delivered)
    append(first, 1)
    append(second, 2)
    pen = LedgerWriter(place, clock)
    for number, file in enumerate((first, second), 1):
        pen.add(SealedEntry(clock.micros(), file.name.removesuffix(".ndjson"), "w", 1, len(lines(number))))
    pen.write(sync=False)
    assert [news(follower) for _ in range(LOOKS)] == [["e-2"]] + [[]] * (LOOKS - 1)
    assert [(gap.batch, gap.events) for gap in follower.gap_detector.gaps] == [(first.name.removesuffix(".ndjson"), 1)]
    assert follower.vanished_batches == 1


def test_a_file_that_went_under_its_active_name_is_no_gap(follower: Tailer, place: Directory, clock: ManualClock) -> None:
    """Its writer and size tell which entry is its own."""
    active = Path(place.path) / "active-w-1.ndjson"
    append(active, 1)
    assert backlog(follower) == ["e-1"]
    active.unlink()
    pen = LedgerWriter(place, clock)
    pen.add(SealedEntry(clock.micros(), "sealed-1", "w", 1, len(lines(1))))
    pen.write(sync=False)
    assert [news(follower) for _ in range(LOOKS)] == [[]] * LOOKS
    assert follower.gap_detector.gaps == []


def test_a_directory_that_is_removed_and_made_again_is_followed_on(follower: Tailer, folder: Path) -> None:
    """A writer makes it anew."""
    assert backlog(follower) == []
    folder.rmdir()
    assert news(follower) == []
    folder.mkdir()
    append(folder / sealed(1), 1)
    assert news(follower) == ["e-1"]
