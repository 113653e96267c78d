"""The compiled pieces of the hot path do what those in Python do.

The tests of the writer and of the outbox run with whichever is chosen; `tools/check` runs those of the store with both.
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
compiled_only = pytest.mark.skipif(not COMPILED, reason="the hot path is not compiled here")


@pytest.mark.parametrize("size", [*range(200), 255, 256, 257, 4095, 4096, 4097, EVENT_BYTES_MAX])
def test_a_record_is_the_same_and_is_read_back(size: int) -> None:
    """Of any length: the checksum is reckoned in blocks."""
    payload = os.urandom(size)
    record = b'{"event":%b,"crc":"%08x"}\n' % (payload, crc32(payload))
    assert encode_record(payload) == py_encode_record(payload) == record
    assert decode_record(record[:-1]) == py_decode_record(record[:-1]) == payload


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(1, 255))
def test_what_is_not_exactly_a_record_is_none(payload: bytes, at: int, change: int) -> None:
    """One byte off, anywhere, or one too many or too few."""
    record = py_encode_record(payload)[:-1]
    at %= len(record)
    changed = record[:at] + bytes([record[at] ^ change]) + record[at + 1 :]
    for line in (changed, record[:at], record + b"\n", record[1:], payload):
        assert decode_record(line) == py_decode_record(line)
    assert decode_record(changed) is None


@pytest.mark.parametrize("function", [encode_record, decode_record])
@pytest.mark.parametrize("wrong", [None, "text", 1])
def test_what_is_not_bytes_is_refused(function: Any, wrong: object) -> None:
    """Rather than read as if it were."""
    with pytest.raises(TypeError):
        function(wrong)


class OddError(Exception):
    """Somebody's own."""


def _encode(event: Any) -> bytes:
    if event.event_key == "raises":
        raise OddError
    if event.event_key == "interrupts":
        raise KeyboardInterrupt
    return msgspec.json.encode(event)


def _line_of(event: Any) -> bytes | Dropped:
    if event == "raises":
        raise OddError
    return b"<%b>" % event if isinstance(event, bytes) else DROPPED["invalid"]


def _events() -> list[Any]:
    keyed = [msgspec.structs.replace(EVENT, event_key=key) for key in ("raises", "x" * 500, "y")]
    return [EVENT, b"line", None, *keyed, object(), *[EVENT] * 40]


@pytest.mark.parametrize("encode_all", [encode_records, py_encode_records])
def test_events_are_packed_into_one_and_each_refusal_stays_where_it_was(encode_all: Any) -> None:
    """Those of another type, too large, or that do not encode, are asked about."""
    lines, refused = encode_all(iter(_events()), _encode, TrackingEvent, 400, _line_of)
    refusals = [False, False, True, True, True, False, True, *[False] * 40]
    assert refused == [DROPPED["invalid"] if refusal else None for refusal in refusals]
    good = py_encode_record(msgspec.json.encode(EVENT))
    last = py_encode_record(msgspec.json.encode(msgspec.structs.replace(EVENT, event_key="y")))
    assert lines == good + b"<line>" + last + 40 * good
    assert encode_all([], _encode, TrackingEvent, 400, _line_of) == (b"", [])


@pytest.mark.parametrize("encode_all", [encode_records, py_encode_records])
def test_what_is_raised_while_events_are_packed_comes_through(encode_all: Any) -> None:
    """By the iterable, by whoever is asked, and an interrupt by the encoder."""

    def broken() -> Any:
        yield EVENT
        raise OddError

    for events, error in ((broken(), OddError), (["raises"], OddError), (None, TypeError)):
        with pytest.raises(error):
            encode_all(events, _encode, TrackingEvent, 400, _line_of)
    with pytest.raises(KeyboardInterrupt):
        encode_all([msgspec.structs.replace(EVENT, event_key="interrupts")], _encode, TrackingEvent, 400, _line_of)


@pytest.fixture
def outbox(tmp_path: Path) -> Any:
    with Outbox(str(tmp_path / "outbox")) as outbox:
        yield outbox


def test_enqueue_is_called_as_its_signature_says(outbox: Outbox) -> None:
    """By position or by name; anything else is a `TypeError`."""
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


def test_power_is_waited_for_where_it_is_the_outbox_s_own(tmp_path: Path) -> None:
    """Which is not the simple case."""
    with Outbox(str(tmp_path / "outbox"), durability="power") as outbox:
        assert outbox.enqueue(EVENT) == Enqueued("power")
        assert outbox.enqueue(EVENT, durability="process") == Enqueued("process")


class OpenLock:
    """Nobody else uses the writer."""

    def acquire(self) -> None: ...
    def release(self) -> None: ...


@compiled_only
def test_counts_do_not_overflow() -> None:
    """A segment that claims as many bytes as a machine word counts has no room for more, and is left to the writer."""

    class State(WriterState):
        def append(self, _line: bytes, _events: int) -> str:
            return "left to the writer"

        def _notify_threshold(self) -> None: ...

    state: Any = State()
    state.lock, state._limit, state._file = OpenLock(), 2**63 - 1, SegmentCounters()
    state._file.bytes = state._file.events = state._file.threshold_events = 2**63 - 1
    enqueue: Any = speedups.Enqueue(
        state, lambda *_: pytest.fail("asked"), msgspec.json.encode, TrackingEvent, 10**6, lambda *_: pytest.fail("asked"),
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
def test_the_simple_case_is_not_the_closure_s(tmp_path: Path) -> None:
    """Otherwise the compiled path would be tested nowhere."""
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


def test_a_full_file_that_has_no_successor_is_not_attended_to_at_each_event(tmp_path: Path) -> None:
    """That cost as much as the event; once there is a spare, a few events more fill the file."""
    setup = WriterSetup(tmp_path / "outbox", batch_size=64)
    looks = 0

    def profile(frame: Any, event: str, _arg: object) -> None:
        nonlocal looks
        looks += event == "call" and frame.f_code.co_name == "_notify_threshold"

    for _ in range(63):
        assert setup.put() == ENQUEUED
    sys.setprofile(profile)
    try:
        for _ in range(64):
            assert setup.put() == ENQUEUED
    finally:
        sys.setprofile(None)
    assert looks == 64 // (64 // SPARE_RECHECK_SHARE)
    assert setup.writer.retired_segments() == []
    setup.sealer.step()
    for _ in range(64 // SPARE_RECHECK_SHARE):
        assert setup.put() == ENQUEUED
    assert len(setup.writer.retired_segments()) == 1
    setup.check()


def test_an_outbox_that_nobody_holds_is_collected(tmp_path: Path) -> None:
    """`enqueue` holds what holds `enqueue`."""
    outbox = Outbox(str(tmp_path / "outbox"))
    assert outbox.enqueue(EVENT)
    outbox.close()
    gone = weakref.ref(outbox._writer)
    del outbox
    gc.collect()
    assert gone() is None


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_way_through_leaks(tmp_path: Path) -> None:
    """A hundred thousand times through each: what is kept would show, one reference at a time."""
    with Outbox(str(tmp_path / "outbox")) as outbox:
        wrong: Any = [object(), msgspec.structs.replace(EVENT, event_key="x" * EVENT_BYTES_MAX)]

        def all_ways(count: int) -> None:
            for _ in range(count):
                outbox.enqueue(EVENT)
                outbox.enqueue(EVENT, durability="process")
                outbox.enqueue(wrong[0])
                outbox.enqueue_many([EVENT, EVENT, wrong[0]])
            for _ in range(count // 1000):
                outbox.enqueue(wrong[1])

        all_ways(2000)
        gc.collect()
        references, before = sys.getrefcount(EVENT), resident()
        all_ways(20_000)
        gc.collect()
        assert sys.getrefcount(EVENT) == references
        assert resident() - before < 4 * 2**20


_PURE = """
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


def test_it_can_be_declined(tmp_path: Path) -> None:
    """By the environment."""
    environment = os.environ | {"PILLARBOX_PURE_PYTHON": "1"}
    command = [sys.executable, "-c", _PURE, str(tmp_path / "outbox")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")
