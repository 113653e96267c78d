"""SQLite, the embedded default: `sqlite:///relative/path.db`, `sqlite:////absolute/path.db`, with `?table=name` if need be.

One table with a column for each field of the event type and `event_id` as primary key, made where it is missing. One
transaction a batch, in WAL mode with `synchronous=FULL`: the sealed file that is then deleted must be as safe here.
"""

from __future__ import annotations

import enum
import sqlite3
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.event import snake_case, without_post_init
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
from pillarbox.store.filesystem import file_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BUSY_TIMEOUT_S: Final = 5.0  # how long a batch waits for another program that writes to the same file
_COLUMN_TYPES: Final = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", bytes: "BLOB"}
# Primary result codes (https://www.sqlite.org/rescode.html) that pass by themselves; all others want a person.
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
    """Writes batches into one table of an SQLite file."""

    capabilities = SinkCapabilities(deduplicates_by="event_id", survives="power", combines_files=True)

    def __init__(self, url: str, event_type: type[msgspec.Struct]) -> None:
        parts = urlsplit(url)
        options = parse_qs(parts.query)
        self._path = unquote(parts.path.removeprefix("/"))
        if parts.netloc or not self._path or self._path == ":memory:" or set(options) - {"table"}:
            advice = "use sqlite:///relative/path.db or sqlite:////absolute/path.db, with ?table=NAME at most"
            raise ConfigurationError("sink", f"sqlite://{'...' if parts.netloc else ''}{parts.path}", "the call", advice)
        self._table = options.get("table", [snake_case(event_type.__name__)])[0]
        self._fields = msgspec.structs.fields(event_type)
        self._decoder = msgspec.json.Decoder(without_post_init(event_type))
        self._encode_row = _row_encoder(event_type)
        self._connection: sqlite3.Connection | None = None
        self._opened_file: tuple[int, int] | None = None  # the file that the connection writes to
        columns = ", ".join(_quote_identifier(field.encode_name) for field in self._fields)
        marks = ", ".join("?" for _ in self._fields)
        self._insert_sql = (
            f"INSERT INTO {_quote_identifier(self._table)} ({columns}) VALUES ({marks}) ON CONFLICT (event_id) DO NOTHING"  # noqa: S608 - names are quoted, values are parameters
        )

    async def open(self) -> None:
        """Open the file and make the table where it is missing."""
        if self._connection is not None:
            return
        try:
            connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
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
        self._opened_file = file_identity(self._path)

    def prepare(self, batch: Batch) -> None:
        """Nothing: while a transaction runs, this thread has no time."""

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Insert what is not there yet, in one transaction."""
        connection = self._connection
        if connection is None:
            return Retry("the file is not open")
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
        if file_identity(self._path) != self._opened_file:
            await self.close()
            await self.open()
            return Retry(f"{self._path} was moved or removed, or is another file by now; opened anew")
        accepted = len(batch) - len(rejected)
        duplicates = accepted - (connection.total_changes - changes_before)
        return PartialFailure(rejected, accepted, duplicates) if rejected else Delivered(accepted, duplicates)

    def _insert_singly(self, connection: sqlite3.Connection, rows: Iterable[tuple[int, Sequence[Any]]]) -> dict[int, Rejection]:
        """Find the rows that the table does not take; the others are inserted."""
        rejected = {}
        for index, row in rows:
            try:
                connection.execute(self._insert_sql, row)
            except OverflowError:
                rejected[index] = Rejection("out_of_range", "an integer that SQLite's 64 signed bits do not hold")
            except (sqlite3.IntegrityError, sqlite3.DataError) as error:
                rejected[index] = Rejection("refused_by_table", str(error))
        return rejected

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """A committed transaction needs no confirming."""
        return len(batches)

    async def check(self) -> Iterable[CheckResult]:
        """Open the file, compare the table's columns with the event type's fields, and try the insert without data."""
        try:
            await self.open()
        except (SinkUnusableError, sqlite3.Error) as error:
            return [CheckResult(ok=False, message=str(error))]
        connection = self._connection
        if connection is None:
            return [CheckResult(ok=False, message="the file is not open")]
        findings = [CheckResult(ok=True, message=f"{self._path}: SQLite {sqlite3.sqlite_version}, table {self._table}")]
        existing = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({_quote_identifier(self._table)})")}
        for field in self._fields:
            if field.encode_name not in existing:
                statement = f"ALTER TABLE {_quote_identifier(self._table)} ADD COLUMN {_column_sql(field)}"
                findings.append(CheckResult(ok=False, message=f"the table has no column {field.encode_name}; {statement}"))
        if all(finding.ok for finding in findings):
            try:
                connection.execute(f"EXPLAIN {self._insert_sql}", [None] * len(self._fields))
            except sqlite3.Error as error:
                findings.append(CheckResult(ok=False, message=self._explain(error)))
        return findings

    async def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _create_table_sql(self) -> str:
        columns = ",\n  ".join(_column_sql(field) for field in self._fields)
        return f"CREATE TABLE IF NOT EXISTS {_quote_identifier(self._table)} (\n  {columns}\n)"

    def _explain(self, error: sqlite3.Error) -> str:
        advice = {
            sqlite3.SQLITE_CANTOPEN: "the folder must exist and be writable",
            sqlite3.SQLITE_READONLY: "the file and its folder must be writable",
            sqlite3.SQLITE_NOTADB: "name a file that is an SQLite database, or one that does not exist yet",
            sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it, or name another",
            sqlite3.SQLITE_ERROR: "compare the table with the event type: pillarbox check",
        }.get(_primary_code(error), "see the SQLite documentation of this message")
        return f"{self._path}, table {self._table}: {error}; {advice}"


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _is_transient(error: sqlite3.Error) -> bool:
    return _primary_code(error) in _TRANSIENT_CODES


def _quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _scalar_type(annotation: Any) -> tuple[type | None, bool]:
    """(the scalar type that a field holds, whether it may be None); (None, ...) where it holds something else."""
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
    """How an event becomes a row: scalars as they are, anything else as JSON text."""
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
