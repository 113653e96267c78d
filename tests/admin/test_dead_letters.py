"""Files of dead letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillarbox.admin import dead_letters
from pillarbox.admin.scan import list_batches
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock
from tests.admin.prepared_outboxes import IDENTITY_DECODER, event_json, outbox_with_dead_letters, seal_batch

NONSENSE = [b"no json\n", b'{"event":5}\n', b'{"event":"\xff","code":"c"}\n', b"\0\0\0\n"]


def test_the_lines_of_a_real_file_are_its_dead_letters(tmp_path: Path) -> None:
    """With id, key, and where they stood among the good records."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), b"5", event_json(2, 5)])
    (file,) = box.glob("dead-*")
    found = dead_letters.parse("b", file.read_bytes(), IDENTITY_DECODER)
    assert [(one.event_id, one.event_key, one.name) for one in found.records] == [
        ("w-000001", "buy", "b#3"),
        (None, None, "b#4"),
        ("w-000002", "buy", "b#5"),
    ]
    assert bytes(found.records[0].letter.event) == event_json(1, 5)
    assert not found.problems


@pytest.mark.parametrize("bad", NONSENSE)
def test_a_line_that_is_no_dead_letter_is_named_and_stays_byte_for_byte(tmp_path: Path, bad: bytes) -> None:
    """Also when all others are taken out."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5)])
    (file,) = box.glob("dead-*")
    first, second = file.read_bytes().splitlines(keepends=True)
    found = dead_letters.parse("b", first + bad + b"\n" + second, IDENTITY_DECODER)
    assert [one.event_id for one in found.records] == ["w-000001", "w-000002"]
    assert [(trouble.file, trouble.line) for trouble in found.problems] == [("dead-b.ndjson", 2)]
    assert found.without_lines({0}) == bad + b"\n" + second
    assert found.without_lines({0, 3}) == bad + b"\n"


def test_a_file_that_was_cut_loses_its_last_line_only(tmp_path: Path) -> None:
    """Cut anywhere; and without the line feed alone it loses nothing."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5)])
    (file,) = box.glob("dead-*")
    data = file.read_bytes()
    end = data.index(b"\n") + 1
    for length in range(end + 1, len(data)):
        found = dead_letters.parse("b", data[:length], IDENTITY_DECODER)
        whole = length == len(data) - 1
        assert (len(found.records), len(found.problems)) == ((2, 0) if whole else (1, 1))
        assert found.without_lines(set()) == data[:length]


def test_what_differs_in_values_only_is_one_group(tmp_path: Path) -> None:
    """The largest group first."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5), event_json(3, 5, key="sell"), b"5"])
    groups = dead_letters.DeadLetterGrouper()
    (file,) = box.glob("dead-*")
    for one in dead_letters.parse("b", file.read_bytes(), IDENTITY_DECODER).records:
        groups.add(one)
    found = groups.largest_first()
    assert (found[0].count, found[0].event_key) == (2, "buy")
    assert sum(group.count for group in found) == 4
    assert len(found) == 3


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("value 17 is above 1_000.5", "value N is above N"),
        ('user "a \\" b" and \'c\'', 'user "..." and "..."'),
        ("id 0199aa11-0000-7000-8000-00000000abcd twice", "id ... twice"),
        ("Expected `int64`, got `str` - at `$.items[0].x2`", "Expected `int64`, got `str` - at `$.items[N].x2`"),
    ],
)
def test_values_are_left_out_of_a_reason_and_names_are_not(reason: str, kind: str) -> None:
    """Members and types tell kinds of trouble apart."""
    assert dead_letters.mask_values(reason) == kind


def test_a_batch_whose_sealed_file_is_there_is_held(tmp_path: Path) -> None:
    """The deliverer may write it again."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5)])
    other = seal_batch(box, good=1)
    (file,) = box.glob("dead-*")
    place = Directory(str(box), OsFilesystem(), ManualClock())
    assert list_batches(place, Kind.DEAD) == ([file.stem.removeprefix("dead-")], frozenset())
    file.rename(box / f"dead-{other.name}")
    assert list_batches(place, Kind.DEAD) == ([other.stem], frozenset({other.stem}))


def test_a_link_under_the_name_of_dead_letters_is_named_and_not_followed(tmp_path: Path) -> None:
    """As everywhere."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5)])
    (file,) = box.glob("dead-*")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    place = Directory(str(box), OsFilesystem(), ManualClock())
    (found,) = dead_letters.read_files(place, [file.stem.removeprefix("dead-")], IDENTITY_DECODER)
    assert not found.records
    assert "link" in found.problems[0].problem
