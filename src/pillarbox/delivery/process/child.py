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
    Line,
    Message,
    Ready,
    Report,
    Setup,
    Trouble,
    decode_settings,
    lines,
)
from pillarbox.delivery.runner import destinations, make_deliverer
from pillarbox.delivery.settlement import Callbacks
from pillarbox.delivery.state import STANDBY_REASON
from pillarbox.errors import PillarboxError
from pillarbox.hooks import Hooks
from pillarbox.store.filesystem import os_filesystem
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from pillarbox.delivery.deliverer import Deliverer

log = logging.getLogger("pillarbox")

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S: Final = 0.25  # between two looks whether there is something to report, where no file is settled
_REPORT_S: Final = 0.05  # between two reports at least: each takes the parent's interpreter away from its callers
_LINES_MAX: Final = 1000  # log lines that wait for a parent that does not read; the oldest go
_FILES_MAX: Final = 10_000  # likewise, of files that are gone: the parent lists the directory anyway
_SURPLUS_S: Final = 1.0  # on standby: before, who delivers may only have been about to end
_FAREWELL_S: Final = 1.0  # for the last report


def main(descriptor: int) -> None:
    """Live a child's life, with a parent at the other end of a socket."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what somebody's module prints is no output of the application's
    line = socket.socket(fileno=descriptor)
    orders = lines(line)
    first = next(orders, None)
    if first is None:
        return
    setup = msgspec.json.decode(first, type=Setup)
    sys.path[:] = setup.path
    mouth = _Mouth(line, setup.log_level)
    try:
        deliverer = mouth.attach(setup)
    except Exception as error:  # noqa: BLE001 - an import of somebody's module may raise anything
        mouth.say(Trouble(str(error) if isinstance(error, PillarboxError) else f"{type(error).__name__}: {error}"))
        return
    mouth.say(Ready())
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
            mouth.start()
        elif order.startswith(STOP):
            deliverer.stop(float(order.removeprefix(STOP)))
            mouth.finish()
            return


class _Mouth(logging.Handler):
    """Tells the parent what happens, on a thread of its own: a parent that does not read holds up no delivery."""

    def __init__(self, line: socket.socket, level: int) -> None:
        super().__init__()
        self._line = line
        self._lines: deque[Line] = deque(maxlen=_LINES_MAX)
        self._gone: deque[int] = deque(maxlen=_FILES_MAX)
        self._durations: deque[tuple[float, str]] = deque(maxlen=_FILES_MAX)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pillarbox-reports", daemon=True)
        self._deliverer: Deliverer | None = None
        self._hooks: Hooks | None = None
        self._clock = SystemClock()
        self._needed_at = 0.0  # in monotonic seconds
        log.setLevel(level)
        logging.getLogger().addHandler(self)

    def _took(self, seconds: float, sink: str) -> None:
        self._durations.append((seconds, sink))

    def attach(self, setup: Setup) -> Deliverer:
        """Make the delivery that is told of; raises what the settings or the directory make it raise."""
        settings = decode_settings(setup.settings)
        clock = self._clock
        place = directory_at(settings.directory, os_filesystem(), clock)
        place.ensure_usable()
        place.seal_after(place.disk_usage().newest_sealed_at)
        self._hooks = Hooks(settings.directory, on_dead_letter=settings.on_dead_letter)
        callbacks = Callbacks(self._gone.append, self._took, self._hooks.report_dead_letter)
        self._deliverer = make_deliverer(
            settings, place, clock, LedgerWriter(place, clock), callbacks, lambda: False, destinations(settings, {})
        )
        return self._deliverer

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log record for the parent: each of ours, and of others what is a warning or worse."""
        if record.levelno < logging.WARNING and not record.name.startswith(log.name):
            return
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._lines.append(Line(record.name, record.levelno, record.getMessage(), record.created, trace))

    def say(self, message: Message) -> None:
        """Send what was logged, then this; a parent that is gone needs nothing."""
        with contextlib.suppress(OSError):
            while self._lines:
                self._line.sendall(msgspec.json.encode(self._lines.popleft()) + b"\n")
            self._line.sendall(msgspec.json.encode(message) + b"\n")

    def start(self) -> None:
        """Begin to report."""
        self._needed_at = self._clock.monotonic()
        self._thread.start()

    def finish(self) -> None:
        """Report a last time."""
        self._ended.set()
        self._thread.join(_LOOK_S + _FAREWELL_S)

    def _run(self) -> None:
        last: Report | None = None
        while True:
            ended = self._ended.is_set()
            report = self._report()
            if report != last or self._lines:
                self.say(report)
                last = msgspec.structs.replace(report, gone=[], durations=[])
            if ended:
                return
            self._ended.wait(_REPORT_S)
            if self._deliverer is not None and not self._ended.is_set():
                settled = sum(sink.flushed_files for sink in report.sinks.values())
                self._deliverer.wait_for_settlement(settled, _LOOK_S)

    def _report(self) -> Report:
        # First the counts: what is counted there is gone, and told of with it.
        sinks = self._deliverer.sinks() if self._deliverer is not None else {}
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        durations = [self._durations.popleft() for _ in range(len(self._durations))]
        failures = self._hooks.failures["on_dead_letter"] if self._hooks is not None else 0
        now = self._clock.monotonic()
        if any(sink.state.reason != STANDBY_REASON for sink in sinks.values()):
            self._needed_at = now
        return Report(sinks, gone, durations, failures, now - self._needed_at > _SURPLUS_S)
