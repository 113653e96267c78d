"""Publishes the module that ships in `wasm/` on a server."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from pillarbox.errors import OperationalError, SinkUnusableError
from pillarbox.event import TrackingEvent
from pillarbox.sinks.spacetimedb.pool import PooledConnection, TransportError
from pillarbox.sinks.spacetimedb.responses import parse_version
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, SchemaError
from pillarbox.sinks.spacetimedb.url import DEFAULT_FUNCTION, SpacetimeDbSettings, Token

if TYPE_CHECKING:
    from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse

TABLE: Final = "tracking_event"
_OWN_FUNCTIONS: Final = {DEFAULT_FUNCTION, f"{DEFAULT_FUNCTION}_counted"}


class PublishError(OperationalError):
    """The module was not published. The message says why and what to do."""


class PublishResult(NamedTuple):
    """The database after publishing."""

    server: str  # URL of the server
    version: str  # version of the server
    wasm_file: str  # the module's file in `wasm/`
    database: str  # name of the database
    database_identity: str  # identity of the database
    owner: str  # identity of the token's owner
    action: Literal["created", "updated", "unchanged"]  # what was done to the database


def read_wasm(name: str) -> bytes:
    """Return a module that ships with the package; raises `PublishError` where its checksum differs."""
    folder = files("pillarbox.sinks.spacetimedb") / "wasm"
    data = (folder / name).read_bytes()
    if f"{hashlib.sha256(data).hexdigest()}  {name}" not in (folder / "SHA256SUMS").read_text().splitlines():
        raise PublishError(f"{name}: the checksum differs from SHA256SUMS, so the file was changed; reinstall Pillarbox")
    return data


async def new_identity(server: str) -> tuple[str, Token]:
    """Create an identity on the server; returns it with its token."""
    connection = _open_connection(server, None)
    try:
        response = await connection.request("POST", "/v1/identity")
        identity = response.decode()
        return identity["identity"], Token(identity["token"])
    except TransportError as error:
        raise SinkUnusableError(str(error)) from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise PublishError(
            f"{server} created no identity (status {response.status}: {response.excerpt}): correct --server"
        ) from None
    finally:
        await connection.close()


async def publish(server: str, database: str, token: Token, *, replace: bool = False) -> PublishResult:
    """Publish the module that matches the server's version.

    Args:
        server: the server's URL.
        database: the name of the database, which is created where it does not exist.
        token: authenticates the database's owner.
        replace: whether to update a database that already has Pillarbox's module.

    Raises:
        PublishError: the database has another module or owner, or the server rejected the module.
        SinkUnusableError: the server cannot be reached.
    """
    connection = _open_connection(server, token)
    path = f"/v1/database/{database}"
    try:
        version = _read_server_version(await connection.request("GET", "/v1/health"), server)
        is_published = await _is_published(connection, database)
        name = f"{TABLE}_v{2 if version.startswith('2.') else 1}.wasm"
        if not is_published or replace:
            response = await connection.request("PUT", path, read_wasm(name), "application/wasm")
            if response.status != 200 or b"Success" not in response.body:
                raise PublishError(_explain_failure(response, server, database))
        database_info = await connection.request("GET", path)
    except TransportError as error:
        raise SinkUnusableError(str(error)) from None
    finally:
        await connection.close()
    identity, owner = _identities(database_info)
    if token.identity() not in (None, owner):
        raise PublishError(f"{database} belongs to another identity, {owner}: use its owner's token, or choose another name")
    action: Literal["created", "updated", "unchanged"] = (
        "created" if not is_published else "updated" if replace else "unchanged"
    )
    return PublishResult(server, version, name, database, identity, owner, action)


def _identities(database_info: SpacetimeDbResponse) -> tuple[str, str]:
    """Return the database's identity and its owner's."""
    try:
        info = database_info.decode()
        pair = [info["database_identity"], info["owner_identity"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unknown", "unknown"
    return tuple(
        str(identity["__identity__"] if isinstance(identity, dict) else identity).removeprefix("0x") for identity in pair
    )  # type: ignore[return-value]  # always two


def _open_connection(server: str, token: Token | None) -> PooledConnection:
    return PooledConnection(SpacetimeDbSettings(server.rstrip("/"), "", "", token, 1, 120.0, 1, 0.0))


def _read_server_version(health: SpacetimeDbResponse, server: str) -> str:
    version = parse_version(health)
    if version is None:
        raise PublishError(f"{server} does not report a SpacetimeDB version (status {health.status}): correct --server")
    if not version.startswith(("1.", "2.")):
        raise PublishError(f"{server} runs SpacetimeDB {version}; the module supports 1.x and 2.x")
    return version


async def _is_published(connection: PooledConnection, database: str) -> bool:
    """Whether the database has Pillarbox's module; raises `PublishError` where it has another module."""
    response = await connection.request("GET", f"/v1/database/{database}/schema?version=9")
    if response.status == 404:
        return False
    if response.status != 200:
        raise PublishError(
            f"cannot read the schema of {database} (status {response.status}: {response.excerpt}): use a token of this server"
        )
    try:
        schema = DatabaseSchema(response.body)
    except SchemaError as error:
        raise PublishError(f"cannot read the schema of {database} ({error}); choose another name") from None
    columns, private = schema.table_columns(TABLE)
    ours = (
        schema.tables == [TABLE]
        and [column.name for column in columns] == list(TrackingEvent.__struct_fields__)
        and private
        and schema.functions.keys() <= _OWN_FUNCTIONS
        and not schema.lifecycle
    )
    if not ours:
        tables, functions = ", ".join(schema.tables) or "none", ", ".join([*schema.functions, *schema.lifecycle]) or "none"
        raise PublishError(
            f"{database} has another module (tables: {tables}; functions: {functions}), which is not replaced: "
            "choose another name, or add the table and function to that module (docs/how-to/spacetimedb.md)"
        )
    return True


def _explain_failure(response: SpacetimeDbResponse, server: str, database: str) -> str:
    match response.status:
        case _ if "does not own" in response.excerpt:  # servers 1.x respond with 500
            return f"{database} belongs to another identity ({response.excerpt}): use its owner's token or another name"
        case 401:
            return f"{server} does not accept the token (401: {response.excerpt}): use a token that this server issued"
        case 403:
            return f"{database} belongs to another identity (403: {response.excerpt}): use its owner's token or another name"
        case _:
            return f"{server} rejected the module (status {response.status}: {response.excerpt})"
