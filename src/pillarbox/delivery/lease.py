"""The lease: a lock by which one process delivers at a time, and the heartbeat in the lock file that shows its state."""

from __future__ import annotations

import contextlib
from os import getpid
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.stats import State
from pillarbox.store import layout
from pillarbox.store.os_filesystem import boot_id

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

STANDBY_REASON: Final = "another process delivers this directory"  # the reason of state `standby`
HEARTBEAT_INTERVAL_S: Final = 1.0
HEARTBEAT_STALE_AFTER_S: Final = 10.0  # the process that wrote an older heartbeat is gone or hangs
_HEARTBEAT_BYTES_MAX: Final = 64 * 1024  # bytes of the file that are read at most, because somebody may have made it large
_READ_ATTEMPTS: Final = 3  # a heartbeat that cannot be decoded may be being written, so it is read again


class Heartbeat(msgspec.Struct, frozen=True):
    """What the delivering process writes into `deliver.lock`: its id, the state of delivery, and the time."""

    pid: int  # id of the delivering process
    sink: str  # the sink, or the sinks, that it delivers to; without secrets
    state: State  # state of delivery
    at_micros: int  # when it was written, by the wall clock
    delivered: int  # number of events that this process has delivered
    last_error: str = ""  # the last failure of a call; "" if there was none
    durability: str = ""  # durability of the outbox in that process; "" if it only delivers
    boot_id: str = ""  # id of the machine's current boot; "" if it is unknown
    failing_since_micros: int | None = None  # since when nothing can be delivered; None while delivery works
    monotonic_s: float = 0.0  # when it was written, by the monotonic clock of that boot

    def age_s(self, clock: Clock) -> float:
        """Seconds since it was written.

        The monotonic clock counts if the machine was not restarted since, because the wall clock may have been set. If it was
        restarted, the heartbeat is at least as old as the machine has been up. If that is unknown, the wall clock counts.
        """
        by_wall_clock = max(0.0, (clock.micros() - self.at_micros) / 1e6)
        if not self.boot_id or not boot_id():
            return by_wall_clock
        age_s = clock.monotonic() - self.monotonic_s
        if self.boot_id != boot_id():
            return max(by_wall_clock, clock.monotonic())
        return age_s if age_s >= 0 else by_wall_clock  # in another time namespace the clocks differ


class Lease:
    """`deliver.lock` of a directory. The kernel releases it when the process dies; the file is never deleted."""

    def __init__(self, directory: Directory, sink: str, clock: Clock, durability: str = "") -> None:
        self._directory = directory
        self._sink = _encodable(sink)
        self._clock = clock
        self._durability = durability
        self._fd = -1
        self._next_heartbeat = 0.0
        self.failing_since_micros: int | None = None  # since when the previous process could not deliver

    @property
    def is_held(self) -> bool:
        """Whether this process delivers."""
        return self._fd >= 0

    def is_valid(self) -> bool:
        """Whether this process holds the lock that others see. Releases the lock if somebody has deleted its file."""
        if self.is_held and not self._directory.filesystem.is_file_at(self._fd, self._directory.path_of(layout.DELIVER_LOCK)):
            self.release()
        return self.is_held

    def acquire(self) -> bool:
        """Become the process that delivers; False if another process is."""
        locked_file = self._directory.acquire_lock_file(layout.DELIVER_LOCK)
        if locked_file is not None:
            self._fd = locked_file.fd
            previous = read_heartbeat(self._directory)
            self.failing_since_micros = previous.failing_since_micros if previous is not None else None
        return self.is_held

    def write_heartbeat(self, state: State, delivered: int, last_error: str, *, now: bool = False) -> None:
        """Write the state of delivery, at most once a second unless it must be `now`. Disk errors are ignored."""
        now_s = self._clock.monotonic()
        if not self.is_held or (now_s < self._next_heartbeat and not now):
            return
        self._next_heartbeat = now_s + HEARTBEAT_INTERVAL_S
        heartbeat = Heartbeat(
            getpid(),
            self._sink,
            msgspec.structs.replace(state, reason=_encodable(state.reason)),
            self._clock.micros(),
            delivered,
            _encodable(last_error),
            self._durability,
            boot_id(),
            self.failing_since_micros,
            now_s,
        )
        try:
            if not self.is_valid():
                return
            self._directory.filesystem.overwrite(self._fd, msgspec.json.encode(heartbeat) + b"\n")
        except OSError:
            return  # a full disk: readers see that the heartbeat is old

    def release(self) -> None:
        """Let another process deliver."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._directory.filesystem.close(fd)


def _encodable(text: str) -> str:
    """Text for JSON: it may quote a file name or a URL, which may be any bytes."""
    return text.encode(errors="backslashreplace").decode()


def read_heartbeat(directory: Directory) -> Heartbeat | None:
    """Read the last heartbeat of the process that delivers or delivered last. Takes no lock."""
    for _ in range(_READ_ATTEMPTS):
        # The heartbeat is overwritten in place: for a moment the rest of a longer one may follow it.
        line = directory.read_small_file(layout.DELIVER_LOCK, _HEARTBEAT_BYTES_MAX).partition(b"\n")[0]
        if not line:
            break
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=Heartbeat)
    return None
