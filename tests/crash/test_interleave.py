"""Every interleaving of the real code within small bounds, and planted defects, which must be found.

`python -m tests.crash.interleave` runs all scenarios with three preemptions and a kill.
"""

from __future__ import annotations

from typing import Any

import pytest

from pillarbox.delivery.lease import Lease
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.testing.crash import CrashFilesystem
from tests.crash import interleave, interleave_fanout
from tests.crash.interleave import SCENARIOS, Scenario, explore

# Bounds (preemptions, kills) that take seconds, for scenarios with many points, with few points, and the others.
MANY = {
    interleave.two_deliver_while_a_third_writes,
    interleave.one_writes_while_others_recover_and_deliver,
    interleave.one_evicts_while_another_delivers,
    interleave.two_evict,
}
FEW = {
    interleave.one_recovers_a_legacy_segment_while_another_delivers,
    interleave.one_delivers_while_an_operator_deletes,
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
def test_no_interleaving_loses_or_repeats_events_or_leaves_files_behind(
    scenario: Scenario, preemptions: int, kills: int
) -> None:
    """Every accepted event is delivered; exactly once if no process is killed."""
    report = explore(scenario, preemptions, kills)
    assert report.complete
    assert not report.violations, str(report)


@pytest.mark.usefixtures("each_order")
def test_a_temporary_file_in_use_is_not_removed_by_another_process() -> None:
    """Temporary files have unique names. With one name for all, another process could hold an earlier file of that name."""
    assert not explore(interleave.one_recovers_a_torn_segment_while_another_delivers, 2, 0).violations


@pytest.mark.usefixtures("each_order")
def test_exploration_is_deterministic() -> None:
    """A violation can be reproduced."""
    first, second = (explore(interleave.two_deliver, 1, 1) for _ in range(2))
    assert (first.schedules, first.points) == (second.schedules, second.points)


def test_exploration_with_a_time_limit_is_reported_as_incomplete() -> None:
    """The limit ends it before every schedule was run."""
    assert not explore(interleave.two_evict, seconds=0.2, seed=1).complete


def open_without_lock(self: Directory, name: str) -> LockedFile | None:
    try:
        return LockedFile(name, self.filesystem.open_existing(self.path_of(name)))
    except FileNotFoundError:
        return None


def always(*_args: Any) -> bool:
    return True


def acquire_without_lock(self: Lease) -> bool:
    self._fd = self._directory.filesystem.open_lock_file(self._directory.path_of("deliver.lock"))
    return True


def first_violation(scenario: Scenario, preemptions: int = 2, kills: int = 0) -> str:
    return str(explore(scenario, preemptions, kills).violations[:1])


def test_recovery_without_a_lock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process seals again what another has sealed and delivered meanwhile."""
    monkeypatch.setattr(Directory, "lock_existing", open_without_lock)
    assert "was delivered" in first_violation(interleave.one_recovers_while_another_delivers, 1)


def test_delivery_without_lease_and_locks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease alone prevents it; so do the locks of files alone."""
    monkeypatch.setattr(Lease, "acquire", acquire_without_lock)
    assert not explore(interleave.two_deliver, 1, 0).violations
    monkeypatch.setattr(Directory, "lock_existing", open_without_lock)
    assert "was delivered 2 times" in first_violation(interleave.two_deliver, 1)


def test_locking_a_file_without_checking_its_name_afterwards_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be sealed or delivered between open and lock."""
    monkeypatch.setattr(CrashFilesystem, "is_file_at", always)
    monkeypatch.setattr(Lease, "acquire", acquire_without_lock)
    assert "was delivered" in first_violation(interleave.two_deliver)


def test_a_writer_that_does_not_check_the_name_of_a_new_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery may remove the file between create and lock. A killed writer would lose the events that it appended."""
    monkeypatch.setattr(CrashFilesystem, "has_name", always)
    assert "lost" in first_violation(interleave.one_creates_segments_while_another_recovers, 1, 1)


def test_removing_a_file_before_its_delivery_is_found_by_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kill the wrong order has no effect."""
    deliver = interleave.InterleavingDestination.deliver

    async def remove_and_deliver(self: interleave.InterleavingDestination, batch: Any) -> Any:
        self.process.directory.remove(f"{batch.id}.ndjson")
        return await deliver(self, batch)

    monkeypatch.setattr(interleave.InterleavingDestination, "deliver", remove_and_deliver)
    assert not explore(interleave.two_deliver, 0, 0).violations
    assert "lost" in first_violation(interleave.two_deliver, 0, 1)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("scenario", interleave_fanout.SCENARIOS)
@pytest.mark.parametrize(("preemptions", "kills"), [(1, 0), (0, 1)])
def test_no_interleaving_of_fanning_out_loses_events_of_a_sink(scenario: Scenario, preemptions: int, kills: int) -> None:
    """While queues are delivered, files are evicted, or a sink is added."""
    report = explore(scenario, preemptions, kills)
    assert report.complete
    assert not report.violations, str(report)
