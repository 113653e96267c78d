"""All histories of up to three steps, all states that a crash may leave of them; and that planted defects are found."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
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
DISTINCT_MIN = 100_000  # states that the exhaustive part is to have seen; fewer, and it has lost its grip

Patch = pytest.MonkeyPatch


@pytest.mark.usefixtures("each_order")
def test_every_state_after_every_short_history_is_recovered() -> None:
    """Histories of up to three steps, torn at any byte; the recoveries of those of one step are cut short as well."""
    report = run(STEPS, bounds=Bounds(in_recovery=1))
    assert not report.violations, report
    assert (report.complete, report.sampled) == (STEPS, 0)
    assert report.distinct > DISTINCT_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", ["gd", "xd", "pk", "mrs"])
def test_a_recovery_that_is_cut_short_is_recovered(history: str) -> None:
    """Histories of two steps and more in which recovery and settlement have something to do."""
    looked = Enumeration(Bounds(in_recovery=len(history)))
    for end in range(1, len(history) + 1):
        looked.check(history[:end])
    assert not looked.violations, looked.violations
    assert looked.in_recovery > 1000


@pytest.mark.usefixtures("each_order")
def test_longer_histories_by_chance() -> None:
    """Processes also die in the middle of a step; the seed is in the report."""
    looked = Enumeration()
    enumeration.check_by_chance(looked, 20, lambda: looked.histories >= 30)
    assert not looked.violations, looked.violations
    assert looked.sampled


# What may be planted: each undoes something that the store must do.


def nothing(*_args: object) -> None:
    pass


def no_data_is_synced(patch: Patch) -> None:
    patch.setattr(CrashFilesystem, "sync_data", nothing)


def sealing_syncs_no_names(patch: Patch) -> None:
    patch.setattr(Directory, "_sync_names", nothing)


def adoption_syncs_no_data(patch: Patch) -> None:
    patch.setattr(recovery, "_sync_or_rewrite", lambda _directory, file: file)


def sealing_syncs_no_data(patch: Patch) -> None:
    patch.setattr(Sealer, "_sync_segments", nothing)


def what_is_put_has_no_durable_name(patch: Patch) -> None:
    patch.setattr(
        Directory, "write_atomically", lambda self, name, data: self.filesystem.close(self._write_and_rename(name, data).fd)
    )


def what_is_put_is_not_synced(patch: Patch) -> None:
    real = Directory._write_and_rename

    def write_aside(self: Directory, name: str, data: bytes) -> LockedFile:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(CrashFilesystem, "sync_data", nothing)
            return real(self, name, data)

    patch.setattr(Directory, "_write_and_rename", write_aside)


def removals_are_not_synced(patch: Patch) -> None:
    patch.setattr(Settler, "sync_removals", nothing)


def the_file_goes_before_its_dead_letters(patch: Patch) -> None:
    keep = settlement.write_dead_letters

    def remove_first(outbox_dir: Directory, batch: str, dead: object) -> None:
        outbox_dir.remove(batch + layout.SUFFIX)
        keep(outbox_dir, batch, dead)  # type: ignore[arg-type]

    patch.setattr(settlement, "write_dead_letters", remove_first)


def damaged_bytes_are_not_kept(patch: Patch) -> None:
    patch.setattr(settlement, "write_quarantine", nothing)


def adoption_cuts_a_torn_tail(patch: Patch) -> None:
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


def recovery_passes_over_what_ends_in_nul_bytes(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    changed[layout.Kind.ACTIVE, recovery.LockState.NOBODY, recovery.FileTail.NUL] = recovery.RecoveryAction.LEAVE
    patch.setattr(recovery, "RECOVERY", changed)


def recovery_removes_what_is_torn(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    changed[layout.Kind.ACTIVE, recovery.LockState.NOBODY, recovery.FileTail.TORN] = recovery.RecoveryAction.REMOVE
    patch.setattr(recovery, "RECOVERY", changed)


def what_was_written_aside_stays(patch: Patch) -> None:
    changed = dict(recovery.RECOVERY)
    for tail in recovery.FileTail:
        changed[layout.Kind.TEMPORARY, recovery.LockState.NOBODY, tail] = recovery.RecoveryAction.LEAVE
    patch.setattr(recovery, "RECOVERY", changed)


def a_damaged_line_hides_the_rest(patch: Patch) -> None:
    real = reader.read_lines

    def read(data: bytes, give_way: Callable[[], None]) -> reader.FileContents:
        contents = real(data, give_way)
        return reader.FileContents([], contents.damaged) if contents.damaged else contents

    patch.setattr(reader, "read_lines", read)


def power_is_promised_without_a_sync(patch: Patch) -> None:
    def pretend(_self: SegmentSyncer, file: Any, _kept: object) -> str:
        file.synced_bytes = file.bytes
        return ""

    patch.setattr(SegmentSyncer, "sync", pretend)


def no_name_is_synced(patch: Patch) -> None:
    patch.setattr(CrashFilesystem, "sync_directory", nothing)


def names_are_used_twice(patch: Patch) -> None:
    patch.setattr(layout, "sealed_name", lambda _stamp, _unique, _like="": "sealed-1.ndjson")


PLANTED = [
    (no_data_is_synced, "lost"),
    (sealing_syncs_no_names, "lost"),
    (sealing_syncs_no_data, "a sealed file is not what it was"),
    (adoption_syncs_no_data, "a sealed file is not what it was"),
    (what_is_put_has_no_durable_name, "lost"),
    (what_is_put_is_not_synced, "lost"),
    (removals_are_not_synced, "settled, and came back"),
    (the_file_goes_before_its_dead_letters, "lost"),
    (damaged_bytes_are_not_kept, "lost"),
    (adoption_cuts_a_torn_tail, "a sealed file is written to"),
    (recovery_passes_over_what_ends_in_nul_bytes, "left behind"),
    (recovery_removes_what_is_torn, "lost"),
    (what_was_written_aside_stays, "left behind"),
    (a_damaged_line_hides_the_rest, "lost"),
    (power_is_promised_without_a_sync, "lost"),
    (no_name_is_synced, "lost"),
    (names_are_used_twice, "lost"),
]


@pytest.mark.parametrize(("plant", "problem"), PLANTED, ids=lambda one: getattr(one, "__name__", ""))
def test_what_is_planted_is_found_and_reproduced(plant: Callable[[Patch], None], problem: str, monkeypatch: Patch) -> None:
    """Within three steps; once it is removed, the violation is gone."""
    looked, histories = Enumeration(Bounds(tears=enumeration.ENDS)), Histories()
    with monkeypatch.context() as patch:
        plant(patch)
        while histories.complete < STEPS and not looked.violations:
            histories.check_longer(looked, lambda: bool(looked.violations))
        found = next(violation for violation in looked.violations)
        assert problem in found
        text = ast.literal_eval(found.partition("reproduce(")[2].removesuffix(")"))
        assert reproduce(text) == found.partition("\n")[0]
    assert not reproduce(text) or "another now" in reproduce(text)


def test_what_shows_only_where_a_recovery_is_cut_short_is_found_and_reproduced(monkeypatch: Patch) -> None:
    """No temporary file is written in this history, but in the recovery of what it leaves."""
    looked = Enumeration(Bounds(in_recovery=1))
    with monkeypatch.context() as patch:
        what_was_written_aside_stays(patch)
        looked.check("g")
        found = looked.violations[0]
        assert "left behind" in found
        text = ast.literal_eval(found.partition("reproduce(")[2].removesuffix(")"))
        assert len(ast.literal_eval(text)["crashes"]) == 2
        assert reproduce(text) == found.partition("\n")[0]
    assert not reproduce(text)


def test_states_that_differ_in_how_files_are_numbered_only_are_one() -> None:
    """States that differ in contents, kinds, order, or in which file belongs to which batch are two."""
    one = {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson": b"2"}
    assert key_of(one) == key_of({f"{OUTBOX_PATH}/dead-sealed-7-b.ndjson": b"2", f"{OUTBOX_PATH}/sealed-7-b.ndjson": b"1"})
    others = [
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"2", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson": b"1"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-2-a.ndjson": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/corrupt-sealed-1-a.ndjson": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1", f"{OUTBOX_PATH}/dead-sealed-1-a.ndjson.aside": b"2"},
        {f"{OUTBOX_PATH}/sealed-1-a.ndjson": b"1"},
    ]
    assert len({key_of(other) for other in [one, *others]}) == 6
