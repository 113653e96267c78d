"""Log records of the package: how to tell them from an application's, and how they get to its handlers.

A handler that stores log records in an outbox must leave out those that delivery causes, or each delivery causes the next one.
`is_own_log_record` tells them apart by the thread and by the logger.

A handler may block, for example on a pipe that nobody reads. Threads of the package do not call handlers themselves: a helper
thread does, for which they wait a moment, so that lines are in order. If it takes longer, records wait in a bounded queue.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections import deque
from typing import Final, NamedTuple

from pillarbox.forks import after_fork_in_child
from pillarbox.system import threads
from pillarbox.system.originals import replacing_library

log = logging.getLogger("pillarbox")

_THREAD_PREFIX: Final = "pillarbox-"  # of the name of each thread that the package starts
_RELAY_THREAD: Final = "pillarbox-log"
_RECORDS_MAX: Final = 1000  # waiting for a handler that blocks; further ones are lost
_SHUTDOWN_TIMEOUT_S: Final = 0.5  # at the exit, for handlers of which one blocks
_GREENLET_PAUSE_S: Final = 0.1  # between two looks of the greenlet that calls handlers under eventlet
# What asyncio and the transport of httpx log, on threads of the package.
_OTHER_LOGGERS: Final = ("asyncio", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
_HANDLER_TIMEOUT_S: Final = 0.25  # for which a thread of the package waits for the handlers


def is_own_log_record(record: logging.LogRecord) -> bool:
    """Whether the package logged a record, or a library that it uses for delivery.

    These are the records of the logger `pillarbox`, and those of any logger from a thread of the package: those of httpx,
    httpcore, asyncio, and of a sink of another package, as long as that does not log from threads that it started itself.
    """
    return (
        record.name == log.name
        or record.name.startswith(f"{log.name}.")
        or (record.threadName or "").startswith(_THREAD_PREFIX)
    )


class SkipOwnLogRecords(logging.Filter):
    """A filter for a handler that stores log records in an outbox: it lets only the application's records pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is the application's."""
        return not is_own_log_record(record)


class RelayFilter(logging.Filter):
    """A filter of a logger, by default the package's: hands over what must not wait for the handlers."""

    def __init__(self, logger: logging.Logger = log) -> None:
        super().__init__()
        self._logger = logger

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the handlers are called at once, by this thread."""
        if self._logger is not log and not (record.threadName or "").startswith(_THREAD_PREFIX):
            return True  # the application's
        return not _relay.takes(record) or not _relay.hand_over(self._logger, record)


def relay_record(logger: logging.Logger, record: logging.LogRecord) -> None:
    """Have a record of any logger handled, without waiting for handlers that block."""
    if not _relay.hand_over(logger, record):
        logger.callHandlers(record)


def prepare_log_records() -> None:
    """Before threads of the package are started, on a thread of the application.

    Has what asyncio and httpcore log on them handed over too, and starts the greenlet that calls handlers under eventlet.
    Under eventlet the locks of handlers know the greenlets of one thread only, and a thread that waits for one waits for ever.
    """
    for name in _OTHER_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, RelayFilter) for known in logger.filters):
            logger.addFilter(RelayFilter(logger))
    if replacing_library() == "eventlet":
        _relay.start_greenlet()


def write_waiting_records() -> None:
    """On a thread of the application: have the records handled that wait for the greenlet."""
    _relay.write_waiting()


def leave_blocked_handlers() -> None:
    """At the exit of the program: if a handler blocks, let neither `logging.shutdown` nor the interpreter wait for it."""
    if not _relay.is_late:
        return
    atexit.unregister(logging.shutdown)
    shutdown = threads.Thread(target=logging.shutdown, name=_RELAY_THREAD)
    try:
        shutdown.start()
    except RuntimeError:  # the system has no thread to give
        return
    shutdown.join(_SHUTDOWN_TIMEOUT_S)
    if shutdown.is_alive():
        for name in ("stdout", "stderr"):  # the interpreter would flush them; a handler that blocks may hold their lock
            setattr(sys, name, None)


class _WaitingRecord(NamedTuple):
    logger: logging.Logger
    record: logging.LogRecord
    handled: threads.Event


class LogRelay:
    """Calls log handlers on a helper thread, which lives while there are records."""

    def __init__(self) -> None:
        self._lock = threads.Lock()
        self._waiting: deque[_WaitingRecord] = deque()
        self._is_running = False
        self.is_late = False  # a handler takes longer than anybody waits
        self._lost = 0
        self._has_greenlet = False  # which calls the handlers, in place of the helper thread

    def takes(self, record: logging.LogRecord) -> bool:
        """Whether a record must not be handled by its thread: one of the package's, or any while a handler blocks."""
        thread = record.threadName or ""
        return thread != _RELAY_THREAD and (self.is_late or thread.startswith(_THREAD_PREFIX))

    def hand_over(self, logger: logging.Logger, record: logging.LogRecord) -> bool:
        """Queue a record, and wait a moment until it is handled. False if there is no thread that could handle it."""
        handled = threads.Event()
        with self._lock:
            if len(self._waiting) >= _RECORDS_MAX:
                self._lost += 1
                return True
            item = _WaitingRecord(logger, record, handled)
            self._waiting.append(item)
            if self._has_greenlet:
                return True
            starts, self._is_running = not self._is_running, True
        if starts:
            try:
                threads.Thread(target=self._call_handlers, name=_RELAY_THREAD).start()
            except RuntimeError:  # the system has no thread to give
                with self._lock:
                    self._is_running = False
                    if item in self._waiting:
                        self._waiting.remove(item)
                return False
        if not self.is_late and not handled.wait(_HANDLER_TIMEOUT_S):
            self.is_late = True
        return True

    def start_greenlet(self) -> bool:
        """Have a greenlet of the application call the handlers. False if there is one already."""
        if self._has_greenlet:
            return False
        self._has_greenlet = True
        threads.start_greenlet(self._write_for_ever, _RELAY_THREAD)
        return True

    def write_waiting(self) -> None:
        """Call the handlers for what waits for the greenlet."""
        while self._has_greenlet and self._waiting:
            item = self._waiting.popleft()
            item.logger.callHandlers(item.record)

    def forget_parent(self) -> None:
        """In a forked child, where the greenlet lives on: what waits is the parent's."""
        self._waiting.clear()

    def _write_for_ever(self) -> None:
        while True:
            self.write_waiting()
            threads.let_greenlets_run(_GREENLET_PAUSE_S)

    def _call_handlers(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = self.is_late = False
                    return
                item = self._waiting.popleft()
                lost, self._lost = (0, self._lost) if self._waiting else (self._lost, 0)
            try:
                item.logger.callHandlers(item.record)
                if lost:
                    text = "%d log records were lost: a log handler blocked for too long"
                    log.warning(text, lost)
            except Exception:  # noqa: BLE001, S110 - a handler's own; logging has reported it where it can
                pass
            finally:
                item.handled.set()


_relay = LogRelay()


def _after_fork() -> None:
    global _relay  # noqa: PLW0603 - a thread that does not exist here may hold its lock
    _relay.forget_parent()
    _relay = LogRelay()


after_fork_in_child(_after_fork)
