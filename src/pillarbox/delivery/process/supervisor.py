"""The parent's side: starts a child where nobody delivers, hears what it reports, starts it again, and sees it end."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.delivery.backoff import Backoff, jitter
from pillarbox.delivery.lease import Lease
from pillarbox.delivery.process.protocol import (
    GO,
    NOTIFY,
    STOP,
    ChildFailed,
    ChildReady,
    ChildSetup,
    LogLine,
    StatsReport,
    decode_message,
    encode_settings,
    read_lines,
)
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.errors import FileUnusableError
from pillarbox.stats import COUNTER_FIELDS, DeliveryCounters, SinkStats, State, StateName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.settlement import DeliveryCallbacks
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

_STANDBY_POLL_S: Final = 0.25  # between two looks whether the process that delivers is gone
_START_TIMEOUT_S: Final = 30.0  # for an interpreter to start and to import: it holds up who else might deliver
_KILL_GRACE_S: Final = 1.0  # beyond the time that a child is given to end: then it is killed
_REAP_TIMEOUT_S: Final = 5.0  # for a process that has hung up to be gone
_STABLE_AFTER_S: Final = 10.0  # a child that lives so long was no failure
_RESTART_BACKOFF: Final = Backoff()
_CHILD_CODE: Final = (
    "import sys; sys.path.append(sys.argv[2]); from pillarbox.delivery.process.child import main; main(int(sys.argv[1]))"
)


class Supervisor:
    """The `Deliverer` whose work is done by a child; at most one of a directory's supervisors has one."""

    def __init__(
        self,
        settings: Settings,
        directory: Directory,
        clock: Clock,
        callbacks: DeliveryCallbacks,
        sinks: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._clock = clock
        self._callbacks = callbacks
        self._lease = Lease(directory, ", ".join(name or url for name, url in sinks.items()), clock, settings.durability)
        self._stopping = threading.Event()
        self._deadline = 0.0  # of the end, in monotonic seconds
        self._order_lock = threading.Lock()
        self._child: _ChildProcess | None = None
        self._child_delivers = False  # the child delivers
        self._stats_changed = threading.Condition()
        self._stats = dict.fromkeys(sinks, DeliveryCounters().to_stats(State("idle"), ""))
        self._stats_before_child: dict[str, SinkStats] = {}  # what was shown when the child began
        self._logged_reason = ""  # what was last logged
        self._failures = 0  # in a row
        self._hook_failures = 0
        self._thread = threading.Thread(target=self._run, name="pillarbox-supervisor", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Have the child deliver what can be delivered without waiting and end; killed a second after `timeout` seconds."""
        with self._order_lock:
            self._deadline = self._clock.monotonic() + timeout
            self._stopping.set()
            self._forward_stop()
        self._thread.join(timeout + _KILL_GRACE_S)
        in_time = not self._thread.is_alive()
        if not in_time:
            child = self._child
            if child is not None:
                child.kill()
            self._thread.join(_KILL_GRACE_S)
        return in_time

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        child = self._child
        if child is not None and self._child_delivers:
            child.send_order(NOTIFY)

    def sinks(self) -> dict[str, SinkStats]:
        """How each stands, as the child reported last; its predecessors' counts are in it."""
        return self._stats

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until other than `known_files` files are settled, at most `timeout` seconds."""
        with self._stats_changed:
            self._stats_changed.wait_for(
                lambda: sum(sink.flushed_files for sink in self._stats.values()) != known_files, timeout
            )

    def _run(self) -> None:
        while True:
            try:
                pause = self._round()
            except Exception as error:
                log.exception("a defect in Pillarbox; it goes on")
                pause = self._child_failed(f"{type(error).__name__}: {error}", 0.0)
            if self._stopping.wait(pause):
                return

    def _round(self) -> float:
        """Have a child deliver for as long as it lives, if nobody else delivers; seconds until the next look."""
        try:
            taken = self._lease.acquire()
        except (OSError, FileUnusableError) as error:
            self._set_state("degraded", str(error))
            return self._settings.flush_interval
        if not taken:
            self._set_state("standby", STANDBY_REASON)
            return _STANDBY_POLL_S
        born = self._clock.monotonic()
        try:
            with contextlib.closing(_ChildProcess()) as child:
                with self._order_lock:
                    self._child = child
                problem = self._supervise(child)
            ended = child.exit_description()
        except OSError as error:  # no process can be started
            problem, ended = "", f"cannot be started: {error}"
        finally:
            with self._order_lock:
                self._child, self._child_delivers = None, False
            self._lease.release()
        if self._stopping.is_set() or problem is None:
            return 0.0
        return self._child_failed(problem or ended, self._clock.monotonic() - born)

    def _child_failed(self, problem: str, lived_s: float) -> float:
        self._failures = 1 if lived_s >= _STABLE_AFTER_S else self._failures + 1
        pause = _RESTART_BACKOFF.delay(self._failures, jitter())
        self._set_state("degraded", f"the process that delivers: {problem}; another is started", pause)
        return pause

    def _supervise(self, child: _ChildProcess) -> str | None:
        """Hear a child until it is gone; what it complained of, None where it was told to end for another delivers."""
        problem: str | None = ""
        self._stats_before_child = self._stats
        state = next(iter(self._stats.values())).state
        if state.name == "degraded":
            self._lease.write_heartbeat(state, 0, state.reason, now=True)  # for `status`: nobody else tells
        child.send_setup(encode_settings(self._settings))
        for line in child.read_messages():
            message = decode_message(line)
            if isinstance(message, LogLine):
                _log_child_line(message)
            elif isinstance(message, ChildFailed):
                problem = message.text
            elif isinstance(message, ChildReady):
                self._lease.release()
                log.info("%s: process %d delivers", self._directory.path, child.pid)
                self._logged_reason = ""
                with self._order_lock:
                    child.send_order(GO)
                    self._child_delivers = True
                    self._forward_stop()
            elif self._apply_report(message) and problem is not None:
                problem = None
                child.send_order(STOP + b"0")
        self._hook_failures = 0
        return problem

    def _apply_report(self, report: StatsReport) -> bool:
        """Show a report; whether the child is not needed."""
        for size in report.released_bytes:
            self._callbacks.on_bytes_released(size)
        for seconds, sink in report.delivery_seconds:
            with contextlib.suppress(Exception):  # the application's metrics are not worth the supervisor
                self._callbacks.on_duration(seconds, sink)
        self._callbacks.on_hook_failures(report.hook_failures - self._hook_failures)
        self._hook_failures = report.hook_failures
        with self._stats_changed:
            self._stats = {name: _add_stats(self._stats_before_child.get(name), sink) for name, sink in report.sinks.items()}
            self._stats_changed.notify_all()
        return report.is_surplus

    def _forward_stop(self) -> None:
        if self._stopping.is_set() and self._child is not None and self._child_delivers:
            left = max(0.0, self._deadline - self._clock.monotonic())
            self._child.send_order(STOP + f"{left:.3f}".encode())

    def _set_state(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        """Be in a state without a child; one log line a change."""
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        state = State(name, reason, retry_at)
        before = self._logged_reason
        with self._stats_changed:
            self._stats = {
                sink: msgspec.structs.replace(at, state=state, last_error=reason, rate=None) for sink, at in self._stats.items()
            }
        self._logged_reason = reason
        if reason != before:
            log.log(logging.INFO if name == "standby" else logging.WARNING, "%s: %s", self._directory.path, state)


class _ChildProcess:
    """One child process and the socket to it."""

    def __init__(self) -> None:
        with _fork_lock:  # what a process forks meanwhile must have none of this open, or neither would hear the other end
            self._socket, theirs = socket.socketpair()
            _open_sockets.add(self._socket)
            try:
                command = [sys.executable, "-P", "-c", _CHILD_CODE, str(theirs.fileno()), _PACKAGE_PARENT]
                self._process = subprocess.Popen(  # noqa: S603 - our own code, and no shell
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
                )
            except BaseException:
                _open_sockets.discard(self._socket)
                self._socket.close()
                raise
            finally:
                theirs.close()
        self.pid = self._process.pid

    def send_setup(self, settings: msgspec.Raw) -> None:
        """Tell it what it needs to know."""
        setup = ChildSetup([place for place in sys.path if isinstance(place, str)], log.getEffectiveLevel(), settings)
        with contextlib.suppress(OSError):  # it is gone already, and `read_messages` ends
            self._socket.sendall(msgspec.json.encode(setup) + b"\n")

    def read_messages(self) -> Iterator[bytes]:
        """What it says, until it is gone; the first must come in time."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(_START_TIMEOUT_S * 1000):
            self.kill()
        return read_lines(self._socket)

    def send_order(self, order: bytes) -> None:
        """Tell it something, if it listens."""
        with contextlib.suppress(OSError):  # one that does not read is killed in the end, one that is gone is heard of
            self._socket.send(order + b"\n", socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Have it gone."""
        with _fork_lock:
            _open_sockets.discard(self._socket)
            self._socket.close()
        try:
            self._process.wait(_REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def exit_description(self) -> str:
        """In words."""
        code = self._process.returncode
        if code < 0:
            return f"ended by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"


def _add_stats(before: SinkStats | None, now: SinkStats) -> SinkStats:
    """The counts of both, the state of the second, and what was last complained of."""
    if before is None:
        return now
    sums = {name: getattr(before, name) + getattr(now, name) for name in COUNTER_FIELDS}
    return msgspec.structs.replace(now, last_error=now.last_error or before.last_error, **sums)


def _log_child_line(message: LogLine) -> None:
    """As if it had been logged here."""
    logger = logging.getLogger(message.logger)
    if logger.isEnabledFor(message.level):
        record = logging.makeLogRecord(
            {
                "name": message.logger,
                "levelno": message.level,
                "levelname": logging.getLevelName(message.level),
                "msg": message.text,
                "created": message.created,
                "exc_text": message.trace,
            }
        )
        logger.handle(record)


_PACKAGE_PARENT: Final = __file__.removesuffix("/pillarbox/delivery/process/supervisor.py")
_fork_lock = threading.RLock()  # held while a process forks, and while a child begins or ends
_open_sockets: set[socket.socket] = set()


def _before_fork() -> None:
    _fork_lock.acquire()


def _after_fork_in_parent() -> None:
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock  # noqa: PLW0603 - the parent's is held by a thread that does not exist here
    _fork_lock = threading.RLock()
    while _open_sockets:
        _open_sockets.pop().close()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
