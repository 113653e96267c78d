"""The SQLite sink, on real files."""

from __future__ import annotations

import asyncio
import enum
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from pillarbox import ConfigurationError, SinkUnusableError, TrackingEvent
from pillarbox.codec import Codec
from pillarbox.sinks import make_sink, redact_url, schemes
from pillarbox.sinks.base import Batch, CheckResult, Delivered, DeliveryResult, Misconfigured, PartialFailure, Retry
from pillarbox.sinks.sqlite import SqliteSink
from tests.conftest import event


def batch(*events: msgspec.Struct) -> Batch:
    return Batch("sealed-a", [Codec(type(one)).encode(one) for one in events])


def deliver(
    path: Path, *batches: Batch, event_type: type[msgspec.Struct] = TrackingEvent, query: str = ""
) -> list[DeliveryResult]:
    async def run() -> list[DeliveryResult]:
        sink = make_sink(f"sqlite:///{path}{query}", event_type)
        try:
            await sink.open()
            return [await sink.deliver(one) for one in batches]
        finally:
            await sink.close()

    return asyncio.run(run())


def check(path: Path, event_type: type[msgspec.Struct] = TrackingEvent) -> list[CheckResult]:
    async def run() -> Iterable[CheckResult]:
        sink = make_sink(f"sqlite:///{path}", event_type)
        try:
            return await sink.check()
        finally:
            await sink.close()

    return list(asyncio.run(run()))


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    found = connection.execute(statement).fetchall()
    connection.close()
    return found


def test_repeats_are_ignored_and_counted(tmp_path: Path) -> None:
    """The first one stays as it was."""
    path = tmp_path / "events.db"
    answers = deliver(path, batch(event(1), event(2)), batch(event(2, event_key="other"), event(3), event(3)))
    assert answers == [Delivered(2, 0), Delivered(3, 2)]
    assert query(path, "SELECT event_id, event_key FROM tracking_event ORDER BY 1") == [
        ("e-000001", "click"),
        ("e-000002", "click"),
        ("e-000003", "click"),
    ]


def test_the_table_has_a_column_for_each_field(tmp_path: Path) -> None:
    """With its type; only what may be None may be NULL; the id is the primary key."""
    path = tmp_path / "events.db"
    deliver(path)
    columns = query(path, "SELECT name, type, \"notnull\", pk FROM pragma_table_info('tracking_event')")
    assert columns == [
        ("event_id", "TEXT", 1, 1),
        ("event_key", "TEXT", 1, 0),
        ("scope_kind", "TEXT", 1, 0),
        ("scope_id", "TEXT", 1, 0),
        ("user_id", "TEXT", 0, 0),
        ("owner_user_id", "TEXT", 0, 0),
        ("profile_id", "TEXT", 0, 0),
        ("module_key", "TEXT", 0, 0),
        ("metadata_json", "TEXT", 1, 0),
        ("occurred_at_micros", "INTEGER", 1, 0),
    ]


def test_what_is_deleted_here_is_as_safe_there(tmp_path: Path) -> None:
    """Write-ahead log, synced at each commit."""
    sink = SqliteSink(f"sqlite:///{tmp_path}/events.db", TrackingEvent)
    asyncio.run(sink.open())
    connection = sink._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    asyncio.run(sink.close())


class Colour(enum.Enum):
    """A field type of an application."""

    RED = "red"


class Order(msgspec.Struct, rename="camel"):
    """An application's own event type, with every kind of field."""

    event_id: str = msgspec.field(name="event_id")
    line_items: list[int] = []
    total: float = 0.0
    paid: bool = False
    colour: Colour | None = None
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    note: str | int | None = None


def test_other_event_types_have_tables_of_their_own(tmp_path: Path) -> None:
    """Scalars as they are, anything else as JSON text; columns by their names in JSON."""
    path = tmp_path / "events.db"
    deliver(path, batch(Order("a", [1, 2], 1.5, paid=True, colour=Colour.RED, note=7)), event_type=Order)
    assert query(path, 'SELECT event_id, lineItems, total, paid, colour, "at", note FROM "order"') == [
        ("a", "[1,2]", 1.5, 1, "red", '"2026-01-02T00:00:00Z"', "7")
    ]


def test_the_table_may_be_named(tmp_path: Path) -> None:
    """Whatever the name has in it."""
    path = tmp_path / "events.db"
    assert deliver(path, batch(event(1)), query="?table=my%20%22events%22") == [Delivered(1)]
    assert query(path, 'SELECT count(*) FROM "my ""events"""') == [(1,)]


def test_a_record_of_the_wrong_type_is_refused_alone(tmp_path: Path) -> None:
    """Valid JSON, but no event; the others are inserted."""
    good = Codec(TrackingEvent).encode(event(1))
    (answer,) = deliver(tmp_path / "events.db", Batch("sealed-a", [b"5", good, b'{"event_id":"x"}']))
    assert isinstance(answer, PartialFailure)
    assert (sorted(answer.rejected), answer.accepted, answer.duplicates) == ([0, 2], 1, 0)
    assert {refusal.code for refusal in answer.rejected.values()} == {"wrong_type"}
    assert query(tmp_path / "events.db", "SELECT count(*) FROM tracking_event") == [(1,)]


class Big(msgspec.Struct):
    """An integer may have 64 bits without a sign in JSON, not in SQLite."""

    event_id: str
    number: int


def test_a_record_that_the_table_refuses_is_refused_alone(tmp_path: Path) -> None:
    """Too large a number, or a constraint that somebody added."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER CHECK (number <> 13))")
    connection.close()
    events = [Big("a", 1), Big("b", 2**63), Big("c", 13), Big("d", 2)]
    (first, second) = deliver(path, batch(*events), batch(*events), event_type=Big)
    assert isinstance(first, PartialFailure)
    assert {index: refusal.code for index, refusal in first.rejected.items()} == {1: "out_of_range", 2: "refused_by_table"}
    assert (first.accepted, first.duplicates) == (2, 0)
    assert isinstance(second, PartialFailure)
    assert (second.accepted, second.duplicates) == (2, 2)
    assert query(path, "SELECT event_id FROM big ORDER BY 1") == [("a",), ("d",)]


def test_a_table_that_lacks_a_column_is_a_wrong_set_up(tmp_path: Path) -> None:
    """Nothing is a dead letter; `check` says how to mend it."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT PRIMARY KEY)")
    connection.close()
    (answer,) = deliver(path, batch(Big("a", 1)), event_type=Big)
    assert isinstance(answer, Misconfigured)
    bad = [finding.message for finding in check(path, Big) if not finding.ok]
    assert bad == ['the table has no column number; run: ALTER TABLE "big" ADD COLUMN "number" INTEGER NOT NULL']


def test_a_table_without_the_key_is_found_by_check(tmp_path: Path) -> None:
    """Without it every repeat would be a row."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT, number INTEGER)")
    connection.close()
    assert [finding.ok for finding in check(path, Big)] == [True, False]


def test_check_of_a_new_file_is_good(tmp_path: Path) -> None:
    """It makes file and table."""
    assert [finding.ok for finding in check(tmp_path / "events.db")] == [True]


def test_a_file_that_another_program_writes_to_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After waiting for it."""
    monkeypatch.setattr("pillarbox.sinks.sqlite.BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "events.db"
    deliver(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    (answer,) = deliver(path, batch(event(1)))
    other.execute("ROLLBACK")
    other.close()
    assert answer == Retry("SQLite: database is locked")


@pytest.mark.parametrize(
    ("content", "advice"), [(b"no database, surely" * 100, "name an SQLite database"), (None, "create its directory")]
)
def test_what_cannot_be_opened_is_a_wrong_set_up_with_advice(tmp_path: Path, content: bytes | None, advice: str) -> None:
    """A file that is something else; a folder that is not there."""
    path = tmp_path / "folder" / "events.db"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(SinkUnusableError, match=advice):
        deliver(path)
    assert [finding.ok for finding in check(path)] == [False]


@pytest.mark.parametrize("url", ["sqlite://host/x.db", "sqlite:", "sqlite:///", "sqlite:///x.db?tabel=y", "nosuch:///x", "x"])
def test_a_url_that_cannot_be_meant_is_refused(url: str) -> None:
    """With what is allowed."""
    with pytest.raises(ConfigurationError, match=r"^sink = "):
        make_sink(url, TrackingEvent)


def test_what_may_be_secret_is_cut_out_of_urls() -> None:
    """User, password and query values."""
    assert redact_url("postgresql://me:pw@host:1/db?sslkey=pw&x=1") == "postgresql://host:1/db?sslkey=...&x=..."
    assert redact_url("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    assert "sqlite" in schemes()


def test_a_database_that_is_removed_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    """What went into the file without a name is sent again."""
    path = tmp_path / "events.db"

    async def run() -> list[DeliveryResult]:
        sink = make_sink(f"sqlite:///{path}", TrackingEvent)
        await sink.open()
        answers = [await sink.deliver(batch(event(1)))]
        path.unlink()
        answers += [await sink.deliver(batch(event(2))), await sink.deliver(batch(event(2)))]
        await sink.close()
        return answers

    first, noticed, again = asyncio.run(run())
    assert (first, again) == (Delivered(1), Delivered(1))
    assert isinstance(noticed, Retry)
    assert query(path, "SELECT event_id FROM tracking_event") == [("e-000002",)]


def test_a_database_in_memory_is_no_destination() -> None:
    """It would not outlive the process."""
    with pytest.raises(ConfigurationError):
        make_sink("sqlite:///:memory:", TrackingEvent)
