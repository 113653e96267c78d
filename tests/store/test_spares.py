"""The files that the sealer holds ready, those that callers make themselves, and in which order they are filled."""

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


def filled(place: Directory) -> list[tuple[int, list[int]]]:
    """The files that hold something and are not sealed, by number: which events."""
    active = [name for name in os.listdir(place.path) if layout.kind_of(name) is layout.Kind.ACTIVE]
    files = [(layout.active_sort_key(name)[1], Path(place.path_of(name)).read_bytes().splitlines()) for name in active]
    return sorted(
        (number, [msgspec.json.decode(record.payload(line))["n"] for line in lines]) for number, lines in files if lines
    )


def numbered(*numbers: int) -> list[bytes]:
    return [record.line(b'{"n":%d}' % number) for number in numbers]


def test_a_file_that_a_caller_makes_while_spares_are_made_comes_ahead_of_them(place: Directory, clock: ManualClock) -> None:
    """Adoption goes by number, and spares that were made in vain would have to be removed again."""
    lines = numbered(*range(9))
    line = Line(place, clock, batch_size=2, batch_bytes=3 * len(lines[0]))
    line.append(3, lines[0])  # a file of its own, full
    spares, _ = line.writer.create_spares(2)
    for each in lines[1:4]:  # another
        line.append(1, each)
    assert line.writer.add_spares(spares) == []
    for each in lines[4:]:
        line.append(1, each)
    found = filled(place)
    assert [events for _, events in found] == [[0, 0, 0], [1, 2, 3], [4, 5], [6, 7, 8]]
    assert [number for number, _ in found][2:] == [layout.active_sort_key(spare.name)[1] for spare in spares]


def test_a_spare_that_comes_after_a_file_with_a_higher_number_is_not_used(
    place: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers have made more of them meanwhile than there is room for between the numbers of spares."""
    monkeypatch.setattr(writer, "_SPARE_NUMBER_STEP", 3)
    line = Line(place, clock, batch_bytes=len(LINE))
    (late,), _ = line.writer.create_spares(1)
    line.append(3)
    assert line.writer.add_spares([late]) == [late]
    (later,), _ = line.writer.create_spares(1)
    assert line.writer.add_spares([later]) == []
    line.append(3)
    assert [number for number, _ in filled(place)] == [1, 2, 4, 6, 7, 8]
    for file in (late, later):
        place.filesystem.close(file.fd)


def test_a_file_holds_more_while_many_wait_for_their_sync(place: Directory, clock: ManualClock) -> None:
    """Twice `batch_size` events where eight do, thrice where sixteen do; as many as ever once they are sealed."""
    line = Line(place, clock, batch_size=2)
    spares, _ = line.writer.create_spares(40)
    line.append()
    assert line.writer.add_spares(spares) == []
    for number in range(1, 60):
        line.append(1, numbered(number)[0])
    assert [len(lines) for _, lines in filled(place)] == [2] * 8 + [4] * 8 + [6, 6]
    line.sealer.step()
    line.append(4)
    assert [len(lines) for _, lines in filled(place)] == [2, 2]


def test_a_file_that_was_to_hold_more_is_looked_at_again_once_the_others_are_sealed(
    place: Directory, clock: ManualClock
) -> None:
    """A burst is over, and the next events may be long in coming."""
    line = Line(place, clock, batch_size=2)
    spares, _ = line.writer.create_spares(30)
    line.append()
    assert line.writer.add_spares(spares) == []
    line.append(2 * 8 + 4 * 8 + 2 - 1)
    assert [len(lines) for _, lines in filled(place)][-1] == 2  # of six
    assert line.writer._file.attend_at == 4
    line.sealer.step()
    line.append(3)
    assert [len(lines) for _, lines in filled(place)] == [3, 2]


def test_numbers_go_on_where_all_files_are_sealed_and_gone(place: Directory, clock: ManualClock) -> None:
    """A loss of power may bring them back under their names."""
    line = Line(place, clock)
    line.append()
    line.sealer.step()  # opens a spare
    line.writer.rotate("manual")
    line.append()
    (_, (spare, _)) = filled(place)
    line.writer._spares.clear()
    line.writer.rotate("manual")
    line.sealer._seal_retired()
    assert filled(place) == []
    line.append()
    assert [number for number, _ in filled(place)] == [spare + 1]


def test_a_handler_between_a_full_file_and_none_comes_behind_it(
    place: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that leaves is neither the active one any more nor among those that wait."""
    line = Line(place, clock)
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
    assert [events for _, events in filled(place)] == [[1], [1], [7]]
