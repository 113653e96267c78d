"""An outbox keeps its promises when the process changes directory, its directory disappears, or its descriptors are unusual."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox import Outbox
from pillarbox._native import COMPILED
from pillarbox.delivery.fanout import FanOut
from pillarbox.delivery.lease import Lease, read_heartbeat
from pillarbox.outcome import ENQUEUED
from pillarbox.sinks.paths import absolute_url
from pillarbox.stats import State
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.retention import Retention
from pillarbox.testing import ManualClock
from tests.conftest import event
from tests.store.test_full_disks import run_in_child
from tests.store.test_writer import SealingWriter


def ids_in(database: Path) -> list[str]:
    """The ids of the events in an SQLite database."""
    with closing(sqlite3.connect(database)) as connection:
        return sorted(row[0] for row in connection.execute("SELECT event_id FROM tracking_event"))


def ids_of(*numbers: int) -> list[str]:
    return [event(number).event_id for number in numbers]


# Relative paths.


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second directory. The first, below the same one, is the working directory."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "second"


@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_relative_paths_stay_the_same_when_the_process_changes_its_working_directory(second: Path, deliver: Any) -> None:
    """As daemons do after the outbox was made. The child process of `deliver="process"` finds them too."""
    outbox = Outbox("var/outbox", sink="sqlite:///events.db", deliver=deliver, flush_interval=0.05)
    os.chdir(second)
    with outbox:
        assert [outbox.enqueue(event(number)) for number in range(3)] == [ENQUEUED] * 3
        assert outbox.flush(60)
    assert list(second.iterdir()) == []
    assert ids_in(second.parent / "first" / "events.db") == ids_of(0, 1, 2)
    assert outbox.name == "var/outbox"
    assert "sqlite:///events.db" in repr(outbox)


def test_relative_paths_stay_the_same_in_a_child_that_is_forked_after_the_change(second: Path) -> None:
    """A daemon changes its directory, then forks: the child makes its sink anew."""
    outbox = Outbox("outbox", sink="sqlite:///events.db", flush_interval=0.05)
    os.chdir(second)

    def work() -> None:
        assert outbox.enqueue(event(1))
        assert outbox.flush(60)
        outbox.close()

    run_in_child(work)
    outbox.close()
    assert list(second.iterdir()) == []
    assert ids_in(second.parent / "first" / "events.db") == ids_of(1)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a%20b.db?table=t", "sqlite:////w%20x/a%20b.db?table=t"),
        ("SQLite:///../a.db", "SQLite:////w%20x/../a.db"),
        ("sqlite:////a.db", "sqlite:////a.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite:///", "sqlite:///"),
        ("spacetimedb://host/db?token_file=t&window=1", "spacetimedb://host/db?token_file=/w%20x/t&window=1"),
        ("spacetimedb://host/db?token_file=%2Ft", "spacetimedb://host/db?token_file=%2Ft"),
        ("https://host/?ca_file=a#format=json&ca_file=a.pem", "https://host/?ca_file=a#format=json&ca_file=/w%20x/a.pem"),
        ("https://host/?token_file=a", "https://host/?token_file=a"),
        ("other://host/a?b=c", "other://host/a?b=c"),
    ],
)
def test_the_paths_in_the_url_of_a_sink_are_made_absolute(url: str, expected: str) -> None:
    """Of a web address only the part that is ours."""
    assert absolute_url(url, "/w x") == expected
    assert absolute_url(url, "") == url


# A directory that is moved or removed.


def test_after_a_directory_was_moved_events_go_to_a_new_one_and_none_is_there_twice(
    tmp_path: Path, outbox_dir: Directory, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The events in the moved directory stay there, whole; a deleted file is recreated from its descriptor instead."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append(2)
    pipeline.sealer.step()  # creates a spare
    os.rename(outbox_dir.path, tmp_path / "moved")
    pipeline.append(1)
    pipeline.writer.rotate("manual")
    pipeline.append(1)  # to a spare that was moved too
    pipeline.sealer.step()
    assert f"was moved to {tmp_path}/moved/active-" in caplog.text
    assert pipeline.lines() == {}
    pipeline.append(5)
    pipeline.writer.rotate("manual")
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 5}
    moved = Directory(str(tmp_path / "moved"), outbox_dir.filesystem, clock)
    assert sum((tmp_path / "moved" / name).read_bytes().count(b"\n") for name in os.listdir(moved.path)) == 4
    pipeline.append(3)
    shutil.rmtree(outbox_dir.path)
    pipeline.writer.rotate("manual")
    pipeline.sealer.step()
    assert "was deleted externally; recreated" in caplog.text
    assert pipeline.lines() == {"sealed": 3}


def test_a_deleted_segment_with_another_hard_link_is_recreated(
    outbox_dir: Directory, clock: ManualClock, tmp_path: Path
) -> None:
    """A snapshot of hard links is no directory in which its events would be delivered."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append(2)
    (name,) = os.listdir(outbox_dir.path)
    (tmp_path / "snapshot").hardlink_to(Path(outbox_dir.path_of(name)))
    os.unlink(outbox_dir.path_of(name))
    pipeline.writer.rotate("manual")
    pipeline.sealer.step()
    assert pipeline.lines() == {"sealed": 2}


@pytest.mark.parametrize("deliver", ["thread", "process"])
def test_a_directory_that_was_removed_before_first_use_is_made_anew(tmp_path: Path, deliver: Any) -> None:
    """An outbox at module level, and a deploy or a test that empties the place before the first event."""
    outbox = Outbox(tmp_path / "above" / "outbox", sink=f"sqlite:///{tmp_path}/events.db", deliver=deliver)
    shutil.rmtree(tmp_path / "above")
    assert outbox.stats().pending_files == 0
    with outbox:
        assert outbox.enqueue(event(1)) == ENQUEUED
        assert outbox.flush(60)
    assert ids_in(tmp_path / "events.db") == ids_of(1)


@pytest.mark.parametrize("started", [False, True])
def test_stats_raise_nothing_whatever_became_of_the_directory(tmp_path: Path, *, started: bool) -> None:
    """It may be gone, or a file."""
    outbox = Outbox(tmp_path / "outbox", sink=f"sqlite:///{tmp_path}/events.db", flush_interval=0.05)
    if started:
        assert outbox.enqueue(event(1))
        assert outbox.flush(60)
    shutil.rmtree(tmp_path / "outbox")
    assert outbox.stats().pending_bytes == 0
    if not started:
        (tmp_path / "outbox").write_bytes(b"")
        assert outbox.stats().pending_bytes == 0
        assert not outbox.enqueue(event(2))
        assert not outbox.flush(1)
    assert not outbox.stats().dropped["max_bytes"]
    outbox.close()


def test_a_directory_that_is_removed_in_use_is_created_again_also_when_the_free_space_is_checked(
    tmp_path: Path, outbox_dir: Directory, clock: ManualClock
) -> None:
    """The free space of a missing directory cannot be asked for, and must not keep it missing."""
    pipeline = SealingWriter(outbox_dir, clock)
    pipeline.append(1)
    pipeline.sealer.step()
    pipeline.writer.rotate("manual")
    pipeline.sealer.step()
    shutil.rmtree(outbox_dir.path)
    clock.advance(60)
    pipeline.sealer.step()
    assert os.path.isdir(outbox_dir.path)


# Descriptors 0 to 2.

_WITHOUT_STDIO = """
import json, os, sys
from pillarbox import Outbox, TrackingEvent
os.closerange(0, 3)
box, report = sys.argv[1:]
def event(number):
    return TrackingEvent(event_id=str(number), event_key="k", scope_kind="Site", scope_id="s")
with Outbox(box, sink=f"sqlite:///{report}.db", batch_size=2, flush_interval=0.05) as outbox:
    for number in range(20):
        assert outbox.enqueue(event(number))
        for fd in range(3):
            try:
                os.write(fd, b"what C code prints")
            except OSError:
                pass
    assert outbox.enqueue(event(20))
    flushed = outbox.flush(60)
    later = Outbox(f"{box}/later")
    os.closerange(0, 3)  # also a program that runs already may do it
    assert later.enqueue(event(21))
    paths = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            paths[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
with open(report, "w") as file:
    json.dump([flushed, sorted(fd for fd, path in paths.items() if path.startswith(box) and fd < 3), len(paths)], file)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc/self/fd, which names the open files")
@pytest.mark.parametrize("pure", ["", "1"])
def test_event_files_and_locks_never_become_standard_output(tmp_path: Path, pure: str) -> None:
    """A program may have closed it, and what C code prints would be written into an event file."""
    if not pure and not COMPILED:
        pytest.skip("needs the C extension")
    report = tmp_path / "report"
    environment = {**os.environ, "PILLARBOX_PURE_PYTHON": pure}
    command = [sys.executable, "-c", _WITHOUT_STDIO, str(tmp_path / "outbox"), str(report)]
    subprocess.run(command, check=True, env=environment, timeout=120)
    flushed, low, count = json.loads(report.read_text())
    assert (flushed, low) == (True, [])
    assert count > 3
    assert len(ids_in(Path(f"{report}.db"))) == 21
    assert not [path for path in (tmp_path / "outbox").iterdir() if path.name.startswith("corrupt-")]


# Clocks.


def test_a_clock_that_starts_decades_back_keeps_the_order(tmp_path: Path) -> None:
    """A board without a battery starts in 1970, with batches of the time before in its directory."""
    clock = ManualClock(5_000_000)
    directory = Directory(str(tmp_path), local_filesystem(), clock)
    earlier = layout.sealed_name(1_700_000_000_000_000, "u")
    Path(directory.path_of(earlier)).write_bytes(b"1\n")
    Path(directory.path_of(layout.sealed_name(layout.MICROS_MAX, "forged"))).write_bytes(b"2\n")
    directory.seal_after(directory.disk_usage().newest_sealed_at)
    pipeline = SealingWriter(directory, clock)
    pipeline.append(1)
    pipeline.writer.rotate("manual")
    pipeline.sealer.step()
    assert [layout.sealed_at(name) for name in directory.batch_names()[:2]] == [1_700_000_000_000_000, 1_700_000_000_000_001]


def test_a_heartbeat_from_the_future_is_as_old_as_the_monotonic_clock_says(outbox_dir: Directory, clock: ManualClock) -> None:
    """The clock stepped back after the process that delivers has died: it must not look alive for an hour."""
    lease = Lease(outbox_dir, "sink \udcff", clock)
    assert lease.acquire()
    clock.advance(100)
    lease.write_heartbeat(State("degraded", "file \udcff"), 3, "file \udcff", now=True)
    lease.release()
    clock.step(-3600)
    clock.advance(30)
    heartbeat = read_heartbeat(outbox_dir)
    assert heartbeat is not None
    assert heartbeat.age_s(clock) == 30
    assert (heartbeat.sink, heartbeat.last_error, heartbeat.state.reason) == ("sink \\udcff", "file \\udcff", "file \\udcff")
    earlier_boot = msgspec.structs.replace(heartbeat, boot_id="another", monotonic_s=1e6)
    assert earlier_boot.age_s(clock) == clock.monotonic()  # it is as old as the machine has been up, at least
    assert msgspec.structs.replace(heartbeat, boot_id="").age_s(clock) == 0  # written by an older version
    assert msgspec.structs.replace(heartbeat, monotonic_s=1e6).age_s(clock) == 0  # in another time namespace


def test_retained_batches_outlive_a_clock_that_is_a_day_ahead_for_a_while(outbox_dir: Directory, clock: ManualClock) -> None:
    """Two clocks decide: a step ahead counts once it has lasted for ten minutes, and is a correction."""
    retention = Retention(outbox_dir, clock, 3600.0, 10**6)

    def retain(number: int) -> None:
        name = layout.sealed_name(number, "u")
        Path(outbox_dir.path_of(name)).write_bytes(b"1\n")
        locked = outbox_dir.lock_existing(name)
        assert locked is not None
        assert retention.retain(locked)
        outbox_dir.filesystem.close(locked.fd)

    retain(1)
    clock.step(86_400)
    for _ in range(3):
        retention.prune()
        clock.advance(1)
    assert len(outbox_dir.delivered_files()) == 1
    clock.step(-86_400)
    retention.prune()
    clock.advance(3500)
    retention.prune()
    assert len(outbox_dir.delivered_files()) == 1
    clock.advance(200)  # the hour is over, by both clocks
    retention.prune()
    assert outbox_dir.delivered_files() == []
    retain(2)
    clock.step(86_400)
    for _ in range(11):
        retention.prune()
        clock.advance(60)
    retention.prune()
    assert outbox_dir.delivered_files() == []


def test_one_retained_file_that_cannot_be_removed_keeps_no_other(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be immutable; it is tried again at the next call."""
    names = [layout.delivered_name(layout.sealed_name(number, "u"), number) for number in (1, 2, 3)]
    for name in names:
        Path(outbox_dir.path_of(name)).write_bytes(b"1\n")
    unlink = outbox_dir.filesystem.unlink

    def fail_for_first(path: str) -> None:
        if path.endswith(names[0]):
            raise PermissionError(path)
        unlink(path)

    monkeypatch.setattr(outbox_dir.filesystem, "unlink", fail_for_first)
    retention = Retention(outbox_dir, clock, 3600.0, 10**6)
    retention.prune()
    assert [file.name for file in outbox_dir.delivered_files()] == names[:1]
    monkeypatch.undo()
    retention.prune()
    assert outbox_dir.delivered_files() == []


# Copies of a directory.


def test_a_copy_without_hard_links_is_delivered_to_every_sink(
    outbox_dir: Directory, clock: ManualClock, tmp_path: Path
) -> None:
    """`cp -r` in the middle of fanning out makes several files of one; the same bytes are the same file."""
    for sink in ("a", "b"):
        outbox_dir.queue(sink).ensure_usable()
    name = layout.sealed_name(1, "u")
    Path(outbox_dir.path_of(name)).write_bytes(record.line(b"1"))
    Path(outbox_dir.queue("a").path_of(name)).hardlink_to(outbox_dir.path_of(name))
    copy = Directory(str(tmp_path / "copy"), outbox_dir.filesystem, clock)
    shutil.copytree(outbox_dir.path, copy.path)
    fan_out = FanOut(copy, ["a", "b"], clock, LedgerWriter(copy, clock))
    assert fan_out.distribute_all() == 1
    assert fan_out.problems == {}
    assert [copy.queue(sink).batch_names() for sink in ("a", "b")] == [[name], [name]]
    Path(copy.path_of(name)).write_bytes(record.line(b"2"))  # other bytes under that name are another file
    assert fan_out.distribute_all() == 0
    assert "is a different file" in fan_out.problems[name]
