"""A problem that repeats in a loop, or comes and goes, is logged once when it begins and once when it is over."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pillarbox.delivery.status import StatusReporter
from pillarbox.stats import DeliveryCounters
from pillarbox.store.state_log import StateLog, kind_of
from pillarbox.testing import ManualClock

SCARCE_DESCRIPTORS = """
import logging, os, resource, sys, time
from pillarbox import Outbox
from tests.conftest import event

class Lines(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)

logging.getLogger().setLevel(logging.INFO)
sinks = {"sink": "sqlite:///a.db"} if sys.argv[1] == "one" else {"sinks": {"a": "sqlite:///a.db", "b": "sqlite:///b.db"}}
outbox = Outbox("box", flush_interval=0.05, batch_size=20, **sinks)
for number in range(100):
    assert outbox.enqueue(event(number))
assert outbox.flush(60)
logging.getLogger().addHandler(Lines())
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
held = []
while True:
    try:
        held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
end = time.monotonic() + 8
number = 100
while time.monotonic() < end:
    if number % 2:
        os.close(held.pop())
    else:
        try:
            held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
    time.sleep(0.01)  # wait: the application works
    outbox.enqueue(event(number))
    number += 1
for fd in held:
    os.close(fd)
assert outbox.flush(60)
time.sleep(12)  # wait: until the problem counts as over
outbox.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sinks", ["one", "two"])
def test_a_lack_of_descriptors_that_comes_and_goes_is_logged_once(sinks: str, tmp_path: Path) -> None:
    """A hundred times a second the application takes the last descriptor and gives it back."""
    done = subprocess.run(
        [sys.executable, "-c", SCARCE_DESCRIPTORS, sinks],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("Too many open files" in line for line in lines)
    counts = Counter(kind_of(line.partition(" (delivered")[0]) for line in lines)
    assert max(counts.values()) <= 6, lines  # two for each of three ledgers
    assert len(lines) <= (16 if sinks == "one" else 36), lines  # without a bound there are hundreds
    assert "Too many open files" not in lines[-1] or "over after " in lines[-1], lines


def test_texts_that_differ_in_names_and_ids_are_one_kind() -> None:
    """Texts that differ in a status or an error number are of different kinds."""
    assert kind_of("[Errno 24] Too many open files: '/box/active-1f-1000.ndjson'") == kind_of(
        "[Errno 24] Too many open files: '/box'"
    )
    assert kind_of("503: request 7f3a9c1e failed") == kind_of("503: request 00112233 failed")
    assert kind_of("sealed-0001-a.ndjson: locked") == kind_of("sealed-0002-b.ndjson: locked")
    assert kind_of("503: overloaded") != kind_of("500: overloaded")
    assert kind_of("[Errno 24] x") != kind_of("[Errno 28] x")


def log_of(log: StateLog, problem: str) -> str:
    if problem:
        return problem if log.is_new_problem(problem) else ""
    return "over" if log.is_over() else ""


def test_a_problem_that_comes_back_is_over_only_after_a_calm_while() -> None:
    """The first end is logged at once."""
    clock = ManualClock()
    log = StateLog(clock)
    assert [log_of(log, problem) for problem in ("", "EIO", "EIO", "", "")] == ["", "EIO", "", "over", ""]
    assert log_of(log, "EIO") == "EIO"
    for _ in range(1000):
        clock.advance(0.01)
        assert not log_of(log, "")
        assert not log_of(log, "EIO")
    assert not log_of(log, "")
    clock.advance(4.9)
    assert not log_of(log, "")
    clock.advance(0.2)
    assert log_of(log, "") == "over"
    clock.advance(61)
    assert [log_of(log, problem) for problem in ("EIO", "")] == ["EIO", "over"]


def test_a_problem_that_comes_back_again_and_again_must_stay_away_for_longer() -> None:
    """Up to a minute."""
    clock = ManualClock()
    log = StateLog(clock)
    lines = 0
    for _ in range(600):  # an hour in which every period of 6 s has a problem
        lines += bool(log_of(log, "EIO"))
        clock.advance(0.1)
        lines += bool(log_of(log, ""))
        clock.advance(5.8)
        lines += bool(log_of(log, ""))
        clock.advance(0.1)
    assert lines <= 6


def test_kinds_that_alternate_are_logged_once_a_minute_each_and_never_more_than_five() -> None:
    """A destination may send a different text every time."""
    clock = ManualClock()
    log = StateLog(clock)
    assert [log_of(log, problem) for problem in ("a", "b", "a", "b")] == ["a", "b", "", ""]
    assert sum(bool(log_of(log, f"problem number {number}")) for number in range(1000)) == 3
    clock.advance(61)
    assert log_of(log, "a") == "a"


def test_a_destination_that_names_every_request_is_logged_once(caplog: pytest.LogCaptureFixture, clock: ManualClock) -> None:
    """The reason in the state is the latest one."""

    class NoLease:
        failing_since_micros: int | None = None

        def write_heartbeat(self, *_: object, **__: object) -> None:
            pass

    caplog.set_level(logging.INFO)
    status = StatusReporter("sink", clock, DeliveryCounters(), NoLease())  # type: ignore[arg-type]  # what it uses of a lease
    for number in range(100):
        status.transition("waiting", f"503: request {number:08x} failed")
    assert len(caplog.records) == 1
    assert status.last_error == "503: request 00000063 failed"
    status.set_healthy("draining")
    assert len(caplog.records) == 2
