"""The state machine for some seconds, always with the same examples; planted defects are found; its losses of power are the model's.

`python -m tests.crash.state_machine` runs it for longer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pillarbox.delivery import settlement
from pillarbox.outcome import ENQUEUED_POWER
from pillarbox.store import recovery
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.segment import Segment, SegmentSyncer
from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.durability_model import DurabilityModel
from tests.crash.state_machine import Fuse, OutboxMachine, pick, torture

EXAMPLES = 1500  # some ten seconds
ENOUGH = 3000  # to find what is planted; most are found in the first hundreds

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.usefixtures("each_order")
def test_nothing_is_lost_invented_doubled_or_left_behind() -> None:
    """Whatever is called, in whatever order, however it ends."""
    torture(EXAMPLES)


def sealed_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    def make_final(_self: SegmentSyncer, files: Sequence[Segment], _kept: Any) -> list[str]:
        for file in files:
            file.is_sealed, file.synced_bytes = True, file.bytes
        return []

    patch.setattr(SegmentSyncer, "sync_for_seal", make_final)


def names_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Directory, "_sync_names", lambda _self: None)


def adopted_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_sync_or_rewrite", lambda _directory, file: file)


def dead_letters_not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settlement, "write_dead_letters", lambda *_: None)


def durable_once_it_is_written(patch: pytest.MonkeyPatch) -> None:
    def commit(self: GroupCommitter, lines: bytes, events: int) -> Any:
        outcome = self._writer.append(lines, events)
        return ENQUEUED_POWER if outcome else outcome

    patch.setattr(GroupCommitter, "commit", commit)


def taken_without_a_lock(patch: pytest.MonkeyPatch) -> None:
    def take(self: Directory, name: str) -> LockedFile | None:
        try:
            return LockedFile(name, self.filesystem.open_existing(self.path_of(name)))
        except FileNotFoundError:
            return None

    patch.setattr(Directory, "lock_existing", take)


def adopted_by_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_recover_file", lambda *_: True)


def put_under_other_names(patch: pytest.MonkeyPatch) -> None:
    put = Directory.write_atomically
    patch.setattr(Directory, "write_atomically", lambda self, name, data: put(self, f"{name}-{self.new_id()}", data))


PLANTS: list[Plant] = [
    sealed_without_a_sync,
    names_without_a_sync,
    adopted_without_a_sync,
    dead_letters_not_kept,
    durable_once_it_is_written,
    taken_without_a_lock,
    adopted_by_nobody,
    put_under_other_names,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """Otherwise the test above would say nothing."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        torture(ENOUGH, 2, shrink=False)


@pytest.mark.usefixtures("each_order")
def test_a_batch_keeps_its_name_when_the_power_fails_after_it_was_sent() -> None:
    """Its sealer died between rename and sync: another name after the loss of power is another batch to the destination."""
    for killed, cut, number in itertools.product(range(4), range(8, 16), range(4)):
        machine, chance = OutboxMachine(), random.Random(number)
        machine.begin(evicts=False)
        machine.start(fuse=None, chance=chance)
        machine.enqueue(count=1, durability="process", fuse=None, chance=chance)
        machine.flush(fuse=Fuse(killed, "kill"), chance=chance)
        machine.deliver(orders=[], fuse=Fuse(cut, "cut"), chance=chance)
        machine.teardown()


def test_what_a_loss_of_power_leaves_is_one_of_the_models_states() -> None:
    """And each of them is left at some time."""
    disk = Disk({"/d/a": b"1\n"})
    filesystem = CrashFilesystem(disk)
    fd = filesystem.create("/d/b")
    filesystem.write(fd, b"2\n")
    filesystem.sync_data(fd)
    filesystem.write(fd, b"34")
    filesystem.rename("/d/b", "/d/c")
    filesystem.unlink("/d/a")
    states = [tuple(sorted(state.items())) for state in DurabilityModel(disk.trace).states()]
    chance = random.Random(1)
    assert {tuple(sorted(pick(disk, chance).items())) for _ in range(3000)} == set(states)
