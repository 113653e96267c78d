"""Disks without free bytes, inodes or quota, processes without descriptors, and read-only disks.

Afterwards each accepted event has reached the destination exactly once, and the outbox accepts events without a restart.
"""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pillarbox import Dropped, Outbox, TrackingEvent
from pillarbox.outcome import DROPPED, DropReason, Outcome
from pillarbox.store import layout, reader
from tests.conftest import event
from tests.crash.block_device import mounted, need

PADDING = '{"text":"' + "x" * 700 + '"}'
TRIES_MAX = 20_000
EVENT_FILE_KINDS = {layout.Kind.ACTIVE, layout.Kind.SEALED}
DRAIN_S = 30.0


class DiskFiller:
    """An outbox that only stores, the events that it accepted, and the destination to which another outbox delivers."""

    def __init__(self, folder: Path, database: Path, **settings: int) -> None:
        self.folder = folder
        self.database = database
        self.accepted: list[str] = []
        self.outbox = Outbox(str(folder), min_free_bytes=0, flush_interval=0.02, **settings)  # type: ignore[arg-type]
        self._numbers = iter(range(10**9))

    def store(self, padding: str = PADDING) -> Outcome:
        outcome = self.outbox.enqueue(stored := self._event(padding))
        if outcome:
            self.accepted.append(stored.event_id)
        return outcome

    def store_many(self, count: int, padding: str = PADDING) -> Outcome:
        events = [self._event(padding) for _ in range(count)]
        outcomes = self.outbox.enqueue_many(events)
        assert len(set(outcomes)) == 1, "some events of one call were stored and others dropped"
        self.accepted += [stored.event_id for stored, outcome in zip(events, outcomes, strict=True) if outcome]
        return outcomes[0]

    def _event(self, padding: str) -> TrackingEvent:
        return event(next(self._numbers), metadata_json=padding)

    def fill(self, store: Callable[[], Outcome]) -> DropReason:
        """Store events until one is dropped. Returns the reason."""
        for _ in range(TRIES_MAX):
            outcome = store()
            if isinstance(outcome, Dropped):
                return outcome.reason
        raise AssertionError(f"none of {TRIES_MAX} events was dropped")

    def stored(self, *, whole: bool = True) -> list[str]:
        """The ids of all readable events on disk. With `whole`, the files must have no damaged lines."""
        while True:
            names = sorted(os.listdir(self.folder))
            try:
                ids_by_file = [self._read(name, whole=whole) for name in names if layout.kind_of(name) in EVENT_FILE_KINDS]
            except FileNotFoundError:
                continue  # the file was sealed meanwhile
            if names == sorted(os.listdir(self.folder)):
                return sorted(event_id for ids in ids_by_file for event_id in ids)

    def _read(self, name: str, *, whole: bool) -> list[str]:
        contents = reader.read_lines((self.folder / name).read_bytes(), lambda: None)
        assert not (whole and contents.damaged), name
        return [json.loads(payload)["event_id"] for payload in contents.payloads]

    def deliver(self, commit: Path | None = None) -> list[str]:
        """Deliver everything by another outbox. Returns the ids of all events at the destination, in order.

        `commit` is the path of a btrfs, which frees the space of deleted files only when it commits.
        """
        with Outbox(str(self.folder), f"sqlite:///{self.database}", flush_interval=0.02, min_free_bytes=0) as delivering:
            deadline = time.monotonic() + DRAIN_S
            while not self.outbox.flush(1.0):
                assert time.monotonic() < deadline
                if commit is not None:
                    subprocess.run(["btrfs", "filesystem", "sync", commit], check=True, capture_output=True)
            assert delivering.flush(DRAIN_S)
        with closing(sqlite3.connect(self.database)) as connection:
            return [row[0] for row in connection.execute("SELECT event_id FROM tracking_event ORDER BY event_id")]


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system in memory, mounted with the options that the test names."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", request.param, "tmpfs") as outbox_dir:
        yield outbox_dir / "outbox"


@pytest.mark.parametrize("small", ["size=256k", "size=100k"], indirect=True)
@pytest.mark.parametrize("count", [1, 7])
def test_a_full_disk_drops_events_keeps_lines_whole_delivers_and_recovers(small: Path, tmp_path: Path, count: int) -> None:
    """The kernel fills the last page before it reports the error. Delivery needs no space."""
    filler = DiskFiller(small, tmp_path / "destination.db", batch_size=40)
    with filler.outbox:

        def store() -> Outcome:
            return filler.store() if count == 1 else filler.store_many(count)

        assert filler.fill(store) == "disk_full"
        assert os.statvfs(small).f_bavail < 3  # pages; the lines of one call are stored all or none
        assert store() == DROPPED["disk_full"]
        assert filler.stored() == filler.accepted
        assert filler.deliver() == filler.accepted
        assert store()
        assert filler.fill(store) == "disk_full"
        assert filler.deliver() == filler.accepted


@pytest.mark.parametrize("small", ["size=64m,nr_inodes=12"], indirect=True)
def test_without_inodes_segments_grow_and_then_events_are_dropped(small: Path, tmp_path: Path) -> None:
    """No spare can be created, so the active segment grows to `batch_bytes` first."""
    filler = DiskFiller(small, tmp_path / "destination.db", batch_size=2, batch_bytes=5_000)
    with filler.outbox:
        filler.store()
        for number in range(20):
            if os.statvfs(small).f_favail:
                (small / f"other-{number}").touch()
        assert filler.fill(filler.store) == "disk_full"
        assert os.statvfs(small).f_favail == 0
        assert filler.stored() == filler.accepted
        for path in small.glob("other-*"):
            path.unlink()
        assert filler.deliver() == filler.accepted
        assert filler.store()
        assert filler.deliver() == filler.accepted


def run_in_child(work: Callable[[], None]) -> None:
    """Run a function in a forked process, which has its own limits."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_descriptors_segments_grow_and_then_events_are_dropped(tmp_path: Path) -> None:
    """No file and no directory can be opened; files that are open still work."""
    filler = DiskFiller(tmp_path / "outbox", tmp_path / "destination.db", batch_size=2, batch_bytes=5_000)

    def work() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with filler.outbox:
            assert filler.store()
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            assert filler.fill(filler.store) == "io_error"
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert filler.stored() == filler.accepted
            assert filler.store()
            assert filler.deliver() == filler.accepted

    run_in_child(work)


@pytest.fixture
def quota(tmp_path: Path) -> Iterator[Path]:
    """A btrfs subvolume with a quota of 8 MiB on a larger device."""
    need(devices=("/dev/loop-control",), commands=("mkfs.btrfs", "btrfs", "mount"))
    image = tmp_path / "btrfs.img"
    with image.open("wb") as file:
        file.truncate(512 * 2**20)
    subprocess.run(["mkfs.btrfs", "--quiet", image], check=True)
    with mounted(tmp_path / "btrfs", "-o", "loop", image) as outbox_dir:
        subprocess.run(["btrfs", "quota", "enable", outbox_dir], check=True)
        subprocess.run(["btrfs", "subvolume", "create", outbox_dir / "limited"], check=True, capture_output=True)
        subprocess.run(["btrfs", "qgroup", "limit", "8M", outbox_dir / "limited"], check=True)
        yield outbox_dir / "limited"


def test_an_exhausted_quota_drops_events_until_there_is_room(quota: Path, tmp_path: Path) -> None:
    """EDQUOT while the volume has free space. btrfs then also fails to truncate and rename, but not to delete.

    So a file may hold dropped events, for which the reason is an I/O error, and no segment can be sealed. The delivery of sealed
    batches makes room.
    """
    filler = DiskFiller(quota / "outbox", tmp_path / "destination.db")
    large = '{"text":"' + "x" * 20_000 + '"}'

    def store() -> Outcome:
        outcome = filler.store_many(20, large)
        filler.outbox.flush(0.0)  # seals the segment
        return outcome

    with filler.outbox:
        assert filler.store()
        assert filler.deliver() == filler.accepted  # creates the lock file
        assert filler.fill(store) in ("disk_full", "io_error")
        assert os.statvfs(quota).f_bavail * os.statvfs(quota).f_frsize > 2 * 8 * 2**20
        arrived = filler.deliver(commit=quota)
        assert set(arrived) >= set(filler.accepted)
        assert filler.store()
        assert filler.accepted[-1] in filler.deliver()


@pytest.mark.parametrize("small", ["size=1m"], indirect=True)
def test_a_volume_that_turns_read_only_is_an_io_error_until_it_is_writable_again(small: Path, tmp_path: Path) -> None:
    """The kernel remounts only while no file is open for writing; here, before the first event."""
    filler = DiskFiller(small, tmp_path / "destination.db")
    with filler.outbox:
        subprocess.run(["mount", "-o", "remount,ro", small.parent], check=True)
        assert [filler.store(), filler.store()] == [DROPPED["io_error"]] * 2
        subprocess.run(["mount", "-o", "remount,rw", small.parent], check=True)
        assert filler.store()
        assert filler.deliver() == filler.accepted
