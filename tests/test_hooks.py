"""The application's own functions: what they are asked and told, and that nothing is lost where they raise."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox import Dropped, Enqueued, InvalidEventError, Outbox, OutboxFullError, Outcome, TrackingEvent
from pillarbox.delivery.batch import DeadLetter
from pillarbox.hooks import Hooks
from pillarbox.outcome import Durability
from pillarbox.sinks.base import PartialFailure, Rejection
from pillarbox.testing import RecordingSink
from tests.conftest import event, wait_until


def stored(directory: Path) -> list[dict[str, Any]]:
    """What is in the files, in order."""
    files = sorted(directory.glob("sealed-*")) + sorted(directory.glob("active-*"))
    return [json.loads(line)["event"] for file in files for line in file.read_bytes().splitlines()]


def redact(given: TrackingEvent) -> TrackingEvent | None:
    """Takes out who it was; clicks of robots are nothing."""
    return None if given.event_key == "robot" else msgspec.structs.replace(given, user_id=None)


def enqueue_one(outbox: Outbox, given: TrackingEvent, way: str, durability: Durability) -> Outcome:
    """By one of the ways in."""
    if way == "many":
        return outbox.enqueue_many([given], durability=durability)[0]
    if way == "async":
        return asyncio.run(outbox.enqueue_async(given, durability=durability))
    return outbox.enqueue(given, durability=durability)


WAYS = [(way, durability) for way in ("one", "many", "async") for durability in ("process", "power")]


@pytest.mark.parametrize(("way", "durability"), WAYS)
@pytest.mark.parametrize("when_full", ["drop_newest", "drop_oldest", "block", "raise"])
def test_before_send_changes_and_filters_what_comes_in(
    tmp_path: Path, way: str, durability: Durability, when_full: Any
) -> None:
    """By every way in, whatever becomes of events without room; the hook runs once an event."""
    asked: list[str] = []

    def before_send(given: TrackingEvent) -> TrackingEvent | None:
        asked.append(given.event_id)
        return redact(given)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send, when_full=when_full) as outbox:
        assert enqueue_one(outbox, event(1, user_id="u"), way, durability) == Enqueued(durability)
        assert enqueue_one(outbox, event(2, event_key="robot"), way, durability) == Dropped("filtered")
        assert enqueue_one(outbox, event(3, user_id="u"), way, durability) == Enqueued(durability)
        assert asked == ["e-000001", "e-000002", "e-000003"]
        stats = outbox.stats()
    assert (stats.accepted, stats.dropped["filtered"], sum(stats.dropped.values())) == (2, 1, 1)
    assert [(found["event_id"], found["user_id"]) for found in stored(tmp_path / "outbox")] == [
        ("e-000001", None),
        ("e-000003", None),
    ]


def test_many_events_are_asked_about_one_by_one(tmp_path: Path) -> None:
    """One outcome each, in order; what is no event is not shown to the hook."""
    with Outbox(str(tmp_path / "outbox"), before_send=redact) as outbox:
        events = [event(1), event(2, event_key="robot"), "no event", event(3)]
        outcomes = outbox.enqueue_many(events)  # type: ignore[arg-type]
        assert outcomes == [Enqueued(), Dropped("filtered"), Dropped("invalid"), Enqueued()]
        assert outbox.stats().hook_failures["before_send"] == 0


@pytest.mark.parametrize(("way", "durability"), WAYS)
def test_an_event_for_which_there_is_no_room_is_asked_about_once(tmp_path: Path, way: str, durability: Durability) -> None:
    """Not once a try; blocked, it waits, and raised, it raises."""
    asked: list[str] = []

    def before_send(given: TrackingEvent) -> TrackingEvent:
        asked.append(given.event_id)
        return given

    common: dict[str, Any] = {"max_bytes": 10, "before_send": before_send}
    with Outbox(str(tmp_path / "a"), when_full="block", block_timeout=0.1, **common) as outbox:
        # On an event loop's thread only the way for coroutines waits.
        assert enqueue_one(outbox, event(1), way, durability) == Dropped("timeout")
    with Outbox(str(tmp_path / "b"), when_full="raise", **common) as outbox, pytest.raises(OutboxFullError):
        enqueue_one(outbox, event(2), way, durability)
    assert asked == ["e-000001", "e-000002"]


@pytest.mark.parametrize(("way", "durability"), WAYS)
def test_a_hook_that_raises_loses_nothing_and_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str, durability: Durability
) -> None:
    """The event is stored as it was given; the log has one line with a traceback, and every time is counted."""

    def before_send(given: TrackingEvent) -> TrackingEvent:
        raise KeyError(given.event_key)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        for number in range(3):
            assert enqueue_one(outbox, event(number, user_id="u"), way, durability)
        assert outbox.stats().hook_failures == {"before_send": 3, "on_drop": 0, "on_dead_letter": 0}
    assert [found["user_id"] for found in stored(tmp_path / "outbox")] == ["u"] * 3
    (line,) = [line for line in caplog.records if "before_send raised" in line.message]
    assert "the event is stored unchanged" in line.message
    assert line.exc_info is not None
    assert line.exc_info[0] is KeyError


def test_a_program_may_end_itself_from_before_send(tmp_path: Path) -> None:
    """What is no `Exception` goes through, and the thread's next event comes past the hook again."""
    ends = iter([True, False])

    def before_send(given: TrackingEvent) -> TrackingEvent:
        if next(ends):
            raise SystemExit(3)
        return msgspec.structs.replace(given, user_id=None)

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        with pytest.raises(SystemExit):
            outbox.enqueue(event(1, user_id="u"))
        assert outbox.enqueue(event(2, user_id="u"))
        assert outbox.stats().hook_failures["before_send"] == 0
    assert [(found["event_id"], found["user_id"]) for found in stored(tmp_path / "outbox")] == [("e-000002", None)]


@pytest.mark.parametrize(("way", "durability"), WAYS)
@pytest.mark.parametrize("wrong", [{"event_id": "a"}, "text", False, Dropped("filtered")])
def test_what_before_send_returns_of_the_wrong_type_is_invalid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str, durability: Durability, wrong: Any
) -> None:
    """It cannot be stored, and the log names the hook."""
    with Outbox(str(tmp_path / "outbox"), before_send=lambda _: wrong) as outbox:
        assert enqueue_one(outbox, event(1), way, durability) == Dropped("invalid")
        assert outbox.stats().dropped["invalid"] == 1
    assert "; it must return a TrackingEvent or None" in caplog.text
    with (
        Outbox(str(tmp_path / "strict"), before_send=lambda _: wrong, on_invalid="raise") as outbox,
        pytest.raises(InvalidEventError, match=r"^before_send: returned a "),
    ):
        enqueue_one(outbox, event(1), way, durability)


@pytest.mark.parametrize(("way", "durability"), WAYS)
def test_a_hook_may_itself_enqueue(tmp_path: Path, way: str, durability: Durability) -> None:
    """Without hooks, so that it does not go on for ever; the next event comes past the hook again."""
    asked = []

    def before_send(given: TrackingEvent) -> TrackingEvent:
        asked.append(given.event_id)
        assert outbox.enqueue(msgspec.structs.replace(given, event_key="seen"), durability=durability)
        return given

    with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
        for number in range(2):
            assert enqueue_one(outbox, event(number), way, durability)
        assert outbox.stats().hook_failures["before_send"] == 0
    assert asked == ["e-000000", "e-000001"]
    assert [found["event_key"] for found in stored(tmp_path / "outbox")] == ["seen", "click"] * 2


def test_a_log_handler_that_enqueues_does_not_come_back_to_the_hook_that_raises(tmp_path: Path) -> None:
    """The report of the failure is itself an event for it."""

    class Handler(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            outbox.enqueue(event(9, event_key=line.levelname))

    def before_send(_: TrackingEvent) -> TrackingEvent:
        raise ValueError

    log, handler = logging.getLogger("pillarbox"), Handler(logging.ERROR)
    log.addHandler(handler)
    try:
        with Outbox(str(tmp_path / "outbox"), before_send=before_send) as outbox:
            assert outbox.enqueue(event(1))
            assert outbox.stats().hook_failures["before_send"] == 1
    finally:
        log.removeHandler(handler)
    assert [found["event_key"] for found in stored(tmp_path / "outbox")] == ["ERROR", "click"]


def test_a_hook_does_not_wait_for_room(tmp_path: Path) -> None:
    """On a thread of ours it would keep from happening what it waits for."""
    inner: list[Outcome] = []

    def before_send(given: TrackingEvent) -> None:
        inner.append(outbox.enqueue(given))

    with Outbox(str(tmp_path / "outbox"), max_bytes=10, when_full="block", block_timeout=5, before_send=before_send) as outbox:
        assert outbox.enqueue(event(1)) == Dropped("filtered")
    assert inner == [Dropped("would_block")]


def test_a_disabled_outbox_asks_nothing(tmp_path: Path) -> None:
    """Nor does it touch the disk; what it refuses is reported at once, for it has no thread."""
    told: Counter[str] = Counter()
    outbox = Outbox(
        str(tmp_path / "outbox"),
        enabled=False,
        before_send=lambda _: pytest.fail("asked"),
        on_drop=lambda reason, count: told.update({reason: count}),
    )
    assert outbox.enqueue(event(1)) == Dropped("disabled")
    assert outbox.enqueue_many([event(1), event(2)]) == [Dropped("disabled")] * 2
    assert outbox.enqueue_json([b"{}"]) == [Dropped("disabled")]
    assert asyncio.run(outbox.enqueue_async(event(1), durability="process")) == Dropped("disabled")
    assert told == {"disabled": 5}
    outbox.close()


def test_events_json_does_not_come_past_before_send(tmp_path: Path) -> None:
    """It was there already."""
    with Outbox(str(tmp_path / "outbox"), before_send=lambda _: None) as outbox:
        assert outbox.enqueue_json([msgspec.json.encode(event(1))]) == [Enqueued()]


@pytest.mark.parametrize("when_full", ["drop_newest", "block", "raise"])
@pytest.mark.parametrize("durability", ["process", "power"])
def test_every_drop_is_reported_and_the_sum_is_that_of_the_counts(tmp_path: Path, when_full: Any, durability: Any) -> None:
    """Eight threads, an outbox that is full, events that are none, and the end in the middle of it."""
    told: Counter[str] = Counter()
    threads_told = set()

    def on_drop(reason: str, count: int) -> None:
        assert count > 0
        told[reason] += count
        threads_told.add(threading.current_thread().name)

    outbox = Outbox(
        str(tmp_path / "outbox"),
        max_bytes=20_000,
        batch_size=20,
        when_full=when_full,
        block_timeout=0.02,
        durability=durability,
        on_drop=on_drop,
        before_send=redact,
    )
    enough, closed = threading.Event(), threading.Event()

    def store(start: int) -> None:
        for number in range(start, start + 150):
            if number == start + 60:
                enough.set()
            if number == start + 100:
                closed.wait(60)
            given = event(number, event_key="robot" if number % 5 == 0 else "click")
            try:
                outbox.enqueue("no event" if number % 7 == 0 else given)  # type: ignore[arg-type]
                outbox.enqueue_many([given, given])
                outbox.enqueue_json([b"{", msgspec.json.encode(given)])
            except OutboxFullError:
                continue

    threads = [threading.Thread(target=store, args=(start,)) for start in range(0, 8000, 1000)]
    for thread in threads:
        thread.start()
    enough.wait(60)
    wait_until(lambda: "pillarbox-sealer" in threads_told)
    outbox.close()
    closed.set()
    for thread in threads:
        thread.join()
    counts = {reason: count for reason, count in outbox.stats().dropped.items() if count}
    assert told == counts
    assert {"invalid", "filtered", "closed"} <= told.keys()
    assert outbox.stats().hook_failures["on_drop"] == 0


def test_drops_are_reported_within_a_second_also_where_nothing_is_sealed(tmp_path: Path) -> None:
    """Never on the thread of the one who was refused, while a thread of ours runs."""
    told: list[tuple[str, int, str]] = []
    with Outbox(
        str(tmp_path / "outbox"),
        flush_interval=86_400,
        on_drop=lambda reason, count: told.append((reason, count, threading.current_thread().name)),
    ) as outbox:
        for _ in range(3):
            outbox.enqueue("no event")  # type: ignore[arg-type]
        wait_until(lambda: sum(count for _, count, _ in told) == 3)
    assert {(reason, name) for reason, _, name in told} == {("invalid", "pillarbox-sealer")}


def test_what_is_refused_before_the_start_and_after_the_end_is_reported_at_once(tmp_path: Path) -> None:
    """There is no thread of ours to do it."""
    told: list[tuple[str, int]] = []
    outbox = Outbox(str(tmp_path / "outbox"), on_drop=lambda reason, count: told.append((reason, count)))
    outbox.enqueue("no event")  # type: ignore[arg-type]
    assert told == [("invalid", 1)]
    assert outbox.enqueue(event(1))
    outbox.close()
    outbox.enqueue(event(2))
    outbox.enqueue_many([event(2), event(3)])
    assert told == [("invalid", 1), ("closed", 1), ("closed", 2)]


def test_what_was_refused_last_is_reported_at_the_end(tmp_path: Path) -> None:
    """Once `close` has returned, all is reported: also what nothing comes after."""
    told: Counter[str] = Counter()
    outbox = Outbox(str(tmp_path / "outbox"), on_drop=lambda reason, count: told.update({reason: count}))
    assert outbox.enqueue(event(1))
    for _ in range(3):
        outbox.enqueue("no event")  # type: ignore[arg-type]
    outbox.close()
    assert told == {"invalid": 3}


def test_what_is_tried_again_for_want_of_room_is_not_reported(tmp_path: Path) -> None:
    """Only what becomes of it; the thread that seals looks in the middle of an attempt."""
    told: Counter[str] = Counter()
    with Outbox(
        str(tmp_path / "outbox"),
        max_bytes=10,
        when_full="block",
        block_timeout=0.1,
        on_drop=lambda reason, count: told.update({reason: count}),
    ) as outbox:
        assert outbox.enqueue(event(1)) == Dropped("timeout")
        outbox._writer.drop("max_bytes")
        outbox.flush(5)
        outbox._writer.uncount_drop("max_bytes", 1)
    assert told == {"timeout": 1}


def test_an_on_drop_that_raises_or_enqueues_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not the thread that seals, not even by ending it; and what it enqueues does not come back to it at once."""
    asked = threading.Event()

    def on_drop(reason: str, _count: int) -> None:
        outbox.enqueue(event(7, event_key=reason))
        asked.set()
        raise SystemExit(1)

    outbox = Outbox(str(tmp_path / "outbox"), batch_size=1, on_drop=on_drop)
    assert outbox.enqueue(event(1))
    outbox.enqueue("no event")  # type: ignore[arg-type]
    assert asked.wait(60)
    assert outbox.enqueue(event(2))
    assert not outbox.flush(0.2)  # nobody delivers, but all is sealed
    wait_until(lambda: sum(outbox.stats().sealed.values()) >= 2)
    wait_until(lambda: outbox._directory.disk_usage().active_files == 0)
    outbox.close()
    outbox.enqueue(event(3))
    assert outbox.stats().dropped["closed"] == 2
    assert outbox.stats().hook_failures["on_drop"] == 2
    assert caplog.text.count("on_drop raised") == 1
    assert [found["event_key"] for found in stored(tmp_path / "outbox")] == ["click", "invalid", "click"]


def test_a_dead_letter_is_reported_once_it_is_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its event; a hook that raises then, or would end the thread, keeps nothing from being delivered."""
    told: list[tuple[str, str, bool]] = []

    def on_dead_letter(letter: DeadLetter) -> None:
        on_disk = any(bytes(letter.event) in file.read_bytes() for file in (tmp_path / "outbox").glob("dead-*"))
        told.append((json.loads(bytes(letter.event))["event_id"], letter.reason, on_disk))
        raise SystemExit

    refusals = {0: Rejection("bad", "too blue"), 2: Rejection("bad", "too red")}
    sink = RecordingSink([PartialFailure(refusals, accepted=1, duplicates=0)])
    with Outbox(str(tmp_path / "outbox"), sink=sink, on_dead_letter=on_dead_letter, flush_interval=60) as outbox:
        outbox.enqueue_many([event(number) for number in range(3)])
        assert outbox.flush(60)
        assert outbox.enqueue(event(9))
        assert outbox.flush(60)
        stats = outbox.stats()
    assert told == [("e-000000", "too blue", True), ("e-000002", "too red", True)]
    assert (stats.delivered, stats.dead, stats.hook_failures["on_dead_letter"]) == (2, 2, 2)
    assert caplog.text.count("on_dead_letter raised") == 1


def test_an_older_count_reports_nothing_anew() -> None:
    """Two threads may have copied the totals one after the other, and report the other way round."""
    told: list[tuple[str, int]] = []
    hooks = Hooks("outbox", on_drop=lambda reason, count: told.append((reason, count)))
    for totals in ({"closed": 5}, {"closed": 3, "invalid": 1}, {"closed": 6, "invalid": 1}):
        hooks.report_drops(totals)
    assert told == [("closed", 5), ("invalid", 1), ("closed", 1)]


def test_after_a_fork_the_hooks_stay_and_count_anew(tmp_path: Path) -> None:
    """The child's drops are its own, and so is the report of a hook that raises."""
    told: Counter[str] = Counter()

    def on_drop(reason: str, count: int) -> None:
        told[reason] += count
        raise ValueError(reason)

    outbox = Outbox(str(tmp_path / "outbox"), before_send=redact, on_drop=on_drop)
    assert outbox.enqueue(event(1, user_id="u"))
    for _ in range(3):
        outbox.enqueue(event(2, event_key="robot"))
    wait_until(lambda: told["filtered"] == 3)
    pid = os.fork()
    if pid == 0:
        fine = False
        try:
            told.clear()
            fine = outbox.stats().hook_failures["on_drop"] == 0
            fine &= bool(outbox.enqueue(event(4, user_id="u")))
            outbox.enqueue(event(5, event_key="robot"))
            outbox.close()
            fine &= told == {"filtered": 1} and outbox.stats().hook_failures["on_drop"] == 1
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    outbox.close()
    assert told == {"filtered": 3}
    assert [found["user_id"] for found in stored(tmp_path / "outbox")] == [None, None]
