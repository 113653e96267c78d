"""On a volume without a free byte or inode, operations that free space still work. The tests use a small real file system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.admin.doctor import DoctorLimits, run_checks
from pillarbox.clock import SystemClock
from pillarbox.outcome import DROPPED
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.queues import directory_at
from tests.conftest import event, wait_until
from tests.crash.block_device import mounted, need
from tests.delivery.worker_setup import QUICK_CONFIG, PoisonedSink, drain_worker, make_worker, seal_batch

PILLARBOX = [sys.executable, "-m", "pillarbox"]


@pytest.fixture
def volume(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system in memory, mounted with the options that the test names."""
    need(commands=("mount", "umount"))
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", request.param, "tmpfs") as folder:
        yield folder


def use_up(volume: Path) -> None:
    """Use all free bytes and inodes."""
    (volume / "others").touch()
    number = 0
    while os.statvfs(volume).f_favail:
        (volume / f"other-{number}").touch()
        number += 1
    with (volume / "others").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PILLARBOX, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def directory_of(path: Path) -> Directory:
    return directory_at(str(path), OsFilesystem(), SystemClock())


@pytest.mark.parametrize("volume", ["size=1m,nr_inodes=40"], indirect=True)
def test_all_lock_files_exist_once_a_directory_was_opened(volume: Path) -> None:
    """This includes those of commands and of eviction, which may not be needed for months."""
    box = volume / "box"
    with Outbox(str(box)):  # it starts
        assert set(layout.CONTROL_FILES) <= set(os.listdir(box))


@pytest.mark.parametrize("volume", ["size=1m,nr_inodes=40"], indirect=True)
def test_a_full_volume_is_delivered_purged_and_evicted(volume: Path, tmp_path: Path) -> None:
    box, database = volume / "box", tmp_path / "events.db"
    with Outbox(str(box), min_free_bytes=0) as outbox:
        assert outbox.enqueue(event(1))
    (box / "dead-sealed-0000000000000001-u.ndjson").write_bytes(
        b'{"event":{},"code":"no","reason":"","sink":"s","index":0,"attempts":1,"first_at_micros":1,"last_at_micros":1}\n'
    )
    use_up(volume)
    purged = run("dead", "purge", "-d", str(box), "--all", "--yes", cwd=tmp_path)
    assert purged.returncode == 0, purged.stdout + purged.stderr
    assert not list(box.glob("dead-*"))
    use_up(volume)
    delivered = run("deliver", "-d", str(box), "--sink", f"sqlite:///{database}", "--once", cwd=tmp_path)
    assert delivered.returncode == 0, delivered.stdout + delivered.stderr
    assert not list(box.glob("sealed-*"))


@pytest.mark.parametrize("volume", ["size=1m,nr_inodes=40"], indirect=True)
def test_eviction_works_on_a_full_volume(volume: Path) -> None:
    box = volume / "box"
    with Outbox(str(box), min_free_bytes=0, when_full="drop_oldest", max_bytes=60_000, flush_interval=0.02) as outbox:
        assert outbox.enqueue(event(0))
        wait_until(lambda: bool(list(box.glob("sealed-*"))))
        use_up(volume)
        numbers = iter(range(1, 10**6))

        def has_evicted() -> bool:
            outbox.enqueue(event(next(numbers)))
            return outbox.stats().evicted > 0

        wait_until(has_evicted)


@pytest.mark.parametrize("volume", ["size=1m,nr_inodes=40"], indirect=True)
def test_a_retained_batch_is_given_up_for_dead_letters(volume: Path) -> None:
    """Otherwise the batch could not be settled and deleted until someone frees space."""
    box = volume / "box"
    box.mkdir(mode=0o700)
    directory = directory_of(box)
    directory.create_control_files()
    seal_batch(directory, 1, b'"poison"')
    seal_batch(directory, 2, b'"good"')
    retained = box / layout.delivered_name(layout.sealed_name(3, "u"), 5)
    retained.write_bytes(b"x" * 8192)
    use_up(volume)
    worker = make_worker(directory, PoisonedSink(), config=QUICK_CONFIG._replace(stop_after_rejected_batches=0))
    drain_worker(worker)
    assert not retained.exists()
    assert not list(box.glob("sealed-*"))
    assert len(list(box.glob("dead-*"))) == 1


@pytest.mark.parametrize("volume", ["size=64m,nr_inodes=400"], indirect=True)
def test_few_free_inodes_drop_events_like_few_free_bytes(volume: Path) -> None:
    """A twentieth of them must stay free. `doctor` reports it."""
    box = volume / "box"
    with Outbox(str(box), min_free_bytes=1) as outbox:
        assert outbox.enqueue(event(0))
    number = 0
    while os.statvfs(volume).f_favail > 15:
        (volume / f"other-{number}").touch()
        number += 1
    with Outbox(str(box), min_free_bytes=1) as outbox:
        assert outbox.enqueue(event(1)) == DROPPED["disk_low"]
    limits = DoctorLimits(power=False, max_bytes=10**9, max_files=1000, min_free_bytes=1, evicts=False)
    findings = run_checks(directory_of(box), SystemClock(), limits)
    assert [finding.ok for finding in findings if "inodes free" in finding.text] == [False]
    with Outbox(str(box), min_free_bytes=0) as outbox:
        assert outbox.enqueue(event(2))
