"""All histories of up to three steps with all states after a crash, and planted defects, which must be found."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from pillarbox.delivery import settlement
from pillarbox.delivery.settlement import Settler
from pillarbox.store import layout, reader, recovery
from pillarbox.store.directory import Directory, LockedFile
from pillarbox.store.sealer import Sealer
from pillarbox.store.segment import SegmentSyncer
from pillarbox.testing.crash import CrashFilesystem
from tests.crash import enumeration
from tests.crash.enumeration import Bounds, Enumeration, Histories, key_of, reproduce, run
from tests.crash.simulation import OUTBOX_PATH

STEPS = 3
DISTINCT_MIN = 100_000  # with fewer distinct states, the exhaustive part no longer covers enough

Patch = pytest.MonkeyPatch


@pytest.mark.usefixtures("each_order")
def test_every_state_after_every_short_history_is_recovered() -> None:
    """Histories of up to three steps, torn at any byte. Recoveries of histories of one step are interrupted as well."""
    report = run(STEPS, bounds=Bounds(in_recovery=1))
    assert not report.violations, report
    assert (report.complete, report.sampled) == (STEPS, 0)
    assert report.distinct > DISTINCT_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", ["gd", "xd", "pk", "mrs"])
def test_an_interrupted_recovery_is_recovered(history: str) -> None:
    """Histories of two or more steps that give recovery and settlement something to do."""
    checker = Enumeration(Bounds(in_recovery=len(history)))
    for end in range(1, len(history) + 1):
        checker.check(history[:end])
    assert not checker.violations, checker.violations
    assert checker.in_recovery > 1000


@pytest.mark.usefixtures("each_order")
def test_longer_random_histories() -> None:
    """Processes are also killed in the middle of a step. The seed is fixed."""
    checker = Enumeration()
    enumeration.check_by_chance(checker, 20, lambda: checker.histories >= 30)
    assert not checker.violations, checker.violations
    assert checker.sampled


# Defects to plant: each removes something that the store must do.


def nothing(*_args: object) -> None:
    pass


def no_data_is_synced(patch: Patch) -> None:
    patch.setattr(CrashFilesystem, "sync_data", nothing)


def sealing_syncs_no_names(patch: Patch) -> None:
    patch.setattr(Directory, "_sync_names", nothing)


def recovery_syncs_no_data(patch: Patch) -> None:
    patch.setattr(recovery, "_sync_or_rewrite", lambda _directory, file: file)


def sealing_syncs_no_data(patch: Patch) -> None:
    patch.setattr(Sealer, "_sync_segments", nothing)


def written_files_have_no_durable_name(patch: Patch) -> None:
    def write_atomically(self: Directory, name: str, data: bytes | Iterable[bytes]) -> None:
        self.filesystem.close(self._write_and_rename(name, (data,) if isinstance(data, bytes) else data).fd)

    patch.setattr(Directory, "write_atomically", write_atomically)


def written_files_are_not_synced(patch: Patch) -> None:
    real = Directory._write_and_rename

    def write_aside(self: Directory, name: str, data: Iterable[bytes]) -> LockedFile:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(CrashFilesystem, "sync_data", nothing)
            return real(self, name, data)

    patch.setattr(Directory, "_write_and_rename", write_aside)


def removals_are_not_synced(patch: Patch) -> None:
    patch.setattr(Settler, "sync_removals", nothing)


def the_file_is_removed_before_its_dead_letters_are_stored(patch: Patch) -> None:
    write_dead_letters = settlement.write_dead_letters

    def remove_first(outbox_dir: Directory, batch: str, dead: object) -> None:
        outbox_dir.remove(batch + layout.SUFFIX)
        write_dead_letters(outbox_dir, batch, dead)  # type: ignore[arg-type]

    patch.setattr(settlement, "write_dead_letters", remove_first)


def damaged_bytes_are_not_quarantined(patch: Patch) -> None:
    patch.setattr(settlement, "write_quarantine", nothing)


def recovery_cuts_off_a_torn_tail(patch: Patch) -> None:
    real = Directory.seal

    def seal(
        self: Directory, ready: Sequence[LockedFile], renamed: Callable[[Sequence[LockedFile], Sequence[str]], None]
    ) -> None:
        def cut(files: Sequence[LockedFile], names: Sequence[str]) -> None:
            for name in names:
                fd = self.filesystem.open_lock_file(self.path_of(name))
                data = self.filesystem.read_all(fd)
                self.filesystem.truncate(fd, data.rfind(b"\n") + 1)
                self.filesystem.close(fd)
            renamed(files, names)

        real(self, ready, cut)

    patch.setattr(Directory, "seal", seal)


def recovery_ignores_files_that_end_with_nul_bytes(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    changed[layout.Kind.ACTIVE, recovery.LockState.NOBODY, recovery.FileTail.NUL] = recovery.RecoveryAction.LEAVE
    patch.setattr(recovery, "RECOVERY", changed)


def recovery_removes_torn_files(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    changed[layout.Kind.ACTIVE, recovery.LockState.NOBODY, recovery.FileTail.TORN] = recovery.RecoveryAction.REMOVE
    patch.setattr(recovery, "RECOVERY", changed)


def temporary_files_are_not_removed(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    for tail in recovery.FileTail:
        changed[layout.Kind.TEMPORARY, recovery.LockState.NOBODY, tail] = recovery.RecoveryAction.LEAVE
    patch.setattr(recovery, "RECOVERY", changed)


def a_damaged_line_hides_the_other_lines(patch: Patch) -> None:
    real = reader.read_lines

    def read(data: bytes, yield_gil: Callable[[], None]) -> reader.FileContents:
        contents = real(data, yield_gil)
        return reader.FileContents([], contents.damaged) if contents.damaged else contents

    patch.setattr(reader, "read_lines", read)


def power_is_confirmed_without_a_sync(patch: Patch) -> None:
    def pretend(_self: SegmentSyncer, file: Any, _kept: object) -> str:
        file.synced_bytes = file.bytes
        return ""

    patch.setattr(SegmentSyncer, "sync", pretend)


def no_name_is_synced(patch: Patch) -> None:
    patch.setattr(CrashFilesystem, "sync_directory", nothing)


def names_are_used_twice(patch: Patch) -> None:
    patch.setattr(layout, "sealed_name", lambda _stamp, _unique, _like="": "sealed-1.ndjson")


DEFECTS = [
    (no_data_is_synced, "lost"),
    (sealing_syncs_no_names, "lost"),
    (sealing_syncs_no_data, "a sealed file is not what it was"),
    (recovery_syncs_no_data, "a sealed file is not what it was"),
    (written_files_have_no_durable_name, "lost"),
    (written_files_are_not_synced, "lost"),
    (removals_are_not_synced, "settled, and came back"),
    (the_file_is_removed_before_its_dead_letters_are_stored, "lost"),
    (damaged_bytes_are_not_quarantined, "lost"),
    (recovery_cuts_off_a_torn_tail, "a sealed file is written to"),
    (recovery_ignores_files_that_end_with_nul_bytes, "left behind"),
    (recovery_removes_torn_files, "lost"),
    (temporary_files_are_not_removed, "left behind"),
    (a_damaged_line_hides_the_other_lines, "lost"),
    (power_is_confirmed_without_a_sync, "lost"),
    (no_name_is_synced, "lost"),
    (names_are_used_twice, "lost"),
]


@pytest.mark.parametrize(("plant", "problem"), DEFECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_defect_is_found_and_reproduced(plant: Callable[[Patch], None], problem: str, monkeypatch: Patch) -> None:
    """Within three steps. Without the defect, the violation does not occur."""
    checker, histories = Enumeration(Bounds(tears=enumeration.ENDS)), Histories()
    with monkeypatch.context() as patch:
        plant(patch)
        while histories.complete < STEPS and not checker.violations:
            histories.check_longer(checker, lambda: bool(checker.violations))
        violation = next(iter(checker.violations))
        assert problem in violation
        text = ast.literal_eval(violation.partition("reproduce(")[2].removesuffix(")"))
        assert reproduce(text) == violation.partition("\n")[0]
    assert not reproduce(text) or "another now" in reproduce(text)


def test_a_defect_that_only_an_interrupted_recovery_shows_is_found(monkeypatch: Patch) -> None:
    """No temporary file is written in this history, but in the recovery after it."""
    checker = Enumeration(Bounds(in_recovery=1))
    with monkeypatch.context() as patch:
        temporary_files_are_not_removed(patch)
        checker.check("g")
        violation = checker.violations[0]
        assert "left behind" in violation
        text = ast.literal_eval(violation.partition("reproduce(")[2].removesuffix(")"))
        assert len(ast.literal_eval(text)["crashes"]) == 2
        assert reproduce(text) == violation.partition("\n")[0]
    assert not reproduce(text)


def test_states_that_differ_only_in_the_numbers_of_files_count_as_one() -> None:
    """States that differ in contents, kinds, order, or the batches of files are different."""
    state = {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson": b"2"}
    assert key_of(state) == key_of({f"{OUTBOX_PATH}/dead-sealed-7-b.ndjson": b"2", f"{OUTBOX_PATH}/sealed-7-b.ndjson": b"1"})
    other_states = [
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"2", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson": b"1"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-2-a.ndjson": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/corrupt-sealed-1-a.ndjson": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson.aside": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1"},
    ]
    assert len({key_of(other) for other in [state, *other_states]}) == 6
