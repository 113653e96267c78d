"""Which records are meant."""

from __future__ import annotations

import msgspec
import pytest

from pillarbox.admin.dead_letters import DeadLetterRecord
from pillarbox.admin.filters import RecordFilter, parse_batch_id
from pillarbox.admin.text import format_time, parse_time
from pillarbox.delivery.settlement import DeadLetter
from pillarbox.errors import UsageError

NOW = 1_700_000_000_000_000
LETTER = DeadLetter(msgspec.Raw(b"{}"), "wrong_type", "Expected `str` for 7", "sqlite:///e.db", 4, 1, 100, 200)
RECORD = DeadLetterRecord("sealed-0000000000000001-a", 0, LETTER, "e-1", "click")


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("90s", NOW - 90_000_000),
        ("1.5h", NOW - 5_400_000_000),
        ("3d", NOW - 259_200_000_000),
        ("1w", NOW - 604_800_000_000),
        ("1970-01-01T00:00:01", 1_000_000),
        ("1970-01-01T01:00:01+01:00", 1_000_000),
        ("1970-01-02", 86_400_000_000),
        ("1970-01-01T00:00:00.000001Z", 1),
    ],
)
def test_a_moment_is_so_long_ago_or_iso_8601(text: str, micros: int) -> None:
    """UTC where it names no offset."""
    assert parse_time(text, NOW) == micros


@pytest.mark.parametrize("text", ["", "yesterday", "3", "-3d", "2026-13-01"])
def test_what_is_no_moment_is_refused_with_examples(text: str) -> None:
    """In one sentence."""
    with pytest.raises(UsageError, match="2h"):
        parse_time(text, NOW)


def test_moments_are_written_in_utc() -> None:
    """One that no calendar has is a number."""
    assert format_time(1_700_000_000_999_999) == "2023-11-14T22:13:20Z"
    assert format_time(None) == "-"
    assert format_time(2**63) == f"{2**63} us"


@pytest.mark.parametrize(
    ("fits", "does_not"),
    [
        ({"batches": ("sealed-0000000000000001",)}, {"batches": ("sealed-2",)}),
        ({"records": ("sealed-0000000000000001-a#4",)}, {"records": ("sealed-0000000000000001-a#5",)}),
        ({"records": ("sealed-0000000000000001-a#4",)}, {"records": ("sealed-0000000000000001-b#4",)}),
        ({"reasons": ("nothing", "`str`")}, {"reasons": ("`int`",)}),
        ({"codes": ("wrong_type",)}, {"codes": ("wrong",)}),
        ({"sinks": ("sqlite",)}, {"sinks": ("https",)}),
        ({"event_keys": ("click",)}, {"event_keys": ("cl",)}),
        ({"event_ids": ("e-1", "e-2")}, {"event_ids": ("e",)}),
        ({"since_micros": 200}, {"since_micros": 201}),
        ({"until_micros": 201}, {"until_micros": 200}),
    ],
)
def test_all_kinds_of_options_must_fit_and_any_of_a_kind(fits: dict[str, object], does_not: dict[str, object]) -> None:
    """Each by itself, and together."""
    everything = {"codes": ("wrong_type",), "event_keys": ("click",)}
    assert RecordFilter(**fits).matches(RECORD)  # type: ignore[arg-type]
    assert not RecordFilter(**does_not).matches(RECORD)  # type: ignore[arg-type]
    assert RecordFilter(**everything | fits).matches(RECORD)  # type: ignore[arg-type]
    assert not RecordFilter(**everything | does_not).matches(RECORD)  # type: ignore[arg-type]


def test_what_has_no_known_time_is_not_meant_where_a_time_is() -> None:
    """Whichever end is open."""
    assert RecordFilter().matches_time(None)
    assert not RecordFilter(since_micros=1).matches_time(None)
    assert not RecordFilter(until_micros=1).matches_time(None)


@pytest.mark.parametrize(
    "typed", ["sealed-1-a", "box/dead-sealed-1-a.ndjson", "corrupt-sealed-1-a.spans.json", "sealed-1-a.ndjson"]
)
def test_a_batch_may_be_named_by_any_of_its_files(typed: str) -> None:
    """Paths and all."""
    assert parse_batch_id(typed) == "sealed-1-a"
