"""The parent's side: starts a child if no other process delivers, reads its reports, restarts it, and ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.delivery.config import Backoff, jitter
from pillarbox.delivery.lease import STANDBY_REASON, Lease
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
from pillarbox.errors import FileUnusableError
from pillarbox.forks import after_fork_in_child, fork_lock
from pillarbox.log_records import relay_record
from pillarbox.stats import COUNTER_FIELDS, DeliveryCounters, SinkStats, State, StateName
from pillarbox.store.os_filesystem import exists
from pillarbox.store.state_log import StateLog
from pillarbox.system import threads
from pillarbox.system.processes import INHERITED_FD, SystemProcess
from pillarbox.system.sockets import MSG_DONTWAIT, Socket, selectors, socket_pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.settlement import DeliveryCallbacks
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

_STANDBY_POLL_S: Final = 0.25  # between two attempts to acquire the lease
_START_TIMEOUT_S: Final = 30.0  # time for the child to start and import; meanwhile no other process can deliver
_KILL_GRACE_S: Final = 1.0  # after the time that the child has to end; then it is killed
_CHILD_POLL_S: Final = 1.0  # between two checks whether the child has ended, while it sends nothing
_REAP_TIMEOUT_S: Final = 5.0  # time to end for a child that has closed its socket
_STABLE_AFTER_S: Final = 10.0  # a child that lives for so long has started successfully
_RESTART_BACKOFF: Final = Backoff()
_CHILD_CODE: Final = (
    "import os, sys; sys.argv[2] and os.chdir(sys.argv[2]); sys.path[:] = sys.argv[3:]; "
    "from pillarbox.delivery.process.child import main; main(int(sys.argv[1]))"
)


class Supervisor:
    """The `Runner` whose work a child process does. Of all supervisors of a directory, at most one has a child."""

    def __init__(
        self,
        settings: Settings,
        directory: Directory,
        clock: Clock,
        callbacks: DeliveryCallbacks,
        sinks: Mapping[str, str],
        working_directory: str = "",
    ) -> None:
        self._settings = msgspec.structs.replace(settings, directory=directory.path)
        self._working_directory = working_directory  # of the child, in which it finds what relative paths name
        self._directory = directory
        self._clock = clock
        self._callbacks = callbacks
        self._lease = Lease(directory, ", ".join(name or url for name, url in sinks.items()), clock, settings.durability)
        self._stopping = threads.Event()
        self._deadline = 0.0  # monotonic seconds, once `stop` is called
        self._order_lock = threads.Lock()
        self._child: _ChildProcess | None = None
        self._child_delivers = False
        self._stats_changed = threads.Condition()
        self._stats = dict.fromkeys(sinks, DeliveryCounters().to_stats(State("idle"), ""))
        self._stats_before_child: dict[str, SinkStats] = {}  # the child counts from 0
        self._state_log = StateLog(clock)
        self._defect_log = StateLog(clock)
        self._is_announced = False  # it was logged that a child delivers
        self._failures = 0  # in a row
        self._hook_failures = 0
        self._thread = threads.Thread(target=self._run, name="pillarbox-supervisor")

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Have the child deliver what can be delivered without waiting, and end. Kills it a second after `timeout` seconds."""
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
        """Say that there may be something to do; from any thread."""
        child = self._child
        if child is not None and self._child_delivers:
            child.send_order(NOTIFY)

    def sinks(self) -> dict[str, SinkStats]:
        """The stats of each sink: the last report of the child, plus the counts of its predecessors."""
        return self._stats

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until the number of settled files is not `known_files`, for at most `timeout` seconds."""
        with self._stats_changed.lock:
            self._stats_changed.wait_for(
                lambda: sum(sink.flushed_files for sink in self._stats.values()) != known_files, timeout
            )

    def _run(self) -> None:
        while True:
            try:
                pause = self._run_once()
            except Exception as error:
                if self._defect_log.is_new_problem(f"{type(error).__name__}: {error}"):
                    log.exception("%s: a defect in Pillarbox; delivery is restarted", self._directory.path)
                pause = self._child_failed(f"{type(error).__name__}: {error}", 0.0)
            if self._stopping.wait(pause):
                return

    def _run_once(self) -> float:
        """Have a child deliver for as long as it lives, if no other process delivers; seconds until the next attempt."""
        try:
            is_acquired = self._lease.acquire()
        except (OSError, FileUnusableError) as error:
            self._set_state("degraded", str(error))
            return self._settings.flush_interval
        if not is_acquired:
            self._set_state("standby", STANDBY_REASON)
            return _STANDBY_POLL_S
        started_s = self._clock.monotonic()
        try:
            with contextlib.closing(_ChildProcess(self._working_directory)) as child:
                with self._order_lock:
                    self._child = child
                problem = self._supervise(child)
            ending = child.exit_description()
        except OSError as error:  # no process can be started
            problem, ending = "", f"cannot be started: {error}"
        finally:
            with self._order_lock:
                self._child, self._child_delivers = None, False
            self._lease.release()
        if self._stopping.is_set() or problem is None:
            return 0.0
        return self._child_failed(problem or ending, self._clock.monotonic() - started_s)

    def _child_failed(self, problem: str, lived_s: float) -> float:
        self._failures = 1 if lived_s >= _STABLE_AFTER_S else self._failures + 1
        pause = _RESTART_BACKOFF.delay(self._failures, jitter())
        self._set_state("degraded", f"delivery process: {problem}; restarting", pause)
        return pause

    def _supervise(self, child: _ChildProcess) -> str | None:
        """Read the child's messages until it ends.

        Returns:
            Why it could not deliver, or nothing; None if it was told to end because another process delivers.
        """
        problem: str | None = ""
        self._stats_before_child = self._stats
        state = next(iter(self._stats.values())).state
        if state.name == "degraded":
            self._lease.write_heartbeat(state, 0, state.reason, now=True)  # for `pillarbox status`: no worker writes one
        child.send_setup(encode_settings(self._settings))
        for line in child.read_messages():
            message = decode_message(line)
            if isinstance(message, LogLine):
                _log_child_line(message)
            elif isinstance(message, ChildFailed):
                problem = message.text
            elif isinstance(message, ChildReady):
                self._lease.release()
                if self._state_log.is_over() or not self._is_announced:
                    self._is_announced = True
                    log.info("%s: process %d delivers", self._directory.path, child.pid)
                with self._order_lock:
                    child.send_order(GO)
                    self._child_delivers = True
                    self._forward_stop()
            else:
                if self._state_log.is_over():
                    log.info("%s: process %d delivers", self._directory.path, child.pid)
                if self._apply_report(message) and problem is not None:
                    problem = None
                    child.send_order(STOP + b"0")
        self._hook_failures = 0
        return problem

    def _apply_report(self, report: StatsReport) -> bool:
        """Take over the child's stats; whether the child is not needed."""
        for size in report.released_bytes:
            self._callbacks.on_bytes_released(size)
        for seconds, sink in report.delivery_seconds:
            with contextlib.suppress(Exception):  # a failing metric must not end the supervisor
                self._callbacks.on_duration(seconds, sink)
        self._callbacks.on_hook_failures(report.hook_failures - self._hook_failures)
        self._hook_failures = report.hook_failures
        with self._stats_changed.lock:
            self._stats = {name: _add_stats(self._stats_before_child.get(name), sink) for name, sink in report.sinks.items()}
            self._stats_changed.notify_all()
        return report.is_surplus

    def _forward_stop(self) -> None:
        if self._stopping.is_set() and self._child is not None and self._child_delivers:
            left = max(0.0, self._deadline - self._clock.monotonic())
            self._child.send_order(STOP + f"{left:.3f}".encode())

    def _set_state(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        """Set the state of all sinks while there is no child, and log each change once."""
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        state = State(name, reason, retry_at)
        with self._stats_changed.lock:
            self._stats = {
                sink: msgspec.structs.replace(stats, state=state, last_error=reason, rate=None)
                for sink, stats in self._stats.items()
            }
        if self._state_log.is_new_problem(reason):
            log.log(logging.INFO if name == "standby" else logging.WARNING, "%s: %s", self._directory.path, state)


def find_interpreter() -> str:
    """The Python that a child process runs on; empty if there is none.

    In a frozen application `sys.executable` is the application itself, and in a server that embeds Python it is the server. If
    the server's installation has a Python, that is used.
    """
    if getattr(sys, "frozen", False):
        return ""
    if sys.executable.rpartition("/")[2].startswith(("python", "pypy")):
        return sys.executable
    beside = f"{sys.exec_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return beside if exists(beside) else ""


def _import_paths() -> list[str]:
    """Where the child finds this package, what it needs, and what the settings name, as this process does.

    A server that embeds Python may take them from elsewhere than the interpreter that is beside it.
    """
    paths = [path for path in sys.path if isinstance(path, str)]
    package_parent = __file__.removesuffix("/pillarbox/delivery/process/supervisor.py")
    return paths if package_parent in paths else [*paths, package_parent]


class _ChildProcess:
    """A child process and the socket to it."""

    def __init__(self, working_directory: str) -> None:
        """Start the child in a working directory, or in that of this process if the directory is gone."""
        directory = working_directory if exists(working_directory) else ""
        # A process forked meanwhile must not inherit the sockets, or neither end would notice the other's death.
        with fork_lock.lock:
            self._socket, theirs = socket_pair()
            _open_sockets.update((self._socket, theirs))
            try:
                command = [find_interpreter(), "-P", "-c", _CHILD_CODE, str(INHERITED_FD), directory, *_import_paths()]
                self._process = SystemProcess(command, theirs.fileno())
            except BaseException:
                _open_sockets.discard(self._socket)
                self._socket.close()
                raise
            finally:
                _open_sockets.discard(theirs)
                theirs.close()
        self.pid = self._process.pid

    def send_setup(self, settings: msgspec.Raw) -> None:
        """Send the settings, and what it needs to import what they name."""
        setup = ChildSetup(log.getEffectiveLevel(), settings)
        with contextlib.suppress(OSError):  # the child has ended already, so `read_messages` will end too
            self._socket.sendall(msgspec.json.encode(setup) + b"\n")

    def read_messages(self) -> Iterator[bytes]:
        """Yield the child's messages until it ends. Kills it if the first message does not come in time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(_START_TIMEOUT_S):
                self.kill()

            def has_data() -> bool:
                while not selector.select(_CHILD_POLL_S):
                    if self._process.poll() is not None:  # a process that C code forked may have its end of the socket too
                        return bool(selector.select(0))
                return True

            yield from read_lines(self._socket, has_data)

    def send_order(self, order: bytes) -> None:
        """Send an order, unless the socket is full or closed."""
        # `stop` kills a child that does not read; one that has ended is noticed by its socket.
        with contextlib.suppress(OSError):
            self._socket.send(order + b"\n", MSG_DONTWAIT)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def close(self) -> None:
        """Close the socket and wait until the process has ended."""
        with fork_lock.lock:
            _open_sockets.discard(self._socket)
            self._socket.close()
        if not self._process.wait(_REAP_TIMEOUT_S):
            self.kill()
            self._process.wait(_REAP_TIMEOUT_S)

    def exit_description(self) -> str:
        """How the process ended."""
        code = self._process.returncode
        if code is None:
            return "cannot be killed"
        if code < 0:
            return f"ended by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"


def _add_stats(before: SinkStats | None, now: SinkStats) -> SinkStats:
    """Add the counts; the state is that of `now`, and the error is the later one."""
    if before is None:
        return now
    sums = {name: getattr(before, name) + getattr(now, name) for name in COUNTER_FIELDS}
    return msgspec.structs.replace(now, last_error=now.last_error or before.last_error, **sums)


def _log_child_line(message: LogLine) -> None:
    """Log a child's record as if this process had logged it."""
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
        logger.handle(record) if logger is log else relay_record(logger, record)


_open_sockets: set[Socket] = set()


def _after_fork_in_child() -> None:
    while _open_sockets:
        _open_sockets.pop().close()


after_fork_in_child(_after_fork_in_child)
