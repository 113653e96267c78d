"""The state machine with fixed examples, planted defects, which must be found, and its model of power losses.

`python -m tests.crash.state_machine` runs it longer.
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

EXAMPLES = 1500  # about ten seconds
DEFECT_EXAMPLES = 3000  # enough to find every planted defect; most are found within hundreds

Defect = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.usefixtures("each_order")
def test_no_sequence_loses_invents_or_repeats_events() -> None:
    """For any calls in any order, with kills and power losses, and no file is left behind."""
    torture(EXAMPLES)


def sealed_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    def make_final(_self: SegmentSyncer, files: Sequence[Segment], _kept: Any) -> list[str]:
        for file in files:
            file.is_sealed, file.synced_bytes = True, file.bytes
        return []

    patch.setattr(SegmentSyncer, "sync_for_seal", make_final)


def names_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Directory, "_sync_names", lambda _self: None)


def recovered_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_sync_or_rewrite", lambda _directory, file: file)


def dead_letters_not_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settlement, "write_dead_letters", lambda *_: None)


def confirmed_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    def commit(self: GroupCommitter, lines: bytes, events: int) -> Any:
        outcome = self._writer.append(lines, events)
        return ENQUEUED_POWER if outcome else outcome

    patch.setattr(GroupCommitter, "commit", commit)


def opened_without_a_lock(patch: pytest.MonkeyPatch) -> None:
    def take(self: Directory, name: str) -> LockedFile | None:
        try:
            return LockedFile(name, self.filesystem.open_existing(self.path_of(name)))
        except FileNotFoundError:
            return None

    patch.setattr(Directory, "lock_existing", take)


def never_recovered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_recover_file", lambda *_: True)


def written_under_other_names(patch: pytest.MonkeyPatch) -> None:
    write_atomically = Directory.write_atomically
    patch.setattr(
        Directory, "write_atomically", lambda self, name, data: write_atomically(self, f"{name}-{self.new_id()}", data)
    )


DEFECTS: list[Defect] = [
    sealed_without_a_sync,
    names_without_a_sync,
    recovered_without_a_sync,
    dead_letters_not_stored,
    confirmed_without_a_sync,
    opened_without_a_lock,
    never_recovered,
    written_under_other_names,
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_found(monkeypatch: pytest.MonkeyPatch, defect: Defect) -> None:
    """Otherwise the test above would prove nothing."""
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        torture(DEFECT_EXAMPLES, 2, shrink=False)


@pytest.mark.usefixtures("each_order")
def test_a_delivered_batch_keeps_its_name_after_a_power_loss() -> None:
    """The sealer is killed between rename and sync. Under another name, the destination would see another batch."""
    for killed, cut, number in itertools.product(range(4), range(8, 16), range(4)):
        machine, chance = OutboxMachine(), random.Random(number)
        machine.begin(evicts=False)
        machine.start(fuse=None, chance=chance)
        machine.enqueue(count=1, durability="process", fuse=None, chance=chance)
        machine.flush(fuse=Fuse(killed, "kill"), chance=chance)
        machine.deliver(answers=[], fuse=Fuse(cut, "cut"), chance=chance)
        machine.teardown()


def test_power_losses_of_the_machine_leave_exactly_the_states_of_the_model() -> None:
    """Each state of the model occurs."""
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
