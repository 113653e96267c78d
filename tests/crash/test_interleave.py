"""Every interleaving of the real code within bounds that take seconds; and that planted defects are found.

`python -m tests.crash.interleave` runs all of them with three preemptions and a kill.
"""

from __future__ import annotations

from typing import Any

import pytest

from pillarbox.delivery.lease import Lease
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.testing.crash import CrashFilesystem
from tests.crash import interleave, interleave_fanout
from tests.crash.interleave import SCENARIOS, Scenario, explore

# As much as takes seconds: (preemptions, kills) of scenarios that come by many points, by few, and by fewest.
MANY = {
    interleave.two_deliver_what_a_third_writes,
    interleave.one_writes_and_the_others_adopt_and_deliver,
    interleave.one_evicts_while_another_delivers,
    interleave.two_evict,
}
FEW = {
    interleave.one_adopts_what_the_older_system_left_and_another_delivers,
    interleave.one_delivers_what_an_operator_deletes,
}


def bounds(scenario: Scenario) -> list[tuple[int, int]]:
    if scenario in MANY:
        return [(1, 0)]
    return [(3, 0), (1, 1)] if scenario in FEW else [(2, 0), (1, 1)]


CASES = [
    pytest.param(scenario, *chosen, id=f"{scenario.__name__}-{chosen[0]}-{chosen[1]}")
    for scenario in SCENARIOS
    for chosen in bounds(scenario)
]


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize(("scenario", "preemptions", "kills"), CASES)
def test_no_interleaving_loses_doubles_or_leaves_anything(scenario: Scenario, preemptions: int, kills: int) -> None:
    """What is accepted is delivered, once where nobody is killed."""
    report = explore(scenario, preemptions, kills)
    assert report.complete
    assert not report.violations, str(report)


@pytest.mark.usefixtures("each_order")
def test_a_file_that_is_written_aside_is_not_removed_as_a_dead_writers() -> None:
    """By another process that held the first one of that name, when there was one name for all."""
    assert not explore(interleave.one_adopts_what_is_torn_and_another_delivers, 2, 0).violations


@pytest.mark.usefixtures("each_order")
def test_schedules_are_the_same_each_time() -> None:
    """What is found can be found again."""
    first, second = (explore(interleave.two_deliver, 1, 1) for _ in range(2))
    assert (first.schedules, first.points) == (second.schedules, second.points)


def test_a_part_of_the_schedules_is_a_part() -> None:
    """With a limit in seconds."""
    assert not explore(interleave.two_evict, seconds=0.2, seed=1).complete


def take_without_claim(self: Directory, name: str) -> LockedFile | None:
    try:
        return LockedFile(name, self.filesystem.open_existing(self.path_of(name)))
    except FileNotFoundError:
        return None


def always(*_args: Any) -> bool:
    return True


def lease_for_all(self: Lease) -> bool:
    self._fd = self._directory.filesystem.open_lock_file(self._directory.path_of("deliver.lock"))
    return True


def found(scenario: Scenario, preemptions: int = 2, kills: int = 0) -> str:
    return str(explore(scenario, preemptions, kills).violations[:1])


def test_a_take_without_a_claim_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adopt the same file."""
    monkeypatch.setattr(Directory, "lock_existing", take_without_claim)
    assert "was delivered" in found(interleave.two_start_and_adopt_the_same_file, 1)


def test_two_deliverers_without_any_claim_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either claim alone would do."""
    monkeypatch.setattr(Lease, "acquire", lease_for_all)
    assert not explore(interleave.two_deliver, 1, 0).violations
    monkeypatch.setattr(Directory, "lock_existing", take_without_claim)
    assert "was delivered 2 times" in found(interleave.two_deliver, 1)


def test_a_file_taken_without_looking_at_its_name_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was sealed or delivered between open and lock."""
    monkeypatch.setattr(CrashFilesystem, "is_file_at", always)
    monkeypatch.setattr(Lease, "acquire", lease_for_all)
    assert "was delivered" in found(interleave.two_deliver)


def test_a_file_that_is_removed_between_create_and_lock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer has to look whether it is still there: killed, it would take with it what it appended."""
    monkeypatch.setattr(CrashFilesystem, "has_name", always)
    assert "lost" in found(interleave.one_begins_files_while_another_recovers, 1, 1)


def test_a_file_that_is_removed_before_it_is_delivered_is_found_by_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of settlement."""
    deliver = interleave.InterleavingDestination.deliver

    async def too_late(self: interleave.InterleavingDestination, batch: Any) -> Any:
        self.process.directory.remove(f"{batch.id}.ndjson")
        return await deliver(self, batch)

    monkeypatch.setattr(interleave.InterleavingDestination, "deliver", too_late)
    assert not explore(interleave.two_deliver, 0, 0).violations
    assert "lost" in found(interleave.two_deliver, 0, 1)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("scenario", interleave_fanout.SCENARIOS)
@pytest.mark.parametrize(("preemptions", "kills"), [(1, 0), (0, 1)])
def test_no_interleaving_of_handing_over_has_a_sink_miss_anything(scenario: Scenario, preemptions: int, kills: int) -> None:
    """While queues are delivered, files are evicted, or a sink is added."""
    report = explore(scenario, preemptions, kills)
    assert report.complete
    assert not report.violations, str(report)
