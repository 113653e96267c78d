"""Files of other users, second hard links and file names of any bytes: none of them stops an outbox, and none counts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox._native import COMPILED
from pillarbox.clock import SystemClock
from pillarbox.errors import FileUnusableError
from pillarbox.outcome import ENQUEUED
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SettledEntry, encode_entries, parse_ledger
from pillarbox.store.os_filesystem import CompiledOsFilesystem, OsFilesystem
from pillarbox.store.reconciliation import reconcile
from pillarbox.store.recovery import recover
from pillarbox.testing import ManualClock, RecordingSink
from tests.conftest import event
from tests.store.test_full_disks import run_in_child
from tests.store.test_writer import SealingWriter

OTHER_USER = 54321  # no process of the machine is this user's
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can create files for other users")
each_filesystem = pytest.mark.parametrize("filesystem", [OsFilesystem(), *([CompiledOsFilesystem()] if COMPILED else [])])


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory below `/tmp`, which every user can reach, with an outbox directory of another user."""
    path = Path(tempfile.mkdtemp(prefix="pillarbox-"))
    path.chmod(0o755)
    (path / "outbox").mkdir(mode=0o700)
    os.chown(path / "outbox", OTHER_USER, OTHER_USER)
    yield path
    shutil.rmtree(path)


def run_as_other_user(work: Callable[[], None]) -> None:
    """Run a function in a process of another user."""

    def switch_user() -> None:
        os.setgroups([])
        os.setgid(OTHER_USER)
        os.setuid(OTHER_USER)
        work()

    run_in_child(switch_user)


@as_root
@pytest.mark.parametrize("sinks", [1, 2])
def test_files_of_another_user_stop_neither_recovery_nor_delivery_nor_flush(shared: Path, sinks: int) -> None:
    """An operator may have copied a file or a directory as root; nobody but root can open it."""
    box = shared / "outbox"
    for name in ("sealed-0000000000000001-u.ndjson", "active-w-1.ndjson", "evict.lock"):
        (box / name).write_bytes(record.line(b'{"event_id":"theirs"}'))
        (box / name).chmod(0o600)
    (box / "sink-evil").mkdir(mode=0o700)
    (box / "sink-evil.removing").mkdir(mode=0o700)

    def work() -> None:
        doubles = {f"s{number}": RecordingSink() for number in range(sinks)}
        with Outbox(box, sinks=doubles) if sinks > 1 else Outbox(box, sink=doubles["s0"]) as outbox:
            assert [outbox.enqueue(event(number)) for number in range(3)] == [ENQUEUED] * 3
            assert outbox.flush(30)
            assert outbox.stats().delivered == 3 * sinks
            assert outbox.stats().pending_files == 0

    run_as_other_user(work)
    assert (box / "sealed-0000000000000001-u.ndjson").exists()


@as_root
@each_filesystem
def test_files_of_other_users_count_towards_no_limit(shared: Path, filesystem: OsFilesystem) -> None:
    """A sparse file of a neighbour would otherwise evict everything, and its name would be the latest seal time."""
    box = shared / "outbox"
    os.chown(box, 0, 0)
    theirs = box / "sealed-1999999999999999-u.ndjson"
    theirs.touch()
    os.truncate(theirs, 2**40)
    os.chown(theirs, OTHER_USER, OTHER_USER)
    (box / "sealed-0000000000000005-u.ndjson").write_bytes(b"12345")
    usage = Directory(str(box), filesystem, SystemClock()).disk_usage()
    assert (usage.pending_bytes, usage.pending_files, usage.newest_sealed_at) == (5, 1, 5)
    os.chown(box, OTHER_USER, OTHER_USER)  # then the files of the owner count too
    assert Directory(str(box), filesystem, SystemClock()).disk_usage().pending_files == 2


@as_root
@each_filesystem
def test_root_opens_only_files_of_the_owner_of_the_directory(shared: Path, filesystem: OsFilesystem) -> None:
    """The owner may have moved or linked any file there, and root would deliver and delete it."""
    directory = Directory(str(shared / "outbox"), filesystem, SystemClock())
    for name, owner in (("sealed-1.ndjson", 0), ("sealed-2.ndjson", OTHER_USER)):
        Path(directory.path_of(name)).write_bytes(b"secret")
        os.chown(directory.path_of(name), owner, owner)
    with pytest.raises(FileUnusableError, match="belongs to user 0"):
        directory.lock_existing("sealed-1.ndjson")
    theirs = directory.lock_existing("sealed-2.ndjson")
    assert theirs is not None
    filesystem.close(theirs.fd)
    os.link(directory.path_of("sealed-2.ndjson"), shared / "elsewhere")
    with pytest.raises(FileUnusableError, match="second hard link"):
        directory.lock_existing("sealed-2.ndjson")
    created = directory.create("active-w-1.ndjson")  # what root creates belongs to the owner, and root can use it
    assert created is not None
    filesystem.close(created.fd)
    assert [file.active_name for file in recover(directory)] == []


@as_root
def test_an_unreadable_file_is_skipped_by_recovery_and_logged_once(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The segments of the others are sealed."""
    directory = Directory(str(shared / "outbox"), OsFilesystem(), SystemClock())
    for name, owner in (("active-v-1.ndjson", 0), ("active-w-1.ndjson", OTHER_USER)):
        Path(directory.path_of(name)).write_bytes(record.line(b"1"))
        os.chown(directory.path_of(name), owner, owner)
    assert [file.active_name for file in recover(directory)] == ["active-w-1.ndjson"]
    assert recover(directory) == []
    assert [entry.message.rpartition("/")[2] for entry in caplog.records] == ["active-v-1.ndjson: belongs to user 0"]


def test_a_snapshot_of_hard_links_does_not_stop_delivery(tmp_path: Path) -> None:
    """As `cp -al` and some backup programs make. Nobody else can write to the directory, so nobody has planted a link."""
    with Outbox(tmp_path / "outbox", flush_interval=0.05) as outbox:
        assert outbox.enqueue(event(1))
    with Outbox(tmp_path / "outbox", sink=f"sqlite:///{tmp_path}/destination.db", flush_interval=0.05) as outbox:
        assert outbox.flush(30)
        assert outbox.enqueue(event(2))
        (tmp_path / "snapshot").mkdir()
        for file in (tmp_path / "outbox").iterdir():
            (tmp_path / "snapshot" / file.name).hardlink_to(file)
        assert outbox.enqueue(event(3))
        assert outbox.flush(30)
        stats = outbox.stats()
        assert (stats.delivered, stats.pending_files) == (3, 0)
        assert stats.state.name in ("draining", "idle")
    with Outbox(tmp_path / "outbox", sink=f"sqlite:///{tmp_path}/destination.db") as outbox:  # the lock files are linked too
        assert outbox.enqueue(event(4))
        assert outbox.flush(30)


def test_a_second_hard_link_is_unusable_where_others_may_write_to_the_directory(outbox_dir: Directory, tmp_path: Path) -> None:
    """They may have linked any file of ours."""
    (tmp_path / "elsewhere").write_bytes(record.line(b"1"))
    Path(outbox_dir.path_of("sealed-1.ndjson")).hardlink_to(tmp_path / "elsewhere")
    locked = outbox_dir.lock_existing("sealed-1.ndjson")
    assert locked is not None
    outbox_dir.filesystem.close(locked.fd)
    Path(outbox_dir.path).chmod(0o770)
    with pytest.raises(FileUnusableError, match="second hard link"):
        outbox_dir.lock_existing("sealed-1.ndjson")


def test_an_unusable_lock_file_does_not_end_the_sealer(outbox_dir: Directory, clock: ManualClock) -> None:
    """A link planted as `evict.lock` stops eviction, and nothing else."""
    Path(outbox_dir.path_of(layout.EVICT_LOCK)).symlink_to("nowhere")
    pipeline = SealingWriter(outbox_dir, clock, batch_size=1, max_bytes=1000)
    pipeline.sealer.quota._evicts = True
    pipeline.append(10)
    pipeline.writer.rotate("manual")
    pipeline.writer.limits = pipeline.writer.limits._replace(max_bytes=1)
    pipeline.sealer.step()
    assert sum(Path(outbox_dir.path_of(name)).read_bytes().count(b"\n") for name in outbox_dir.batch_names()) == 10


# File names that are not UTF-8.

_STRANGE = os.fsencode("sealed-0000000000000001-") + b"\xff\xfe.ndjson"


def _put_strange_file(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    strange = os.fsencode(path) + b"/" + _STRANGE
    with open(strange, "wb") as file:
        file.write(record.line(b'{"event_id":"strange","event_key":"k","scope_kind":"Site","scope_id":"s"}') + b"torn")


@pytest.mark.parametrize("sinks", [1, 2])
def test_a_file_whose_name_is_not_utf8_is_delivered_and_counted_like_any_other(tmp_path: Path, sinks: int) -> None:
    """Ledger, quarantine and destination get its name escaped."""
    box = tmp_path / "outbox"
    _put_strange_file(box)
    urls = {f"s{number}": f"sqlite:///{tmp_path}/destination-{number}.db" for number in range(sinks)}
    with Outbox(box, sinks=urls) if sinks > 1 else Outbox(box, sink=urls["s0"]) as outbox:
        assert outbox.enqueue(event(1))
        assert outbox.flush(30)
        assert outbox.stats().delivered == 2 * sinks
    queues = [box / f"sink-s{number}" for number in range(sinks)] if sinks > 1 else [box]
    for queue in queues:
        assert [path.name for path in queue.glob("corrupt-*.ndjson")] == ["corrupt-sealed-0000000000000001-\\xff\\xfe.ndjson"]
        assert reconcile(Directory(str(queue), OsFilesystem(), SystemClock())).balances


def test_segments_with_strange_names_are_recovered_and_evicted(outbox_dir: Directory, clock: ManualClock) -> None:
    """The writer in the ledger is escaped too."""
    with open(os.fsencode(outbox_dir.path) + b"/active-\xff-1.ndjson", "wb") as file:
        file.write(record.line(b"1"))
    (adopted,) = recover(outbox_dir)
    assert layout.writer_of(adopted.active_name) == "\\xff"
    ledger = LedgerWriter(outbox_dir, clock)
    _put_strange_file(Path(outbox_dir.path))
    pipeline = SealingWriter(outbox_dir, clock, max_bytes=len(record.line(b"1")))
    pipeline.sealer.quota._evicts, pipeline.sealer.quota._ledger = True, ledger
    pipeline.sealer.step()
    assert outbox_dir.batch_names() == []


def test_an_entry_with_text_that_cannot_be_encoded_is_written_escaped() -> None:
    """A sink's URL comes from the command line, which may be any bytes."""
    line = encode_entries([SettledEntry(1, "sealed-1", "sqlite:///\udcff.db", 1, 0, 0, 0)])
    entries, unread = parse_ledger(line)
    assert (len(entries), unread) == (1, 0)
