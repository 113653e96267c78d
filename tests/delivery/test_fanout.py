"""Fan-out stops when it is told to. Errors and kills during fan-out are tested in `tests/crash`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from pillarbox.delivery.fanout import GROUP_MAX_FILES, FanOut
from pillarbox.store.ledger import LedgerWriter
from pillarbox.testing import ManualClock
from tests.delivery.fanout_setup import open_directory

FILES = 3 * GROUP_MAX_FILES + 1


@pytest.fixture
def box(tmp_path: Path) -> Path:
    path = tmp_path / "box"
    path.mkdir()
    for number in range(FILES):
        (path / f"sealed-{number:016d}-x.ndjson").write_bytes(b'{"event":{"event_id":"e"}}\n')
    return path


def names_in(path: Path) -> list[str]:
    return sorted(one.name for one in path.glob("sealed-*"))


def test_fan_out_can_stop_between_two_groups(box: Path) -> None:
    """So the heartbeat is written in time, and the process can end. The oldest batches come first."""
    outbox_dir, clock = open_directory(box), ManualClock()
    fan_out = FanOut(outbox_dir, ["live"], clock, LedgerWriter(outbox_dir, clock))
    assert list(islice(fan_out.distribute(), 2)) == [GROUP_MAX_FILES, GROUP_MAX_FILES]
    assert names_in(box) == names_in(box / "sink-live")[2 * GROUP_MAX_FILES :]
    assert fan_out.distribute_all() == FILES - 2 * GROUP_MAX_FILES
    assert names_in(box) == []
    assert len(names_in(box / "sink-live")) == FILES


def test_a_new_sink_gets_its_queue_after_the_earlier_batches_are_fanned_out(box: Path) -> None:
    """These batches are not for the new sink, even if their fan-out takes several groups."""
    outbox_dir, clock = open_directory(box), ManualClock()
    ledger = LedgerWriter(outbox_dir, clock)
    (box / "sink-warehouse").mkdir()
    fan_out = FanOut(outbox_dir, ["warehouse", "live"], clock, ledger)
    assert next(fan_out.distribute()) == GROUP_MAX_FILES
    assert not (box / "sink-live").exists()
    assert fan_out.distribute_all() == FILES - GROUP_MAX_FILES
    assert names_in(box / "sink-live") == []
    assert len(names_in(box / "sink-warehouse")) == FILES
