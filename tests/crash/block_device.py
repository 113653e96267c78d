"""Compares the durability model with the kernel: a real ext4 or XFS loses power after the k-th operation of a history.

A history is the trace of the real code on the simulated disk, or of random operations. The same operations are done on a file
system on a loop device. The shutdown ioctl leaves the state of a power loss, within milliseconds, and mounting replays the
journal. In between, the kernel is made to write data back at random moments, as it may at any time. The model must admit the
state after the cut, and the real code must open it and deliver the promised events. A test calls `need` with its requirements
of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import itertools
import logging
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Final, NamedTuple, Self
from unittest import mock

import pytest

from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import CrashFilesystem, Disk, Op, State
from pillarbox.testing.durability_model import DurabilityModel
from tests.crash import simulation
from tests.crash.enumeration import LETTERS
from tests.crash.simulation import LOCKS, OUTBOX_PATH, Obligations, RecoveryOutcome, SimulationWorld, kind_at

MAKERS: Final = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
}
IMAGE_BYTES: Final = 320 * 2**20  # XFS needs at least 300 MiB; the file is sparse
STEPS_MAX: Final = 14
RAW_MAX: Final = 40  # operations of a random history
UNSYNCED_MAX: Final = 4  # changes of a file, where a large one counts as two; more have too many possible states
UNSURE_MAX: Final = 12  # unsynced changes of names; more have too many possible states
_SHUTDOWN: Final = 0x8004587D
_DROP_LOG, _FLUSH_LOG = 2, 1  # whether the unwritten part of the journal is written
_WAIT_WRITE_WAIT: Final = 7  # for `sync_file_range`: from one end of the file to the other
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class BlockDeviceViolation(AssertionError):  # noqa: N818 - it is not an error of the program that raises it
    """The model does not admit a state of the kernel, or the store lost promised events."""


class BlockDeviceReport(NamedTuple):
    """The figures of a run."""

    filesystem: str
    seed: int
    cuts: int
    raw: int  # cuts in histories of random operations
    distinct: int  # different histories
    lost_something: int  # cuts after which something was missing


def need(*, root: bool = True, devices: tuple[str, ...] = (), commands: tuple[str, ...] = (), fuse: bool = False) -> None:
    """Skip if the machine lacks something; fail in CI, where nothing may be missing."""
    lacking = ["libfuse"] if fuse and not (find_library("fuse") or find_library("fuse3")) else []
    lacking += [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    lacking += [command for command in commands if shutil.which(command) is None]
    if root and os.geteuid() != 0:
        lacking.append("root")
    if lacking and os.environ.get("CI"):
        pytest.fail(f"CI must have {', '.join(lacking)}")
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str | Path) -> Iterator[Path]:
    """Mount something at `folder`; `arguments` are those of `mount` before the mount point."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments, folder], check=True)
    try:
        yield folder
    finally:
        if subprocess.run(["umount", folder], check=False).returncode:  # a failed test may hold files open
            subprocess.run(["umount", "--lazy", folder], check=True)


class LoopDevice:
    """A small file system on a loop device whose power can be cut."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.folder = directory / kind
        self._image = directory / f"{kind}.img"
        self._device = ""

    def __enter__(self) -> Self:
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run([*MAKERS[self.kind], self._image], check=True, stdout=subprocess.DEVNULL)
        losetup = subprocess.run(["losetup", "--find", "--show", self._image], check=True, capture_output=True, text=True)
        self._device = losetup.stdout.strip()
        self.folder.mkdir()
        try:
            self._mount()
        except BaseException:
            subprocess.run(["losetup", "--detach", self._device], check=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if subprocess.run(["umount", self.folder], check=False).returncode:
            subprocess.run(["umount", "--lazy", self.folder], check=True)
        subprocess.run(["losetup", "--detach", self._device], check=True)
        self._image.unlink()

    def _mount(self) -> None:
        subprocess.run(["mount", "-t", self.kind, self._device, self.folder], check=True)

    def shut_down(self, *, flush_log: bool) -> None:
        """Cut the power: from now on, nothing is written to the device."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _FLUSH_LOG if flush_log else _DROP_LOG))
        finally:
            os.close(fd)

    def remount(self) -> None:
        """Mount again after a cut. No file may be open."""
        subprocess.run(["umount", self.folder], check=True)
        self._mount()

    def write_back(self) -> None:
        """Make the kernel write everything back."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            _check(_LIBC.syncfs(fd))
        finally:
            os.close(fd)

    def write_back_data(self, fd: int) -> None:
        """Make the kernel write the data of a file back, but not the journal."""
        _check(_LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WAIT_WRITE_WAIT))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class TraceReplay:
    """Repeats the operations of a trace on a real file system, in a directory in place of `OUTBOX_PATH`."""

    def __init__(self, medium: LoopDevice, root: Path, chance: random.Random) -> None:
        self._medium = medium
        self._root = root
        self._chance = chance
        self._filesystem = OsFilesystem()
        self._open: dict[int, int] = {}  # inode -> descriptor
        self._names: dict[str, int] = {}  # path -> inode

    def at(self, path: str) -> str:
        """The real path."""
        return path.replace(OUTBOX_PATH, str(self._root), 1)

    def do(self, op: Op) -> None:
        """Do one operation, and sometimes a writeback that the kernel may do at any time."""
        filesystem, verb = self._filesystem, op.verb
        if verb == "create":
            create = filesystem.open_lock_file if op.path.rpartition("/")[2] in LOCKS else filesystem.create
            self._open[op.inode] = create(self.at(op.path))
            self._names[op.path] = op.inode
        elif verb == "write":
            self._write(op)
        elif verb == "truncate":
            filesystem.truncate(self._descriptor(op.inode), op.offset)
        elif verb == "sync_data":
            filesystem.sync_data(self._descriptor(op.inode))
        elif verb == "rename":
            filesystem.rename(self.at(op.path), self.at(op.target))
            moved = [path for path in self._names if path == op.path or path.startswith(op.path + "/")]
            self._names |= {op.target + path[len(op.path) :]: self._names.pop(path) for path in moved}
        elif verb == "link":
            os.link(self.at(op.path), self.at(op.target))
            self._names[op.target] = op.inode
        elif verb == "unlink":
            filesystem.unlink(self.at(op.path))
            self._names.pop(op.path, None)
        elif verb in ("make_directory", "remove_directory"):
            (os.mkdir if verb == "make_directory" else os.rmdir)(self.at(op.path))
        elif verb == "sync_directory":
            filesystem.sync_directory(self.at(op.path))
        elif verb != "mark":
            raise BlockDeviceViolation(f"cannot be replayed: {verb}")
        if self._chance.random() < 0.15:
            self._write_back_at_random(op)

    def _descriptor(self, inode: int) -> int:
        if inode not in self._open:
            path = next(path for path, number in self._names.items() if number == inode)
            self._open[inode] = os.open(self.at(path), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        return self._open[inode]

    def _write(self, op: Op) -> None:
        fd = self._descriptor(op.inode)
        if op.path.rpartition("/")[2] in LOCKS:
            return  # the model ignores them
        if os.fstat(fd).st_size != op.offset:
            raise BlockDeviceViolation(f"the replay diverges from the trace at {op.path}")
        self._filesystem.write_all(fd, op.data)

    def _write_back_at_random(self, op: Op) -> None:
        match self._chance.randrange(4):
            case 0:
                self._medium.write_back()
            case 1:  # the journal is written, with all names and sizes, but not the data
                with (self._root.parent / "bystander").open("ab") as file:
                    file.write(b"x")
                    file.flush()
                    os.fsync(file.fileno())
            case 2:  # the data is written, but not the journal
                if op.inode in self._open:
                    self._medium.write_back_data(self._open[op.inode])
            case 3:
                if op.inode in self._open and os.fstat(self._open[op.inode]).st_nlink:
                    self._filesystem.close(self._open.pop(op.inode))

    def close(self) -> None:
        """Close all files, as the kernel does when a process is killed."""
        for fd in self._open.values():
            self._filesystem.close(fd)
        self._open.clear()


_SIZES: Final = (1, 9, 40, 40, 300, 1500, 4096, 4500)


class _RawFiles:
    """A few files and directories on a simulated disk, for random operations."""

    def __init__(self, chance: random.Random) -> None:
        self.disk = Disk()
        self._chance = chance
        self._filesystem = CrashFilesystem(self.disk)
        self._filesystem.make_directory(OUTBOX_PATH)
        self._numbers = itertools.count(1).__next__
        self._letters = itertools.cycle(b"abcdefghijklmnopqrstuvwxyz")
        self._directories = [OUTBOX_PATH]
        self._opened: dict[str, int] = {}  # path -> descriptor
        self._unsynced: Counter[int] = Counter()

    def _new_path(self) -> str:
        return f"{self._chance.choice(self._directories)}/f{self._numbers()}"

    def step(self) -> None:
        """Do one operation."""
        chance, filesystem, opened = self._chance, self._filesystem, self._opened
        verb = chance.choice(
            ("create", "write", "write", "write", "truncate", "sync_data", "rename", "link", "unlink", "sync", "directory")
        )
        if verb == "sync":
            filesystem.sync_directory(chance.choice(self._directories))
        elif verb == "directory":
            self._change_directory()
        elif not opened or (verb == "create" and len(opened) < 4):
            path = self._new_path()
            opened[path] = filesystem.create(path)
        elif verb in ("rename", "link", "unlink"):
            self._change_name(verb, chance.choice(sorted(opened)))
        else:
            self._change_data(verb, opened[chance.choice(sorted(opened))])

    def _change_directory(self) -> None:
        """Create a directory without a sync, or rename or remove one."""
        chance, others = self._chance, self._directories[1:]
        if len(others) < 2 and chance.random() < 0.5:
            self._directories.append(path := f"{chance.choice(self._directories)}/d{self._numbers()}")
            self.disk.make_directory(path)
        elif others:
            path = chance.choice(others)
            target = f"{path.rpartition('/')[0]}/d{self._numbers()}"
            below = [entry for entry in (*self._directories, *self._opened) if entry.startswith(path + "/")]
            if not below and chance.random() < 0.5:
                self._filesystem.remove_directory(path)
                self._directories.remove(path)
                return
            self._filesystem.rename(path, target)
            self._directories = [target + old[len(path) :] if old in (path, *below) else old for old in self._directories]
            self._opened = {target + old[len(path) :] if old in below else old: fd for old, fd in self._opened.items()}

    def _change_name(self, verb: str, path: str) -> None:
        filesystem, opened, parent = self._filesystem, self._opened, path.rpartition("/")[0]
        if verb == "unlink":
            filesystem.unlink(path)
            del opened[path]
        elif verb == "link":
            target = self._new_path()
            filesystem.link(path, target)
            opened[target] = opened[path]
        else:
            siblings = sorted(other for other in opened if other.rpartition("/")[0] == parent)
            target = f"{parent}/f{self._numbers()}" if self._chance.random() < 0.7 else self._chance.choice(siblings)
            filesystem.rename(path, target)
            if opened.get(target) != opened[path]:
                opened[target] = opened.pop(path)

    def _change_data(self, verb: str, fd: int) -> None:
        filesystem = self._filesystem
        if verb == "sync_data" or self._unsynced[fd] >= UNSYNCED_MAX:
            filesystem.sync_data(fd)
            self._unsynced[fd] = 0
        elif verb == "truncate":
            filesystem.truncate(fd, self._chance.randrange(filesystem.size(fd) + 1))
            self._unsynced[fd] += 1
        else:
            size = self._chance.choice(_SIZES)
            filesystem.write(fd, bytes([next(self._letters)]) * size)
            self._unsynced[fd] += 1 if size < 1000 else UNSYNCED_MAX // 2


def raw_history(chance: random.Random) -> list[Op]:
    """Random operations on a few files, with one or more names, and on directories. Returns the trace."""
    files = _RawFiles(chance)
    for _ in range(chance.randrange(3, RAW_MAX)):
        files.step()
    return files.disk.trace


def simulated_history(chance: random.Random) -> tuple[str, list[Op]]:
    """A random history of the real code on the simulated disk, and its trace."""
    history = "".join(
        chance.choice(LETTERS) + (str(chance.randrange(12)) if chance.random() < 0.1 else "")
        for _ in range(chance.randrange(1, STEPS_MAX))
    )
    simulated = SimulationWorld()
    simulated.run(history)
    return history, simulated.disk.trace


class PowerCuts:
    """Replays one history after another on a loop device, and cuts its power."""

    def __init__(self, medium: LoopDevice, seed: int) -> None:
        self._medium = medium
        self._seed = seed
        self._chance = random.Random(seed)
        self._cuts: Counter[str] = Counter()
        self._histories: set[str] = set()

    def report(self) -> BlockDeviceReport:
        """The figures so far."""
        cuts = self._cuts
        return BlockDeviceReport(self._medium.kind, self._seed, cuts["all"], cuts["raw"], len(self._histories), cuts["lost"])

    def once(self) -> None:
        """Replay one history and cut the power once."""
        chance = random.Random(self._chance.randrange(2**64))
        raw = chance.random() < 0.4
        history, trace = ("", raw_history(chance)) if raw else simulated_history(chance)
        model, obligations = DurabilityModel(ignoring=LOCKS), Obligations()
        end = chance.randrange(len(trace) + 1)
        for at, op in enumerate(trace[:end]):
            if model.unsynced_names > UNSURE_MAX:
                end = at
                break
            obligations.apply(op, lambda path: model.complete_state().get(path, b""))
            model.apply(op)
        root = self._root()
        self._replay(trace[:end], root, chance)
        state = self._state(root)
        self._cuts["all"] += 1
        self._cuts["raw"] += raw
        self._cuts["lost"] += state != model.complete_state()
        self._histories.add(history or repr(trace))
        where = f"{self._medium.kind}, seed {self._seed}, cut {self._cuts['all']}, after operation {end} of {history or trace}"
        if not model.admits(state):
            raise BlockDeviceViolation(f"{where}\nthe model does not admit {state}\nafter\n" + "\n".join(map(str, trace[:end])))
        if not raw:
            problem = simulation.problem_of(state, self._open(root), obligations, power=True)
            if problem:
                raise BlockDeviceViolation(f"{where}\n{problem}\nthe state was {state}")
        shutil.rmtree(root)

    def _root(self) -> Path:
        root = self._medium.folder / str(self._cuts["all"])
        root.mkdir(mode=0o700)
        self._medium.write_back()
        return root

    def _replay(self, trace: list[Op], root: Path, chance: random.Random) -> None:
        replay = TraceReplay(self._medium, root, chance)
        try:
            for op in trace:
                replay.do(op)
            self._medium.shut_down(flush_log=chance.random() < 0.3)
        finally:
            replay.close()
        self._medium.remount()

    def _state(self, root: Path) -> State:
        paths = [path for path in sorted(root.rglob("*")) if path.name not in LOCKS]
        names = {path: f"{OUTBOX_PATH}/{path.relative_to(root)}" for path in paths}
        return {
            names[path] + "/" if path.is_dir() else names[path]: b"" if path.is_dir() else path.read_bytes() for path in paths
        }

    def _open(self, root: Path) -> RecoveryOutcome:
        """Open the state after a cut with the real code on the real file system, and deliver everything."""
        destination = simulation.SimulatedDestination(Disk())
        filesystem = OsFilesystem()
        with mock.patch.object(simulation, "OUTBOX_PATH", str(root)):
            process = simulation.SimulationProcess(
                filesystem, map("after-{}".format, itertools.count(1)).__next__, ManualClock(), lambda _: None
            )
            try:
                process.start()
                simulation.deliver(process.directory, destination)
                process.sealer.seal_remaining()
            except OSError as error:
                return RecoveryOutcome(tuple(destination.arrived), frozenset(), f"the recovery fails: {error!r}")
            finally:
                filesystem.close_inherited()
        rejected: set[int] = set()
        problem = ""
        for path, data in self._state(root).items():
            if kind_at(path) in (Kind.DEAD, Kind.CORRUPT):
                rejected |= simulation.numbers_in(data)
            elif kind_at(path) is not Kind.RANGES:
                problem = f"left behind: {path}"
        return RecoveryOutcome(tuple(destination.arrived), frozenset(rejected), problem)


def run(
    filesystem: str,
    seconds: float,
    seed: int,
    directory: Path,
    progress: Callable[[BlockDeviceReport], None] = lambda _: None,
    *,
    cuts_min: int = 0,
) -> BlockDeviceReport:
    """Run for about `seconds`, and longer on a slow machine, until the minimum of cuts is reached. Raises `BlockDeviceViolation` with the history."""
    with LoopDevice(filesystem, directory) as medium:
        cuts = PowerCuts(medium, seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end or cuts.report().cuts < cuts_min:
            cuts.once()
            progress(cuts.report())
        return cuts.report()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filesystem", choices=MAKERS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)  # noqa: T201 - the report
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the file system is unmounted
    logging.getLogger("pillarbox").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="pillarbox-block-device-") as directory:
        print(run(chosen.filesystem, chosen.minutes * 60, chosen.seed, Path(directory)))  # noqa: T201


if __name__ == "__main__":
    main()
