"""Every operation of some histories fails in every way; planted defects are found; and the file system that fails itself."""

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
    """Disable the log: a disk that fails a thousand times fills it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_each_operation_may_fail_once_or_for_good_with_each_error(history: str) -> None:
    """Nothing is raised, nothing is lost, no answer is false, and once the disk works again everything is delivered."""
    report = run(BOUNDS, [(history, faults) for faults in faults_of(history)])
    assert not report.violations, report
    assert report.faults >= FAULTS_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_a_part_of_a_write_may_be_there_to_stay(history: str) -> None:
    """The disk is full in the middle of a line, and the part that was written cannot be cut off."""
    report = run(BOUNDS, [(history, faults) for faults in pairs_of(history)])
    assert not report.violations, report
    assert report.faults >= PAIRS_MIN


def test_the_histories_come_by_every_verb_that_can_fail() -> None:
    """So that each error of the table is met."""
    met = {(fault.verb, fault.errno) for _, faults in all_cases() for fault in faults}
    # The ledger's, and those of several sinks, have tests of their own.
    elsewhere = {"open_append", "link", "lock_shared", "remove_directory"}
    assert met == {(verb, code) for verb, codes in VERBS.items() if verb not in elsewhere for code in codes}


# What may be planted: each believes a disk that has failed.


def a_failed_sync_is_tried_again(patch: Patch) -> None:
    real = FaultFilesystem.sync_data

    def sync_data(self: FaultFilesystem, fd: int) -> None:
        try:
            real(self, fd)
        except OSError:
            real(self, fd)

    patch.setattr(FaultFilesystem, "sync_data", sync_data)


def a_failed_sync_of_the_directory_is_forgotten(patch: Patch) -> None:
    patch.setattr(Directory, "_sync_names", swallowing(Directory._sync_names))


def what_cannot_be_put_is_forgotten(patch: Patch) -> None:
    patch.setattr(Directory, "write_atomically", swallowing(Directory.write_atomically))


def a_refusal_is_an_acceptance(patch: Patch) -> None:
    real = Writer._undo_append

    def undo(self: Writer, error: OSError, events: int) -> object:
        real(self, error, events)
        return ENQUEUED

    patch.setattr(Writer, "_undo_append", undo)


def a_short_write_is_taken_for_whole(patch: Patch) -> None:
    patch.setattr(Writer, "_complete_append", lambda *_args: None)


def a_listing_that_ends_early_is_a_crash(patch: Patch) -> None:
    def account(self: Directory) -> object:
        try:
            return real(self)
        except OSError:
            raise ValueError("planted") from None

    real = Directory.disk_usage
    patch.setattr(Directory, "disk_usage", account)


def swallowing(real: Callable[..., object]) -> Callable[..., object]:
    def swallow(*args: object) -> object:
        try:
            return real(*args)
        except OSError:
            return None

    return swallow


@pytest.mark.parametrize(
    ("plant", "history", "problem"),
    [
        (a_failed_sync_is_tried_again, "paas", "lost"),
        (a_failed_sync_of_the_directory_is_forgotten, "ars", "lost"),
        (what_cannot_be_put_is_forgotten, "xrsd", "lost"),
        (a_refusal_is_an_acceptance, "aa", "lost"),
        (a_short_write_is_taken_for_whole, "aa", "lost"),
        (a_listing_that_ends_early_is_a_crash, "a", "raised"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_what_is_planted_is_found_and_reproduced(
    plant: Callable[[Patch], None], history: str, problem: str, monkeypatch: Patch
) -> None:
    """Once it is removed, the violation is gone."""
    with monkeypatch.context() as patch:
        plant(patch)
        found = run(BOUNDS, [(history, faults) for faults in faults_of(history)]).violations[0]
        assert found.startswith(problem)
        text = ast.literal_eval(found.partition("reproduce(")[2].removesuffix(")"))
        assert reproduce(text) == found.partition("\n")[0]
    mended = reproduce(text)
    assert not mended or "another now" in mended


# The file system that fails.


def outbox_dir(fault: Fault) -> tuple[Disk, FaultFilesystem]:
    disk = Disk({"/d/a": b"1"})
    filesystem: Filesystem = FaultFilesystem(CrashFilesystem(disk), fault)
    assert isinstance(filesystem, FaultFilesystem)
    return disk, filesystem


def test_the_nth_operation_of_a_verb_fails_and_no_other() -> None:
    """For good: it and all later ones."""
    _disk, filesystem = outbox_dir(Fault("create", 2, errno.EMFILE))
    filesystem.create("/d/b")
    filesystem.open_existing("/d/a")
    with pytest.raises(OSError, match="Too many open files"):
        filesystem.create("/d/c")
    filesystem.create("/d/c")
    _disk, filesystem = outbox_dir(Fault("create", 1, errno.EMFILE, permanent=True))
    for _ in range(3):
        with pytest.raises(OSError, match="Too many open files"):
            filesystem.create("/d/b")
    filesystem.counter.clear_faults()
    filesystem.create("/d/b")


def test_a_short_write_answers_how_much_and_fails_when_it_is_called_again() -> None:
    """A half is there; with once only, the next one is whole."""
    disk, filesystem = outbox_dir(Fault("write", 1, errno.ENOSPC, permanent=True, partial=True))
    fd = filesystem.create("/d/b")
    assert filesystem.write(fd, b"1234") == 2
    with pytest.raises(OSError, match="No space left"):
        filesystem.write(fd, b"34")
    assert disk.files["/d/b"] == b"12"


@pytest.mark.parametrize("verb", ["write_all", "overwrite"])
def test_what_is_written_as_a_whole_may_be_there_in_part(verb: str) -> None:
    """And fails."""
    disk, filesystem = outbox_dir(Fault(verb, 1, errno.EIO, partial=True))
    fd = filesystem.create("/d/b")
    with pytest.raises(OSError, match="Input/output"):
        getattr(filesystem, verb)(fd, b"1234")
    assert disk.files["/d/b"] == b"12"


def test_a_listing_may_fail_half_way() -> None:
    """After it has named something."""
    disk, filesystem = outbox_dir(Fault("list_files", 1, errno.EIO, partial=True))
    filesystem.create("/d/b")
    names = filesystem.list_files("/d")
    assert next(names).name == "a"
    with pytest.raises(OSError, match="Input/output"):
        next(names)
    assert len(disk.files) == 2


def test_a_failed_sync_dooms_what_it_was_to_make_durable() -> None:
    """A later one that answers changes nothing about it."""
    disk, filesystem = outbox_dir(Fault("sync_data", 1, errno.EIO))
    fd = filesystem.create("/d/b")
    filesystem.sync_directory("/d")
    filesystem.write(fd, b"2")
    with pytest.raises(OSError, match="Input/output"):
        filesystem.sync_data(fd)
    filesystem.sync_data(fd)
    assert {state["/d/b"] for state in DurabilityModel(disk.trace).states()} == {b"", b"2", b"\0"}


def test_every_verb_of_a_file_system_either_fails_or_is_passed_on() -> None:
    """What cannot fail is named in the head of the table."""
    verbs = {verb for verb in dir(Filesystem) if not verb.startswith("_")}
    several = {verb for made in (SequentialBatchOps, PortableScanOps) for verb in vars(made) if not verb.startswith("_")}
    assert verbs - set(VERBS) - several == {"close", "close_inherited", "has_name", "is_same_file", "is_file_at", "size"}
    assert verbs >= PARTIAL_VERBS
    assert verbs >= several
    assert not several & (vars(FaultFilesystem).keys() | vars(CrashFilesystem).keys())  # made of those that fail
