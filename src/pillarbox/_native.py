"""The parts of the store that have a compiled twin, in Python, and the choice between the two.

The C extension `pillarbox._speedups` (`src/speedups/*.c`) is used where it was compiled at installation, unless the environment
has `PILLARBOX_PURE_PYTHON=1`. A name such as `encode_record` is the compiled function, or `py_encode_record` where there is
none; both behave the same, and the same tests hold both to it.

Some twins are elsewhere, because they need what is defined there: of the batch operations in `store/filesystem.py`, of the
directory scan in `store/dirscan.py`, of the compiled `enqueue` in `Writer.build_enqueue`, and of the ids, times and checks of
an event in `event.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from contextvars import copy_context
from functools import update_wrapper
from itertools import accumulate
from os import environ
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from zlib import crc32

from pillarbox.outcome import ENQUEUED

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from contextvars import Context
    from types import EllipsisType

    from pillarbox.outcome import Dropped, Outcome
    from pillarbox.system.threads import RLock

    Callback = Callable[["PyCommitFuture"], object]

# Records. One line is `{"event":PAYLOAD,"crc":"xxxxxxxx"}` and a line feed: see `store/record.py`.

RECORD_TEMPLATE: Final = b'{"event":%b,"crc":"%08x"}\n'  # (payload, crc32(payload)); the writer's closure formats it itself
RECORD_OVERHEAD_BYTES: Final = len(RECORD_TEMPLATE % (b"", 0))
_WITHOUT_LINE_FEED: Final = RECORD_TEMPLATE[:-1]
_HEAD_BYTES: Final = len(b'{"event":')
_TAIL_BYTES: Final = len(b',"crc":"00000000"}')


def py_encode_record(payload: bytes) -> bytes:
    """Make the record of a payload."""
    return RECORD_TEMPLATE % (payload, crc32(payload))


def py_decode_record(line: bytes) -> bytes | None:
    """The payload of a record without its line feed; None if the record is not of the form that `encode_record` makes."""
    payload = line[_HEAD_BYTES:-_TAIL_BYTES]
    return payload if _WITHOUT_LINE_FEED % (payload, crc32(payload)) == line else None


def py_decode_records(
    data: bytes, offset: int, most: int, decode_record: Callable[[bytes], bytes | None], check: Callable[[bytes], object]
) -> tuple[list[bytes], int]:
    """The payloads of up to `most` lines from an offset on, and the offset at which they end.

    It stops at the first line that has no line feed, for which `decode_record` returns None, whose payload is not UTF-8, or for
    which `check` raises.
    """
    payloads: list[bytes] = []
    if not 0 <= offset <= len(data):
        raise ValueError(f"offset {offset} is not within the {len(data)} bytes")
    while len(payloads) < most and (end := data.find(b"\n", offset)) >= 0:
        payload = decode_record(data[offset:end])
        if payload is None:
            break
        try:
            if not payload.isascii():
                payload.decode()
            check(payload)
        except Exception:  # noqa: BLE001 - the reader finds the error again, if there is one
            break
        payloads.append(payload)
        offset = end + 1
    return payloads, offset


def py_encode_records(
    events: Iterable[Any],
    encode: Callable[[Any], bytes],
    event_type: type,
    bytes_max: int,
    encode_other: Callable[[Any], bytes | Dropped],
) -> tuple[bytes, list[Dropped | None]]:
    """Join the records of all events; for each event, also return None or why it has no record.

    `encode_other` decides about an event that is not of `event_type`, does not encode, or has more than `bytes_max` bytes.
    """
    lines: list[bytes] = []
    dropped: list[Dropped | None] = []
    for event in events:
        record: bytes | Dropped = b""
        if type(event) is event_type:
            with contextlib.suppress(Exception):
                payload = encode(event)
                if len(payload) <= bytes_max:
                    record = RECORD_TEMPLATE % (payload, crc32(payload))
        record = record or encode_other(event)
        if isinstance(record, bytes):
            lines.append(record)
            dropped.append(None)
        else:
            dropped.append(record)
    return b"".join(lines), dropped


# The hot path's state, and the hot path.


class PySegmentCounters:
    """The fields of a segment that the hot path reads and writes; at `threshold_events` events it calls the writer."""

    __slots__ = ("bytes", "events", "fd", "threshold_events")

    bytes: int
    events: int
    fd: int
    threshold_events: int


class PyWriterState:
    """The fields of a writer that the hot path reads and writes."""

    lock: RLock
    _file: Any  # a `SegmentCounters`
    _limit: int
    _append_interrupted: bool


E = TypeVar("E", bound="Callable[..., Outcome]")


def compile_enqueue(
    writer: PyWriterState,
    enqueue: E,
    encode: Callable[[Any], bytes],
    event_type: type,
    bytes_max: int,
    append_unstarted: Callable[[bytes, int], Outcome],
    write: Callable[[int, bytes], int],
    *,
    power: bool,
) -> E:
    """Return `enqueue` itself, or a compiled function that handles the simple case and calls `enqueue` for all others."""
    if not COMPILED:
        return enqueue
    compiled = speedups.Enqueue(writer, enqueue, encode, event_type, bytes_max, append_unstarted, write, ENQUEUED, power)
    return update_wrapper(compiled, enqueue)  # type: ignore[return-value]  # it is called the same way


# Futures for group commit. A future of asyncio wakes its task by a callback of its own through the event loop, which costs more
# than the event. Of these futures, one callback wakes all that belong to a loop, each in its context. They follow the protocol
# that `asyncio.Task` has for futures which are not its own. Only the loop's thread changes them.


class GroupMember(Protocol):
    """A caller that waits for the outcome of its lines: a coroutine of an event loop, or a thread, which has no loop."""

    @property
    def lines(self) -> bytes:
        """The lines, which are never changed."""

    @property
    def events(self) -> int:
        """The number of events in the lines, at least one."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of a coroutine; None for a thread."""


M = TypeVar("M", bound=GroupMember)


class PyCommitFuture:
    """A future for the outcome of whole `lines` that hold `events` events."""

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_cancelled", "_message", "_outcome", "events", "lines", "loop")

    def __init__(self, lines: bytes, events: int, loop: asyncio.AbstractEventLoop) -> None:
        self.lines = lines
        self.events = events
        self.loop = loop
        self._asyncio_future_blocking = False
        self._callbacks: list[tuple[Callback, Context]] = []
        self._cancelled = False
        self._message: object = None
        self._outcome: Outcome | None = None

    def __await__(self) -> Generator[PyCommitFuture, None, Outcome]:
        while not self.done():
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def add_done_callback(self, callback: Callback, *, context: Context | None = None) -> None:
        """As `asyncio.Future`."""
        context = context if context is not None else copy_context()
        if self.done():
            self.loop.call_soon(callback, self, context=context)
        else:
            self._callbacks.append((callback, context))

    def remove_done_callback(self, callback: Callback) -> int:
        """As `asyncio.Future`; if a comparison raises, no callback is removed."""
        equal = [pair for pair in self._callbacks[:] if pair[0] == callback]
        before = len(self._callbacks)
        self._callbacks = [pair for pair in self._callbacks if not any(pair is other for other in equal)]
        return before - len(self._callbacks)

    def cancel(self, msg: object = None) -> bool:
        """Stop waiting; False if the future is done already."""
        if self.done():
            return False
        self._cancelled, self._message = True, msg
        self._schedule_callbacks()
        return True

    def result(self) -> Outcome:
        """The outcome."""
        if self._cancelled:
            raise asyncio.CancelledError if self._message is None else asyncio.CancelledError(self._message)
        if self._outcome is None:
            raise asyncio.InvalidStateError("Result is not set.")
        return self._outcome

    def exception(self) -> None:
        """None: an outcome is never an error."""
        self.result()

    def done(self) -> bool:
        """Whether it has an outcome or is cancelled."""
        return self._cancelled or self._outcome is not None

    def cancelled(self) -> bool:
        """Whether it is cancelled."""
        return self._cancelled

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the coroutine that waits."""
        return self.loop

    def _resolve(self, outcome: Outcome) -> None:
        if self.done():
            return
        self._outcome = outcome
        if self._callbacks:
            callback, context = self._callbacks.pop(0)
            try:
                context.run(callback, self)
            finally:
                self._schedule_callbacks()

    def _schedule_callbacks(self) -> None:
        while self._callbacks:
            callback, context = self._callbacks.pop(0)
            self.loop.call_soon(callback, self, context=context)


def py_resolve_futures(futures: list[PyCommitFuture], outcome: Outcome) -> None:
    """Set the outcome of all futures, each in its context. Resolved ones leave the list, even if a callback raises."""
    resolved = 0
    try:
        for future in futures:
            resolved += 1
            future._resolve(outcome)  # noqa: SLF001 - the same unit
    finally:
        del futures[:resolved]


def py_gather_group(
    queue: list[M], most: int, room_events: int, room_bytes: int
) -> tuple[list[M], bytes, int, asyncio.AbstractEventLoop | EllipsisType | None]:
    """Gather the first entries of a queue that fit: at most `most`, at least one.

    Returns the entries, their joined lines, their number of events, and their loop: `...` if they have several. The queue is
    not changed.
    """
    entries = queue[: max(1, min(most, room_events))]  # each has an event at least
    events = [entry.events for entry in entries]
    lines = [entry.lines for entry in entries]
    count = len(entries)
    if sum(events) > room_events or sum(map(len, lines)) > room_bytes:
        by_events = bisect_right(list(accumulate(events)), room_events)
        by_bytes = bisect_right(list(accumulate(map(len, lines))), room_bytes)
        count = max(1, min(by_events, by_bytes))
    entries = entries[:count]
    loops = {entry.loop for entry in entries}
    return entries, b"".join(lines[:count]), sum(events[:count]), loops.pop() if len(loops) == 1 else ...


# The choice.

if TYPE_CHECKING:
    from pillarbox import _speedups

    speedups = _speedups
else:
    speedups = None  # where it is not used
    if not environ.get("PILLARBOX_PURE_PYTHON"):
        with contextlib.suppress(ImportError):
            from pillarbox import _speedups as speedups

COMPILED: Final = speedups is not None

if TYPE_CHECKING or not COMPILED:
    encode_record = py_encode_record
    encode_records = py_encode_records
    decode_record = py_decode_record
    decode_records = py_decode_records
    SegmentCounters = PySegmentCounters
    WriterState = PyWriterState
    CommitFuture = PyCommitFuture
    resolve_futures = py_resolve_futures
    gather_group = py_gather_group
else:
    encode_record = speedups.encode_record
    encode_records = speedups.encode_records
    decode_record = speedups.decode_record
    decode_records = speedups.decode_records
    SegmentCounters = speedups.SegmentCounters
    WriterState = speedups.WriterState
    CommitFuture = speedups.CommitFuture
    resolve_futures = speedups.resolve_futures
    gather_group = speedups.gather_group
