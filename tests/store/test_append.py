"""The compiled hot path does the same as the one in Python.

The tests of the writer and of the outbox use the installed one; `tools/check` runs the tests of the store with both.
"""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox import Dropped, Enqueued, Outbox, TrackingEvent
from pillarbox._native import (
    COMPILED,
    SegmentCounters,
    WriterState,
    decode_record,
    encode_record,
    encode_records,
    py_decode_record,
    py_encode_record,
    py_encode_records,
    speedups,
)
from pillarbox.errors import ConfigurationError
from pillarbox.event import EVENT_BYTES_MAX
from pillarbox.outcome import DROPPED, ENQUEUED
from pillarbox.store.segment import SPARE_RECHECK_SHARE
from tests.store.writer_scenarios import WriterSetup

EVENT_FIELDS = {"event_key": "k", "scope_kind": "Site", "scope_id": "s"}
EVENT = TrackingEvent(event_id="e", occurred_at_micros=1, **EVENT_FIELDS)
compiled_only = pytest.mark.skipif(not COMPILED, reason="needs the C extension")


@pytest.mark.parametrize("size", [*range(200), 255, 256, 257, 4095, 4096, 4097, EVENT_BYTES_MAX])
def test_records_are_the_same_in_c_and_python_and_are_read_back(size: int) -> None:
    """For any length: the C code computes the checksum in blocks."""
    payload = os.urandom(size)
    record = b'{"event":%b,"crc":"%08x"}\n' % (payload, crc32(payload))
    assert encode_record(payload) == py_encode_record(payload) == record
    assert decode_record(record[:-1]) == py_decode_record(record[:-1]) == payload


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_record_is_not_decoded(payload: bytes, at: int, change: int) -> None:
    """One byte is changed anywhere, or there is one too many or too few."""
    record = py_encode_record(payload)[:-1]
    at %= len(record)
    changed = record[:at] + bytes([record[at] ^ change]) + record[at + 1 :]
    for line in (changed, record[:at], record + b"\n", record[1:], payload):
        assert decode_record(line) == py_decode_record(line)
    assert decode_record(changed) is None


@pytest.mark.parametrize("function", [encode_record, decode_record])
@pytest.mark.parametrize("wrong", [None, "text", 1])
def test_arguments_that_are_not_bytes_raise(function: Any, wrong: object) -> None:
    """Text and other objects are not converted."""
    with pytest.raises(TypeError):
        function(wrong)


class OddError(Exception):
    """An exception that the package does not know."""


def _encode(event: Any) -> bytes:
    if event.event_key == "raises":
        raise OddError
    if event.event_key == "interrupts":
        raise KeyboardInterrupt
    return msgspec.json.encode(event)


def _encode_other(event: Any) -> bytes | Dropped:
    if event == "raises":
        raise OddError
    return b"<%b>" % event if isinstance(event, bytes) else DROPPED["invalid"]


def _events() -> list[Any]:
    keyed = [msgspec.structs.replace(EVENT, event_key=key) for key in ("raises", "x" * 500, "y")]
    return [EVENT, b"line", None, *keyed, object(), *[EVENT] * 40]


@pytest.mark.parametrize("encode_all", [encode_records, py_encode_records])
def test_records_are_joined_and_each_dropped_event_has_its_reason(encode_all: Any) -> None:
    """`encode_other` decides about events of another type, too large ones, and those that do not encode."""
    lines, dropped = encode_all(iter(_events()), _encode, TrackingEvent, 400, _encode_other)
    is_dropped = [False, False, True, True, True, False, True, *[False] * 40]
    assert dropped == [DROPPED["invalid"] if expected else None for expected in is_dropped]
    good = py_encode_record(msgspec.json.encode(EVENT))
    last = py_encode_record(msgspec.json.encode(msgspec.structs.replace(EVENT, event_key="y")))
    assert lines == good + b"<line>" + last + 40 * good
    assert encode_all([], _encode, TrackingEvent, 400, _encode_other) == (b"", [])


@pytest.mark.parametrize("encode_all", [encode_records, py_encode_records])
def test_exceptions_while_records_are_joined_are_raised(encode_all: Any) -> None:
    """Those of the iterable and of `encode_other`, and an interrupt in the encoder."""

    def failing_iterator() -> Any:
        yield EVENT
        raise OddError

    for events, error in ((failing_iterator(), OddError), (["raises"], OddError), (None, TypeError)):
        with pytest.raises(error):
            encode_all(events, _encode, TrackingEvent, 400, _encode_other)
    with pytest.raises(KeyboardInterrupt):
        encode_all([msgspec.structs.replace(EVENT, event_key="interrupts")], _encode, TrackingEvent, 400, _encode_other)


@pytest.fixture
def outbox(tmp_path: Path) -> Any:
    with Outbox(str(tmp_path / "outbox")) as outbox:
        yield outbox


def test_enqueue_accepts_the_arguments_of_its_signature(outbox: Outbox) -> None:
    """By position or by name; other arguments are a `TypeError`."""
    assert str(inspect.signature(outbox.enqueue)).startswith("(event")
    assert outbox.enqueue.__doc__
    assert outbox.enqueue(EVENT) == outbox.enqueue(event=EVENT) == Enqueued("process")
    assert outbox.enqueue(EVENT, durability=None) == outbox.enqueue(EVENT, durability="process") == Enqueued("process")
    wrong: list[tuple[tuple[object, ...], dict[str, object]]] = [
        ((), {}),
        ((EVENT, EVENT), {}),
        ((EVENT,), {"event": EVENT}),
        ((EVENT,), {"other": 1}),
        ((EVENT, "process"), {}),
    ]
    for positional, named in wrong:
        with pytest.raises(TypeError):
            outbox.enqueue(*positional, **named)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        outbox.enqueue(EVENT, durability="for ever")  # type: ignore[arg-type]
    assert outbox.enqueue(object()) == Dropped("invalid")  # type: ignore[arg-type]
    assert outbox.stats().accepted == 4


def test_a_call_without_durability_uses_that_of_the_outbox(tmp_path: Path) -> None:
    """With `power`, the call waits for the sync, which is not the simple case."""
    with Outbox(str(tmp_path / "outbox"), durability="power") as outbox:
        assert outbox.enqueue(EVENT) == Enqueued("power")
        assert outbox.enqueue(EVENT, durability="process") == Enqueued("process")


class OpenLock:
    """A lock without contention, because no other thread uses the writer."""

    def acquire(self) -> None: ...
    def release(self) -> None: ...


@compiled_only
def test_counts_do_not_overflow() -> None:
    """A segment whose byte count is at the maximum of its type has no room; the append is left to the writer."""

    class State(WriterState):
        def append(self, _line: bytes, _events: int) -> str:
            return "left to the writer"

        def _notify_threshold(self) -> None: ...

    state: Any = State()
    state.lock, state._limit, state._file = OpenLock(), 2**63 - 1, SegmentCounters()
    state._file.bytes = state._file.events = state._file.threshold_events = 2**63 - 1
    enqueue: Any = speedups.Enqueue(
        state, lambda *_: pytest.fail("called"), msgspec.json.encode, TrackingEvent, 10**6, lambda *_: pytest.fail("called"),
        lambda _fd, line: len(line), ENQUEUED, power=False,
    )  # fmt: skip
    for size in (2**63 - 1, 2**63 - 2, -(2**63), 0):
        state._file.bytes = size
        assert enqueue(EVENT) in (ENQUEUED, "left to the writer")
        assert state._file.events == 2**63 - 1
    state._limit = 100
    state._file.bytes = 2**63 - 1
    outcome: object = enqueue(EVENT)
    assert outcome == "left to the writer"


@compiled_only
def test_the_simple_case_runs_no_python_of_the_writer(tmp_path: Path) -> None:
    """Otherwise no test would cover the compiled path."""
    setup = WriterSetup(tmp_path / "outbox")
    calls = 0

    def profile(frame: Any, _event: str, _arg: object) -> None:
        nonlocal calls
        calls += frame.f_code.co_filename.endswith("writer.py")

    assert setup.put() == ENQUEUED
    sys.setprofile(profile)
    try:
        assert setup.put() == ENQUEUED
    finally:
        sys.setprofile(None)
    assert calls == 0
    setup.check()


def test_a_full_segment_without_a_spare_is_not_checked_at_each_event(tmp_path: Path) -> None:
    """A check costs as much as an event. Once there is a spare, the sealer retires the segment."""
    setup = WriterSetup(tmp_path / "outbox", batch_size=64)
    checks = 0

    def profile(frame: Any, event: str, _arg: object) -> None:
        nonlocal checks
        checks += event == "call" and frame.f_code.co_name == "_notify_threshold"

    for _ in range(63):
        assert setup.put() == ENQUEUED
    sys.setprofile(profile)
    try:
        for _ in range(64):
            assert setup.put() == ENQUEUED
    finally:
        sys.setprofile(None)
    assert checks == 64 // (64 // SPARE_RECHECK_SHARE)
    assert setup.writer.retired_segments() == []
    setup.sealer.step()
    assert setup.sealer.sealed["batch_size"] == 1
    setup.check()


def test_an_unreferenced_outbox_is_collected(tmp_path: Path) -> None:
    """`enqueue` and the outbox refer to each other."""
    outbox = Outbox(str(tmp_path / "outbox"))
    assert outbox.enqueue(EVENT)
    outbox.close()
    writer = weakref.ref(outbox._writer)
    del outbox
    gc.collect()
    assert writer() is None


def resident_bytes() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_path_of_enqueue_leaks(tmp_path: Path) -> None:
    """20,000 calls of each path would show a leak of one reference per call."""
    with Outbox(str(tmp_path / "outbox")) as outbox:
        wrong: Any = [object(), msgspec.structs.replace(EVENT, event_key="x" * EVENT_BYTES_MAX)]

        def call_all_paths(count: int) -> None:
            for _ in range(count):
                outbox.enqueue(EVENT)
                outbox.enqueue(EVENT, durability="process")
                outbox.enqueue(wrong[0])
                outbox.enqueue_many([EVENT, EVENT, wrong[0]])
            for _ in range(count // 1000):
                outbox.enqueue(wrong[1])

        call_all_paths(2000)
        gc.collect()
        references, bytes_before = sys.getrefcount(EVENT), resident_bytes()
        call_all_paths(20_000)
        gc.collect()
        assert sys.getrefcount(EVENT) == references
        assert resident_bytes() - bytes_before < 4 * 2**20


_PURE_PYTHON_SCRIPT = """
import sys
from pillarbox import Outbox, TrackingEvent
from pillarbox._native import (
    COMPILED,
    SegmentCounters,
    WriterState,
    decode_record,
    encode_record,
    encode_records,
    py_decode_record,
    py_encode_record,
    py_encode_records,
    speedups,
)
event = TrackingEvent(event_key="k", scope_kind="Site", scope_id="s")
with Outbox(sys.argv[1]) as outbox:
    assert outbox.enqueue(event) and all(outbox.enqueue_many([event, event]))
    assert type(outbox.enqueue).__name__ == "function"
print(COMPILED)
"""


def test_the_environment_can_disable_the_extension(tmp_path: Path) -> None:
    """With `PILLARBOX_PURE_PYTHON=1`, the functions in Python are used."""
    environment = os.environ | {"PILLARBOX_PURE_PYTHON": "1"}
    command = [sys.executable, "-c", _PURE_PYTHON_SCRIPT, str(tmp_path / "outbox")]
    process = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (process.stdout, process.stderr) == ("False\n", "")
