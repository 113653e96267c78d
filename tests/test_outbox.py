"""The outbox as an application uses it: real threads, real files, and an SQLite database as the destination."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox import DirectoryUnusableError, Dropped, Enqueued, InvalidEventError, Outbox, Outcome, TrackingEvent
from pillarbox.errors import ConfigurationError
from pillarbox.outbox import CALL_BYTES_MAX
from pillarbox.outcome import Durability
from pillarbox.sinks.base import Retry
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.usage import DiskUsage
from pillarbox.store.writer import Writer
from pillarbox.testing import RecordingSink
from tests.conftest import event, existing_events, wait_until


def delivered_rows(path: Path) -> list[dict[str, object]]:
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM tracking_event ORDER BY rowid")]
    connection.close()
    return rows


def test_an_event_is_delivered(tmp_path: Path) -> None:
    """From the application, through the disk, into SQLite."""
    with Outbox(str(tmp_path / "outbox"), sink=f"sqlite:///{tmp_path}/events.db") as outbox:
        assert outbox.enqueue(event(1)) == Enqueued("process")
        assert outbox.flush(60)
        assert delivered_rows(tmp_path / "events.db") == [json.loads(msgspec.json.encode(event(1)))]
        stats = outbox.stats()
    assert (stats.accepted, stats.delivered, stats.pending_bytes, stats.pending_files) == (1, 1, 0, 0)
    assert set(os.listdir(tmp_path / "outbox")) == set(layout.CONTROL_FILES)


def test_a_directory_of_the_older_system_is_delivered_in_order_and_unchanged(existing: Path, tmp_path: Path) -> None:
    """All 127 events, and then the new one."""
    with Outbox(str(existing), sink=f"sqlite:///{tmp_path}/events.db") as outbox:
        outbox.enqueue(event(1))
        assert outbox.flush(60)
        assert outbox.stats().sealed["startup"] == 1
    assert delivered_rows(tmp_path / "events.db") == [*existing_events(), json.loads(msgspec.json.encode(event(1)))]
    assert len(existing_events()) == 127
    assert set(os.listdir(existing)) == set(layout.CONTROL_FILES)


def test_opening_changes_nothing_before_the_first_enqueue(existing: Path) -> None:
    """The directory is checked, but nothing is recovered, and no thread starts."""
    before = sorted(os.listdir(existing))
    outbox = Outbox(str(existing))
    assert outbox.stats().pending_bytes == 41_051
    assert sorted(os.listdir(existing)) == before
    outbox.close()
    assert sorted(os.listdir(existing)) == before


def test_pending_bytes_count_segments_and_batches(tmp_path: Path) -> None:
    """Twelve here: quarantined bytes are not pending."""
    (tmp_path / "active.ndjson").write_text("active")
    (tmp_path / "sealed-one.ndjson").write_text("sealed")
    (tmp_path / "corrupt-one.ndjson").write_text("corrupt")
    assert Outbox(str(tmp_path)).stats().pending_bytes == 12


def test_an_unusable_directory_is_an_error_when_the_outbox_is_created(tmp_path: Path) -> None:
    """Not at the first event."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusableError, match="is a file"):
        Outbox(str(tmp_path / "file"))


def test_a_disabled_outbox_does_not_access_the_disk(tmp_path: Path) -> None:
    """Every call returns its outcome, and that is all."""
    outbox = Outbox(str(tmp_path / "outbox"), enabled=False, sink="sqlite:///events.db")
    assert outbox.enqueue(event(1)) == Dropped("disabled")
    assert outbox.enqueue("no event") == Dropped("disabled")  # type: ignore[arg-type]
    assert outbox.enqueue_many([event(1)]) == [Dropped("disabled")]
    assert outbox.flush()
    assert outbox.stats().dropped["disabled"] == 3
    outbox.close()
    assert not (tmp_path / "outbox").exists()


def test_a_closed_outbox_drops_events_and_can_be_closed_again(tmp_path: Path) -> None:
    """Whether it was used or not."""
    for used in (False, True):
        outbox = Outbox(str(tmp_path / str(used)))
        if used:
            assert outbox.enqueue(event(1))
        outbox.close()
        outbox.close()
        assert outbox.enqueue(event(2)) == Dropped("closed")
        assert outbox.enqueue_many([event(2)]) == [Dropped("closed")]


def test_above_max_bytes_the_event_is_dropped_and_no_segment_is_created(tmp_path: Path) -> None:
    """The drop is counted by its reason."""
    outbox = Outbox(str(tmp_path / "outbox"), max_bytes=10)
    assert outbox.enqueue(event(1)) == Dropped("max_bytes")
    assert set(os.listdir(tmp_path / "outbox")) == set(layout.CONTROL_FILES)
    assert outbox.stats().dropped["max_bytes"] == 1
    outbox.close()


class Measurement(msgspec.Struct):
    """An event type of an application."""

    event_id: str
    value: float | None = None


INVALID = [
    ("event", "no event"),
    ("event", {"event_id": "a"}),
    ("value", Measurement("a", value="text")),  # type: ignore[arg-type]
    ("value", Measurement("a", value=float("nan"))),
    ("event_id", Measurement("\ud800")),
    ("bytes", Measurement("a" * 300_000)),
]


@pytest.mark.parametrize(("named", "bad"), INVALID)
def test_an_invalid_event_is_dropped_with_the_field_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str, bad: object
) -> None:
    """Nothing is written, and five invalid events make one line in the log."""
    with Outbox(str(tmp_path / "outbox"), event_type=Measurement) as outbox:
        for _ in range(5):
            assert outbox.enqueue(bad) == Dropped("invalid")  # type: ignore[arg-type]
        assert outbox.stats().dropped["invalid"] == 5
        assert set(os.listdir(tmp_path / "outbox")) == set(layout.CONTROL_FILES)
    messages = [entry.message for entry in caplog.records if "invalid event" in entry.message]
    assert len(messages) == 1
    assert named in messages[0]


@pytest.mark.parametrize(("named", "bad"), INVALID)
def test_on_invalid_raise_raises_an_error(tmp_path: Path, named: str, bad: object) -> None:
    """Useful in the tests of an application."""
    outbox = Outbox(str(tmp_path / "outbox"), event_type=Measurement, on_invalid="raise")
    with outbox, pytest.raises(InvalidEventError, match=named):
        outbox.enqueue(bad)  # type: ignore[arg-type]


def test_another_event_type_is_stored_and_delivered(tmp_path: Path) -> None:
    """Its table and columns come from the type."""
    with Outbox(str(tmp_path / "outbox"), sink=f"sqlite:///{tmp_path}/events.db", event_type=Measurement) as outbox:
        assert outbox.enqueue(Measurement("a", value=1.5))
        assert outbox.flush(60)
    with contextlib.closing(sqlite3.connect(tmp_path / "events.db")) as database:
        assert database.execute("SELECT * FROM measurement").fetchall() == [("a", 1.5)]


def test_enqueue_many_stores_all_events_in_one_batch(tmp_path: Path) -> None:
    """Invalid events are dropped individually."""
    sink = RecordingSink()
    with Outbox(str(tmp_path / "outbox"), sink=sink, batch_size=3) as outbox:
        outcomes = outbox.enqueue_many([event(1), "bad", *map(event, range(2, 10))])  # type: ignore[list-item]
        assert outcomes == [Enqueued(), Dropped("invalid"), *[Enqueued()] * 8]
        assert outbox.enqueue_many([]) == []
        assert outbox.flush(60)
    assert [len(batch) for batch in sink.batches.values()] == [9]


def test_a_call_with_too_many_bytes_is_dropped_as_a_whole(tmp_path: Path) -> None:
    """Even those events that would fit."""
    big = [event(number, metadata_json=json.dumps("x" * 200_000)) for number in range(CALL_BYTES_MAX // 200_000 + 1)]
    with Outbox(str(tmp_path / "outbox")) as outbox:
        assert set(outbox.enqueue_many(big)) == {Dropped("invalid")}
        assert outbox.stats().accepted == 0


def test_enqueue_async_stores_an_event(tmp_path: Path) -> None:
    """With durability "process", it writes in the calling thread."""
    with Outbox(str(tmp_path / "outbox")) as outbox:
        assert asyncio.run(outbox.enqueue_async(event(1), durability="process")) == Enqueued()


def test_an_unknown_durability_is_an_error(tmp_path: Path) -> None:
    """The error names the argument."""
    with Outbox(str(tmp_path / "outbox")) as outbox, pytest.raises(ConfigurationError, match="durability"):
        outbox.enqueue(event(1), durability="forever")  # type: ignore[arg-type]


def test_a_delivered_batch_is_no_longer_pending_in_any_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if `stats` is called between the deletion of the file and the update of the counts."""
    deleted, stats_called, snapshots = threading.Event(), threading.Event(), []
    original_release = Writer.release_bytes

    def release(writer: Writer, size: int, files: int = 1) -> None:
        deleted.set()
        stats_called.wait(60)
        original_release(writer, size, files)

    monkeypatch.setattr(Writer, "release_bytes", release)
    with Outbox(str(tmp_path / "a"), sink=RecordingSink(), flush_interval=0.02) as outbox:
        outbox.enqueue(event(1))
        assert deleted.wait(60)
        thread = threading.Thread(target=lambda: snapshots.append(outbox.stats()))
        thread.start()
        thread.join(0.1)
        stats_called.set()
        thread.join(60)
    assert [(stats.delivered, stats.pending_files, stats.pending_bytes) for stats in snapshots] == [(1, 0, 0)]


def test_flush_waits_for_delivery_up_to_its_timeout(tmp_path: Path) -> None:
    """It returns False if events are still pending."""
    with Outbox(str(tmp_path / "a"), sink=RecordingSink([Retry("busy", 60.0)])) as outbox:
        outbox.enqueue(event(1))
        assert not outbox.flush(0.2)
        wait_until(lambda: outbox.stats().state.name == "waiting")
        assert outbox.stats().pending_files == 1
        outbox.close(0.5)
    assert len(list((tmp_path / "a").glob("sealed-*"))) == 1


def test_undelivered_events_are_delivered_by_the_next_process(tmp_path: Path) -> None:
    """They stayed on disk."""
    with Outbox(str(tmp_path / "a"), sink=RecordingSink([Retry("busy", 60.0)])) as outbox:
        outbox.enqueue(event(1))
        outbox.close(0.2)
    sink = RecordingSink()
    with Outbox(str(tmp_path / "a"), sink=sink) as outbox:
        assert outbox.flush(60)
    assert len(sink.payloads) == 1


def test_sink_must_be_a_url_a_sink_or_none(tmp_path: Path) -> None:
    """The error names what was passed."""
    with pytest.raises(ConfigurationError, match=r"^sink: use a URL, a Sink or None, not int$"):
        Outbox(str(tmp_path / "a"), sink=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"^sink = 'ftp://host' .*: use a URL that begins with one of "):
        Outbox(str(tmp_path / "a"), sink="ftp://host")


def test_passwords_in_the_url_of_a_sink_are_not_shown(tmp_path: Path) -> None:
    """Neither in `repr` nor in an error."""
    with pytest.raises(ConfigurationError) as caught:
        Outbox(str(tmp_path / "a"), sink="nosuch://user:secret@host/db?token=secret")
    assert "secret" not in str(caught.value)
    assert "hidden" not in repr(Outbox(str(tmp_path / "a"), sink=f"sqlite:///{tmp_path}/a.db?table=hidden"))


def test_a_forked_child_writes_to_its_own_segment(tmp_path: Path) -> None:
    """All events of both processes arrive once, and the child does not keep the parent's locks."""
    outbox = Outbox(str(tmp_path / "a"), sink=f"sqlite:///{tmp_path}/events.db")
    for number in range(10):
        assert outbox.enqueue(event(number))
    pid = os.fork()
    if pid == 0:
        stored = all(outbox.enqueue(event(number)) for number in range(10, 20))
        outbox.close()
        os._exit(0 if stored else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for number in range(20, 30):
        assert outbox.enqueue(event(number))
    outbox.close()
    with Outbox(str(tmp_path / "a"), sink=f"sqlite:///{tmp_path}/events.db") as reopened:
        assert reopened.flush(60)
    ids = [str(row["event_id"]) for row in delivered_rows(tmp_path / "events.db")]
    assert sorted(ids) == [f"e-{number:06d}" for number in range(30)]


PROGRAM = """
import sys
from pillarbox import Outbox, Outcome, TrackingEvent
outbox = Outbox(sys.argv[1], sink=sys.argv[2])
for number in range(3):
    outbox.enqueue(TrackingEvent(event_id=str(number), event_key="k", scope_kind="Site", scope_id="s"))
"""


def test_a_program_that_exits_without_close_delivers_its_events(tmp_path: Path) -> None:
    """At its exit, within seconds."""
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "a"), f"sqlite:///{tmp_path}/events.db"]
    subprocess.run(arguments, check=True, timeout=60)
    assert len(delivered_rows(tmp_path / "events.db")) == 3


def test_a_signal_handler_may_enqueue_during_an_enqueue(tmp_path: Path) -> None:
    """A hundred timer signals, nested on a slow machine: no deadlock, no torn line, and all events are counted."""
    sink = RecordingSink()
    handled: list[Outcome] = []
    numbers = itertools.count(10**6)
    with Outbox(str(tmp_path / "a"), sink=sink, batch_size=50) as outbox:
        depth = 0

        def handle(_signal: int, _frame: object) -> None:
            nonlocal depth
            depth += 1
            if depth < 3:  # on a busy machine a handler may take longer than the timer, so the nesting needs a limit
                signal.setitimer(signal.ITIMER_REAL, 0.001)
            handled.append(outbox.enqueue(event(next(numbers))))
            depth -= 1
            if depth == 0:
                signal.setitimer(signal.ITIMER_REAL, 0.001)

        previous_handler = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        number = 0
        try:
            while len(handled) < 100:
                assert outbox.enqueue(event(number))
                number += 1
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous_handler)
        assert outbox.flush(60)
    assert all(handled)
    ids = [json.loads(payload)["event_id"] for payload in sink.payloads]
    assert len(ids) == len(set(ids)) == number + len(handled) == outbox.stats().accepted


def test_a_state_change_is_logged_once_and_not_for_each_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A hundred drops make one line."""
    caplog.set_level(logging.INFO, "pillarbox")
    # A long interval, so that no poll happens to find free space, which would end the state.
    with Outbox(str(tmp_path / "a"), max_bytes=1000, flush_interval=60) as outbox:
        for number in range(100):
            outbox.enqueue(event(number))
        outbox.flush(0.2)
    assert len([entry for entry in caplog.records if entry.message.endswith("/a: dropping events: max_bytes")]) == 1
    assert len(caplog.records) < 10


def test_an_event_type_must_have_an_id(tmp_path: Path) -> None:
    """This is checked when the outbox is created."""
    with pytest.raises(ValueError, match="event_id"):
        Outbox(str(tmp_path), event_type=msgspec.defstruct("NoId", ["name"]))


def test_tracking_events_are_the_default() -> None:
    """The event type need not be named."""
    assert Outbox.__init__.__defaults__ == (None, TrackingEvent)


def test_a_nested_enqueue_during_the_start_does_not_start_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event is dropped, because otherwise two sealers would use one writer."""
    outbox = Outbox(str(tmp_path / "a"))
    nested_outcomes: list[Outcome] = []
    original_disk_usage = Directory.disk_usage

    def disk_usage(self: Directory) -> DiskUsage:
        if not nested_outcomes:
            nested_outcomes.append(Dropped("io_error"))
            nested_outcomes[0] = outbox.enqueue(event(1))
        return original_disk_usage(self)

    monkeypatch.setattr(Directory, "disk_usage", disk_usage)
    before = set(threading.enumerate())
    assert outbox.enqueue(event(2))
    assert nested_outcomes == [Dropped("would_block")]
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["pillarbox-sealer"]
    assert outbox.enqueue(event(3))
    outbox.close()


def test_a_sink_object_is_not_used_in_a_forked_child(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its connections belong to the parent. The child stores events, and the parent delivers them."""
    sink = RecordingSink()
    with Outbox(str(tmp_path / "a"), sink=sink) as outbox:
        assert outbox.enqueue(event(1))
        pid = os.fork()
        if pid == 0:
            passed = bool(outbox.enqueue(event(2))) and not outbox._sinks
            messages = [record.getMessage() for record in caplog.records]
            passed &= any(
                "a sink object cannot be used after fork; this process only stores events" in line for line in messages
            )
            passed &= not any("invalid event" in line for line in messages)
            outbox.close()
            os._exit(0 if passed else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert outbox.flush(60)
    assert sorted(json.loads(payload)["event_id"] for payload in sink.payloads) == ["e-000001", "e-000002"]


def test_a_directory_that_cannot_be_listed_is_logged_once_and_not_as_an_invalid_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Events are dropped until it can be listed; then they are stored."""
    with monkeypatch.context() as patch:

        def disk_usage(_self: Directory) -> DiskUsage:
            raise OSError(5, "Input/output error")

        outbox = Outbox(str(tmp_path / "a"))
        patch.setattr(Directory, "disk_usage", disk_usage)
        assert [outbox.enqueue(event(number)) for number in range(3)] == [Dropped("io_error")] * 3
    why, drops = [entry.getMessage() for entry in caplog.records]
    assert "drops events until it can start: cannot list the directory: [Errno 5] Input/output error" in why
    assert drops.endswith("a: dropping events: io_error")
    assert outbox.enqueue(event(4))
    outbox.close()


class RawJsonEvent(msgspec.Struct, frozen=True):
    """An event type with a field of raw JSON."""

    event_id: str
    raw: msgspec.Raw


@pytest.mark.parametrize("trusted", [False, True])
def test_a_line_feed_in_raw_json_is_invalid(tmp_path: Path, trusted: bool) -> None:
    """A record is a line."""
    with Outbox(str(tmp_path / "a"), event_type=RawJsonEvent, trusted=trusted) as outbox:
        assert outbox.enqueue(RawJsonEvent("a", msgspec.Raw(b'{"x":1}')))
        assert outbox.enqueue(RawJsonEvent("b", msgspec.Raw(b'{\n"x":1}'))) == Dropped("invalid")


def to_json(original: TrackingEvent, **changes: object) -> bytes:
    """An event as JSON, with fields added or replaced; None removes a field."""
    fields = json.loads(msgspec.json.encode(original)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_enqueue_json_stores_events_byte_for_byte_in_one_write(tmp_path: Path, durability: Durability) -> None:
    """With their spaces, unknown fields and order of fields. They are delivered like other events."""
    payloads = [
        b'  {"later": {"a": [1.50, "\xc3\xa4", null]}, ' + to_json(event(1))[1:] + b"\r\n",
        to_json(event(2), user_id=None, metadata_json='{"a":\n1}'),
        to_json(event(3)).replace(b", ", b" ,\n\t"),
        msgspec.json.encode(event(4)),
    ]
    outbox = Outbox(str(tmp_path / "outbox"), batch_size=2, flush_interval=3600)
    assert outbox.enqueue_json(iter(payloads), durability=durability) == [Enqueued(durability)] * 4
    outbox.close()
    (file,) = (tmp_path / "outbox").glob("sealed-*")
    stored = [record.payload(line) for line in file.read_bytes().splitlines()]
    assert stored == [payload.strip().replace(b"\n", b"") for payload in payloads]
    assert [json.loads(value) for value in stored] == [json.loads(payload) for payload in payloads]
    with Outbox(str(tmp_path / "outbox"), sink=f"sqlite:///{tmp_path}/events.db") as outbox:
        assert outbox.flush(60)
    assert [row["event_id"] for row in delivered_rows(tmp_path / "events.db")] == [
        event(number).event_id for number in (1, 2, 3, 4)
    ]


BAD_JSON = [
    ("event", "text"),
    ("event", {"event_id": "a"}),
    ("truncated", b""),
    ("truncated", b'{"event_id": "a"'),
    ("malformed", to_json(event(1)) + to_json(event(2))),
    ("malformed", b"\xef\xbb\xbf" + to_json(event(1))),
    ("object", b"[]"),
    ("event_key", to_json(event(1), event_key=None)),
    ("event_id", to_json(event(1), event_id=None)),
    ("event_id", to_json(event(1), event_id=5)),
    ("occurred_at_micros", to_json(event(1), occurred_at_micros=None)),
    ("occurred_at_micros", to_json(event(1), occurred_at_micros=2**63)),
    ("metadata_json", to_json(event(1), metadata_json="{")),
    ("64 bits", to_json(event(1), later={"a": [2**64]})),
    ("64 bits", to_json(event(1), later={"a": -(2**63) - 1})),
    ("range", to_json(event(1))[:-1] + b', "later": 1e999}'),
    ("utf-8", to_json(event(1))[:-1] + b', "later": "\xff"}'),
    ("truncated", to_json(event(1))[:-1] + b', "later": "\\ud800"}'),
    ("malformed", to_json(event(1))[:-1] + b', "later": NaN}'),
    ("invalid character", to_json(event(1)).replace(b"click", b"cl\nick")),
    ("recursion", to_json(event(1))[:-1] + b', "later": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ("bytes", to_json(event(1), user_id="x" * 300_000)),
]


@pytest.mark.parametrize(("named", "bad"), BAD_JSON)
def test_invalid_json_is_dropped_and_the_other_events_are_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str, bad: Any
) -> None:
    """Whatever is wrong with it. Each event has an outcome, in order."""
    valid = to_json(event(1))
    with Outbox(str(tmp_path / "outbox")) as outbox:
        assert outbox.enqueue_json([valid, bad, valid]) == [Enqueued(), Dropped("invalid"), Enqueued()]
        assert outbox.enqueue_json([bad]) == [Dropped("invalid")]
        assert outbox.enqueue_json([]) == []
        stats = outbox.stats()
    assert (stats.accepted, stats.dropped["invalid"]) == (2, 2)
    (line,) = [line.message for line in caplog.records if "invalid event" in line.message]
    assert named in line
    with Outbox(str(tmp_path / "strict"), on_invalid="raise") as outbox, pytest.raises(InvalidEventError):
        outbox.enqueue_json([valid, bad])


def test_enqueue_json_drops_the_whole_call_if_it_is_too_large_or_there_is_no_room(tmp_path: Path) -> None:
    """Like `enqueue_many`. A closed outbox drops it, too."""
    payloads = [to_json(event(number), metadata_json='"' + "x" * 200_000 + '"') for number in range(90)]
    assert sum(map(len, payloads)) > CALL_BYTES_MAX
    with Outbox(str(tmp_path / "outbox"), max_bytes=10_000_000) as outbox:
        assert outbox.enqueue_json(payloads) == [Dropped("invalid")] * 90
        assert outbox.enqueue_json([*payloads[:60], b"{"]) == [*[Dropped("max_bytes")] * 60, Dropped("invalid")]
        assert outbox.enqueue_json(payloads[:40]) == [Enqueued()] * 40
    assert outbox.enqueue_json(payloads[:1]) == [Dropped("closed")]


def test_json_of_another_event_type_is_validated_against_that_type(tmp_path: Path) -> None:
    """The id is required; fields with defaults may be missing."""

    class RenamedIdEvent(msgspec.Struct):
        event_id: str = msgspec.field(default_factory=lambda: "new", name="id")
        lines: list[int] = []

    with Outbox(str(tmp_path / "outbox"), event_type=RenamedIdEvent) as outbox:
        payloads = [b'{"id":"a"}', b'{"lines":[1]}', b'{"id":"b","lines":[1.5]}', b'{"id":"c","lines":[12345678901234567890]}']
        invalid = Dropped("invalid")
        assert outbox.enqueue_json(payloads) == [Enqueued(), invalid, invalid, Enqueued()]
