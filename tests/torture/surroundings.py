"""The environments of the torture's processes: normal, patched by gevent, with little memory, or on a volume that is often full."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

MEMORY_BYTES: Final = 256 * 2**20  # of all processes of a round together
VOLUME_BYTES: Final = 48 * 2**20
VOLUME_INODES: Final = 2000
PHASE_S: Final = (0.3, 1.0, 2.0)  # how long the volume is full or not
TOP_UP_S: Final = 0.01  # between two times that a full volume is filled again
_CGROUPS: Final = Path("/sys/fs/cgroup")


class UnavailableError(Exception):
    """This machine cannot provide the environment. The message says why."""


class Surroundings:
    """The normal environment, and the base class of the others."""

    ledger_is_whole = True  # without room, files are settled before their entries are written, and a kill loses these

    def outboxes(self, folder: Path) -> Path:
        """The directory for outbox directories; `folder` is that of the run."""
        return folder

    def start_round(self) -> None:
        """Called when the outbox of a round exists."""

    def enter(self) -> None:
        """Called in each process before it works."""

    def violations(self) -> list[str]:
        """Violations that do not concern events."""
        return []

    def end(self) -> None:
        """Remove what this object created."""


class Gevent(Surroundings):
    """gevent patches each process after Pillarbox was imported."""

    def __init__(self) -> None:
        if importlib.util.find_spec("gevent") is None:
            raise UnavailableError("gevent is not installed")
        for name in ("monkey", "os", "queue", "select", "signal", "socket", "ssl", "subprocess", "thread", "threading", "time"):
            importlib.import_module(f"gevent.{name}")  # so that the processes, which live for seconds, have it at once
        # Patching looks for plug-ins of gevent 25 times in the metadata of all packages, which takes most of its time.
        events: Any = importlib.import_module("gevent.events")
        events.notify_and_call_entry_points = events.notify

    def enter(self) -> None:
        """Patch everything."""
        importlib.import_module("gevent.monkey").patch_all()


class SmallMemory(Surroundings):
    """The processes share 256 MiB; the kernel must not have to kill one."""

    def __init__(self) -> None:
        self._group = _memory_group() / f"pillarbox-torture-{os.getpid()}"
        try:
            self._group.mkdir()
            limit = "memory.max" if (self._group / "memory.max").exists() else "memory.limit_in_bytes"
            (self._group / limit).write_text(str(MEMORY_BYTES))
        except OSError as error:
            raise UnavailableError(f"no cgroup can be created: {error}") from None

    def enter(self) -> None:
        """Join the group."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def violations(self) -> list[str]:
        """A violation if the kernel has killed a process for lack of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                counts = dict(line.split() for line in (self._group / name).read_text().splitlines())
                return [f"{counts['oom_kill']} processes were killed for lack of memory"] if int(counts["oom_kill"]) else []
        return []

    def end(self) -> None:
        """Remove the group."""
        with contextlib.suppress(OSError):
            self._group.rmdir()


def _memory_group() -> Path:
    """The cgroup of this process that limits memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _CGROUPS / "memory" / path.lstrip("/")
    return _CGROUPS / path.lstrip("/")


class FullVolume(Surroundings):
    """The outbox is on a small ext4, which has no free byte and inode half of the time."""

    ledger_is_whole = False

    def __init__(self) -> None:
        self._mount: Path | None = None
        self._filler: subprocess.Popen[bytes] | None = None

    def outboxes(self, folder: Path) -> Path:
        """Create and mount the volume."""
        image, mount = folder / "volume", folder / "mount"
        mount.mkdir()
        with image.open("wb") as file:
            file.truncate(VOLUME_BYTES)
        commands = (
            ["mkfs.ext4", "-q", "-N", str(VOLUME_INODES), "-m", "0", str(image)],
            ["mount", "-o", "loop", str(image), str(mount)],
        )
        for command in commands:
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UnavailableError(f"{command[0]} failed: {error}") from None
        self._mount = mount
        return mount

    def start_round(self) -> None:
        """Start the process that fills and empties the volume."""
        self.end_round()
        self._filler = subprocess.Popen([sys.executable, "-m", "tests.torture.surroundings", str(self._mount)])

    def end_round(self) -> None:
        """Stop filling and emptying the volume."""
        if self._filler is not None:
            self._filler.send_signal(signal.SIGKILL)
            self._filler.wait()
            self._filler = None
        for path in self._mount.glob("filling-*") if self._mount is not None else ():
            path.unlink()

    def end(self) -> None:
        """Remove the volume."""
        self.end_round()
        if self._mount is not None:
            subprocess.run(["umount", str(self._mount)], check=False, capture_output=True)


KINDS: Final = {"gevent": Gevent, "small-memory": SmallMemory, "full-volume": FullVolume}


def fill_and_empty(volume: Path, chance: random.Random) -> None:
    """Fill a volume and empty it again, until this process is killed."""
    number = 0
    while True:
        end = time.monotonic() + chance.choice(PHASE_S)
        while time.monotonic() < end:
            number = _fill(volume, number)
            # wait: until the processes under test have freed something
            time.sleep(TOP_UP_S)
        for path in volume.glob("filling-*"):
            path.unlink()
        # wait: the phase in which the volume has room
        time.sleep(chance.choice(PHASE_S))


def _fill(volume: Path, number: int) -> int:
    """Use all bytes, and then all inodes. Returns the number of the next file."""
    with contextlib.suppress(OSError), (volume / "filling-bytes").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    with contextlib.suppress(OSError):
        while True:
            (volume / f"filling-{number}").touch(exist_ok=False)
            number += 1
    return number + 1


if __name__ == "__main__":
    fill_and_empty(Path(sys.argv[1]), random.Random(sys.argv[1]))
