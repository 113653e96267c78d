"""Spares, segments that callers create, and the order in which both are filled."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pillarbox.outcome import DROPPED, ENQUEUED
from pillarbox.store import layout, record, writer
from pillarbox.store.directory import Directory
from pillarbox.store.segment import SEGMENT_BYTES_MAX
from pillarbox.testing import ManualClock
from tests.store.test_writer import LINE, SealingWriter


def events_by_number(outbox_dir: Directory) -> list[tuple[int, list[int]]]:
    """The events of each non-empty unsealed segment, with the number of the segment, in order."""
    active = [name for name in os.listdir(outbox_dir.path) if layout.kind_of(name) is layout.Kind.ACTIVE]
    files = [(layout.active_sort_key(name)[1], Path(outbox_dir.path_of(name)).read_bytes().splitlines()) for name in active]
    return sorted(
        (number, [msgspec.json.decode(record.payload(line))["n"] for line in lines]) for number, lines in files if lines
    )


def numbered(*numbers: int) -> list[bytes]:
    return [record.line(b'{"n":%d}' % number) for number in numbers]


def test_a_segment_created_by_a_caller_precedes_spares_that_are_being_created(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """Recovery sorts by number, and unused spares would have to be removed."""
    lines = numbered(*range(9))
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2, batch_bytes=3 * len(lines[0]))
    pipeline.append(3, lines[0])  # a full segment
    spares, _ = pipeline.writer.create_spares(2)
    for line in lines[1:4]:  # the next segment
        pipeline.append(1, line)
    assert pipeline.writer.add_spares(spares) == []
    for line in lines[4:]:
        pipeline.append(1, line)
    segments = events_by_number(outbox_dir)
    assert [events for _, events in segments] == [[0, 0, 0], [1, 2, 3], [4, 5], [6, 7, 8]]
    assert [number for number, _ in segments][2:] == [layout.active_sort_key(spare.name)[1] for spare in spares]


def test_a_spare_with_a_lower_number_than_a_used_segment_is_not_used(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile callers have created more segments than there are numbers between two spares."""
    monkeypatch.setattr(writer, "_SPARE_NUMBER_STEP", 3)
    pipeline = SealingWriter(outbox_dir, clock, batch_bytes=len(LINE))
    (late,), _ = pipeline.writer.create_spares(1)
    pipeline.append(3)
    assert pipeline.writer.add_spares([late]) == [late]
    (later,), _ = pipeline.writer.create_spares(1)
    assert pipeline.writer.add_spares([later]) == []
    pipeline.append(3)
    assert [number for number, _ in events_by_number(outbox_dir)] == [1, 2, 4, 6, 7, 8]
    for file in (late, later):
        outbox_dir.filesystem.close(file.fd)


def test_a_segment_holds_more_events_while_many_wait_for_their_sync(outbox_dir: Directory, clock: ManualClock) -> None:
    """Twice `batch_size` with eight waiting segments, three times with sixteen, and once after they are sealed."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2)
    spares, _ = pipeline.writer.create_spares(40)
    pipeline.append()
    assert pipeline.writer.add_spares(spares) == []
    for number in range(1, 60):
        pipeline.append(1, numbered(number)[0])
    assert [len(lines) for _, lines in events_by_number(outbox_dir)] == [2] * 8 + [4] * 8 + [6, 6]
    pipeline.sealer.step()
    pipeline.append(4)
    assert [len(lines) for _, lines in events_by_number(outbox_dir)] == [2, 2]


def test_a_segment_that_may_hold_more_is_checked_again_once_the_others_are_sealed(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """After a burst, the next event may come much later: the segment is full then, and no event needs to follow."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2)
    spares, _ = pipeline.writer.create_spares(30)
    pipeline.append()
    assert pipeline.writer.add_spares(spares) == []
    pipeline.append(2 * 8 + 4 * 8 + 2 - 1)
    assert [len(lines) for _, lines in events_by_number(outbox_dir)][-1] == 2  # it may hold six
    assert pipeline.writer._file.threshold_events == 4
    pipeline.sealer.step()
    assert [segment.events for segment in pipeline.writer.retired_segments()] == [2]
    pipeline.append(3)
    assert [len(lines) for _, lines in events_by_number(outbox_dir)] == [2, 2, 1]


def test_a_segment_that_filled_before_there_was_a_spare_is_sealed_without_another_event(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """The first events may come before the sealer has created a spare."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2)
    pipeline.append(2)
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 2}
    assert pipeline.sealer.sealed["batch_size"] == 1


def test_a_segment_that_filled_at_the_limit_of_files_is_sealed_when_a_file_is_delivered(
    outbox_dir: Directory, clock: ManualClock
) -> None:
    """At `max_files` a full segment grows; the delivery that makes room has it sealed."""
    pipeline = SealingWriter(outbox_dir, clock, batch_size=2, max_files=2)
    pipeline.append(2)
    pipeline.sealer.step()
    pipeline.append(3)
    pipeline.sealer.step()
    assert len(outbox_dir.batch_names()) == 1
    pipeline.writer.release_bytes(0)
    assert [segment.events for segment in pipeline.writer.retired_segments()] == [3]


def test_numbers_continue_after_all_segments_are_sealed_and_delivered(outbox_dir: Directory, clock: ManualClock) -> None:
    """After a power loss, the old files may reappear under their old names."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append()
    pipeline.sealer.step()  # creates a spare
    pipeline.writer.rotate("manual")
    pipeline.append()
    (_, (spare, _)) = events_by_number(outbox_dir)
    pipeline.writer._spares.clear()
    pipeline.writer.rotate("manual")
    pipeline.sealer._seal_retired()
    assert events_by_number(outbox_dir) == []
    pipeline.append()
    assert [number for number, _ in events_by_number(outbox_dir)] == [spare + 1]


def test_a_handler_that_appends_during_a_rotation_gets_the_later_segment(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At that moment, the retiring segment is neither active nor retired."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append()
    pipeline.writer._highest_used = 4999
    pipeline.writer.rotate("manual")
    pipeline.append()
    finish_retiring = pipeline.writer._finish_retiring

    def append_and_finish() -> None:
        monkeypatch.setattr(pipeline.writer, "_finish_retiring", finish_retiring)
        assert pipeline.append(1, numbered(7)[0]) == [ENQUEUED]
        finish_retiring()

    monkeypatch.setattr(pipeline.writer, "_finish_retiring", append_and_finish)
    pipeline.writer.rotate("manual")
    assert [events for _, events in events_by_number(outbox_dir)] == [[1], [1], [7]]


def test_a_segment_that_waits_for_a_slow_disk_stops_growing_at_a_limit(outbox_dir: Directory, clock: ManualClock) -> None:
    """Then events are dropped with the reason `disk_slow` until the disk has caught up."""
    pipeline = SealingWriter(outbox_dir, clock, batch_bytes=1000, max_bytes=2**30)
    large = record.line(b'"' + b"x" * 2**20 + b'"')
    outcomes = [pipeline.writer.append(large, 1) for _ in range(writer.RETIRED_MAX + SEGMENT_BYTES_MAX // 2**20 + 3)]
    accepted = outcomes.index(DROPPED["disk_slow"])
    assert outcomes[:accepted] == [ENQUEUED] * (writer.RETIRED_MAX + SEGMENT_BYTES_MAX // len(large))
    assert set(outcomes[accepted:]) == {DROPPED["disk_slow"]}
    pipeline.sealer.step()
    assert pipeline.writer.append(large, 1) == ENQUEUED
    sizes = [os.path.getsize(outbox_dir.path_of(name)) for name in os.listdir(outbox_dir.path)]
    assert max(sizes) <= SEGMENT_BYTES_MAX
