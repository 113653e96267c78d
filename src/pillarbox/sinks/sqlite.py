"""The SQLite sink, for `sqlite:///relative/path.db` and `sqlite:////absolute/path.db`, with an optional `?table=name`.

It writes to one table with a column for each field of the event type and `event_id` as primary key, and creates the table where
it does not exist. Each batch is one transaction, in WAL mode with `synchronous=FULL`, because the batch file is deleted
afterwards and its events must survive a loss of power in the database too.
"""

from __future__ import annotations

import contextlib
import enum
import sqlite3
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.event import snake_case, without_post_init
from pillarbox.redaction import redact_url
from pillarbox.sinks import base
from pillarbox.sinks.base import (
    YIELD_EVERY_RECORDS,
    Batch,
    CheckResult,
    Delivered,
    DeliveryResult,
    Misconfigured,
    PartialFailure,
    Rejection,
    Retry,
    SinkCapabilities,
)
from pillarbox.store.os_filesystem import absolute_path, ensure_private_file, file_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BUSY_TIMEOUT_S: Final = 5.0  # how long a batch waits for another program that is writing to the same database
_COLUMN_TYPES: Final = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", bytes: "BLOB"}
# Primary result codes (https://www.sqlite.org/rescode.html) that a retry can resolve; all others need a person.
_TRANSIENT_CODES: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_SCHEMA,
    }
)


class SqliteSink:
    """Inserts batches into one table of an SQLite database."""

    capabilities = SinkCapabilities(deduplicates_by="event_id", survives="power", combines_files=True, is_shared=False)

    def __init__(self, url: str, event_type: type[msgspec.Struct]) -> None:
        advice = "use sqlite:///relative/path.db or sqlite:////absolute/path.db, with ?table=NAME as the only option"
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigurationError("sink", redact_url(url), "the call", advice) from None
        options = parse_qs(parts.query)
        self._path = unquote(parts.path.removeprefix("/"))
        if parts.netloc or not self._path or self._path == ":memory:" or "\0" in self._path or set(options) - {"table"}:
            raise ConfigurationError("sink", redact_url(url), "the call", advice)
        self._absolute_path = absolute_path(self._path)  # the process may change its working directory before it is opened
        self._table = options.get("table", [snake_case(event_type.__name__)])[0]
        self._fields = msgspec.structs.fields(event_type)
        self._decoder = msgspec.json.Decoder(without_post_init(event_type))
        self._encode_row = _row_encoder(event_type)
        self._connection: sqlite3.Connection | None = None
        self._opened_file: tuple[int, int] | None = None  # identity of the file that the connection writes to
        table = _quote_identifier(self._table)
        columns = ", ".join(_quote_identifier(field.encode_name) for field in self._fields)
        placeholders = ", ".join("?" for _ in self._fields)
        self._insert_sql = f"INSERT INTO {table} ({columns}) VALUES ({placeholders}) ON CONFLICT (event_id) DO NOTHING"  # noqa: S608 - names are quoted, values are parameters

    async def open(self) -> None:
        """Open the database and create the table where it does not exist."""
        if self._connection is not None:
            return
        with contextlib.suppress(OSError):  # SQLite says why it cannot be opened
            ensure_private_file(self._absolute_path)  # SQLite would let other users read it; its other files get the same mode
        try:
            connection = sqlite3.connect(self._absolute_path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        except sqlite3.Error as error:
            raise SinkUnusableError(self._explain(error)) from None
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(self._create_table_sql())
        except sqlite3.Error as error:
            connection.close()
            if _is_transient(error):
                raise
            raise SinkUnusableError(self._explain(error)) from None
        self._connection = connection
        self._opened_file = file_identity(self._absolute_path)

    def prepare(self, batch: Batch) -> None:
        """Do nothing: this thread also runs the transaction, so there is no time to use."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Insert the events that the table does not have yet, in one transaction."""
        connection = self._connection
        if connection is None:
            return Retry("the database is not open")
        events, indexes, rejected = base.decode_records(batch, self._decoder)
        rows: list[Sequence[Any]] = []
        for start in range(0, len(events), YIELD_EVERY_RECORDS):
            batch.yield_gil()
            rows += map(self._encode_row, events[start : start + YIELD_EVERY_RECORDS])
        changes_before = connection.total_changes
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(self._insert_sql, rows)
            except (OverflowError, sqlite3.IntegrityError, sqlite3.DataError):
                connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                changes_before = connection.total_changes
                rejected |= self._insert_singly(connection, zip(indexes, rows, strict=True))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return Retry(f"SQLite: {error}") if _is_transient(error) else Misconfigured(self._explain(error))
        if file_identity(self._absolute_path) != self._opened_file:
            await self.close()
            await self.open()
            return Retry(f"{self._path} was moved, deleted or replaced; the sink has opened the new file")
        accepted = len(batch) - len(rejected)
        duplicates = accepted - (connection.total_changes - changes_before)
        return PartialFailure(rejected, accepted, duplicates) if rejected else Delivered(accepted, duplicates)

    def _insert_singly(self, connection: sqlite3.Connection, rows: Iterable[tuple[int, Sequence[Any]]]) -> dict[int, Rejection]:
        """Insert row by row and return the rejections of the rows that the table does not accept."""
        rejected = {}
        for index, row in rows:
            try:
                connection.execute(self._insert_sql, row)
            except OverflowError:
                rejected[index] = Rejection("out_of_range", "an integer exceeds SQLite's 64 signed bits")
            except (sqlite3.IntegrityError, sqlite3.DataError) as error:
                rejected[index] = Rejection("refused_by_table", str(error))
        return rejected

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Confirm all: a committed transaction is durable."""
        return len(batches)

    async def check(self) -> Iterable[CheckResult]:
        """Open the database, compare the table's columns with the event type, and let SQLite compile the insert."""
        try:
            await self.open()
        except (SinkUnusableError, sqlite3.Error) as error:
            return [CheckResult(ok=False, message=str(error))]
        connection = self._connection
        if connection is None:
            return [CheckResult(ok=False, message="the database is not open")]
        results = [CheckResult(ok=True, message=f"{self._path}: SQLite {sqlite3.sqlite_version}, table {self._table}")]
        existing = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({_quote_identifier(self._table)})")}
        for field in self._fields:
            if field.encode_name not in existing:
                statement = f"ALTER TABLE {_quote_identifier(self._table)} ADD COLUMN {_column_sql(field)}"
                results.append(CheckResult(ok=False, message=f"the table has no column {field.encode_name}; run: {statement}"))
        if all(result.ok for result in results):
            try:
                connection.execute(f"EXPLAIN {self._insert_sql}", [None] * len(self._fields))
            except sqlite3.Error as error:
                results.append(CheckResult(ok=False, message=self._explain(error)))
        return results

    async def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _create_table_sql(self) -> str:
        columns = ",\n  ".join(_column_sql(field) for field in self._fields)
        return f"CREATE TABLE IF NOT EXISTS {_quote_identifier(self._table)} (\n  {columns}\n)"

    def _explain(self, error: sqlite3.Error) -> str:
        advice = {
            sqlite3.SQLITE_CANTOPEN: "create its directory, and make it writable for this user",
            sqlite3.SQLITE_READONLY: "make the file and its directory writable for this user",
            sqlite3.SQLITE_NOTADB: "name an SQLite database, or a file that does not exist yet",
            sqlite3.SQLITE_CORRUPT: "the database is damaged: restore it, or name another file",
            sqlite3.SQLITE_ERROR: "compare the table with the event type: run pillarbox check",
        }.get(_primary_code(error), "look up this message in SQLite's documentation")
        return f"{self._path}, table {self._table}: {error}; {advice}"


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _is_transient(error: sqlite3.Error) -> bool:
    return _primary_code(error) in _TRANSIENT_CODES


def _quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _scalar_type(annotation: Any) -> tuple[type | None, bool]:
    """Return a field's scalar type (None where it has another type) and whether it may be None."""
    options = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
    nullable = type(None) in options
    options.discard(type(None))
    (kind,) = options if len(options) == 1 else (None,)
    return (kind, nullable) if kind in _COLUMN_TYPES else (None, nullable)


def _column_sql(field: msgspec.structs.FieldInfo) -> str:
    kind, nullable = _scalar_type(field.type)
    text = f"{_quote_identifier(field.encode_name)} {_COLUMN_TYPES[kind] if kind else 'TEXT'}"
    if field.encode_name == "event_id":
        return f"{text} PRIMARY KEY NOT NULL"
    return text if nullable else f"{text} NOT NULL"


def _row_encoder(event_type: type[msgspec.Struct]) -> Callable[[Any], Sequence[Any]]:
    """Return the function that turns an event into a row: scalars unchanged, all other values as JSON text."""
    fields = msgspec.structs.fields(event_type)
    if all(_scalar_type(field.type)[0] for field in fields):
        return msgspec.structs.astuple

    def row(event: Any) -> list[Any]:
        return [_encode_cell(getattr(event, field.name)) for field in fields]

    return row


def _encode_cell(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return _encode_cell(value.value)
    return value if value is None or isinstance(value, (*_COLUMN_TYPES,)) else msgspec.json.encode(value).decode()
