"""The child: delivers a directory for as long as its parent wants and lives."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.clock import SystemClock
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
from pillarbox.delivery.runner import build_local_runner, build_sinks
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.errors import PillarboxError
from pillarbox.hooks import Hooks
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from pillarbox.delivery.deliverer import Runner

log = logging.getLogger("pillarbox")

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_IGNORED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPORT_IDLE_S: Final = 0.25  # between two looks whether there is something to report, where no file is settled
_REPORT_INTERVAL_S: Final = 0.05  # between two reports at least: each takes the parent's interpreter away from its callers
_LOG_LINES_MAX: Final = 1000  # log lines that wait for a parent that does not read; the oldest go
_FILES_MAX: Final = 10_000  # likewise, of files that are gone: the parent lists the directory anyway
_SURPLUS_S: Final = 1.0  # on standby: before, who delivers may only have been about to end
_LAST_REPORT_S: Final = 1.0  # for the last report


def main(descriptor: int) -> None:
    """Live a child's life, with a parent at the other end of a socket."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what somebody's module prints is no output of the application's
    line = socket.socket(fileno=descriptor)
    orders = read_lines(line)
    first = next(orders, None)
    if first is None:
        return
    setup = msgspec.json.decode(first, type=ChildSetup)
    sys.path[:] = setup.sys_path
    mouth = ParentReporter(line, setup.log_level)
    try:
        deliverer = mouth.build_runner(setup)
    except Exception as error:  # noqa: BLE001 - an import of somebody's module may raise anything
        mouth.send_message(ChildFailed(str(error) if isinstance(error, PillarboxError) else f"{type(error).__name__}: {error}"))
        return
    mouth.send_message(ChildReady())
    heard: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        for order in orders:
            if order == NOTIFY:
                deliverer.notify()
            else:
                heard.put(order)
        os._exit(0)  # the parent is gone

    threading.Thread(target=listen, name="pillarbox-orders", daemon=True).start()
    while True:
        order = heard.get()
        if order == GO:
            deliverer.start()
            mouth.start_reporting()
        elif order.startswith(STOP):
            deliverer.stop(float(order.removeprefix(STOP)))
            mouth.finish_reporting()
            return


class ParentReporter(logging.Handler):
    """Tells the parent what happens, on a thread of its own: a parent that does not read holds up no delivery."""

    def __init__(self, line: socket.socket, level: int) -> None:
        super().__init__()
        self._socket = line
        self._lines: deque[LogLine] = deque(maxlen=_LOG_LINES_MAX)
        self._released_bytes: deque[int] = deque(maxlen=_FILES_MAX)
        self._delivery_seconds: deque[tuple[float, str]] = deque(maxlen=_FILES_MAX)
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pillarbox-reports", daemon=True)
        self._runner: Runner | None = None
        self._hooks: Hooks | None = None
        self._clock = SystemClock()
        self._last_needed_s = 0.0  # in monotonic seconds
        log.setLevel(level)
        logging.getLogger().addHandler(self)

    def _add_duration(self, seconds: float, sink: str) -> None:
        self._delivery_seconds.append((seconds, sink))

    def build_runner(self, setup: ChildSetup) -> Runner:
        """Make the delivery that is told of; raises what the settings or the directory make it raise."""
        settings = decode_settings(setup.settings)
        clock = self._clock
        place = directory_at(settings.directory, local_filesystem(), clock)
        place.ensure_usable()
        place.seal_after(place.disk_usage().newest_sealed_at)
        self._hooks = Hooks(settings.directory, on_dead_letter=settings.on_dead_letter)
        callbacks = DeliveryCallbacks(self._released_bytes.append, self._add_duration, self._hooks.report_dead_letter)
        self._runner = build_local_runner(
            settings, place, clock, LedgerWriter(place, clock), callbacks, lambda: False, build_sinks(settings, {})
        )
        return self._runner

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log record for the parent: each of ours, and of others what is a warning or worse."""
        if record.levelno < logging.WARNING and not record.name.startswith(log.name):
            return
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._lines.append(LogLine(record.name, record.levelno, record.getMessage(), record.created, trace))

    def send_message(self, message: ChildMessage) -> None:
        """Send what was logged, then this; a parent that is gone needs nothing."""
        with contextlib.suppress(OSError):
            while self._lines:
                self._socket.sendall(msgspec.json.encode(self._lines.popleft()) + b"\n")
            self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def start_reporting(self) -> None:
        """Begin to report."""
        self._last_needed_s = self._clock.monotonic()
        self._thread.start()

    def finish_reporting(self) -> None:
        """Report a last time."""
        self._finishing.set()
        self._thread.join(_REPORT_IDLE_S + _LAST_REPORT_S)

    def _run(self) -> None:
        last: StatsReport | None = None
        while True:
            ended = self._finishing.is_set()
            report = self._build_report()
            if report != last or self._lines:
                self.send_message(report)
                last = msgspec.structs.replace(report, released_bytes=[], delivery_seconds=[])
            if ended:
                return
            self._finishing.wait(_REPORT_INTERVAL_S)
            if self._runner is not None and not self._finishing.is_set():
                settled = sum(sink.flushed_files for sink in report.sinks.values())
                self._runner.wait_for_settlement(settled, _REPORT_IDLE_S)

    def _build_report(self) -> StatsReport:
        # First the counts: what is counted there is gone, and told of with it.
        sinks = self._runner.sinks() if self._runner is not None else {}
        gone = [self._released_bytes.popleft() for _ in range(len(self._released_bytes))]
        durations = [self._delivery_seconds.popleft() for _ in range(len(self._delivery_seconds))]
        failures = self._hooks.failures["on_dead_letter"] if self._hooks is not None else 0
        now = self._clock.monotonic()
        if any(sink.state.reason != STANDBY_REASON for sink in sinks.values()):
            self._last_needed_s = now
        return StatsReport(sinks, gone, durations, failures, now - self._last_needed_s > _SURPLUS_S)
