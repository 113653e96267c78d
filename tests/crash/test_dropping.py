"""The file system that loses what was not synced: that it does, and a fixed part of the torture on it."""

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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """The file system, mounted, with nothing in it."""
    need(devices=("/dev/fuse",), fuse=True)
    with lossy_fs.mounted(tmp_path / "mount", seed=1):
        yield tmp_path / "mount"


def test_only_what_was_synced_survives(mount: Path) -> None:
    """Data by the sync of the file, the name by that of the directory."""
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


def test_locks_and_identities_are_as_on_any_other_file_system(mount: Path) -> None:
    """Also those of a file that was renamed, replaced or removed while it is open."""
    filesystem = OsFilesystem()
    old, new = str(mount / "old"), str(mount / "new")
    fd = filesystem.create(old)
    other = filesystem.open_existing(old)
    assert filesystem.lock(fd)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    filesystem.rename(old, new)
    assert filesystem.is_file_at(fd, new)
    third = filesystem.create(old)
    filesystem.rename(old, new)
    assert not filesystem.is_file_at(fd, new)
    assert filesystem.is_file_at(third, new)
    filesystem.unlink(new)
    assert not filesystem.has_name(third)
    assert os.listdir(mount) == []
    for opened in (fd, other, third):
        filesystem.close(opened)


def test_a_name_before_its_data_is_reported(mount: Path) -> None:
    """Whether or not this cut shows it: a sealed name says that the file is complete."""
    (mount / "sealed-a.ndjson").write_bytes(b"data")
    assert lossy_fs.cut(mount) == ["sealed-a.ndjson has its name before the disk has its data"]
    assert lossy_fs.cut(mount) == []


def test_a_replacement_is_whole_or_not_at_all(mount: Path) -> None:
    """Though libfuse makes two renames of it where the replaced file is open."""
    filesystem = OsFilesystem()
    fd = filesystem.create(str(mount / "name"))
    filesystem.write(fd, b"0")
    filesystem.sync_data(fd)
    filesystem.sync_directory(str(mount))
    found, kept = b"0", 0
    for number in range(1, 41):
        opened = filesystem.open_existing(str(mount / "name"))
        aside = filesystem.create(str(mount / "aside"))
        filesystem.write(aside, b"%d" % number)
        filesystem.sync_data(aside)
        filesystem.rename(str(mount / "aside"), str(mount / "name"))
        lossy_fs.cut(mount)
        before, found = found, (mount / "name").read_bytes()
        assert found in (before, b"%d" % number)
        kept += found == before
        (mount / "aside").unlink(missing_ok=True)
        filesystem.sync_directory(str(mount))
        filesystem.close(opened)
        filesystem.close(aside)
    filesystem.close(fd)
    assert 0 < kept < 40


def test_unsynced_writes_are_lost_applied_torn_or_sized() -> None:
    """Each for itself; what was synced before stays, and so does what is synced after a sync in vain."""
    seen = set()
    for seed in range(200):
        file = lossy_fs.LossyFile(1)
        file.change((0, b"A"))
        file.sync()
        file.change((1, b"BB"))
        file.change((3, b"CC"))
        file.cut(random.Random(seed))
        seen.add(bytes(file.data))
    assert {b"A", b"ABB", b"ABBCC", b"A\0\0", b"A\0\0CC", b"AB", b"ABB\0\0", b"ABBC"} <= seen
    file = lossy_fs.LossyFile(1)
    file.change((0, b"A"))
    file.sync_in_vain(random.Random(4))
    file.change((1, b"B"))
    file.sync()
    file.cut(None)
    assert bytes(file.data)[1:] == b"B"


@pytest.mark.parametrize("made", ["outbox", "above"])
def test_a_directory_whose_maker_died_before_its_sync_is_made_durable_by_the_next(mount: Path, made: str) -> None:
    """Or all that was acknowledged in it is lost with its name."""
    (mount / made).mkdir()
    path = mount / "outbox" if made == "outbox" else mount / made / "outbox"
    with Outbox(str(path), min_free_bytes=0, durability="power") as outbox:
        assert outbox.enqueue(kills.make_event(1, 0)) == Enqueued("power")
    lossy_fs.cut(mount, "all")
    assert path.is_dir()
    assert any(b'"1-0"' in found.read_bytes() for found in path.iterdir())


@pytest.mark.parametrize("failing", [0.0, 0.05])
def test_what_was_acknowledged_under_power_survives_kills_and_cuts(tmp_path: Path, failing: float) -> None:
    """Where syncs fail, too; in a process of its own, for a parent with threads must not fork."""
    need(devices=("/dev/fuse",), fuse=True)
    command = [sys.executable, "-m", "tests.crash.lossy_fs", "--minutes", str(SECONDS / 60), "--failing", str(failing)]
    command += ["--seed", "20261", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = dict(part.split("=") for part in done.stdout.splitlines()[-1].removeprefix("KillReport(").rstrip(")").split(", "))
    assert int(figures["rounds"]) >= 5
    assert int(figures["acknowledged"]) > 100
