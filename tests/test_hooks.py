"""The hooks of an application: when they are called and with what, and that no event is lost if one raises."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from pillarbox import Dropped, Enqueued, InvalidEventError, Outbox, OutboxFullError, Outcome, TrackingEvent
from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.hooks import Hooks
from pillarbox.outcome import Durability
from pillarbox.sinks.base import PartialFailure, Rejection
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until


def stored_events(directory: Path) -> list[dict[str, Any]]:
    """The events in all files, in order."""
    files = sorted(directory.glob("sealed-*")) + sorted(directory.glob("active-*"))
    return [json.loads(line)["event"] for file in files for line in file.read_bytes().splitlines()]


def anonymize(tracking_event: TrackingEvent) -> TrackingEvent | None:
    """Remove the user id, and filter out the clicks of robots."""
    return None if tracking_event.event_key == "robot" else msgspec.structs.replace(tracking_event, user_id=None)


def enqueue_one(outbox: Outbox, tracking_event: TrackingEvent, method: str, durability: Durability) -> Outcome:
    """Enqueue an event through one of the methods."""
    if method == "many":
        return outbox.enqueue_many([tracking_event], durability=durability)[0]
    if method == "async":
        return asyncio.run(outbox.enqueue_async(tracking_event, durability=durability))
    return outbox.enqueue(tracking_event, durability=durability)


METHODS = [(method, durability) for method in ("one", "many", "async") for durability in ("process", "power")]


@pytest.mark.parametrize(("method", "durability"), METHODS)
@pytest.mark.parametrize("when_full", ["drop_newest", "drop_oldest", "block", "raise"])
def test_before_send_changes_and_filters_events(tmp_path: Path, method: str, durability: Durability, when_full: Any) -> None:
    """With every method and every `when_full`. The hook runs once for each event."""
    hook_calls: list[str] = []

    def before_send(tracking_event: TrackingEvent) -> TrackingEvent | None:
        hook_calls.append(tracking_event.event_id)
        return anonymize(tracking_event)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send, when_full=when_full) as outbox:
        assert enqueue_one(outbox, event(1, user_id="u"), method, durability) == Enqueued(durability)
        assert enqueue_one(outbox, event(2, event_key="robot"), method, durability) == Dropped("filtered")
        assert enqueue_one(outbox, event(3, user_id="u"), method, durability) == Enqueued(durability)
        assert hook_calls == ["e-000001", "e-000002", "e-000003"]
        stats = outbox.stats()
    assert (stats.accepted, stats.dropped["filtered"], sum(stats.dropped.values())) == (2, 1, 1)
    assert [(stored["event_id"], stored["user_id"]) for stored in stored_events(tmp_path / "outbox")] == [
        ("e-000001", None),
        ("e-000003", None),
    ]


def test_enqueue_many_calls_the_hook_for_each_event(tmp_path: Path) -> None:
    """Each has an outcome, in order. The hook does not get an object that is not an event."""
    with Outbox(str(tmp_path / "outbox"), before_send=anonymize) as outbox:
        events = [event(1), event(2, event_key="robot"), "no event", event(3)]
        outcomes = outbox.enqueue_many(events)  # type: ignore[arg-type]
        assert outcomes == [Enqueued(), Dropped("filtered"), Dropped("invalid"), Enqueued()]
        assert outbox.stats().hook_failures["before_send"] == 0


@pytest.mark.parametrize(("method", "durability"), METHODS)
def test_the_hook_runs_once_for_an_event_without_room(tmp_path: Path, method: str, durability: Durability) -> None:
    """Not once for each attempt, whether `enqueue` blocks or raises."""
    hook_calls: list[str] = []

    def before_send(tracking_event: TrackingEvent) -> TrackingEvent:
        hook_calls.append(tracking_event.event_id)
        return tracking_event

    common: dict[str, Any] = {"max_bytes": 10, "before_send": before_send}
    with Outbox(str(tmp_path / "a"), when_full="block", block_timeout=0.1, **common) as outbox:
        # In the thread of an event loop, only `enqueue_async` waits.
        assert enqueue_one(outbox, event(1), method, durability) == Dropped("timeout")
    with Outbox(str(tmp_path / "b"), when_full="raise", **common) as outbox, pytest.raises(OutboxFullError):
        enqueue_one(outbox, event(2), method, durability)
    assert hook_calls == ["e-000001", "e-000002"]


@pytest.mark.parametrize(("method", "durability"), METHODS)
def test_if_before_send_raises_the_event_is_stored_unchanged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, durability: Durability
) -> None:
    """The log has one line with a traceback, and each failure is counted."""

    def before_send(tracking_event: TrackingEvent) -> TrackingEvent:
        raise KeyError(tracking_event.event_key)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        for number in range(3):
            assert enqueue_one(outbox, event(number, user_id="u"), method, durability)
        assert outbox.stats().hook_failures == {"before_send": 3, "on_drop": 0, "on_dead_letter": 0}
    assert [stored["user_id"] for stored in stored_events(tmp_path / "outbox")] == ["u"] * 3
    (line,) = [line for line in caplog.records if "before_send raised" in line.message]
    assert "the event is stored unchanged" in line.message
    assert line.exc_info is not None
    assert line.exc_info[0] is KeyError


def test_before_send_may_raise_system_exit(tmp_path: Path) -> None:
    """Exceptions that are not an `Exception` are raised, and the thread's next event passes through the hook again."""
    raises = iter([True, False])

    def before_send(tracking_event: TrackingEvent) -> TrackingEvent:
        if next(raises):
            raise SystemExit(3)
        return msgspec.structs.replace(tracking_event, user_id=None)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        with pytest.raises(SystemExit):
            outbox.enqueue(event(1, user_id="u"))
        assert outbox.enqueue(event(2, user_id="u"))
        assert outbox.stats().hook_failures["before_send"] == 0
    assert [(stored["event_id"], stored["user_id"]) for stored in stored_events(tmp_path / "outbox")] == [("e-000002", None)]


@pytest.mark.parametrize(("method", "durability"), METHODS)
@pytest.mark.parametrize("wrong", [{"event_id": "a"}, "text", False, Dropped("filtered")])
def test_a_result_of_before_send_with_the_wrong_type_is_invalid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, durability: Durability, wrong: Any
) -> None:
    """It cannot be stored, and the log names the hook."""
    with Outbox(str(tmp_path / "outbox"), before_send=lambda _: wrong) as outbox:
        assert enqueue_one(outbox, event(1), method, durability) == Dropped("invalid")
        assert outbox.stats().dropped["invalid"] == 1
    assert "; it must return a TrackingEvent or None" in caplog.text
    with (
        Outbox(str(tmp_path / "strict"), before_send=lambda _: wrong, on_invalid="raise") as outbox,
        pytest.raises(InvalidEventError, match=r"^before_send: returned a "),
    ):
        enqueue_one(outbox, event(1), method, durability)


@pytest.mark.parametrize(("method", "durability"), METHODS)
def test_before_send_may_enqueue(tmp_path: Path, method: str, durability: Durability) -> None:
    """The inner call runs without hooks, to prevent an endless recursion. The next event passes through the hook again."""
    hook_calls = []

    def before_send(tracking_event: TrackingEvent) -> TrackingEvent:
        hook_calls.append(tracking_event.event_id)
        assert outbox.enqueue(msgspec.structs.replace(tracking_event, event_key="seen"), durability=durability)
        return tracking_event

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        for number in range(2):
            assert enqueue_one(outbox, event(number), method, durability)
        assert outbox.stats().hook_failures["before_send"] == 0
    assert hook_calls == ["e-000000", "e-000001"]
    assert [stored["event_key"] for stored in stored_events(tmp_path / "outbox")] == ["seen", "click"] * 2


def test_a_log_handler_that_enqueues_does_not_call_the_failing_hook_again(tmp_path: Path) -> None:
    """The handler enqueues an event for the log line about the hook."""

    class EnqueuingHandler(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            outbox.enqueue(event(9, event_key=line.levelname))

    def before_send(_: TrackingEvent) -> TrackingEvent:
        raise ValueError

    log, handler = logging.getLogger("pillarbox"), EnqueuingHandler(logging.ERROR)
    log.addHandler(handler)
    try:
        with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
            assert outbox.enqueue(event(1))
            assert outbox.stats().hook_failures["before_send"] == 1
    finally:
        log.removeHandler(handler)
    assert [stored["event_key"] for stored in stored_events(tmp_path / "outbox")] == ["ERROR", "click"]


def test_before_send_does_not_wait_for_room(tmp_path: Path) -> None:
    """In a thread of Pillarbox, it would block the very work that makes room."""
    inner: list[Outcome] = []

    def before_send(tracking_event: TrackingEvent) -> None:
        inner.append(outbox.enqueue(tracking_event))

    with Outbox(str(tmp_path / "outbox"), max_bytes=10, when_full="block", block_timeout=5, before_send=before_send) as outbox:
        assert outbox.enqueue(event(1)) == Dropped("filtered")
    assert inner == [Dropped("would_block")]


def test_a_disabled_outbox_does_not_call_before_send(tmp_path: Path) -> None:
    """It does not touch the disk. It reports drops at once, because it has no thread."""
    reported: Counter[str] = Counter()
    outbox = Outbox(
        str(tmp_path / "outbox"),
        enabled=False,
        before_send=lambda _: pytest.fail("before_send was called"),
        on_drop=lambda reason, count: reported.update({reason: count}),
    )
    assert outbox.enqueue(event(1)) == Dropped("disabled")
    assert outbox.enqueue_many([event(1), event(2)]) == [Dropped("disabled")] * 2
    assert outbox.enqueue_json([b"{}"]) == [Dropped("disabled")]
    assert asyncio.run(outbox.enqueue_async(event(1), durability="process")) == Dropped("disabled")
    assert reported == {"disabled": 5}
    outbox.close()


def test_enqueue_json_does_not_call_before_send(tmp_path: Path) -> None:
    """The hook has already seen the event."""
    with Outbox(str(tmp_path / "outbox"), before_send=lambda _: None) as outbox:
        assert outbox.enqueue_json([msgspec.json.encode(event(1))]) == [Enqueued()]


@pytest.mark.parametrize("when_full", ["drop_newest", "block", "raise"])
@pytest.mark.parametrize("durability", ["process", "power"])
def test_the_reported_drops_add_up_to_the_counts(tmp_path: Path, when_full: Any, durability: Any) -> None:
    """Eight threads, a full outbox, invalid events, and a close in the middle."""
    reported: Counter[str] = Counter()
    reporting_threads = set()

    def on_drop(reason: str, count: int) -> None:
        assert count > 0
        reported[reason] += count
        reporting_threads.add(threading.current_thread().name)

    outbox = Outbox(
        str(tmp_path / "outbox"),
        max_bytes=20_000,
        batch_size=20,
        when_full=when_full,
        block_timeout=0.02,
        durability=durability,
        on_drop=on_drop,
        before_send=anonymize,
    )
    many_enqueued, closed = threading.Event(), threading.Event()

    def store(start: int) -> None:
        for number in range(start, start + 150):
            if number == start + 60:
                many_enqueued.set()
            if number == start + 100:
                closed.wait(60)
            tracking_event = event(number, event_key="robot" if number % 5 == 0 else "click")
            try:
                outbox.enqueue("no event" if number % 7 == 0 else tracking_event)  # type: ignore[arg-type]
                outbox.enqueue_many([tracking_event, tracking_event])
                outbox.enqueue_json([b"{", msgspec.json.encode(tracking_event)])
            except OutboxFullError:
                continue

    threads = [threading.Thread(target=store, args=(start,)) for start in range(0, 8000, 1000)]
    for thread in threads:
        thread.start()
    many_enqueued.wait(60)
    wait_until(lambda: "pillarbox-hooks" in reporting_threads)
    outbox.close()
    closed.set()
    for thread in threads:
        thread.join()
    counts = {reason: count for reason, count in outbox.stats().dropped.items() if count}
    assert reported == counts
    assert {"invalid", "filtered", "closed"} <= reported.keys()
    assert outbox.stats().hook_failures["on_drop"] == 0


def test_drops_are_reported_within_a_second_even_if_nothing_is_sealed(tmp_path: Path) -> None:
    """A thread of its own calls the hook, never the thread that called `enqueue`."""
    reported: list[tuple[str, int, str]] = []
    with Outbox(
        str(tmp_path / "outbox"),
        flush_interval=86_400,
        on_drop=lambda reason, count: reported.append((reason, count, threading.current_thread().name)),
    ) as outbox:
        for _ in range(3):
            outbox.enqueue("no event")  # type: ignore[arg-type]
        wait_until(lambda: sum(count for _, count, _ in reported) == 3)
    assert {(reason, name) for reason, _, name in reported} == {("invalid", "pillarbox-hooks")}


def test_an_on_drop_that_does_not_return_holds_up_nothing(tmp_path: Path) -> None:
    """Events are sealed and dropped as before, and `close` waits for the hook only as long as it may."""
    returns = threading.Event()
    outbox = Outbox(str(tmp_path / "outbox"), on_drop=lambda *_: returns.wait(60), batch_size=1)
    outbox.enqueue("no event")  # type: ignore[arg-type]
    wait_until(lambda: any(thread.name == "pillarbox-hooks" for thread in threading.enumerate()))
    for number in range(20):
        assert outbox.enqueue(event(number))
    wait_until(lambda: sum(path.read_bytes().count(b"\n") for path in (tmp_path / "outbox").glob("sealed-*")) == 20)
    start = time.monotonic()
    outbox.close(timeout=0.2)
    assert time.monotonic() - start < 5
    returns.set()


def test_drops_without_a_start_and_after_the_close_are_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At these times there is no sealer thread."""
    reported: list[tuple[str, int]] = []
    outbox = Outbox(str(tmp_path / "outbox"), on_drop=lambda reason, count: reported.append((reason, count)))
    with monkeypatch.context() as patch:
        patch.setattr(outbox._sealer, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        assert outbox.enqueue(event(1)) == Dropped("io_error")
        assert reported == [("io_error", 1)]
    assert outbox.enqueue(event(1))
    outbox.close()
    outbox.enqueue(event(2))
    outbox.enqueue_many([event(2), event(3)])
    assert reported == [("io_error", 1), ("closed", 1), ("closed", 2)]


def test_close_reports_the_last_drops(tmp_path: Path) -> None:
    """Before `close` returns."""
    reported: Counter[str] = Counter()
    outbox = Outbox(str(tmp_path / "outbox"), on_drop=lambda reason, count: reported.update({reason: count}))
    assert outbox.enqueue(event(1))
    for _ in range(3):
        outbox.enqueue("no event")  # type: ignore[arg-type]
    outbox.close()
    assert reported == {"invalid": 3}


def test_a_retry_for_lack_of_room_is_not_reported(tmp_path: Path) -> None:
    """Only its final outcome is. The sealer thread reports drops in the middle of an attempt."""
    reported: Counter[str] = Counter()
    with Outbox(
        str(tmp_path / "outbox"),
        max_bytes=10,
        when_full="block",
        block_timeout=0.1,
        on_drop=lambda reason, count: reported.update({reason: count}),
    ) as outbox:
        assert outbox.enqueue(event(1)) == Dropped("timeout")
        outbox._writer.drop("max_bytes")
        outbox.flush(5)
        outbox._writer.uncount_drop("max_bytes", 1)
    assert reported == {"timeout": 1}


def test_if_on_drop_raises_or_enqueues_sealing_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even if it raises SystemExit. The events that it enqueues do not call it again at once."""
    hook_called = threading.Event()

    def on_drop(reason: str, _count: int) -> None:
        outbox.enqueue(event(7, event_key=reason))
        hook_called.set()
        raise SystemExit(1)

    outbox = Outbox(str(tmp_path / "outbox"), batch_size=1, on_drop=on_drop)
    assert outbox.enqueue(event(1))
    outbox.enqueue("no event")  # type: ignore[arg-type]
    assert hook_called.wait(60)
    assert outbox.enqueue(event(2))
    assert not outbox.flush(0.2)  # without a sink nothing is delivered, but all is sealed
    wait_until(lambda: sum(outbox.stats().sealed.values()) >= 1)
    wait_until(lambda: outbox._directory.disk_usage().active_files == 0)
    outbox.close()
    outbox.enqueue(event(3))
    assert outbox.stats().dropped["closed"] == 2
    assert outbox.stats().hook_failures["on_drop"] == 2
    assert caplog.text.count("on_drop raised") == 1
    assert [stored["event_key"] for stored in stored_events(tmp_path / "outbox")] == ["click", "invalid", "click"]


def test_a_dead_letter_is_reported_once_it_is_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its event. If the hook raises, even SystemExit, delivery goes on."""
    reported: list[tuple[str, str, bool]] = []

    def on_dead_letter(letter: DeadLetter) -> None:
        on_disk = any(bytes(letter.event) in file.read_bytes() for file in (tmp_path / "outbox").glob("dead-*"))
        reported.append((json.loads(bytes(letter.event))["event_id"], letter.reason, on_disk))
        raise SystemExit

    refusals = {0: Rejection("bad", "too blue"), 2: Rejection("bad", "too red")}
    sink = RecordingSink([PartialFailure(refusals, accepted=1, duplicates=0)])
    with Outbox(str(tmp_path / "outbox"), sink=sink, on_dead_letter=on_dead_letter, flush_interval=60) as outbox:
        outbox.enqueue_many([event(number) for number in range(3)])
        assert outbox.flush(60)
        assert outbox.enqueue(event(9))
        assert outbox.flush(60)
        stats = outbox.stats()
    assert reported == [("e-000000", "too blue", True), ("e-000002", "too red", True)]
    assert (stats.delivered, stats.dead, stats.hook_failures["on_dead_letter"]) == (2, 2, 2)
    assert caplog.text.count("on_dead_letter raised") == 1


def test_an_older_count_is_not_reported_again() -> None:
    """Two threads may copy the totals one after the other, and report them in the reverse order."""
    reported: list[tuple[str, int]] = []
    hooks = Hooks("outbox", on_drop=lambda reason, count: reported.append((reason, count)))
    for totals in ({"closed": 5}, {"closed": 3, "invalid": 1}, {"closed": 6, "invalid": 1}):
        hooks.report_drops(totals)
    assert reported == [("closed", 5), ("invalid", 1), ("closed", 1)]


def test_after_a_fork_the_hooks_stay_and_their_counts_are_reset(tmp_path: Path) -> None:
    """The child counts and logs only its own drops and failures."""
    reported: Counter[str] = Counter()

    def on_drop(reason: str, count: int) -> None:
        reported[reason] += count
        raise ValueError(reason)

    outbox = Outbox(str(tmp_path / "outbox"), before_send=anonymize, on_drop=on_drop)
    assert outbox.enqueue(event(1, user_id="u"))
    for _ in range(3):
        outbox.enqueue(event(2, event_key="robot"))
    wait_until(lambda: reported["filtered"] == 3)
    pid = os.fork()
    if pid == 0:
        passed = False
        try:
            reported.clear()
            passed = outbox.stats().hook_failures["on_drop"] == 0
            passed &= bool(outbox.enqueue(event(4, user_id="u")))
            outbox.enqueue(event(5, event_key="robot"))
            outbox.close()
            passed &= reported == {"filtered": 1} and outbox.stats().hook_failures["on_drop"] == 1
        finally:
            os._exit(0 if passed else 1)
    assert os.waitpid(pid, 0)[1] == 0
    outbox.close()
    assert reported == {"filtered": 3}
    assert [stored["user_id"] for stored in stored_events(tmp_path / "outbox")] == [None, None]
