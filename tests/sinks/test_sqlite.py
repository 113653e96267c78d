"""The SQLite sink, on real files."""

from __future__ import annotations

import asyncio
import enum
import os
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
    rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_new_database_is_private(tmp_path: Path, umask: int) -> None:
    """With the files that SQLite keeps beside it; they hold the same events."""
    path = tmp_path / "events.db"
    before = os.umask(umask)

    def read_modes() -> dict[str, int]:
        return {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}

    async def run() -> dict[str, int]:
        sink = make_sink(f"sqlite:///{path}", TrackingEvent)
        await sink.open()
        await sink.deliver(batch(event(1)))
        modes = read_modes()
        await sink.close()
        return modes

    try:
        modes = asyncio.run(run())
    finally:
        os.umask(before)
    assert modes == {"events.db": 0o600, "events.db-wal": 0o600, "events.db-shm": 0o600}


def test_an_existing_database_keeps_its_mode(tmp_path: Path) -> None:
    """An operator may have let others read it; also behind a link."""
    path = tmp_path / "events.db"
    path.touch(0o640)
    path.chmod(0o640)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    deliver(link, batch(event(1)))
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "dangling.db").symlink_to(tmp_path / "target.db")
    deliver(tmp_path / "dangling.db", batch(event(1)))
    assert (tmp_path / "target.db").stat().st_mode & 0o777 == 0o600


def test_duplicates_are_ignored_and_counted(tmp_path: Path) -> None:
    """The first row stays unchanged."""
    path = tmp_path / "events.db"
    results = deliver(path, batch(event(1), event(2)), batch(event(2, event_key="other"), event(3), event(3)))
    assert results == [Delivered(2, 0), Delivered(3, 2)]
    assert query(path, "SELECT event_id, event_key FROM tracking_event ORDER BY 1") == [
        ("e-000001", "click"),
        ("e-000002", "click"),
        ("e-000003", "click"),
    ]


def test_the_table_has_a_column_for_each_field(tmp_path: Path) -> None:
    """With its type; only optional fields may be NULL; the id is the primary key."""
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


def test_a_committed_batch_survives_a_loss_of_power(tmp_path: Path) -> None:
    """Write-ahead log, synced at each commit."""
    sink = SqliteSink(f"sqlite:///{tmp_path}/events.db", TrackingEvent)
    asyncio.run(sink.open())
    connection = sink._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    asyncio.run(sink.close())


class OrderColour(enum.Enum):
    """A field type of an application."""

    RED = "red"


class Order(msgspec.Struct, rename="camel"):
    """An application's own event type, with every kind of field."""

    event_id: str = msgspec.field(name="event_id")
    line_items: list[int] = []
    total: float = 0.0
    paid: bool = False
    colour: OrderColour | None = None
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)
    note: str | int | None = None


def test_each_event_type_has_its_own_table(tmp_path: Path) -> None:
    """Scalars unchanged, all other values as JSON text; the columns have the JSON names."""
    path = tmp_path / "events.db"
    deliver(path, batch(Order("a", [1, 2], 1.5, paid=True, colour=OrderColour.RED, note=7)), event_type=Order)
    assert query(path, 'SELECT event_id, lineItems, total, paid, colour, "at", note FROM "order"') == [
        ("a", "[1,2]", 1.5, 1, "red", '"2026-01-02T00:00:00Z"', "7")
    ]


def test_the_url_may_name_the_table(tmp_path: Path) -> None:
    """With any characters."""
    path = tmp_path / "events.db"
    assert deliver(path, batch(event(1)), query="?table=my%20%22events%22") == [Delivered(1)]
    assert query(path, 'SELECT count(*) FROM "my ""events"""') == [(1,)]


def test_only_the_record_of_the_wrong_type_is_rejected(tmp_path: Path) -> None:
    """Valid JSON that is not an event; the others are inserted."""
    good = Codec(TrackingEvent).encode(event(1))
    (result,) = deliver(tmp_path / "events.db", Batch("sealed-a", [b"5", good, b'{"event_id":"x"}']))
    assert isinstance(result, PartialFailure)
    assert (sorted(result.rejected), result.accepted, result.duplicates) == ([0, 2], 1, 0)
    assert {rejection.code for rejection in result.rejected.values()} == {"wrong_type"}
    assert query(tmp_path / "events.db", "SELECT count(*) FROM tracking_event") == [(1,)]


class Big(msgspec.Struct):
    """An integer may have 64 bits without a sign in JSON, not in SQLite."""

    event_id: str
    number: int


def test_only_the_record_that_the_table_rejects_is_rejected(tmp_path: Path) -> None:
    """A number out of range, and a constraint that an operator added."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT PRIMARY KEY, number INTEGER CHECK (number <> 13))")
    connection.close()
    events = [Big("a", 1), Big("b", 2**63), Big("c", 13), Big("d", 2)]
    (first, second) = deliver(path, batch(*events), batch(*events), event_type=Big)
    assert isinstance(first, PartialFailure)
    assert {index: rejection.code for index, rejection in first.rejected.items()} == {1: "out_of_range", 2: "refused_by_table"}
    assert (first.accepted, first.duplicates) == (2, 0)
    assert isinstance(second, PartialFailure)
    assert (second.accepted, second.duplicates) == (2, 2)
    assert query(path, "SELECT event_id FROM big ORDER BY 1") == [("a",), ("d",)]


def test_a_missing_column_is_a_misconfiguration(tmp_path: Path) -> None:
    """There are no dead letters, and `check` prints the statement that adds it."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT PRIMARY KEY)")
    connection.close()
    (result,) = deliver(path, batch(Big("a", 1)), event_type=Big)
    assert isinstance(result, Misconfigured)
    problems = [check_result.message for check_result in check(path, Big) if not check_result.ok]
    assert problems == ['the table has no column number; run: ALTER TABLE "big" ADD COLUMN "number" INTEGER NOT NULL']


def test_check_finds_a_table_without_the_primary_key(tmp_path: Path) -> None:
    """Without it each duplicate would be a row."""
    path = tmp_path / "events.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE big (event_id TEXT, number INTEGER)")
    connection.close()
    assert [check_result.ok for check_result in check(path, Big)] == [True, False]


def test_check_accepts_a_new_file(tmp_path: Path) -> None:
    """It creates the file and the table."""
    assert [check_result.ok for check_result in check(tmp_path / "events.db")] == [True]


def test_a_database_locked_by_another_program_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `BUSY_TIMEOUT_S`."""
    monkeypatch.setattr("pillarbox.sinks.sqlite.BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "events.db"
    deliver(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    (result,) = deliver(path, batch(event(1)))
    other.execute("ROLLBACK")
    other.close()
    assert result == Retry("SQLite: database is locked")


@pytest.mark.parametrize(
    ("content", "advice"), [(b"no database, surely" * 100, "name an SQLite database"), (None, "create its directory")]
)
def test_a_file_that_cannot_be_opened_is_a_misconfiguration(tmp_path: Path, content: bytes | None, advice: str) -> None:
    """A file of another kind, and a missing directory; the message says what to do."""
    path = tmp_path / "folder" / "events.db"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(SinkUnusableError, match=advice):
        deliver(path)
    assert [check_result.ok for check_result in check(path)] == [False]


@pytest.mark.parametrize("url", ["sqlite://host/x.db", "sqlite:", "sqlite:///", "sqlite:///x.db?tabel=y", "nosuch:///x", "x"])
def test_an_invalid_url_is_rejected(url: str) -> None:
    """The message shows a valid one."""
    with pytest.raises(ConfigurationError, match=r"^sink = "):
        make_sink(url, TrackingEvent)


def test_possible_secrets_are_redacted_from_urls() -> None:
    """User, password and query values."""
    assert redact_url("postgresql://me:pw@host:1/db?sslkey=pw&x=1") == "postgresql://host:1/db?sslkey=...&x=..."
    assert redact_url("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    assert "sqlite" in schemes()


def test_a_database_deleted_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    """Events written to the deleted file are sent again."""
    path = tmp_path / "events.db"

    async def run() -> list[DeliveryResult]:
        sink = make_sink(f"sqlite:///{path}", TrackingEvent)
        await sink.open()
        results = [await sink.deliver(batch(event(1)))]
        path.unlink()
        results += [await sink.deliver(batch(event(2))), await sink.deliver(batch(event(2)))]
        await sink.close()
        return results

    first, noticed, repeated = asyncio.run(run())
    assert (first, repeated) == (Delivered(1), Delivered(1))
    assert isinstance(noticed, Retry)
    assert query(path, "SELECT event_id FROM tracking_event") == [("e-000002",)]


def test_a_database_in_memory_is_rejected() -> None:
    """It would not outlive the process."""
    with pytest.raises(ConfigurationError):
        make_sink("sqlite:///:memory:", TrackingEvent)
