"""Dead letters that go in again, on disks that fail, with doors that close."""

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

USUAL = WriteLimits(500, 10**6)
EVERYTHING = RecordFilter()
SIX = [event_json(number, 5) for number in range(6)]


def good(record: object) -> bytes:
    """The event as it should have been."""
    return unchanged_event(record).replace(b":5,", b':"5",')  # type: ignore[arg-type]


class Carried:
    """A replay of everything that `mend` has an event for."""

    def __init__(self, box: Path, door: Enqueuer, fault: Fault | None = None, bounds: WriteLimits = USUAL) -> None:
        self.place = Directory(str(box), FaultFilesystem(OsFilesystem(), fault), SystemClock())
        self.report = ChangeReport()
        self.stopped: Callable[[], bool] = lambda: False
        self.done: list[int] = []
        self._door = door
        self._bounds = bounds

    def run(self, mend: Callable[[object], bytes | None] = good, selection: RecordFilter = EVERYTHING) -> ChangeReport:
        ledger = LedgerWriter(Directory(self.place.path, OsFilesystem(), SystemClock()), SystemClock())
        again = DeadLetterReplayer(self.place, IDENTITY_DECODER, SystemClock(), selection, self.report)
        carrier = ChangeExecutor(
            self.place, ledger, self.report, self.stopped, self.done.append, self._door, "process", self._bounds
        )
        carrier.execute(again.replay_changes(VALIDATOR, mend, lambda _record, _payload: None))
        return self.report


class LimitedDoor:
    """The real door, which closes after so many events."""

    def __init__(self, outbox: Outbox, most: int) -> None:
        self.outbox = outbox
        self.left = most

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        events = list(payloads)
        if len(events) > self.left:
            return [Dropped("max_bytes") for _ in events]
        self.left -= len(events)
        return self.outbox.enqueue_json(events, durability=durability)


def ids(box: Path, pattern: str) -> list[str]:
    return [line.split(b'"event_id":"')[1][:8].decode() for line in file_lines(box, pattern)]


def test_what_went_in_leaves_and_the_last_takes_the_file_with_it(tmp_path: Path) -> None:
    """One after the other, in the order in which they stood."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    with Outbox(str(box)) as outbox:
        first = Carried(box, outbox).run(selection=RecordFilter(event_ids=("w-000000", "w-000004")))
        assert (first.events, first.files, first.complete) == (2, 2, True)
        assert ids(box, "dead-*") == ["w-000001", "w-000002", "w-000003", "w-000005"]
        assert Carried(box, outbox).run().events == 4
        assert not list(box.glob("dead-*"))
    deliver_pending(box, tmp_path / "events.db")
    came = [one for one, scope in delivered_rows(tmp_path / "events.db") if scope == "5"]
    assert came == ["w-000000", "w-000004", "w-000001", "w-000002", "w-000003", "w-000005"]


def test_a_door_that_closes_leaves_the_rest_where_it_is(tmp_path: Path) -> None:
    """Also in the middle of a file, and the next files are not tried."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    with Outbox(str(box)) as outbox:
        report = Carried(box, LimitedDoor(outbox, 2), bounds=WriteLimits(1, 10**6)).run()
    assert (report.events, report.drop_reason, report.complete) == (2, "max_bytes", False)
    assert ids(box, "dead-*") == ["w-000002", "w-000003", "w-000004", "w-000005"]


def test_an_event_that_only_the_door_refuses_stays_alone(tmp_path: Path) -> None:
    """The others go."""
    box = outbox_with_dead_letters(tmp_path, SIX)

    class PickyDoor(LimitedDoor):
        def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
            return [
                Dropped("filtered") if b"w-000003" in one else self.outbox.enqueue_json([one], durability=durability)[0]
                for one in payloads
            ]

    with Outbox(str(box)) as outbox:
        report = Carried(box, PickyDoor(outbox, 0)).run()
    assert (report.events, report.problems_count) == (5, 1)
    assert "filtered" in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000003"]


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("verb", ["create", "write_all", "sync_data", "rename"])
def test_where_the_file_cannot_be_written_anew_it_stays_as_it_was(tmp_path: Path, verb: str, files: int) -> None:
    """The events are in; the next try sends them again under the same ids."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=files)
    before = ids(box, "dead-*")
    database = tmp_path / "events.db"
    with Outbox(str(box)) as outbox:
        chosen = RecordFilter(event_ids=("w-000000", "w-000005"))
        report = Carried(box, outbox, Fault(verb, 1, errno.ENOSPC, permanent=True)).run(selection=chosen)
        assert (report.events, report.problems_count, report.complete) == (0, files, False)
        assert "second time" in report.problems[0].problem
        assert ids(box, "dead-*") == before
        assert not list(box.glob("dead-*.aside"))
        assert Carried(box, outbox).run(selection=chosen).complete
    deliver_pending(box, database)
    assert [one for one, scope in delivered_rows(database) if scope == "5"] == ["w-000000", "w-000005"]


def test_a_file_that_cannot_be_removed_is_reported(tmp_path: Path) -> None:
    """And the others go on."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    with Outbox(str(box)) as outbox:
        report = Carried(box, outbox, Fault("unlink", 1, errno.EIO)).run()
    assert (report.events, report.problems_count) == (3, 1)
    assert ids(box, "dead-*") == ["w-000000", "w-000001", "w-000002"]


@pytest.mark.parametrize(("verb", "problem"), [("open_existing", "cannot be read"), ("read_all", "cannot be read")])
def test_a_file_that_cannot_be_read_is_named_and_the_others_go_on(tmp_path: Path, verb: str, problem: str) -> None:
    """It stays as it is."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    with Outbox(str(box)) as outbox:
        report = Carried(box, outbox, Fault(verb, 1, errno.EIO)).run()
    assert report.events == 3
    assert problem in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000000", "w-000001", "w-000002"]


@pytest.mark.parametrize(("nth", "events", "said"), [(1, 0, "nothing was changed"), (2, 6, "a power loss may undo")])
def test_a_directory_that_cannot_be_synced_is_reported(tmp_path: Path, nth: int, events: int, said: str) -> None:
    """Before, nothing is done; after, the loss of power may bring a file back, and what is in it goes in twice."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    with Outbox(str(box)) as outbox:
        report = Carried(box, outbox, Fault("sync_directory", nth, errno.EIO)).run()
    assert (report.events, report.complete) == (events, False)
    assert said in report.problems[0].problem
    assert len(file_lines(box, "dead-*")) == 6 - events


def test_told_to_stop_it_ends_after_the_step_under_way(tmp_path: Path) -> None:
    """What was done is done, and the rest is as it was."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=3)
    with Outbox(str(box)) as outbox:
        carried = Carried(box, outbox, bounds=WriteLimits(1, 10**6))
        carried.stopped = lambda: len(carried.done) == 1
        report = carried.run()
    assert (report.interrupted, report.events, report.complete) == (True, 2, False)
    assert ids(box, "dead-*") == ["w-000002", "w-000003", "w-000004", "w-000005"]


def test_what_is_mended_wrongly_is_named_and_stays(tmp_path: Path) -> None:
    """And does not hold up the others."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    with Outbox(str(box)) as outbox:
        report = Carried(box, outbox).run(
            lambda one: unchanged_event(one) if b"w-000001" in unchanged_event(one) else good(one)  # type: ignore[arg-type]
        )
    assert (report.events, report.problems_count) == (5, 1)
    assert "not a valid TrackingEvent" in report.problems[0].problem
    assert ids(box, "dead-*") == ["w-000001"]


def test_one_command_at_a_time_changes_what_is_kept(tmp_path: Path) -> None:
    """The lock ends with its holder."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    place = Directory(str(box), OsFilesystem(), SystemClock())
    first = acquire_lock(place)
    assert first is not None
    assert acquire_lock(place) is None
    place.filesystem.close(first.fd)
    second = acquire_lock(place)
    assert second is not None
    place.filesystem.close(second.fd)
    assert (box / ADMIN_LOCK).exists()


def test_the_ledger_says_what_went_in_before_the_file_changes(tmp_path: Path) -> None:
    """One entry a file, with its batch."""
    box = outbox_with_dead_letters(tmp_path, SIX, files=2)
    batches = sorted(file.stem.removeprefix("dead-") for file in box.glob("dead-*"))
    with Outbox(str(box)) as outbox:
        Carried(box, outbox, Fault("unlink", 1, errno.EIO, permanent=True)).run()
    entries = [line for line in file_lines(box, "ledger.ndjson") if b"replayed" in line]
    assert len(entries) == 2
    for batch, entry in zip(batches, entries, strict=True):
        assert batch.encode() in entry
        assert b'"events":3' in entry


def test_where_the_ledger_cannot_be_written_the_work_is_done_and_it_is_said(tmp_path: Path) -> None:
    """It is never needed for recovery."""
    box = outbox_with_dead_letters(tmp_path, SIX)
    (box / "ledger.ndjson").unlink(missing_ok=True)
    (box / "ledger.ndjson").mkdir()
    with Outbox(str(box)) as outbox:
        report = Carried(box, outbox).run()
    assert (report.events, report.ledger_behind, report.complete) == (6, True, False)
    assert not list(box.glob("dead-*"))
