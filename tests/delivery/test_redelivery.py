"""Retention of delivered batches: how they are kept, expire, are deleted to make room, and are redelivered."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.admin.changes import acquire_lock
from pillarbox.clock import SystemClock
from pillarbox.delivery.config import SettlementLimits
from pillarbox.sinks.base import SinkCapabilities
from pillarbox.store import layout, retention
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import DiskSpace
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from tests.cli.test_commands import CLEAN, PILLARBOX, delivered_event_ids, run
from tests.conftest import event, wait_until
from tests.delivery.test_quarantine_limits import RejectingSink
from tests.delivery.worker_setup import MovingClock, drain_worker, make_worker, seal_batch

KEEPING = SettlementLimits(keep_delivered_s=3600.0)
BOX = ("-d", "box")


@pytest.fixture
def outbox_dir(tmp_path: Path) -> Directory:
    """An empty outbox directory, with the machine's clock."""
    directory = Directory(str(tmp_path / "outbox"), OsFilesystem(), SystemClock())
    directory.ensure_usable()
    return directory


def batch_ids(outbox_dir: Directory, kind: layout.Kind = layout.Kind.DELIVERED) -> list[str]:
    """The ids of the batches whose files are of a kind."""
    return [layout.batch_id(name) for name in sorted(os.listdir(outbox_dir.path)) if layout.kind_of(name) is kind]


def deliver(folder: Path, *more: object) -> None:
    """Deliver the pending batches and retain them."""
    environ = {"PILLARBOX_KEEP_DELIVERED": "24h"}
    completed = run("deliver", *BOX, "--sink", "sqlite:///events.db", "--once", *more, cwd=folder, environ=environ)
    assert completed.returncode == 0, completed.stderr


def store(folder: Path, *numbers: int) -> None:
    """Store events in a batch of their own."""
    with Outbox(str(folder / "box")) as outbox:
        assert all(outbox.enqueue(event(number)) for number in numbers)


def verify_json(folder: Path) -> dict[str, object]:
    """The output of `verify`, which must balance."""
    completed = run("verify", *BOX, "--json", cwd=folder)
    assert completed.returncode == 0, completed.stdout
    return dict(json.loads(completed.stdout)["reconciliation"])


def deliver_three_batches(folder: Path) -> None:
    """Deliver three batches of ten events, and retain them."""
    for first in (0, 10, 20):
        store(folder, *range(first, first + 10))
        deliver(folder)


# Retention.


def test_a_delivered_batch_is_retained_by_a_rename_and_no_longer_pending(outbox_dir: Directory) -> None:
    """Its content is unchanged, and its name has the time of delivery."""
    kept = [seal_batch(outbox_dir, stamp, b'"%d"' % stamp) for stamp in range(1, 4)]
    before = {name: Path(outbox_dir.path_of(name)).read_bytes() for name in outbox_dir.batch_names()}
    released: list[int] = []
    drain_worker(make_worker(outbox_dir, RecordingSink(), released, limits=KEEPING))
    assert outbox_dir.batch_names() == []
    assert batch_ids(outbox_dir) == kept
    assert {
        layout.batch_id(file.name) + ".ndjson": Path(outbox_dir.path_of(file.name)).read_bytes()
        for file in outbox_dir.delivered_files()
    } == before
    assert sum(released) == sum(map(len, before.values()))
    assert outbox_dir.disk_usage().pending_bytes == 0


def test_without_keep_delivered_nothing_is_retained_and_earlier_files_stay(outbox_dir: Directory) -> None:
    """A process that once runs without the setting must not delete the retained batches."""
    first = seal_batch(outbox_dir, 1, b"1")
    drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING))
    seal_batch(outbox_dir, 2, b"2")
    drain_worker(make_worker(outbox_dir, RecordingSink()))
    assert batch_ids(outbox_dir) == [first]


def test_retained_files_are_deleted_when_they_are_too_old(outbox_dir: Directory) -> None:
    """Counted from their delivery, also by another process. A file without a time in its name stays."""
    clock = MovingClock()
    outbox_dir = Directory(outbox_dir.path, outbox_dir.filesystem, clock)
    for stamp in (1, 2):
        seal_batch(outbox_dir, stamp, b"1")
        drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING, clock=clock))
        clock.advance(2000)
    Path(outbox_dir.path_of("delivered-by-hand.ndjson")).write_bytes(b"")
    drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING, clock=clock))
    assert batch_ids(outbox_dir) == ["sealed-0000000000000002-u", "sealed-by-hand"]


def test_beyond_the_byte_limit_the_first_delivered_files_are_deleted(outbox_dir: Directory) -> None:
    """Whenever they were sealed."""
    for stamp in (9, 3, 5):
        seal_batch(outbox_dir, stamp, b'"%s"' % (b"x" * 100))
        drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING._replace(max_delivered_bytes=300)))
    assert batch_ids(outbox_dir) == ["sealed-0000000000000003-u", "sealed-0000000000000005-u"]


def test_retained_files_are_bounded_in_number(outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because every listing of the directory returns each of them."""
    monkeypatch.setattr(retention, "FILES_MAX", 2)
    for stamp in range(1, 6):
        seal_batch(outbox_dir, stamp, b"1")
    drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING))
    assert batch_ids(outbox_dir) == ["sealed-0000000000000004-u", "sealed-0000000000000005-u"]


def test_a_file_with_dead_letters_and_damaged_lines_is_retained_unchanged(outbox_dir: Directory) -> None:
    """Its redelivery delivers the good records, and dead-letters and quarantines the others again."""
    batch = seal_batch(outbox_dir, 1, b'"good"', b'"poison"', raw=b"damaged\n")
    sink = RejectingSink()
    drain_worker(make_worker(outbox_dir, sink, limits=KEEPING))
    (kept,) = outbox_dir.delivered_files()
    assert batch_ids(outbox_dir) == [batch]
    new_name = outbox_dir.reseal(kept.name)
    assert new_name is not None
    drain_worker(make_worker(outbox_dir, sink, limits=KEEPING))
    assert sink.payloads == [b'"good"', b'"poison"'] * 2
    both = sorted([batch, layout.batch_id(new_name)])
    assert batch_ids(outbox_dir, layout.Kind.DEAD) == [f"dead-{one}" for one in both]
    assert batch_ids(outbox_dir, layout.Kind.CORRUPT) == [f"corrupt-{one}" for one in both]


class NoSpaceForNames(OsFilesystem):
    """A disk on which a directory cannot grow."""

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        if layout.kind_of(os.path.basename(target)) is layout.Kind.DELIVERED:
            raise OSError(28, "No space left on device")
        os.rename(source, target)


def test_a_file_that_cannot_be_retained_is_deleted(
    outbox_dir: Directory, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is delivered, and would use up the space that is missing."""
    outbox_dir = Directory(outbox_dir.path, NoSpaceForNames(), clock)
    for stamp in (1, 2):
        seal_batch(outbox_dir, stamp, b"1")
    with caplog.at_level(logging.WARNING, "pillarbox"):
        drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING))
    assert (outbox_dir.batch_names(), outbox_dir.delivered_files()) == ([], [])
    assert len([one for one in caplog.records if "could not be retained" in one.message]) == 1


# Making room.


class SmallVolume(OsFilesystem):
    """A volume of 1,000,000 bytes, of which `others` are used by other files."""

    others = 0

    def disk_space(self, path: str) -> DiskSpace:
        used = sum(size for _, size in self.list_files(path))
        return DiskSpace(max(0, 1_000_000 - self.others - used), 1_000_000)


def full_directory(outbox_dir: Directory, clock: ManualClock) -> tuple[Directory, SmallVolume]:
    """Ten retained files of 50,000 bytes, and three pending ones."""
    volume = SmallVolume()
    outbox_dir = Directory(outbox_dir.path, volume, clock)
    for stamp in range(10):
        Path(outbox_dir.path_of(layout.delivered_name(layout.sealed_name(stamp, "d"), 100 - stamp))).write_bytes(
            b"1234567890" * 5000
        )
    for stamp in range(3):
        Path(outbox_dir.path_of(layout.sealed_name(stamp, "w"))).write_bytes(b"123456789\n" * 5000)
    return outbox_dir, volume


def quota_of(outbox_dir: Directory, clock: ManualClock, *, evicts: bool) -> tuple[QuotaEnforcer, Writer]:
    """The quota of a process that has not enqueued anything yet."""
    writer = Writer(outbox_dir, WriterLimits(500, 10**6, 10**9), lambda: None)
    usage = outbox_dir.disk_usage()
    writer.start(usage.pending_bytes, usage.pending_files)
    capacity = QuotaEnforcer(outbox_dir, writer, clock, None, evicts=evicts)
    return capacity, writer


@pytest.mark.parametrize("evicts", [False, True])
def test_retained_files_are_deleted_before_events_are_dropped_or_evicted(
    outbox_dir: Directory, clock: ManualClock, *, evicts: bool
) -> None:
    """As many as needed, those delivered first."""
    outbox_dir, volume = full_directory(outbox_dir, clock)
    capacity, writer = quota_of(outbox_dir, clock, evicts=evicts)
    volume.others = 250_000
    capacity.enforce()
    assert len(outbox_dir.delivered_files()) == 10
    clock.advance(10)
    volume.others = 350_000  # leaves no free space
    capacity.enforce()
    # 5 % of the volume, and a quarter of that in advance: two files.
    assert [layout.delivered_at(file.name) for file in outbox_dir.delivered_files()] == list(range(93, 101))
    assert (writer.dropped["disk_low"], capacity.evicted_events, len(outbox_dir.batch_names())) == (0, 0, 3)
    clock.advance(10)
    volume.others = 1_000_000
    capacity.enforce()
    assert (outbox_dir.delivered_files(), len(outbox_dir.batch_names())) == ([], 3)


def test_after_drops_retained_files_are_deleted_before_pending_ones(outbox_dir: Directory, clock: ManualClock) -> None:
    """Although the volume reports free space, because there may be a disk quota. Pending files are evicted after all retained ones."""
    outbox_dir, _ = full_directory(outbox_dir, clock)
    capacity, writer = quota_of(outbox_dir, clock, evicts=True)
    for left in (9, 8):
        writer.dropped["disk_full"] += 1
        capacity.enforce()
        assert (len(outbox_dir.delivered_files()), len(outbox_dir.batch_names())) == (left, 3)
    for file in outbox_dir.delivered_files():
        outbox_dir.remove(file.name)
    writer.dropped["disk_full"] += 1
    capacity.enforce()
    assert len(outbox_dir.batch_names()) == 2


def test_retained_files_do_not_count_against_max_bytes(tmp_path: Path) -> None:
    """`max_bytes` limits the pending files."""
    with Outbox(str(tmp_path / "box"), RecordingSink(), max_bytes=2000, batch_size=1, keep_delivered="1h") as outbox:
        for number in range(50):
            wait_until(lambda: outbox.stats().pending_bytes < 1000)
            assert outbox.enqueue(event(number))
        assert outbox.flush(60)
        assert outbox.stats().pending_bytes == 0
    assert sum(file.stat().st_size for file in (tmp_path / "box").glob("delivered-*")) > 5000


# Redelivery.


def test_a_destination_that_was_restored_from_a_backup_gets_all_events_again(tmp_path: Path) -> None:
    """An SQLite database, copied after the first of three batches and restored. Each event is in it once."""
    store(tmp_path, *range(10))
    deliver(tmp_path)
    shutil.copy(tmp_path / "events.db", tmp_path / "copy.db")
    for first in (10, 20):
        store(tmp_path, *range(first, first + 10))
        deliver(tmp_path)
    for left in tmp_path.glob("events.db*"):
        left.unlink()
    shutil.copy(tmp_path / "copy.db", tmp_path / "events.db")
    assert len(delivered_event_ids(tmp_path / "events.db")) == 10
    completed = run("redeliver", *BOX, "--since", "2h", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stdout.splitlines()[-1][:59]) == (
        0,
        b"30 events in 3 batches pending again (the oldest retained b",
    )
    deliver(tmp_path)
    assert delivered_event_ids(tmp_path / "events.db") == [f"e-{number:06d}" for number in range(30)]
    usage = verify_json(tmp_path)
    assert usage["resent_on_request"] == 30
    assert usage["total"]["accepted"] == usage["total"]["delivered"] == 60  # type: ignore[index]
    assert usage["total"]["duplicates"] == 10  # type: ignore[index]
    assert b"(duplicates 10, redelivered 30)" in run("verify", *BOX, cwd=tmp_path).stdout


def test_without_yes_nothing_is_redelivered(tmp_path: Path) -> None:
    """The plan in text and in JSON; with --yes, the same and the result."""
    deliver_three_batches(tmp_path)
    before = sorted(os.listdir(tmp_path / "box"))
    text = run("redeliver", *BOX, "--since", "1h", cwd=tmp_path).stdout.decode()
    assert "30 events in 3 batches would be redelivered; add --yes to do it" in text
    plan = json.loads(run("redeliver", *BOX, "--since", "1h", "--json", cwd=tmp_path).stdout)
    assert sorted(os.listdir(tmp_path / "box")) == before
    assert (plan["applied"], plan["events"], plan["files"]) == (False, 30, 3)
    assert [(item["events"], item["sink"], item["redelivered_as"]) for item in plan["items"]] == [(10, "", None)] * 3
    assert all(item["sealed_at_micros"] < item["delivered_at_micros"] for item in plan["items"])
    completed = json.loads(run("redeliver", *BOX, "--since", "1h", "--json", "--yes", cwd=tmp_path).stdout)
    new_name = [item["redelivered_as"] for item in completed["items"]]
    assert (completed["applied"], sorted(new_name)) == (True, new_name)
    assert [item["batch"] for item in completed["items"]] == sorted(item["batch"] for item in plan["items"])
    waiting = Directory(str(tmp_path / "box"), OsFilesystem(), SystemClock()).batch_names()
    assert [layout.batch_id(name) for name in waiting] == new_name


def test_since_and_until_apply_to_the_time_of_delivery(tmp_path: Path) -> None:
    """A batch can also be named, by any of its names."""
    deliver_three_batches(tmp_path)
    first, second, third = sorted(one.name for one in (tmp_path / "box").glob("delivered-*"))
    at = layout.delivered_at(second)
    assert at is not None

    def chosen(*options: str) -> list[str]:
        plan = json.loads(run("redeliver", *BOX, *options, "--json", cwd=tmp_path).stdout)
        return [item["batch"] for item in plan["items"]]

    moment = f"{at / 1e6:.6f}"
    iso = subprocess.run(["date", "-u", "-d", f"@{moment}", "+%FT%T.%6N"], capture_output=True, text=True, check=True)
    assert chosen("--since", iso.stdout) == [layout.batch_id(second), layout.batch_id(third)]
    assert chosen("--until", iso.stdout) == [layout.batch_id(first)]
    assert chosen("--batch", f"box/{third}") == chosen("--batch", layout.batch_id(third)) == [layout.batch_id(third)]
    assert len(chosen("--all")) == 3


def test_batches_of_several_sinks_can_be_redelivered_to_one(tmp_path: Path) -> None:
    """Each file has a link in each queue. One sink is down all the time, and the database of another one is lost."""
    sinks = [f"{name}=sqlite:///{name}.db" for name in ("one", "other")]
    more = [part for sink in [*sinks, "down=sqlite:////nowhere/at/all.db"] for part in ("--sink", sink)]
    environ = {"PILLARBOX_KEEP_DELIVERED": "24h"}
    command = ("deliver", *BOX, *more, "--once", "--timeout", "1")
    store(tmp_path, *range(10))
    assert run(*command, cwd=tmp_path, environ=environ).returncode == 1
    for left in tmp_path.glob("one.db*"):
        left.unlink()
    completed = run("redeliver", *BOX, "--all", "--sink", "one", "--yes", cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert run(*command, cwd=tmp_path, environ=environ).returncode == 1
    assert [delivered_event_ids(tmp_path / f"{name}.db") for name in ("one", "other")] == [
        [f"e-{number:06d}" for number in range(10)]
    ] * 2
    usage = json.loads(run("verify", *BOX, "--json", cwd=tmp_path).stdout)
    assert usage["balances"]
    assert [len(list((tmp_path / "box" / f"sink-{name}").glob("delivered-*"))) for name in ("one", "other")] == [1, 1]


def test_error_messages_say_what_to_type(tmp_path: Path) -> None:
    """No selection, an unknown sink, no retained batches, and a lock held by another command."""
    store(tmp_path, 1)
    assert run("redeliver", *BOX, cwd=tmp_path).returncode == 2
    wrong = run("redeliver", *BOX, "--all", "--sink", "warehouse", cwd=tmp_path)
    assert (wrong.returncode, b"leave --sink out" in wrong.stderr) == (2, True)
    nothing = run("redeliver", *BOX, "--since", "2h", "--yes", cwd=tmp_path)
    assert (nothing.returncode, b"set keep_delivered" in nothing.stdout) == (1, True)
    deliver(tmp_path)
    none = run("redeliver", *BOX, "--until", "2h", "--yes", cwd=tmp_path)
    assert (none.returncode, none.stdout[:19]) == (0, b"nothing was changed")
    outbox_dir = Directory(str(tmp_path / "box"), OsFilesystem(), SystemClock())
    lock = acquire_lock(outbox_dir)
    assert lock is not None
    busy = run("redeliver", *BOX, "--all", "--yes", cwd=tmp_path)
    assert (busy.returncode, b"another command is changing it" in busy.stderr) == (1, True)
    outbox_dir.filesystem.close(lock.fd)


def test_redelivery_leaves_room_for_new_events(tmp_path: Path) -> None:
    """It stops below `max_bytes`, and prints how to redeliver the rest later."""
    deliver_three_batches(tmp_path)
    size = next((tmp_path / "box").glob("delivered-*")).stat().st_size
    limit = {"PILLARBOX_MAX_BYTES": str(size * 5 // 2)}
    part = run("redeliver", *BOX, "--all", "--yes", cwd=tmp_path, environ=limit)
    assert part.returncode == 1
    assert b"20 events in 2 batches pending again" in part.stdout
    assert b"accepts no more events (max_bytes)" in part.stderr
    until = part.stdout.split(b"--until ")[1].split()[0].decode()
    deliver(tmp_path)
    rest = run("redeliver", *BOX, "--all", "--until", until, "--yes", cwd=tmp_path)
    assert rest.returncode == 0
    deliver(tmp_path)
    assert verify_json(tmp_path)["resent_on_request"] in (
        30,
        40,
        50,
    )  # batches delivered in the second before may be redelivered too


def test_redelivery_works_while_a_worker_runs(tmp_path: Path) -> None:
    """The worker delivers and retains the batches again."""
    sink = RecordingSink()
    with Outbox(str(tmp_path / "box"), sink, keep_delivered=3600, flush_interval=0.05) as outbox:
        for number in range(5):
            outbox.enqueue(event(number))
            assert outbox.flush(60)
        assert run("redeliver", *BOX, "--since", "1h", "--yes", cwd=tmp_path).returncode == 0
        wait_until(lambda: len(sink.payloads) == 10)
        assert outbox.flush(60)
    assert sink.payloads[:5] == sink.payloads[5:]
    assert len(list((tmp_path / "box").glob("delivered-*"))) == 5
    assert verify_json(tmp_path)["resent_on_request"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_redelivery_loses_and_duplicates_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """By SIGINT or SIGKILL in the middle of 500 files: each is retained or pending."""
    outbox_dir = Directory(str(tmp_path / "box"), OsFilesystem(), SystemClock())
    outbox_dir.ensure_usable()
    for stamp in range(500):
        seal_batch(outbox_dir, stamp + 1, b'{"n":%d}' % stamp)
    ledger = LedgerWriter(outbox_dir, SystemClock())
    drain_worker(make_worker(outbox_dir, RecordingSink(), limits=KEEPING))
    ledger.write(sync=True)
    contents = sorted(Path(outbox_dir.path_of(file.name)).read_bytes() for file in outbox_dir.delivered_files())
    assert len(contents) == 500
    process = subprocess.Popen(
        [*PILLARBOX, "redeliver", *BOX, "--all", "--yes"],
        cwd=tmp_path,
        env=CLEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: bool(outbox_dir.batch_names()))
    process.send_signal(number)
    process.communicate(timeout=60)
    files = [*outbox_dir.delivered_files(), *((name, 0) for name in outbox_dir.batch_names())]
    assert sorted(Path(outbox_dir.path_of(name)).read_bytes() for name, _ in files) == contents
    if number == signal.SIGINT:
        assert process.returncode in (0, 130)
    verify_json(tmp_path)
    assert run("redeliver", *BOX, "--all", "--yes", cwd=tmp_path).returncode == 0
    assert outbox_dir.delivered_files() == []
    verify_json(tmp_path)


class VolatileSink(RecordingSink):
    """A destination that may lose accepted events in a power loss."""

    capabilities = SinkCapabilities(deduplicates_by="event_id", survives="process")


@pytest.mark.parametrize("keep", [None, "24h"])
def test_with_power_durability_a_volatile_sink_gets_a_hint_about_redelivery(
    tmp_path: Path, keep: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning names the command, and the setting if it is not set."""
    monkeypatch.setattr(Directory, "check_power_durability", lambda _self: None)  # the tests may run on a tmpfs
    with caplog.at_level(logging.WARNING, "pillarbox"):
        Outbox(str(tmp_path / "box"), VolatileSink(), durability="power", keep_delivered=keep)
    (said,) = (one.message for one in caplog.records if "survive a power loss here, but not at" in one.message)
    assert "`pillarbox redeliver`" in said
    assert ("set keep_delivered" in said) == (keep is None)
