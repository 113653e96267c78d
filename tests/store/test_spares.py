"""Spares, segments that callers create themselves, and the order in which they are filled."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pillarbox.outcome import ENQUEUED
from pillarbox.store import layout, record, writer
from pillarbox.store.directory import Directory
from pillarbox.testing import ManualClock
from tests.store.test_writer import LINE, Line


def filled(outbox_dir: Directory) -> list[tuple[int, list[int]]]:
    """The files that hold something and are not sealed, by number: which events."""
    active = [name for name in os.listdir(outbox_dir.path) if layout.kind_of(name) is layout.Kind.ACTIVE]
    files = [(layout.active_sort_key(name)[1], Path(outbox_dir.path_of(name)).read_bytes().splitlines()) for name in active]
    return sorted(
        (number, [msgspec.json.decode(record.payload(line))["n"] for line in lines]) for number, lines in files if lines
    )


def numbered(*numbers: int) -> list[bytes]:
    return [record.line(b'{"n":%d}' % number) for number in numbers]


def test_a_segment_that_a_caller_creates_while_spares_are_created_comes_before_them(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """Recovery sorts by number, and spares created in vain would have to be removed."""
    lines = numbered(*range(9))
    line = Line(outbox_dir, clock, batch_size=2, batch_bytes=3 * len(lines[0]))
    line.append(3, lines[0])  # a file of its own, full
    spares, _ = line.writer.create_spares(2)
    for each in lines[1:4]:  # another
        line.append(1, each)
    assert line.writer.add_spares(spares) == []
    for each in lines[4:]:
        line.append(1, each)
    found = filled(outbox_dir)
    assert [events for _, events in found] == [[0, 0, 0], [1, 2, 3], [4, 5], [6, 7, 8]]
    assert [number for number, _ in found][2:] == [layout.active_sort_key(spare.name)[1] for spare in spares]


def test_a_spare_with_a_lower_number_than_a_used_segment_is_not_used(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers have created more segments meanwhile than there are numbers between spares."""
    monkeypatch.setattr(writer, "_SPARE_NUMBER_STEP", 3)
    line = Line(outbox_dir, clock, batch_bytes=len(LINE))
    (late,), _ = line.writer.create_spares(1)
    line.append(3)
    assert line.writer.add_spares([late]) == [late]
    (later,), _ = line.writer.create_spares(1)
    assert line.writer.add_spares([later]) == []
    line.append(3)
    assert [number for number, _ in filled(outbox_dir)] == [1, 2, 4, 6, 7, 8]
    for file in (late, later):
        outbox_dir.filesystem.close(file.fd)


def test_a_segment_holds_more_events_while_many_wait_for_their_sync(outbox_dir: Directory, clock: ManualClock) -> None:
    """Twice `batch_size` with eight of them, three times with sixteen; once again when they are sealed."""
    line = Line(outbox_dir, clock, batch_size=2)
    spares, _ = line.writer.create_spares(40)
    line.append()
    assert line.writer.add_spares(spares) == []
    for number in range(1, 60):
        line.append(1, numbered(number)[0])
    assert [len(lines) for _, lines in filled(outbox_dir)] == [2] * 8 + [4] * 8 + [6, 6]
    line.sealer.step()
    line.append(4)
    assert [len(lines) for _, lines in filled(outbox_dir)] == [2, 2]


def test_a_segment_that_may_hold_more_is_checked_again_once_the_others_are_sealed(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """A burst is over, and the next events may be a long time in coming."""
    line = Line(outbox_dir, clock, batch_size=2)
    spares, _ = line.writer.create_spares(30)
    line.append()
    assert line.writer.add_spares(spares) == []
    line.append(2 * 8 + 4 * 8 + 2 - 1)
    assert [len(lines) for _, lines in filled(outbox_dir)][-1] == 2  # of six
    assert line.writer._file.threshold_events == 4
    line.sealer.step()
    line.append(3)
    assert [len(lines) for _, lines in filled(outbox_dir)] == [3, 2]


def test_numbers_continue_after_all_segments_are_sealed_and_delivered(outbox_dir: Directory, clock: ManualClock) -> None:
    """A power loss may bring the old files back under their names."""
    line = Line(outbox_dir, clock)
    line.append()
    line.sealer.step()  # opens a spare
    line.writer.rotate("manual")
    line.append()
    (_, (spare, _)) = filled(outbox_dir)
    line.writer._spares.clear()
    line.writer.rotate("manual")
    line.sealer._seal_retired()
    assert filled(outbox_dir) == []
    line.append()
    assert [number for number, _ in filled(outbox_dir)] == [spare + 1]


def test_a_handler_that_appends_during_a_rotation_gets_the_later_segment(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retiring segment is neither active any more nor among the retired ones."""
    line = Line(outbox_dir, clock)
    line.append()
    line.writer._highest_used = 4999
    line.writer.rotate("manual")
    line.append()
    finish = line.writer._finish_retiring

    def interrupted() -> None:
        monkeypatch.setattr(line.writer, "_finish_retiring", finish)
        assert line.append(1, numbered(7)[0]) == [ENQUEUED]
        finish()

    monkeypatch.setattr(line.writer, "_finish_retiring", interrupted)
    line.writer.rotate("manual")
    assert [events for _, events in filled(outbox_dir)] == [[1], [1], [7]]
