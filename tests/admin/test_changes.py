"""Replaying dead letters on disks that fail, with an outbox that stops accepting events."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.admin.changes import ADMIN_LOCK, ChangeExecutor, ChangeReport, Enqueuer, WriteLimits, acquire_lock
from pillarbox.admin.filters import RecordFilter
from pillarbox.admin.replay import DeadLetterReplayer, unchanged_event
from pillarbox.clock import SystemClock
from pillarbox.outcome import Dropped, Durability, Outcome
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.testing.fault import Fault, FaultFilesystem
from tests.admin.prepared_outboxes import (
    IDENTITY_DECODER,
    VALIDATOR,
    deliver_pending,
    delivered_rows,
    event_json,
    file_lines,
    outbox_with_dead_letters,
)

USUAL_LIMITS = WriteLimits(500, 10**6)
MATCH_ALL = RecordFilter()
SIX_DEAD_LETTERS = [event_json(number, 5) for number in range(6)]


def corrected_event(record: object) -> bytes:
    """The event with a scope of the right type."""
    return unchanged_event(record).replace(b":5,", b':"5",')  # type: ignore[arg-type]


class Replay:
    """A replay of all dead letters for which `edit` returns an event."""

    def __init__(self, box: Path, enqueuer: Enqueuer, fault: Fault | None = None, limits: WriteLimits = USUAL_LIMITS) -> None:
        self.directory = Directory(str(box), FaultFilesystem(OsFilesystem(), fault), SystemClock())
        self.report = ChangeReport()
        self.should_stop: Callable[[], bool] = lambda: False
        self.done: list[int] = []
        self._enqueuer = enqueuer
        self._limits = limits

    def run(
        self, edit: Callable[[object], bytes | None] = corrected_event, record_filter: RecordFilter = MATCH_ALL
    ) -> ChangeReport:
        ledger = LedgerWriter(Directory(self.directory.path, OsFilesystem(), SystemClock()), SystemClock())
        replayer = DeadLetterReplayer(self.directory, IDENTITY_DECODER, SystemClock(), record_filter, self.report)
        executor = ChangeExecutor(
            self.directory, ledger, self.report, self.should_stop, self.done.append, self._enqueuer, "process", self._limits
        )
        executor.execute(replayer.replay_changes(VALIDATOR, edit, lambda _record, _payload: None))
        return self.report


class LimitedEnqueuer:
    """The outbox, which accepts only some more events."""

    def __init__(self, outbox: Outbox, max_events: int) -> None:
        self.outbox = outbox
        self.left = max_events

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        events = list(payloads)
        if len(events) > self.left:
            return [Dropped("max_bytes") for _ in events]
        self.left -= len(events)
        return self.outbox.enqueue_json(events, durability=durability)


def ids(box: Path, pattern: str) -> list[str]:
    return [line.split(b'"event_id":"')[1][:8].decode() for line in file_lines(box, pattern)]


def test_replayed_dead_letters_leave_their_file_and_an_empty_file_is_deleted(tmp_path: Path) -> None:
    """They are delivered in the order of the file."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=2)
    with Outbox(str(box)) as outbox:
        first = Replay(box, outbox).run(record_filter=RecordFilter(event_ids=("w-000000", "w-000004")))
        assert (first.events, first.files, first.complete) == (2, 2, True)
        assert ids(box, "dead-*") == ["w-000001", "w-000002", "w-000003", "w-000005"]
        assert Replay(box, outbox).run().events == 4
        assert not list(box.glob("dead-*"))
    deliver_pending(box, tmp_path / "events.db")
    delivered = [event_id for event_id, scope in delivered_rows(tmp_path / "events.db") if scope == "5"]
    assert delivered == ["w-000000", "w-000004", "w-000001", "w-000002", "w-000003", "w-000005"]


def test_when_the_outbox_is_full_the_remaining_dead_letters_stay(tmp_path: Path) -> None:
    """Also in the middle of a file; the next files are not tried."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=2)
    with Outbox(str(box)) as outbox:
        report = Replay(box, LimitedEnqueuer(outbox, 2), limits=WriteLimits(1, 10**6)).run()
    assert (report.events, report.drop_reason, report.complete) == (2, "max_bytes", False)
    assert ids(box, "dead-*") == ["w-000002", "w-000003", "w-000004", "w-000005"]


def test_an_event_that_the_outbox_drops_stays_and_the_others_are_replayed(tmp_path: Path) -> None:
    """A drop for a reason that concerns one event only."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS)

    class FilteringEnqueuer(LimitedEnqueuer):
        def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
            return [
                Dropped("filtered") if b"w-000003" in payload else self.outbox.enqueue_json([payload], durability=durability)[0]
                for payload in payloads
            ]

    with Outbox(str(box)) as outbox:
        report = Replay(box, FilteringEnqueuer(outbox, 0)).run()
    assert (report.events, report.problems_count) == (5, 1)
    assert "filtered" in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000003"]


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("verb", ["create", "write_all", "sync_data", "rename"])
def test_a_file_that_cannot_be_rewritten_stays_as_it_was(tmp_path: Path, verb: str, files: int) -> None:
    """Its events are enqueued; the next attempt enqueues them again under the same ids."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=files)
    before = ids(box, "dead-*")
    database = tmp_path / "events.db"
    with Outbox(str(box)) as outbox:
        chosen = RecordFilter(event_ids=("w-000000", "w-000005"))
        report = Replay(box, outbox, Fault(verb, 1, errno.ENOSPC, permanent=True)).run(record_filter=chosen)
        assert (report.events, report.problems_count, report.complete) == (0, files, False)
        assert "enqueues its events a second time" in report.problems[0].problem
        assert ids(box, "dead-*") == before
        assert not list(box.glob("dead-*.aside"))
        assert Replay(box, outbox).run(record_filter=chosen).complete
    deliver_pending(box, database)
    assert [event_id for event_id, scope in delivered_rows(database) if scope == "5"] == ["w-000000", "w-000005"]


def test_a_file_that_cannot_be_removed_is_reported(tmp_path: Path) -> None:
    """The other files are changed."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=2)
    with Outbox(str(box)) as outbox:
        report = Replay(box, outbox, Fault("unlink", 1, errno.EIO)).run()
    assert (report.events, report.problems_count) == (3, 1)
    assert ids(box, "dead-*") == ["w-000000", "w-000001", "w-000002"]


@pytest.mark.parametrize(("verb", "problem"), [("open_existing", "cannot be read"), ("read_all", "cannot be read")])
def test_a_file_that_cannot_be_read_is_reported_and_stays(tmp_path: Path, verb: str, problem: str) -> None:
    """The other files are changed."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=2)
    with Outbox(str(box)) as outbox:
        report = Replay(box, outbox, Fault(verb, 1, errno.EIO)).run()
    assert report.events == 3
    assert problem in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000000", "w-000001", "w-000002"]


@pytest.mark.parametrize(("nth", "events", "message"), [(1, 0, "nothing was changed"), (2, 6, "a power loss may undo")])
def test_a_failed_fsync_of_the_directory_is_reported(tmp_path: Path, nth: int, events: int, message: str) -> None:
    """Before the first change nothing is changed; afterwards, a power loss may bring a file back."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS)
    with Outbox(str(box)) as outbox:
        report = Replay(box, outbox, Fault("sync_directory", nth, errno.EIO)).run()
    assert (report.events, report.complete) == (events, False)
    assert message in report.problems[0].problem
    assert len(file_lines(box, "dead-*")) == 6 - events


def test_a_replay_that_is_stopped_finishes_the_current_group(tmp_path: Path) -> None:
    """Completed changes stay; the remaining dead letters are not changed."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=3)
    with Outbox(str(box)) as outbox:
        replay = Replay(box, outbox, limits=WriteLimits(1, 10**6))
        replay.should_stop = lambda: len(replay.done) == 1
        report = replay.run()
    assert (report.interrupted, report.events, report.complete) == (True, 2, False)
    assert ids(box, "dead-*") == ["w-000002", "w-000003", "w-000004", "w-000005"]


def test_an_event_that_is_still_invalid_is_reported_and_stays(tmp_path: Path) -> None:
    """The others are replayed."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS)
    with Outbox(str(box)) as outbox:
        report = Replay(box, outbox).run(
            lambda record: unchanged_event(record) if b"w-000001" in unchanged_event(record) else corrected_event(record)  # type: ignore[arg-type]
        )
    assert (report.events, report.problems_count) == (5, 1)
    assert "not a valid TrackingEvent" in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000001"]


def test_one_command_at_a_time_can_make_changes(tmp_path: Path) -> None:
    """Closing the lock file releases the lock."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS)
    directory = Directory(str(box), OsFilesystem(), SystemClock())
    first = acquire_lock(directory)
    assert first is not None
    assert acquire_lock(directory) is None
    directory.filesystem.close(first.fd)
    second = acquire_lock(directory)
    assert second is not None
    directory.filesystem.close(second.fd)
    assert (box / ADMIN_LOCK).exists()


def test_the_ledger_is_written_before_the_files_are_changed(tmp_path: Path) -> None:
    """One entry for each file, with its batch."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS, files=2)
    batches = sorted(file.stem.removeprefix("dead-") for file in box.glob("dead-*"))
    with Outbox(str(box)) as outbox:
        Replay(box, outbox, Fault("unlink", 1, errno.EIO, permanent=True)).run()
    entries = [line for line in file_lines(box, "ledger.ndjson") if b"replayed" in line]
    assert len(entries) == 2
    for batch, entry in zip(batches, entries, strict=True):
        assert batch.encode() in entry
        assert b'"events":3' in entry


def test_without_a_writable_ledger_the_changes_are_made_and_that_is_reported(tmp_path: Path) -> None:
    """Recovery never needs the ledger."""
    box = outbox_with_dead_letters(tmp_path, SIX_DEAD_LETTERS)
    (box / "ledger.ndjson").unlink(missing_ok=True)
    (box / "ledger.ndjson").mkdir()
    with Outbox(str(box)) as outbox:
        report = Replay(box, outbox).run()
    assert (report.events, report.ledger_behind, report.complete) == (6, True, False)
    assert not list(box.glob("dead-*"))
