"""Several sinks: every crash state of fanning out and settling, every single fault; and that planted defects are found."""

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
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.testing.crash import CrashFilesystem, Op
from pillarbox.testing.fault import Fault, FaultCounter
from tests.crash import fanout, fanout_faults
from tests.crash.compiled_order import fault_filesystem
from tests.crash.fanout import FanOutEnumeration, FanOutWorld, moments

# The life of files up to the last sink; later sinks, with what waits and without; one that goes; the first set-up over what
# waits, active files too; eviction before, between and after; deaths in between.
HISTORIES = (
    *("aafxyafd", "afxafyd", "afcafd", "afcfad", "aopfd", "afpfd", "afxpfafd", "afrafd", "afpfrad"),
    *("aafxv", "av", "afcfafvafd", "okfxkd", "kafkafxkd"),
)
CUT_SHORT = ("af{}fd", "aafx{}yd", "afcf{}afd", "afxpf{}fd", "afr{}afd", "aafxv{}afd", "af{}v")
CHECKED_MIN = 60  # states of a history
EACH = 5  # so many-th fault of those of a history: all of them take minutes, and differ in the error only
FAULTS_MIN = 200
CHANCES = 25
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quick(monkeypatch: Patch) -> Iterator[None]:
    """Without log messages, which are many, and without a second look at accounts that do not balance."""
    monkeypatch.setattr(reconciliation, "_ATTEMPTS", 1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", HISTORIES)
def test_no_sink_misses_anything_or_is_given_it_twice_whenever_the_process_or_the_power_fails(history: str) -> None:
    """The accounts of the directory and of each sink balance too."""
    looked = FanOutEnumeration()
    looked.check_history(history)
    assert not looked.violations
    assert looked.checked > CHECKED_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", CUT_SHORT)
def test_a_step_that_is_cut_short_anywhere_is_done_again_by_the_next_process(history: str) -> None:
    """Killed before each of its operations; then what a second crash leaves."""
    looked = FanOutEnumeration()
    for operation in range(40):
        looked.check_history(history.format(operation), few=True)
    assert not looked.violations
    assert looked.checked > CHECKED_MIN


@pytest.mark.usefixtures("each_order")
def test_longer_histories_by_chance() -> None:
    """Processes also die in the middle of a step; the violation has the history."""
    looked = FanOutEnumeration()
    chance = random.Random(7)
    for _ in range(CHANCES):
        letters = chance.choices("aaoffdxyvk", k=chance.randint(4, 9))
        for later in ("c", "pf", "r"):
            if chance.random() < 0.4:
                letters.insert(chance.randrange(len(letters)), later if "c" not in letters or later != "pf" else "")
        looked.check_history(
            "".join(one + (str(chance.randint(1, 25)) if chance.random() < 0.2 else "") for one in letters if one), few=True
        )
        assert not looked.violations


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("history", fanout_faults.HISTORIES)
def test_each_operation_may_fail_once_or_for_good_with_each_error(history: str) -> None:
    """Trouble is reported, and once the disk works again everything arrives everywhere."""
    met = 0
    for fault in itertools.islice(fanout_faults.faults_of(history), None, None, EACH):
        _, problem = fanout_faults.check(history, fault)
        assert not problem, (history, fault)
        met += 1
    assert met > FAULTS_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("verb", ["sync_data", "sync_directory", "link", "rename", "unlink"])
def test_what_a_crash_leaves_after_a_fault_is_recovered(verb: str) -> None:
    """No name is removed before the sync that it waits for, if that sync has failed."""
    history, looked = "aafxfd", FanOutEnumeration()
    meter = FaultCounter()
    FanOutWorld(lambda plain: fault_filesystem(plain, meter)).run(history)
    for nth in range(1, meter.counts[verb] + 1):
        trace, _ = fanout_faults.check(history, Fault(verb, nth, errno.EIO))
        looked.check_trace(f"{history} with {verb} {nth}", trace, few=True, faults=True)
    assert not looked.violations
    assert looked.checked > CHECKED_MIN


# What may be planted: each undoes something that handing over must do.


def nothing(*_args: object) -> None:
    pass


def queues_are_not_synced(patch: Patch) -> None:
    real = CrashFilesystem.sync_directory
    patch.setattr(CrashFilesystem, "sync_directory", lambda self, path: None if "sink-" in path else real(self, path))


def a_link_counts_at_once(patch: Patch) -> None:
    patch.setattr(Directory, "batch_names", lambda self: sorted(self.all_sealed_names()))


def the_first_queues_are_made_one_by_one(patch: Patch) -> None:
    def finish_adding(self: FanOut, missing: Sequence[str], *, first: bool) -> None:
        for sink in missing if first else ():
            self.directory.request_queue(sink)
            self.directory.create_requested_queue(sink)
            break

    patch.setattr(FanOut, "_finish_adding", finish_adding)


def eviction_ignores_queues(patch: Patch) -> None:
    real = QuotaEnforcer._lock_candidate
    patch.setattr(QuotaEnforcer, "_lock_candidate", lambda self, name, places: real(self, name, places[-1:]))


def the_name_goes_first(patch: Patch) -> None:
    real = FanOut._write_ledgers

    def write_down(self: FanOut, going: Sequence[object], queues: Sequence[Directory]) -> None:
        for found in going:
            self.directory.remove(found.locked_file.name)  # type: ignore[attr-defined]
        self.directory.filesystem.sync_directory(self.directory.path)
        real(self, going, queues)  # type: ignore[arg-type]

    patch.setattr(FanOut, "_write_down", write_down)


def sinks_have_no_account(patch: Patch) -> None:
    patch.setattr(FanOut, "_write_down", nothing)


@pytest.mark.parametrize(
    ("plant", "history", "problem"),
    [
        (queues_are_not_synced, "af", "balance"),
        (a_link_counts_at_once, "af", "twice"),
        (the_first_queues_are_made_one_by_one, "af", "misses"),
        (eviction_ignores_queues, "af{}v", "given up"),
        (the_name_goes_first, "af", "balance"),
        (sinks_have_no_account, "af", "balance"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_planted_is_found(plant: Callable[[Patch], None], history: str, problem: str, monkeypatch: Patch) -> None:
    """In a short history, or one that is cut short somewhere."""
    looked = FanOutEnumeration()
    plant(monkeypatch)
    for operation in range(30 if "{" in history else 1):
        looked.check_history(history.format(operation), few=True)
    assert looked.violations
    assert problem in looked.violations[0]


def test_the_histories_come_by_every_moment_of_handing_over() -> None:
    """Links, queues that are made and removed, and directories that are renamed."""
    verbs = {op.verb for history in HISTORIES for op in trace_of(history)}
    assert {"link", "unlink", "rename", "make_directory", "remove_directory", "sync_directory"} <= verbs
    assert sum(1 for _ in moments(trace_of("afd"))) > 50
    assert set(fanout.STEPS) == {letter for history in HISTORIES for letter in history}


def trace_of(history: str) -> list[Op]:
    world = FanOutWorld()
    world.run(history)
    return world.disk.trace
