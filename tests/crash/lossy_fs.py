"""A file system in memory that loses unsynced changes, and the torture by SIGKILL on it, with power losses as well.

`LossyFilesystem` is mounted through FUSE by its own process. It keeps the contents of the disk beside those that programs see;
a cut replaces the latter by the former. Unsynced changes are lost together, or each write and each change of a name is applied,
lost, torn, or applied in size only, independently of the others. Syncs may be made to fail; their data is lost, whatever later
syncs report. Locks are those of the kernel. Real file systems hide a missing sync of a directory; this one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.crash import kills

ROUND_S: Final = 0.25
CUT: Final = "user.cut"
_HIDDEN: Final = ".fuse_hidden"  # the prefix of the name that libfuse gives an open file that is removed
_ROOT = Path(__file__).parents[2]
_Pending = tuple[int, bytes | None]  # a write, or a truncation to that size


class LossyFile:
    """A file: the data that programs see, the data on the disk, and the changes in between."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.data = bytearray()
        self.durable = bytearray()
        self.pending: list[_Pending] = []

    def change(self, pending: _Pending) -> None:
        """Write or truncate."""
        _apply(self.data, *pending)
        self.pending.append(pending)

    def sync(self) -> None:
        """Everything since the last sync reaches the disk."""
        for pending in self.pending:
            _apply(self.durable, *pending)
        self.pending.clear()

    def fail_sync(self, chance: random.Random) -> None:
        """Fail a sync. The data is not written again; programs see it, or the data on the disk."""
        self._write_back_some(chance)
        if chance.random() < 0.5:
            self.data[:] = self.durable[: len(self.data)].ljust(len(self.data), b"\0")

    def cut(self, chance: random.Random | None) -> None:
        """Cut the power. Without `chance`, every unsynced change is lost."""
        self._write_back_some(chance)
        self.data = bytearray(self.durable)

    def _write_back_some(self, chance: random.Random | None) -> None:
        torn = chance.randrange(2 * len(self.pending)) if chance is not None and self.pending else -1
        for index, (offset, data) in enumerate(self.pending):
            fate = chance.choice(("lost", "applied", "sized")) if chance is not None else "lost"
            if chance is not None and data is not None and index == torn:
                _apply(self.durable, offset, data[: chance.randrange(len(data) + 1)])
            elif data is not None and fate == "sized":
                self.durable.extend(bytes(max(0, offset + len(data) - len(self.durable))))
            elif fate == "applied":
                _apply(self.durable, offset, data)
        self.pending.clear()


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


class LossyFolder:
    """A directory: the names that programs see, those on the disk, and the changes in between."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: dict[str, LossyFile | LossyFolder] = {}
        self.durable: dict[str, LossyFile | LossyFolder] = {}
        self.pending: list[tuple[str, str, LossyFile | LossyFolder]] = []  # (old name, new name, node); "" is no name

    def change(self, old: str, new: str, node: LossyFile | LossyFolder) -> None:
        """Create (no old name), remove (no new name), or rename.

        libfuse renames a file that is removed or replaced while it is open. That counts as the removal, and as part of the
        rename.
        """
        replaced = self.pending[-1][:2] if self.pending else ("", "")
        self._apply(self.names, old, new, node)
        if new and replaced == (new, ""):
            self.pending.pop()
        if not old.startswith(_HIDDEN):
            self.pending.append((old, "" if new.startswith(_HIDDEN) else new, node))

    @staticmethod
    def _apply(names: dict[str, LossyFile | LossyFolder], old: str, new: str, node: LossyFile | LossyFolder) -> None:
        for name in [name for name, named in names.items() if named is node and (new or name == old)]:
            del names[name]  # a file has one name, whichever earlier changes were lost
        if new:
            names[new] = node

    def sync(self) -> None:
        """Every change of a name since the last sync reaches the disk."""
        for change in self.pending:
            self._apply(self.durable, *change)
        self.pending.clear()

    def cut(self, chance: random.Random | None) -> None:
        """Cut the power. Without `chance`, every unsynced change of a name is lost."""
        for change in self.pending:
            if chance is not None and chance.random() < 0.5:
                self._apply(self.durable, *change)
        self.pending.clear()
        self.names = dict(self.durable)
        for node in self.names.values():
            node.cut(chance)


class LossyFilesystem:
    """The operations of the file system, as mfusepy calls them, and `cut`."""

    use_ns = True  # read by mfusepy

    def __init__(self, seed: int, failing: float, ready: Callable[[], None]) -> None:
        self._chance = random.Random(seed)
        self._failing = failing
        self._ready = ready
        self._numbers = itertools.count(1).__next__
        self._root = LossyFolder(self._numbers())
        self._open: dict[int, LossyFile] = {}
        self._handles = itertools.count(1).__next__
        self._wrong: list[str] = []

    def setxattr(self, _path: str, name: str, value: bytes, _options: int, *_: int) -> None:
        """Cut the power if the attribute is `CUT`. Its value is `all` or `some`: the unsynced changes to lose."""
        if name != CUT:
            raise OSError(errno.ENOTSUP, "")
        self._wrong = [] if self._failing else list(self._unsynced(self._root))
        self._root.cut(None if value == b"all" else self._chance)

    def getxattr(self, _path: str, name: str, *_: int) -> bytes:
        """The violations before the last cut, one a line."""
        if name != CUT:
            raise OSError(errno.ENODATA, "")
        return "\n".join(self._wrong).encode()

    def _unsynced(self, folder: LossyFolder) -> Iterator[str]:
        """Files with a name of complete files and unsynced data."""
        for name, node in folder.names.items():
            if isinstance(node, LossyFolder):
                yield from self._unsynced(node)
            elif node.pending and name.startswith(("sealed-", "corrupt-", "dead-")) and not name.endswith(".aside"):
                yield f"{name} has its name before the disk has its data"

    def _find(self, path: str) -> LossyFile | LossyFolder:
        node: LossyFile | LossyFolder = self._root
        for name in path.split("/")[1:] if path != "/" else []:
            if not isinstance(node, LossyFolder) or name not in node.names:
                raise OSError(errno.ENOENT, "")
            node = node.names[name]
        return node

    def _folder(self, path: str) -> tuple[LossyFolder, str]:
        parent, _, name = path.rpartition("/")
        node = self._find(parent or "/")
        assert isinstance(node, LossyFolder)
        return node, name

    def _add_node(self, path: str, node: LossyFile | LossyFolder) -> None:
        folder, name = self._folder(path)
        if name in folder.names:
            raise OSError(errno.EEXIST, "")
        folder.change("", name, node)

    def _handle(self, file: LossyFile) -> int:
        handle = self._handles()
        self._open[handle] = file
        return handle

    def init(self, _path: str) -> None:
        self._ready()

    def getattr(self, path: str | None, handle: int | None = None) -> dict[str, float]:
        attributes = self._attributes(self._open[handle] if handle else self._find(path or ""))
        if path is not None and path.rpartition("/")[2].startswith(_HIDDEN):
            attributes["st_nlink"] = 0
        return attributes

    @staticmethod
    def _attributes(node: LossyFile | LossyFolder) -> dict[str, float]:
        if isinstance(node, LossyFolder):
            return {"st_ino": node.number, "st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        return {"st_ino": node.number, "st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(node.data)}

    def readdir(self, path: str, _handle: int) -> list[tuple[str, dict[str, float], int]]:
        node = self._find(path)
        assert isinstance(node, LossyFolder)
        nodes = {".": node, "..": self._root} | node.names
        return [(name, self._attributes(entry), 0) for name, entry in nodes.items() if not name.startswith(_HIDDEN)]

    def mkdir(self, path: str, _mode: int) -> None:
        self._add_node(path, LossyFolder(self._numbers()))

    def create(self, path: str, _mode: int, _flags: int) -> int:
        file = LossyFile(self._numbers())
        self._add_node(path, file)
        return self._handle(file)

    def open(self, path: str, _flags: int) -> int:
        node = self._find(path)
        assert isinstance(node, LossyFile)
        return self._handle(node)

    def release(self, _path: str, handle: int) -> None:
        del self._open[handle]

    def read(self, _path: str, size: int, offset: int, handle: int) -> bytes:
        return bytes(self._open[handle].data[offset : offset + size])

    def write(self, _path: str, data: bytes, offset: int, handle: int) -> int:
        self._open[handle].change((offset, data))
        return len(data)

    def truncate(self, path: str, size: int, handle: int | None = None) -> None:
        node = self._open[handle] if handle else self._find(path)
        assert isinstance(node, LossyFile)
        node.change((size, None))

    def rename(self, old: str, new: str, _flags: int = 0) -> None:
        folder, name = self._folder(old)
        other, target = self._folder(new)
        if folder is not other:
            raise OSError(errno.EXDEV, "")
        if name not in folder.names:
            raise OSError(errno.ENOENT, "")
        folder.change(name, target, folder.names[name])

    def unlink(self, path: str) -> None:
        folder, name = self._folder(path)
        if name not in folder.names:
            raise OSError(errno.ENOENT, "")
        folder.change(name, "", folder.names[name])

    def fsync(self, _path: str, _datasync: int, handle: int) -> None:
        file = self._open[handle]
        if file.pending and self._fails():
            file.fail_sync(self._chance)
            raise OSError(errno.EIO, "")
        file.sync()

    def fsyncdir(self, path: str, _datasync: int, _handle: int) -> None:
        node = self._find(path)
        assert isinstance(node, LossyFolder)
        holds_folders = any(isinstance(below, LossyFolder) for below in node.names.values())
        if node.pending and not holds_folders and self._fails():  # if the creation of an outbox fails, opening it fails too
            raise OSError(errno.EIO, "")
        node.sync()

    def _fails(self) -> bool:
        return self._chance.random() < self._failing

    def statfs(self, _path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 2**20, "f_bfree": 2**20, "f_bavail": 2**20, "f_namemax": 255}


def serve(mount: str, seed: int, failing: float) -> None:
    """Serve the file system until it is unmounted."""
    mfusepy: Any = importlib.import_module("mfusepy")  # it has no type hints
    dropping = LossyFilesystem(seed, failing, lambda: print("ready", flush=True))  # noqa: T201 - the parent reads it
    options: dict[str, Any] = {"attr_timeout": 0, "entry_timeout": 0, "direct_io": True, "use_ino": True}
    mfusepy.FUSE(dropping, mount, foreground=True, nothreads=True, fsname="dropping", **options)


@contextlib.contextmanager
def mounted(mount: Path, seed: int, failing: float = 0.0) -> Iterator[None]:
    """Mount the file system at `mount`; `failing` is the share of syncs that fail."""
    mount.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.crash.lossy_fs",
        "--serve",
        str(mount),
        "--seed",
        str(seed),
        "--failing",
        str(failing),
    ]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            if server.stdout.readline() != "ready\n":
                raise kills.KillViolation("the file system could not be mounted")
            yield
        finally:
            subprocess.run(["umount", "--lazy", mount], check=False)
            server.wait(10.0)


def cut(mount: Path, mode: str = "some") -> list[str]:
    """Cut the power of a mounted file system. Returns the violations before the cut."""
    os.setxattr(mount, CUT, mode.encode())
    return os.getxattr(mount, CUT).decode().splitlines()


def run(
    seconds: float,
    seed: int,
    directory: Path,
    progress: Callable[[kills.KillReport], None] = lambda _: None,
    failing: float = 0.0,
    *,
    rounds_min: int = 0,
    acknowledged_min: int = 0,
) -> kills.KillReport:
    """Torture with a cut in each round for about `seconds`, and longer on a slow machine, until the minima are reached.

    Raises `KillViolation`; the files are kept then.
    """
    mount = directory / "mount"
    chance = random.Random(f"{seed}/cuts")

    def fail() -> None:
        wrong = cut(mount, chance.choice(("all", "some", "some")))
        if chance.random() < 0.3:
            _kill_recovery(torture, chance)
            wrong += cut(mount)
        if wrong:
            raise torture.violation(wrong)

    with mounted(mount, seed, failing):
        torture = kills.KillTorture(directory, mount / "outboxes", seed, power=0.7, kept=(kills.POWER,), cut=fail)
        end = time.monotonic() + seconds
        while (
            time.monotonic() < end or (report := torture.report()).rounds < rounds_min or report.acknowledged < acknowledged_min
        ):
            torture.round(ROUND_S)
            progress(torture.report())
    return torture.report()


def _kill_recovery(torture: kills.KillTorture, chance: random.Random) -> None:
    """Open the outbox after a cut in a process that is killed in the middle of the recovery."""

    def work() -> None:
        kills.kill_self_later(chance)
        torture.make_life(chance).deliver()

    pid = kills.fork(torture.failures, work)
    # wait: until a child ends, or the next poll
    signal.sigtimedwait([signal.SIGCHLD], 0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    """Run the torture, or with `--serve` the process of the file system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--failing", type=float, default=0.0)
    parser.add_argument("--rounds-min", type=int, default=0)
    parser.add_argument("--acknowledged-min", type=int, default=0)
    parser.add_argument("--serve")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.seed, chosen.failing)
        return
    directory = chosen.directory or Path(tempfile.mkdtemp(prefix="pillarbox-lossy-fs-"))
    print(f"seed {chosen.seed}, in {directory}", flush=True)  # noqa: T201 - the report
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the file system is unmounted
    report = run(
        chosen.minutes * 60,
        chosen.seed,
        directory,
        lambda report: print(report, flush=True),  # noqa: T201
        chosen.failing,
        rounds_min=chosen.rounds_min,
        acknowledged_min=chosen.acknowledged_min,
    )
    print(report, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
