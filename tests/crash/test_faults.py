"""Every operation of some histories fails in every way; planted defects are found; and tests of the faulty file system."""

from __future__ import annotations

import ast
import errno
import logging
from collections.abc import Callable, Iterator

import pytest

from pillarbox.outcome import ENQUEUED
from pillarbox.store.directory import Directory
from pillarbox.store.dirscan import PortableScanOps
from pillarbox.store.filesystem import Filesystem, SequentialBatchOps
from pillarbox.store.writer import Writer
from pillarbox.testing.crash import CrashFilesystem, Disk
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import PARTIAL_VERBS, VERBS, Fault, FaultFilesystem
from tests.crash.enumeration import ENDS, Bounds
from tests.crash.faults import HISTORIES, all_cases, faults_of, pairs_of, reproduce, run

BOUNDS = Bounds(tears=ENDS, states_max=60)
FAULTS_MIN = 150  # of a history
PAIRS_MIN = 4
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Disable the log, which thousands of faults would fill."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_any_operation_may_fail_once_or_permanently_with_any_error(history: str) -> None:
    """Nothing is raised or lost, no outcome is false, and once the disk works again everything is delivered."""
    report = run(BOUNDS, [(history, faults) for faults in faults_of(history)])
    assert not report.violations, report
    assert report.faults >= FAULTS_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_a_partial_write_may_be_impossible_to_cut_off(history: str) -> None:
    """The disk is full in the middle of a line, and truncating the torn line fails too."""
    report = run(BOUNDS, [(history, faults) for faults in pairs_of(history)])
    assert not report.violations, report
    assert report.faults >= PAIRS_MIN


def test_the_histories_cover_every_operation_that_can_fail(each_order: str) -> None:
    """With every error of the table."""
    covered = {(fault.verb, fault.errno) for _, faults in all_cases() for fault in faults}
    # Operations of the ledger and of several sinks have their own tests.
    tested_elsewhere = {"open_append", "link", "lock_shared", "remove_directory"}
    if each_order == "portable":
        tested_elsewhere.add("write_back")  # only the operations in C start it
    assert covered == {(verb, code) for verb, codes in VERBS.items() if verb not in tested_elsewhere for code in codes}


# Defects to plant: each trusts a disk that has failed.


def a_failed_sync_is_repeated(patch: Patch) -> None:
    real = FaultFilesystem.sync_data

    def sync_data(self: FaultFilesystem, fd: int) -> None:
        try:
            real(self, fd)
        except OSError:
            real(self, fd)

    patch.setattr(FaultFilesystem, "sync_data", sync_data)


def a_failed_sync_of_the_directory_is_ignored(patch: Patch) -> None:
    patch.setattr(Directory, "_sync_names", ignoring_errors(Directory._sync_names))


def a_failed_atomic_write_is_ignored(patch: Patch) -> None:
    patch.setattr(Directory, "write_atomically", ignoring_errors(Directory.write_atomically))


def a_failed_append_returns_enqueued(patch: Patch) -> None:
    real = Writer._undo_append

    def undo_and_accept(self: Writer, error: OSError, events: int) -> object:
        real(self, error, events)
        return ENQUEUED

    patch.setattr(Writer, "_undo_append", undo_and_accept)


def a_short_write_counts_as_complete(patch: Patch) -> None:
    patch.setattr(Writer, "_complete_append", lambda *_args: None)


def a_failed_listing_raises_another_error(patch: Patch) -> None:
    def disk_usage(self: Directory) -> object:
        try:
            return real(self)
        except OSError:
            raise ValueError("planted") from None

    real = Directory.disk_usage
    patch.setattr(Directory, "disk_usage", disk_usage)


def ignoring_errors(real: Callable[..., object]) -> Callable[..., object]:

    def call(*args: object) -> object:
        try:
            return real(*args)
        except OSError:
            return None

    return call


@pytest.mark.parametrize(
    ("plant", "history", "problem"),
    [
        (a_failed_sync_is_repeated, "paas", "lost"),
        (a_failed_sync_of_the_directory_is_ignored, "ars", "lost"),
        (a_failed_atomic_write_is_ignored, "xrsd", "lost"),
        (a_failed_append_returns_enqueued, "aa", "lost"),
        (a_short_write_counts_as_complete, "aa", "lost"),
        (a_failed_listing_raises_another_error, "a", "raised"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_defect_is_found_and_reproduced(
    plant: Callable[[Patch], None], history: str, problem: str, monkeypatch: Patch
) -> None:
    """Without the defect, the violation does not occur."""
    with monkeypatch.context() as patch:
        plant(patch)
        violation = run(BOUNDS, [(history, faults) for faults in faults_of(history)]).violations[0]
        assert violation.startswith(problem)
        text = ast.literal_eval(violation.partition("reproduce(")[2].removesuffix(")"))
        assert reproduce(text) == violation.partition("\n")[0]
    problem_without_defect = reproduce(text)
    assert not problem_without_defect or "another now" in problem_without_defect


# The faulty file system.


def faulty_disk(fault: Fault) -> tuple[Disk, FaultFilesystem]:
    disk = Disk({"/d/a": b"1"})
    filesystem: Filesystem = FaultFilesystem(CrashFilesystem(disk), fault)
    assert isinstance(filesystem, FaultFilesystem)
    return disk, filesystem


def test_only_the_nth_operation_of_a_verb_fails() -> None:
    """A permanent fault also fails all later ones."""
    _disk, filesystem = faulty_disk(Fault("create", 2, errno.EMFILE))
    filesystem.create("/d/b")
    filesystem.open_existing("/d/a")
    with pytest.raises(OSError, match="Too many open files"):
        filesystem.create("/d/c")
    filesystem.create("/d/c")
    _disk, filesystem = faulty_disk(Fault("create", 1, errno.EMFILE, permanent=True))
    for _ in range(3):
        with pytest.raises(OSError, match="Too many open files"):
            filesystem.create("/d/b")
    filesystem.counter.clear_faults()
    filesystem.create("/d/b")


def test_a_short_write_returns_its_size_and_the_next_write_fails() -> None:
    """Half of the data is written."""
    disk, filesystem = faulty_disk(Fault("write", 1, errno.ENOSPC, permanent=True, partial=True))
    fd = filesystem.create("/d/b")
    assert filesystem.write(fd, b"1234") == 2
    with pytest.raises(OSError, match="No space left"):
        filesystem.write(fd, b"34")
    assert disk.files["/d/b"] == b"12"


@pytest.mark.parametrize("verb", ["write_all", "overwrite"])
def test_a_failed_write_of_everything_may_write_a_part(verb: str) -> None:
    """The call raises nevertheless."""
    disk, filesystem = faulty_disk(Fault(verb, 1, errno.EIO, partial=True))
    fd = filesystem.create("/d/b")
    with pytest.raises(OSError, match="Input/output"):
        getattr(filesystem, verb)(fd, b"1234")
    assert disk.files["/d/b"] == b"12"


def test_a_listing_may_fail_in_the_middle() -> None:
    """After it has returned some names."""
    disk, filesystem = faulty_disk(Fault("list_files", 1, errno.EIO, partial=True))
    filesystem.create("/d/b")
    names = filesystem.list_files("/d")
    assert next(names).name == "a"
    with pytest.raises(OSError, match="Input/output"):
        next(names)
    assert len(disk.files) == 2


def test_data_of_a_failed_sync_may_be_lost() -> None:
    """A later, successful sync does not make it durable."""
    disk, filesystem = faulty_disk(Fault("sync_data", 1, errno.EIO))
    fd = filesystem.create("/d/b")
    filesystem.sync_directory("/d")
    filesystem.write(fd, b"2")
    with pytest.raises(OSError, match="Input/output"):
        filesystem.sync_data(fd)
    filesystem.sync_data(fd)
    assert {state["/d/b"] for state in DurabilityModel(disk.trace).states()} == {b"", b"2", b"\0"}


def test_every_operation_of_a_filesystem_can_fail_or_is_listed_here() -> None:
    """Batch operations consist of operations that can fail."""
    cannot_fail = {"close", "close_inherited", "current_path", "has_name", "is_same_file", "is_file_at", "size"}
    verbs = {verb for verb in dir(Filesystem) if not verb.startswith("_")}
    batch_verbs = {verb for ops in (SequentialBatchOps, PortableScanOps) for verb in vars(ops) if not verb.startswith("_")}
    assert verbs - set(VERBS) - batch_verbs == cannot_fail
    assert verbs >= PARTIAL_VERBS
    assert verbs >= batch_verbs
    assert not batch_verbs & (vars(FaultFilesystem).keys() | vars(CrashFilesystem).keys())  # they call operations that fail
