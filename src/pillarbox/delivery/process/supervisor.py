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

import pillarbox
from pillarbox.delivery.backoff import Backoff, jitter
from pillarbox.delivery.lease import Lease
from pillarbox.delivery.process.protocol import (
    GO,
    NOTIFY,
    STOP,
    Line,
    Ready,
    Report,
    Setup,
    Trouble,
    decode_message,
    encode_settings,
    lines,
)
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.errors import FileUnusableError
from pillarbox.stats import COUNTER_FIELDS, DeliveryCounters, SinkStats, State, StateName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pillarbox.clock import Clock
    from pillarbox.delivery.settlement import Callbacks
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

_LOOK_S: Final = 0.25  # between two looks whether the process that delivers is gone
_BOOT_S: Final = 30.0  # for an interpreter to start and to import: it holds up who else might deliver
_GRACE_S: Final = 1.0  # beyond the time that a child is given to end: then it is killed
_REAP_S: Final = 5.0  # for a process that has hung up to be gone
_GOOD_AFTER_S: Final = 10.0  # a child that lives so long was no failure
_AGAIN: Final = Backoff()
_CODE: Final = (
    "import sys; sys.path.append(sys.argv[2]); from pillarbox.delivery.process.child import main; main(int(sys.argv[1]))"
)


class Supervisor:
    """The `Deliverer` whose work is done by a child; at most one of a directory's supervisors has one."""

    def __init__(
        self,
        settings: Settings,
        directory: Directory,
        clock: Clock,
        callbacks: Callbacks,
        sinks: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._clock = clock
        self._callbacks = callbacks
        self._lease = Lease(directory, ", ".join(name or url for name, url in sinks.items()), clock, settings.durability)
        self._stopping = threading.Event()
        self._deadline = 0.0  # of the end, in monotonic seconds
        self._orders = threading.Lock()
        self._child: _Child | None = None
        self._at_work = False  # the child delivers
        self._news = threading.Condition()
        self._shown = dict.fromkeys(sinks, DeliveryCounters().to_stats(State("idle"), ""))
        self._before: dict[str, SinkStats] = {}  # what was shown when the child began
        self._trouble = ""  # what was last logged
        self._failures = 0  # in a row
        self._hook_failures = 0
        self._thread = threading.Thread(target=self._run, name="pillarbox-supervisor", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Have the child deliver what can be delivered without waiting and end; killed a second after `timeout` seconds."""
        with self._orders:
            self._deadline = self._clock.monotonic() + timeout
            self._stopping.set()
            self._pass_on_the_end()
        self._thread.join(timeout + _GRACE_S)
        in_time = not self._thread.is_alive()
        if not in_time:
            child = self._child
            if child is not None:
                child.kill()
            self._thread.join(_GRACE_S)
        return in_time

    def notify(self) -> None:
        """There may be something to do; from any thread."""
        child = self._child
        if child is not None and self._at_work:
            child.order(NOTIFY)

    def sinks(self) -> dict[str, SinkStats]:
        """How each stands, as the child reported last; its predecessors' counts are in it."""
        return self._shown

    def wait_for_settlement(self, seen: int, timeout: float) -> None:
        """Wait until other than `seen` files are settled, at most `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: sum(sink.flushed_files for sink in self._shown.values()) != seen, timeout)

    def _run(self) -> None:
        while True:
            try:
                pause = self._round()
            except Exception as error:
                log.exception("a defect in Pillarbox; it goes on")
                pause = self._failed(f"{type(error).__name__}: {error}", 0.0)
            if self._stopping.wait(pause):
                return

    def _round(self) -> float:
        """Have a child deliver for as long as it lives, if nobody else delivers; seconds until the next look."""
        try:
            taken = self._lease.take()
        except (OSError, FileUnusableError) as error:
            self._enter("degraded", str(error))
            return self._settings.flush_interval
        if not taken:
            self._enter("standby", STANDBY_REASON)
            return _LOOK_S
        born = self._clock.monotonic()
        try:
            with contextlib.closing(_Child()) as child:
                with self._orders:
                    self._child = child
                trouble = self._attend(child)
            ended = child.how_it_ended()
        except OSError as error:  # no process can be started
            trouble, ended = "", f"cannot be started: {error}"
        finally:
            with self._orders:
                self._child, self._at_work = None, False
            self._lease.release()
        if self._stopping.is_set() or trouble is None:
            return 0.0
        return self._failed(trouble or ended, self._clock.monotonic() - born)

    def _failed(self, trouble: str, lived_s: float) -> float:
        self._failures = 1 if lived_s >= _GOOD_AFTER_S else self._failures + 1
        pause = _AGAIN.delay(self._failures, jitter())
        self._enter("degraded", f"the process that delivers: {trouble}; another is started", pause)
        return pause

    def _attend(self, child: _Child) -> str | None:
        """Hear a child until it is gone; what it complained of, None where it was told to end for another delivers."""
        trouble: str | None = ""
        self._before = self._shown
        state = next(iter(self._shown.values())).state
        if state.name == "degraded":
            self._lease.beat(state, 0, state.reason, now=True)  # for `status`: nobody else tells
        child.begin(encode_settings(self._settings))
        for line in child.hear():
            message = decode_message(line)
            if isinstance(message, Line):
                _log(message)
            elif isinstance(message, Trouble):
                trouble = message.text
            elif isinstance(message, Ready):
                self._lease.release()
                log.info("%s: process %d delivers", self._directory.path, child.pid)
                self._trouble = ""
                with self._orders:
                    child.order(GO)
                    self._at_work = True
                    self._pass_on_the_end()
            elif self._take_in(message) and trouble is not None:
                trouble = None
                child.order(STOP + b"0")
        self._hook_failures = 0
        return trouble

    def _take_in(self, report: Report) -> bool:
        """Show a report; whether the child is not needed."""
        for size in report.gone:
            self._callbacks.on_gone(size)
        for seconds, sink in report.durations:
            with contextlib.suppress(Exception):  # the application's metrics are not worth the supervisor
                self._callbacks.on_duration(seconds, sink)
        self._callbacks.on_hook_failures(report.hook_failures - self._hook_failures)
        self._hook_failures = report.hook_failures
        with self._news:
            self._shown = {name: _added(self._before.get(name), sink) for name, sink in report.sinks.items()}
            self._news.notify_all()
        return report.surplus

    def _pass_on_the_end(self) -> None:
        if self._stopping.is_set() and self._child is not None and self._at_work:
            left = max(0.0, self._deadline - self._clock.monotonic())
            self._child.order(STOP + f"{left:.3f}".encode())

    def _enter(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        """Be in a state without a child; one log line a change."""
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        state = State(name, reason, retry_at)
        before = self._trouble
        with self._news:
            self._shown = {
                sink: msgspec.structs.replace(at, state=state, last_error=reason, rate=None) for sink, at in self._shown.items()
            }
        self._trouble = reason
        if reason != before:
            log.log(logging.INFO if name == "standby" else logging.WARNING, "%s: %s", self._directory.path, state)


class _Child:
    """One child process and the socket to it."""

    def __init__(self) -> None:
        with _forking:  # what a process forks meanwhile must have none of this open, or neither would hear the other end
            self._line, theirs = socket.socketpair()
            _open.add(self._line)
            try:
                command = [sys.executable, "-P", "-c", _CODE, str(theirs.fileno()), _ROOT]
                self._process = subprocess.Popen(  # noqa: S603 - our own code, and no shell
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
                )
            except BaseException:
                _open.discard(self._line)
                self._line.close()
                raise
            finally:
                theirs.close()
        self.pid = self._process.pid

    def begin(self, settings: msgspec.Raw) -> None:
        """Tell it what it needs to know."""
        setup = Setup([place for place in sys.path if isinstance(place, str)], log.getEffectiveLevel(), settings)
        with contextlib.suppress(OSError):  # it is gone already, and `hear` ends
            self._line.sendall(msgspec.json.encode(setup) + b"\n")

    def hear(self) -> Iterator[bytes]:
        """What it says, until it is gone; the first must come in time."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        if not poll.poll(_BOOT_S * 1000):
            self.kill()
        return lines(self._line)

    def order(self, text: bytes) -> None:
        """Tell it something, if it listens."""
        with contextlib.suppress(OSError):  # one that does not read is killed in the end, one that is gone is heard of
            self._line.send(text + b"\n", socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Have it gone."""
        with _forking:
            _open.discard(self._line)
            self._line.close()
        try:
            self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def how_it_ended(self) -> str:
        """In words."""
        code = self._process.returncode
        if code < 0:
            return f"ended by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"


def _added(before: SinkStats | None, now: SinkStats) -> SinkStats:
    """The counts of both, the state of the second, and what was last complained of."""
    if before is None:
        return now
    sums = {name: getattr(before, name) + getattr(now, name) for name in COUNTER_FIELDS}
    return msgspec.structs.replace(now, last_error=now.last_error or before.last_error, **sums)


def _log(line: Line) -> None:
    """As if it had been logged here."""
    logger = logging.getLogger(line.logger)
    if logger.isEnabledFor(line.level):
        record = logging.makeLogRecord(
            {
                "name": line.logger,
                "levelno": line.level,
                "levelname": logging.getLevelName(line.level),
                "msg": line.text,
                "created": line.created,
                "exc_text": line.trace,
            }
        )
        logger.handle(record)


_ROOT: Final = (pillarbox.__file__ or "").removesuffix("/pillarbox/__init__.py")
_forking = threading.RLock()  # held while a process forks, and while a child begins or ends
_open: set[socket.socket] = set()


def _fork_begins() -> None:
    _forking.acquire()


def _fork_is_over() -> None:
    _forking.release()


def _in_forked() -> None:
    global _forking  # noqa: PLW0603 - the parent's is held by a thread that does not exist here
    _forking = threading.RLock()
    while _open:
        _open.pop().close()


os.register_at_fork(before=_fork_begins, after_in_parent=_fork_is_over, after_in_child=_in_forked)
