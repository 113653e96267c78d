"""The format of dead letter files."""

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

NOT_DEAD_LETTERS = [b"no json\n", b'{"event":5}\n', b'{"event":"\xff","code":"c"}\n', b"\0\0\0\n"]


def test_a_real_file_is_parsed(tmp_path: Path) -> None:
    """Ids, keys, and the index of each record in its batch."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), b"5", event_json(2, 5)])
    (file,) = box.glob("dead-*")
    parsed = dead_letters.parse("b", file.read_bytes(), IDENTITY_DECODER)
    assert [(record.event_id, record.event_key, record.name) for record in parsed.records] == [
        ("w-000001", "buy", "b#3"),
        (None, None, "b#4"),
        ("w-000002", "buy", "b#5"),
    ]
    assert bytes(parsed.records[0].letter.event) == event_json(1, 5)
    assert not parsed.problems


@pytest.mark.parametrize("bad", NOT_DEAD_LETTERS)
def test_a_line_that_is_not_a_dead_letter_is_reported_and_kept_byte_for_byte(tmp_path: Path, bad: bytes) -> None:
    """Also if all other lines are removed."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5)])
    (file,) = box.glob("dead-*")
    first, second = file.read_bytes().splitlines(keepends=True)
    parsed = dead_letters.parse("b", first + bad + b"\n" + second, IDENTITY_DECODER)
    assert [record.event_id for record in parsed.records] == ["w-000001", "w-000002"]
    assert [(problem.file, problem.line) for problem in parsed.problems] == [("dead-b.ndjson", 2)]
    assert parsed.without_lines({0}) == bad + b"\n" + second
    assert parsed.without_lines({0, 3}) == bad + b"\n"


def test_a_truncated_file_loses_only_its_last_line(tmp_path: Path) -> None:
    """Wherever it is truncated. Without only the last line feed, it loses nothing."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5)])
    (file,) = box.glob("dead-*")
    data = file.read_bytes()
    end = data.index(b"\n") + 1
    for length in range(end + 1, len(data)):
        parsed = dead_letters.parse("b", data[:length], IDENTITY_DECODER)
        whole = length == len(data) - 1
        assert (len(parsed.records), len(parsed.problems)) == ((2, 0) if whole else (1, 1))
        assert parsed.without_lines(set()) == data[:length]


def test_dead_letters_that_differ_only_in_values_are_one_group(tmp_path: Path) -> None:
    """The largest group comes first."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5), event_json(2, 5), event_json(3, 5, key="sell"), b"5"])
    grouper = dead_letters.DeadLetterGrouper()
    (file,) = box.glob("dead-*")
    for record in dead_letters.parse("b", file.read_bytes(), IDENTITY_DECODER).records:
        grouper.add(record)
    groups = grouper.largest_first()
    assert (groups[0].count, groups[0].event_key) == (2, "buy")
    assert sum(group.count for group in groups) == 4
    assert len(groups) == 3


@pytest.mark.parametrize(
    ("reason", "masked"),
    [
        ("value 17 is above 1_000.5", "value N is above N"),
        ('user "a \\" b" and \'c\'', 'user "..." and "..."'),
        ("id 0199aa11-0000-7000-8000-00000000abcd twice", "id ... twice"),
        ("Expected `int64`, got `str` - at `$.items[0].x2`", "Expected `int64`, got `str` - at `$.items[N].x2`"),
    ],
)
def test_values_in_a_reason_are_masked_and_names_are_not(reason: str, masked: str) -> None:
    """Names of fields and types distinguish problems."""
    assert dead_letters.mask_values(reason) == masked


def test_a_batch_with_a_sealed_file_is_pending(tmp_path: Path) -> None:
    """Its delivery worker may write the dead letters again."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5)])
    other = seal_batch(box, good=1)
    (file,) = box.glob("dead-*")
    directory = Directory(str(box), OsFilesystem(), ManualClock())
    assert list_batches(directory, Kind.DEAD) == ([file.stem.removeprefix("dead-")], frozenset())
    file.rename(box / f"dead-{other.name}")
    assert list_batches(directory, Kind.DEAD) == ([other.stem], frozenset({other.stem}))


def test_a_link_with_the_name_of_a_dead_letter_file_is_reported_and_not_followed(tmp_path: Path) -> None:
    """It may point anywhere."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5)])
    (file,) = box.glob("dead-*")
    file.rename(tmp_path / "target")
    file.symlink_to(tmp_path / "target")
    directory = Directory(str(box), OsFilesystem(), ManualClock())
    (parsed,) = dead_letters.read_files(directory, [file.stem.removeprefix("dead-")], IDENTITY_DECODER)
    assert not parsed.records
    assert "link" in parsed.problems[0].problem
