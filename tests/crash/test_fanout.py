"""Several sinks: every state after a crash, every single fault, and planted defects, which must be found."""

from __future__ import annotations

import errno
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from pillarbox.delivery.fanout import FanOut
from pillarbox.store import reconciliation
from pillarbox.store.directory import Directory
from pillarbox.store.queue_changes import create_requested_queue, request_queue
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.testing.crash import CrashFilesystem, Op
from pillarbox.testing.fault import Fault, FaultCounter
from tests.crash import fanout, fanout_faults
from tests.crash.compiled_order import fault_filesystem
from tests.crash.fanout import FanOutEnumeration, FanOutWorld, moments

# Files from the fan-out to the last sink; later sinks, with and without the backlog; a removed sink; the first queues with a
# backlog, active segments too; eviction before, during and after the fan-out; kills in between.
HISTORIES = (
    *("aafxyafd", "afxafyd", "afcafd", "afcfad", "aopfd", "afpfd", "afxpfafd", "afrafd", "afpfrad"),
    *("aafxv", "av", "afcfafvafd", "okfxkd", "kafkafxkd"),
)
CUT_SHORT = ("af{}fd", "aafx{}yd", "afcf{}afd", "afxpf{}fd", "afr{}afd", "aafxv{}afd", "af{}v")
CHECKED_MIN = 60  # states of a history
FAULT_STRIDE = 5  # every fifth fault of a history is checked: all take minutes, and many differ only in the errno
FAULTS_MIN = 200
RANDOM_HISTORIES = 25
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Patch) -> Iterator[None]:
    """Disable the log, and the second reconciliation of a directory that does not balance."""
    monkeypatch.setattr(reconciliation, "_ATTEMPTS", 1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_every_sink_receives_every_event_once_after_any_kill_or_power_loss(history: str) -> None:
    """Reconciliation of the directory and of each queue balances too."""
    checker = FanOutEnumeration()
    checker.check_history(history)
    assert not checker.violations
    assert checker.checked > CHECKED_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", CUT_SHORT)
def test_the_next_process_repeats_a_step_that_was_killed_at_any_operation(history: str) -> None:
    """The process is killed before each operation of the step; then every state after a second crash is checked."""
    checker = FanOutEnumeration()
    for operation in range(40):
        checker.check_history(history.format(operation), few=True)
    assert not checker.violations
    assert checker.checked > CHECKED_MIN


@pytest.mark.usefixtures("each_order")
def test_longer_random_histories() -> None:
    """Processes are also killed in the middle of a step. A violation contains the history."""
    checker = FanOutEnumeration()
    chance = random.Random(7)
    for _ in range(RANDOM_HISTORIES):
        letters = chance.choices("aaoffdxyvk", k=chance.randint(4, 9))
        for later in ("c", "pf", "r"):
            if chance.random() < 0.4:
                letters.insert(chance.randrange(len(letters)), later if "c" not in letters or later != "pf" else "")
        checker.check_history(
            "".join(letter + (str(chance.randint(1, 25)) if chance.random() < 0.2 else "") for letter in letters if letter),
            few=True,
        )
        assert not checker.violations


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", fanout_faults.HISTORIES)
def test_any_operation_may_fail_once_or_permanently_with_any_error(history: str) -> None:
    """The failure is reported, and once the disk works again every sink receives every event."""
    checked = 0
    for fault in itertools.islice(fanout_faults.faults_of(history), None, None, FAULT_STRIDE):
        _, problem = fanout_faults.check(history, fault)
        assert not problem, (history, fault)
        checked += 1
    assert checked > FAULTS_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("verb", ["sync_data", "sync_directory", "link", "rename", "unlink"])
def test_every_state_of_a_crash_after_a_fault_is_recovered(verb: str) -> None:
    """If a sync fails, no name is removed that needs this sync first."""
    history, checker = "aafxfd", FanOutEnumeration()
    counter = FaultCounter()
    FanOutWorld(lambda plain: fault_filesystem(plain, counter)).run(history)
    for nth in range(1, counter.counts[verb] + 1):
        trace, _ = fanout_faults.check(history, Fault(verb, nth, errno.EIO))
        checker.check_trace(f"{history} with {verb} {nth}", trace, few=True, faults=True)
    assert not checker.violations
    assert checker.checked > CHECKED_MIN


# Defects to plant: each removes something that fanning out must do.


def nothing(*_args: object) -> None:
    pass


def queues_are_not_synced(patch: Patch) -> None:
    real = CrashFilesystem.sync_directory
    patch.setattr(CrashFilesystem, "sync_directory", lambda self, path: None if "sink-" in path else real(self, path))


def a_link_counts_immediately(patch: Patch) -> None:
    patch.setattr(Directory, "batch_names", lambda self: sorted(self.all_sealed_names()))


def the_first_queues_are_created_one_by_one(patch: Patch) -> None:
    def finish_adding(self: FanOut, missing: Sequence[str], *, first: bool) -> None:
        for sink in missing if first else ():
            request_queue(self.directory, sink)
            create_requested_queue(self.directory, sink)
            break

    patch.setattr(FanOut, "_finish_adding", finish_adding)


def eviction_ignores_queues(patch: Patch) -> None:
    real = QuotaEnforcer._lock_candidate
    patch.setattr(QuotaEnforcer, "_lock_candidate", lambda self, name, directories: real(self, name, directories[-1:]))


def the_name_is_removed_first(patch: Patch) -> None:
    real = FanOut._write_ledgers

    def write_ledgers(self: FanOut, files: Sequence[object], queues: Sequence[Directory]) -> None:
        for file in files:
            self.directory.remove(file.locked_file.name)  # type: ignore[attr-defined]
        self.directory.filesystem.sync_directory(self.directory.path)
        real(self, files, queues)  # type: ignore[arg-type]

    patch.setattr(FanOut, "_write_ledgers", write_ledgers)


def sinks_have_no_ledger(patch: Patch) -> None:
    patch.setattr(FanOut, "_write_ledgers", nothing)


@pytest.mark.parametrize(
    ("plant", "history", "problem"),
    [
        (queues_are_not_synced, "af", "balance"),
        (a_link_counts_immediately, "af", "twice"),
        (the_first_queues_are_created_one_by_one, "af", "misses"),
        (eviction_ignores_queues, "af{}v", "evicted"),
        (the_name_is_removed_first, "af", "balance"),
        (sinks_have_no_ledger, "af", "balance"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_defect_is_found(plant: Callable[[Patch], None], history: str, problem: str, monkeypatch: Patch) -> None:
    """In a short history, or in one with a kill."""
    checker = FanOutEnumeration()
    plant(monkeypatch)
    for operation in range(30 if "{" in history else 1):
        checker.check_history(history.format(operation), few=True)
    assert checker.violations
    assert problem in checker.violations[0]


def test_the_histories_cover_every_operation_of_fanning_out() -> None:
    """Links, created and removed queues, and renamed directories."""
    verbs = {op.verb for history in HISTORIES for op in trace_of(history)}
    assert {"link", "unlink", "rename", "make_directory", "remove_directory", "sync_directory"} <= verbs
    assert sum(1 for _ in moments(trace_of("afd"))) > 50
    assert set(fanout.STEPS) == {letter for history in HISTORIES for letter in history}


def trace_of(history: str) -> list[Op]:
    world = FanOutWorld()
    world.run(history)
    return world.disk.trace
