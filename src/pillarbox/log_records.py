"""Log records of the package: how to tell them from an application's, and how they get to its handlers.

A handler that stores log records in an outbox must leave out those that delivery causes, or each delivery causes the next one.
`is_own_log_record` tells them apart by the thread and by the logger.

A handler may block, for example on a pipe that nobody reads. So threads of the package do not call handlers themselves. A
helper thread calls them, and the thread that logs waits for it briefly, so that lines stay in order. If a handler takes longer,
records wait in a bounded queue.
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

_THREAD_PREFIX: Final = "pillarbox-"  # the names of all threads of the package begin with it
_RELAY_THREAD: Final = "pillarbox-log"
_RECORDS_MAX: Final = 1000  # that wait while a handler blocks; further ones are lost
_SHUTDOWN_TIMEOUT_S: Final = 0.5  # at exit, if a handler blocks
_GREENLET_PAUSE_S: Final = 0.1  # between two polls of the queue by the greenlet that calls handlers under eventlet
# The loggers of asyncio and of httpx's transport, which log on threads of the package.
_OTHER_LOGGERS: Final = ("asyncio", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
_HANDLER_TIMEOUT_S: Final = 0.25  # how long a thread of the package waits for the handlers


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
    """A filter of a logger, by default the package's: relays the records whose thread must not wait for handlers."""

    def __init__(self, logger: logging.Logger = log) -> None:
        super().__init__()
        self._logger = logger

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this thread calls the handlers itself."""
        if self._logger is not log and not (record.threadName or "").startswith(_THREAD_PREFIX):
            return True  # the application's
        return not _relay.must_relay(record) or not _relay.relay(self._logger, record)


def relay_record(logger: logging.Logger, record: logging.LogRecord) -> None:
    """Pass a record of any logger to its handlers, without waiting for handlers that block."""
    if not _relay.relay(logger, record):
        logger.callHandlers(record)


def prepare_log_relay() -> None:
    """Prepare the relay on a thread of the application, before threads of the package are started.

    Relays the records of asyncio and httpcore too. Under eventlet it starts the greenlet that calls the handlers: a lock of
    eventlet works among the greenlets of one thread only, and another thread would wait forever for the lock of a handler.
    """
    for name in _OTHER_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(log_filter, RelayFilter) for log_filter in logger.filters):
            logger.addFilter(RelayFilter(logger))
    if replacing_library() == "eventlet":
        _relay.start_greenlet()


def write_waiting_records() -> None:
    """Call the handlers for records that wait for the greenlet. Must run on a thread of the application."""
    _relay.write_waiting()


def abandon_blocked_handlers() -> None:
    """Keep `logging.shutdown` and the interpreter from waiting for a handler that blocks at the exit of the program."""
    if not _relay.is_blocked:
        return
    atexit.unregister(logging.shutdown)
    shutdown = threads.Thread(target=logging.shutdown, name=_RELAY_THREAD)
    try:
        shutdown.start()
    except RuntimeError:  # the system cannot start another thread
        return
    shutdown.join(_SHUTDOWN_TIMEOUT_S)
    if shutdown.is_alive():
        for name in ("stdout", "stderr"):  # the interpreter would flush them, but a blocked handler may hold their lock
            setattr(sys, name, None)


class _WaitingRecord(NamedTuple):
    logger: logging.Logger
    record: logging.LogRecord
    handled: threads.Event


class LogRelay:
    """Calls log handlers on a helper thread, which lives while there are records."""

    def __init__(self) -> None:
        self._lock = threads.RLock()  # re-entrant: a signal handler may log while this thread queues a record
        self._waiting: deque[_WaitingRecord] = deque()
        self._is_running = False
        self.is_blocked = False  # a handler takes longer than `_HANDLER_TIMEOUT_S`
        self._lost_records = 0
        self._has_greenlet = False  # a greenlet calls the handlers, and not the helper thread

    def must_relay(self, record: logging.LogRecord) -> bool:
        """Whether a record's own thread must not call the handlers: a thread of the package, or any while a handler blocks."""
        thread = record.threadName or ""
        return thread != _RELAY_THREAD and (self.is_blocked or thread.startswith(_THREAD_PREFIX))

    def relay(self, logger: logging.Logger, record: logging.LogRecord) -> bool:
        """Queue a record, and wait briefly until it is handled. Returns False if no thread could be started to handle it."""
        handled = threads.Event()
        with self._lock:
            if len(self._waiting) >= _RECORDS_MAX:
                self._lost_records += 1
                return True
            item = _WaitingRecord(logger, record, handled)
            self._waiting.append(item)
            if self._has_greenlet:
                return True
            must_start, self._is_running = not self._is_running, True
        if must_start:
            try:
                threads.Thread(target=self._call_handlers, name=_RELAY_THREAD).start()
            except RuntimeError:  # the system cannot start another thread
                with self._lock:
                    self._is_running = False
                    if item in self._waiting:
                        self._waiting.remove(item)
                return False
        if not self.is_blocked and not handled.wait(_HANDLER_TIMEOUT_S):
            self.is_blocked = True
        return True

    def start_greenlet(self) -> bool:
        """Start a greenlet of the application that calls the handlers. Returns False if one was started before."""
        if self._has_greenlet:
            return False
        self._has_greenlet = True
        threads.start_greenlet(self._run_greenlet, _RELAY_THREAD)
        return True

    def write_waiting(self) -> None:
        """Call the handlers for the records that wait for the greenlet."""
        while self._has_greenlet and self._waiting:
            item = self._waiting.popleft()
            item.logger.callHandlers(item.record)

    def drop_parent_records(self) -> None:
        """Drop the waiting records in a forked child, where the greenlet lives on: the parent writes them."""
        self._waiting.clear()

    def _run_greenlet(self) -> None:
        while True:
            self.write_waiting()
            threads.let_greenlets_run(_GREENLET_PAUSE_S)

    def _call_handlers(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = self.is_blocked = False
                    return
                item = self._waiting.popleft()
                lost, self._lost_records = (0, self._lost_records) if self._waiting else (self._lost_records, 0)
            try:
                item.logger.callHandlers(item.record)
                if lost:
                    records = "1 log record was" if lost == 1 else f"{lost:,} log records were"
                    log.warning("%s lost: a log handler blocked for too long", records)
            except Exception:  # noqa: BLE001, S110 - the handler's own error, which `Handler.handleError` has reported
                pass
            finally:
                item.handled.set()


_relay = LogRelay()


def _after_fork() -> None:
    global _relay  # noqa: PLW0603 - a thread that does not exist here may hold its lock
    _relay.drop_parent_records()
    _relay = LogRelay()


after_fork_in_child(_after_fork)
