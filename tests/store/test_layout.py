"""File names and the kinds of files that they stand for."""

from __future__ import annotations

import pytest

from pillarbox.store import layout
from pillarbox.store.layout import Kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("active.ndjson", Kind.LEGACY_ACTIVE),
        ("active-0b1c-1.ndjson", Kind.ACTIVE),
        ("sealed-1795436302841870-12491cba.ndjson", Kind.SEALED),
        ("sealed-bad.ndjson", Kind.SEALED),
        ("sealed-.ndjson", Kind.SEALED),
        ("sealed-x.ndjson.zst", Kind.SEALED),
        ("sealed-x.ndjson.gz", Kind.OTHER),
        ("delivered-1795436302841870-12491cba.ndjson", Kind.DELIVERED),
        ("delivered-x.ndjson.zst", Kind.DELIVERED),
        ("delivered-x.ndjson.1.aside", Kind.TEMPORARY),
        ("corrupt-sealed-x.ndjson", Kind.CORRUPT),
        ("corrupt-sealed-x.spans.json", Kind.RANGES),
        ("dead-sealed-x.ndjson", Kind.DEAD),
        ("dead-sealed-x.ndjson.aside", Kind.TEMPORARY),
        ("deliver.lock", Kind.OTHER),
        ("Active.ndjson", Kind.OTHER),
        ("notes.txt", Kind.OTHER),
        ("", Kind.OTHER),
    ],
)
def test_a_name_determines_the_kind(name: str, kind: Kind) -> None:
    """Only the prefix and the suffix count."""
    assert layout.kind_of(name) is kind


def test_the_functions_of_layout_make_names_of_their_kind() -> None:
    """For every function that makes a name."""
    sealed = layout.sealed_name(1_795_436_302_841_870, "u")
    batch = layout.batch_id(sealed)
    assert layout.kind_of(layout.active_name("w", 3)) is Kind.ACTIVE
    assert layout.kind_of(sealed) is Kind.SEALED
    assert layout.sealed_at(sealed) == 1_795_436_302_841_870
    delivered = layout.delivered_name(sealed, 1_795_436_302_999_999)
    assert layout.kind_of(delivered) is Kind.DELIVERED
    assert (layout.sealed_at(delivered), layout.batch_id(delivered)) == (1_795_436_302_841_870, batch)
    assert layout.delivered_at(delivered) == 1_795_436_302_999_999
    assert layout.batch_id(f"{delivered}.zst") == batch
    assert layout.sealed_name(7, "v", f"{delivered}.zst") == f"{layout.sealed_name(7, 'v')}.zst"
    without_time = layout.delivered_name("sealed-bad.ndjson", 5)
    assert (layout.batch_id(without_time), layout.sealed_at(without_time), layout.delivered_at(without_time)) == (
        "sealed-bad",
        None,
        5,
    )
    assert (layout.batch_id("delivered-bad.ndjson"), layout.delivered_at("delivered-bad.ndjson")) == ("sealed-bad", None)
    assert layout.kind_of(layout.corrupt_name(batch)) is Kind.CORRUPT
    assert layout.kind_of(layout.ranges_name(batch)) is Kind.RANGES
    assert layout.kind_of(layout.dead_name(batch)) is Kind.DEAD
    for name in (layout.corrupt_name(batch), layout.ranges_name(batch), layout.dead_name(batch)):
        assert layout.kind_of(layout.temporary_name(name, "x")) is Kind.TEMPORARY


def test_names_of_batches_sort_by_seal_time_while_it_has_sixteen_digits() -> None:
    """Early times are padded with zeros."""
    assert layout.sealed_name(5, "z") < layout.sealed_name(40, "a") < layout.sealed_name(layout.MICROS_MAX, "a")


def test_a_batch_file_with_another_name_has_no_seal_time() -> None:
    """It is delivered nevertheless."""
    assert layout.sealed_at("sealed-bad.ndjson") is None


@pytest.mark.parametrize("sink", ["live", "0", "a_b-c", "x" * 32])
def test_the_name_of_a_queue_determines_its_sink(sink: str) -> None:
    """The name of a sink determines that of its queue."""
    assert layout.is_sink_name(sink)
    assert layout.sink_of_queue(layout.queue_name(sink)) == sink


@pytest.mark.parametrize("name", ["sink-", "sink-Live", "sink-live.adding", "sink-a/b", "sink-..", "live", "sink-" + "x" * 33])
def test_other_directories_are_not_queues(name: str) -> None:
    """Directories of requested queues are not queues either."""
    assert layout.sink_of_queue(name) is None
