"""The child process: delivers a directory until its parent tells it to stop or ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.delivery.build import build_local_runner, build_sinks
from pillarbox.delivery.lease import STANDBY_REASON
from pillarbox.delivery.process.protocol import (
    GO,
    NOTIFY,
    STOP,
    ChildFailed,
    ChildMessage,
    ChildReady,
    ChildSetup,
    LogLine,
    StatsReport,
    decode_settings,
    read_lines,
)
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.errors import PillarboxError
from pillarbox.hooks import Hooks
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.open_files import close_files_above
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.system import threads
from pillarbox.system.sockets import Socket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.clock import Clock
    from pillarbox.delivery.runner import Runner

log = logging.getLogger("pillarbox")

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_IGNORED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPORT_IDLE_S: Final = 0.25  # between two checks for something to report while no file is settled
_REPORT_INTERVAL_S: Final = 0.05  # shortest time between two reports: each takes the parent's GIL from callers of `enqueue`
_LOG_LINES_MAX: Final = 1000  # buffered for a parent that does not read; further ones are lost
_FILES_MAX: Final = 10_000  # settled files buffered for such a parent, which lists the directory anyway
_SURPLUS_S: Final = 1.0  # a child that is on standby for longer is not needed; at first the other process may be about to end
_LAST_REPORT_S: Final = 1.0  # time for the last report


def main(descriptor: int) -> None:
    """Run the child; `descriptor` is its end of the socket to the parent."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what an imported module prints must not mix with the application's output
    close_files_above(descriptor)  # C code of the parent may have opened them without excluding child processes
    connection = Socket(fileno=descriptor)
    lines = read_lines(connection)
    first = next(lines, None)
    if first is None:
        return
    setup = msgspec.json.decode(first, type=ChildSetup)
    channel = ParentChannel(connection, setup.log_level)
    try:
        runner, reporter, ledger = _build_delivery(setup, channel)
    except Exception as error:  # noqa: BLE001 - importing a module of another package may raise anything
        text = str(error) if isinstance(error, PillarboxError) else f"{type(error).__name__}: {error}"
        channel.send_message(ChildFailed(text))
        return
    channel.send_message(ChildReady())
    _obey_orders(lines, runner, reporter, ledger)


def _build_delivery(setup: ChildSetup, channel: ParentChannel) -> tuple[Runner, StatsReporter, LedgerWriter]:
    """Build the runner of the settings, what reports its stats, and its ledger. Raises what settings and directory raise."""
    settings = decode_settings(setup.settings)
    clock = SystemClock()
    directory = directory_at(settings.directory, local_filesystem(), clock)
    directory.ensure_usable()
    directory.create_control_files()
    directory.seal_after(directory.disk_usage().newest_sealed_at)
    hooks = Hooks(settings.directory, on_dead_letter=settings.on_dead_letter)
    events = DeliveryEvents()
    callbacks = DeliveryCallbacks(events.released_bytes.append, events.add_duration, hooks.report_dead_letter)
    ledger = LedgerWriter(directory, clock)
    runner = build_local_runner(settings, directory, clock, ledger, callbacks, build_sinks(settings, {}))
    return runner, StatsReporter(channel, runner, hooks, events, clock), ledger


def _obey_orders(lines: Iterator[bytes], runner: Runner, reporter: StatsReporter, ledger: LedgerWriter) -> None:
    """Start and stop delivery on the parent's orders. A notification does not wait for a stop that is under way."""
    orders: threads.SimpleQueue[bytes] = threads.SimpleQueue()

    def read_orders() -> None:
        for order in lines:
            if order == NOTIFY:
                runner.notify()
            else:
                orders.put(order)
        os._exit(0)  # the parent is gone

    threads.Thread(target=read_orders, name="pillarbox-orders").start()
    while True:
        order = orders.get()
        if order == GO:
            runner.start()
            reporter.start_reporting()
        elif order.startswith(STOP):
            runner.stop(float(order.removeprefix(STOP)))
            ledger.finish()
            reporter.finish_reporting()
            return


class ParentChannel(logging.Handler):
    """The child's end of the socket. Buffers log records and sends them with the next message."""

    def __init__(self, connection: Socket, level: int) -> None:
        super().__init__()
        self._socket = connection
        self._lines: deque[LogLine] = deque()
        self._lost_lines = 0
        log.setLevel(level)
        logging.getLogger().addHandler(self)

    @property
    def has_lines(self) -> bool:
        """Whether log records wait to be sent."""
        return bool(self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log record for the parent: each of Pillarbox, and warnings and errors of others."""
        if record.levelno < logging.WARNING and not record.name.startswith(log.name):
            return
        if len(self._lines) >= _LOG_LINES_MAX:
            self._lost_lines += 1
            return
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._lines.append(LogLine(record.name, record.levelno, record.getMessage(), record.created, trace))

    def send_message(self, message: ChildMessage) -> None:
        """Send the buffered log records, then the message. Does nothing if the parent is gone."""
        with contextlib.suppress(OSError):
            while self._lines:
                self._socket.sendall(msgspec.json.encode(self._lines.popleft()) + b"\n")
            lost, self._lost_lines = self._lost_lines, 0
            if lost:
                log.warning("log lines of the delivery process that were lost, because nobody read them: %d", lost)
            self._socket.sendall(msgspec.json.encode(message) + b"\n")


class DeliveryEvents:
    """What has happened since the last report."""

    def __init__(self) -> None:
        self.released_bytes: deque[int] = deque(maxlen=_FILES_MAX)  # of each file
        self.durations: deque[tuple[float, str]] = deque(maxlen=_FILES_MAX)  # seconds, and the name of the sink

    def add_duration(self, seconds: float, sink: str) -> None:
        """Add the time that a file took."""
        self.durations.append((seconds, sink))


class StatsReporter:
    """Reports to the parent on a thread of its own: a parent that does not read must not delay delivery."""

    def __init__(self, channel: ParentChannel, runner: Runner, hooks: Hooks, events: DeliveryEvents, clock: Clock) -> None:
        self._channel = channel
        self._runner = runner
        self._hooks = hooks
        self._events = events
        self._clock = clock
        self._last_needed_s = 0.0  # monotonic
        self._finishing = threads.Event()
        self._thread = threads.Thread(target=self._run, name="pillarbox-reports")

    def start_reporting(self) -> None:
        """Start the thread."""
        self._last_needed_s = self._clock.monotonic()
        self._thread.start()

    def finish_reporting(self) -> None:
        """Send the last report."""
        self._finishing.set()
        self._thread.join(_REPORT_IDLE_S + _LAST_REPORT_S)

    def _run(self) -> None:
        last: StatsReport | None = None
        while True:
            is_last = self._finishing.is_set()
            report = self._build_report()
            if report != last or self._channel.has_lines:
                self._channel.send_message(report)
                last = msgspec.structs.replace(report, released_bytes=[], delivery_seconds=[])
            if is_last:
                return
            self._finishing.wait(_REPORT_INTERVAL_S)
            if not self._finishing.is_set():
                settled = sum(sink.flushed_files for sink in report.sinks.values())
                self._runner.wait_for_settlement(settled, _REPORT_IDLE_S)

    def _build_report(self) -> StatsReport:
        sinks = self._runner.sinks()  # first: a file that is counted is in the events too
        released = [self._events.released_bytes.popleft() for _ in range(len(self._events.released_bytes))]
        durations = [self._events.durations.popleft() for _ in range(len(self._events.durations))]
        now = self._clock.monotonic()
        if any(sink.state.reason != STANDBY_REASON for sink in sinks.values()):
            self._last_needed_s = now
        is_surplus = now - self._last_needed_s > _SURPLUS_S
        return StatsReport(sinks, released, durations, self._hooks.failures["on_dead_letter"], is_surplus)
