"""The lossy file system loses unsynced data and names; a fixed part of the torture runs on it."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import Enqueued, Outbox
from pillarbox.store.os_filesystem import OsFilesystem
from tests.crash import kills, lossy_fs
from tests.crash.block_device import need

ROOT = Path(__file__).parents[2]
SECONDS = 5.0
ROUNDS_MIN = 5
ACKNOWLEDGED_MIN = 100


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """The mounted, empty file system."""
    need(devices=("/dev/fuse",), fuse=True)
    with lossy_fs.mounted(tmp_path / "mount", seed=1):
        yield tmp_path / "mount"


def test_only_synced_data_and_names_survive_a_cut(mount: Path) -> None:
    """Data needs a sync of the file, a name a sync of the directory."""
    filesystem = OsFilesystem()
    for name in ("both", "data", "name"):
        fd = filesystem.create(f"{mount}/{name}")
        filesystem.write(fd, b"first,")
        if name != "name":
            filesystem.sync_data(fd)
        if name != "data":
            filesystem.sync_directory(str(mount))
        filesystem.write(fd, b"second")
        assert filesystem.read_all(fd) == b"first,second"
        filesystem.close(fd)
    os.rename(mount / "both", mount / "renamed")
    filesystem.sync_directory(str(mount))
    os.unlink(mount / "renamed")
    assert sorted(os.listdir(mount)) == ["data", "name"]
    assert lossy_fs.cut(mount, "all") == []
    assert {name: (mount / name).read_bytes() for name in os.listdir(mount)} == {
        "renamed": b"first,",
        "data": b"first,",
        "name": b"",
    }


def test_locks_and_inode_numbers_are_as_on_other_file_systems(mount: Path) -> None:
    """Also for a file that is renamed, replaced or removed while it is open."""
    filesystem = OsFilesystem()
    old, new = str(mount / "old"), str(mount / "new")
    fd = filesystem.create(old)
    second_fd = filesystem.open_existing(old)
    assert filesystem.lock(fd)
    with pytest.raises(BlockingIOError):
        fcntl.flock(second_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    filesystem.rename(old, new)
    assert filesystem.is_file_at(fd, new)
    replacement = filesystem.create(old)
    filesystem.rename(old, new)
    assert not filesystem.is_file_at(fd, new)
    assert filesystem.is_file_at(replacement, new)
    filesystem.unlink(new)
    assert not filesystem.has_name(replacement)
    assert os.listdir(mount) == []
    for open_fd in (fd, second_fd, replacement):
        filesystem.close(open_fd)


def test_a_sealed_name_with_unsynced_data_is_reported(mount: Path) -> None:
    """Even if this cut loses no data: a sealed name means that the file is complete."""
    (mount / "sealed-a.ndjson").write_bytes(b"data")
    assert lossy_fs.cut(mount) == ["sealed-a.ndjson has its name before the disk has its data"]
    assert lossy_fs.cut(mount) == []


def test_replacing_a_file_is_atomic(mount: Path) -> None:
    """Although libfuse turns it into two renames if the replaced file is open."""
    filesystem = OsFilesystem()
    fd = filesystem.create(str(mount / "name"))
    filesystem.write(fd, b"0")
    filesystem.sync_data(fd)
    filesystem.sync_directory(str(mount))
    data, unchanged = b"0", 0
    for number in range(1, 41):
        opened = filesystem.open_existing(str(mount / "name"))
        temporary = filesystem.create(str(mount / "aside"))
        filesystem.write(temporary, b"%d" % number)
        filesystem.sync_data(temporary)
        filesystem.rename(str(mount / "aside"), str(mount / "name"))
        lossy_fs.cut(mount)
        previous, data = data, (mount / "name").read_bytes()
        assert data in (previous, b"%d" % number)
        unchanged += data == previous
        (mount / "aside").unlink(missing_ok=True)
        filesystem.sync_directory(str(mount))
        filesystem.close(opened)
        filesystem.close(temporary)
    filesystem.close(fd)
    assert 0 < unchanged < 40


def test_unsynced_writes_are_lost_applied_torn_or_sized() -> None:
    """Independently of each other. Data that was synced before, or after a failed sync, survives."""
    contents = set()
    for seed in range(200):
        file = lossy_fs.LossyFile(1)
        file.change((0, b"A"))
        file.sync()
        file.change((1, b"BB"))
        file.change((3, b"CC"))
        file.cut(random.Random(seed))
        contents.add(bytes(file.data))
    assert {b"A", b"ABB", b"ABBCC", b"A\0\0", b"A\0\0CC", b"AB", b"ABB\0\0", b"ABBC"} <= contents
    file = lossy_fs.LossyFile(1)
    file.change((0, b"A"))
    file.fail_sync(random.Random(4))
    file.change((1, b"B"))
    file.sync()
    file.cut(None)
    assert bytes(file.data)[1:] == b"B"


@pytest.mark.parametrize("created", ["outbox", "parent"])
def test_a_directory_that_a_killed_process_created_is_made_durable_by_the_next(mount: Path, created: str) -> None:
    """Otherwise the events in it would be lost with its name."""
    (mount / created).mkdir()
    path = mount / "outbox" if created == "outbox" else mount / created / "outbox"
    with Outbox(str(path), min_free_bytes=0, durability="power") as outbox:
        assert outbox.enqueue(kills.make_event(1, 0)) == Enqueued("power")
    lossy_fs.cut(mount, "all")
    assert path.is_dir()
    assert any(b'"1-0"' in file.read_bytes() for file in path.iterdir())


@pytest.mark.parametrize("failing", [0.0, 0.05])
def test_events_confirmed_with_power_survive_kills_and_cuts(tmp_path: Path, failing: float) -> None:
    """Also if syncs fail. It runs in its own process, because a process with threads must not fork."""
    need(devices=("/dev/fuse",), fuse=True)
    command = [sys.executable, "-m", "tests.crash.lossy_fs", "--minutes", str(SECONDS / 60), "--failing", str(failing)]
    command += ["--seed", "20261", "--directory", str(tmp_path)]
    command += ["--rounds-min", str(ROUNDS_MIN), "--acknowledged-min", str(ACKNOWLEDGED_MIN)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    figures = dict(
        part.split("=") for part in process.stdout.splitlines()[-1].removeprefix("KillReport(").rstrip(")").split(", ")
    )
    assert int(figures["rounds"]) >= ROUNDS_MIN
    assert int(figures["acknowledged"]) >= ACKNOWLEDGED_MIN
