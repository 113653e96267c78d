"""The module that ships in `wasm/`, and putting it on a server."""

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
    """The module was not put on the server; the message says why, and what to do."""


class PublishResult(NamedTuple):
    """What is on the server now, and how it came there."""

    server: str
    version: str  # of the server
    wasm_file: str  # the file in `wasm/`
    database: str
    database_identity: str
    owner: str  # the identity that the token proves
    action: Literal["made", "replaced", "was there"]


def read_wasm(name: str) -> bytes:
    """A module that ships with the package, checked against its checksum."""
    folder = files("pillarbox.sinks.spacetimedb") / "wasm"
    data = (folder / name).read_bytes()
    if f"{hashlib.sha256(data).hexdigest()}  {name}" not in (folder / "SHA256SUMS").read_text().splitlines():
        raise PublishError(f"{name} is not the file that was shipped: its checksum differs; install Pillarbox again")
    return data


async def new_identity(server: str) -> tuple[str, Token]:
    """Ask the server for an identity of its own making, and the token that proves it."""
    connection = _open_connection(server, None)
    try:
        reply = await connection.request("POST", "/v1/identity")
        found = msgspec.json.decode(reply.body)
        return found["identity"], Token(found["token"])
    except TransportError as error:
        raise SinkUnusableError(str(error)) from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise PublishError(f"{server} gave no identity (status {reply.status}: {reply.excerpt}); is it SpacetimeDB?") from None
    finally:
        await connection.close()


async def publish(server: str, database: str, token: Token, *, replace: bool = False) -> PublishResult:
    """Put the module that fits the server on it; one of ours that is there is replaced only if that is asked for."""
    connection = _open_connection(server, token)
    path = f"/v1/database/{database}"
    try:
        version = _read_server_version(await connection.request("GET", "/v1/health"), server)
        is_published = await _is_published(connection, database)
        name = f"{TABLE}_v{2 if version.startswith('2.') else 1}.wasm"
        if not is_published or replace:
            reply = await connection.request("PUT", path, read_wasm(name), "application/wasm")
            if reply.status != 200 or b"Success" not in reply.body:
                raise PublishError(_explain_failure(reply, server, database))
        database_info = await connection.request("GET", path)
    except TransportError as error:
        raise SinkUnusableError(str(error)) from None
    finally:
        await connection.close()
    identity, owner = _identities(database_info)
    if token.identity() not in (None, owner):
        raise PublishError(f"{database} belongs to another identity, {owner}: use its owner's token, or another name")
    action: Literal["made", "replaced", "was there"] = "made" if not is_published else "replaced" if replace else "was there"
    return PublishResult(server, version, name, database, identity, owner, action)


def _identities(database_info: SpacetimeDbResponse) -> tuple[str, str]:
    """The database's identity and its owner's."""
    try:
        found = msgspec.json.decode(database_info.body)
        pair = [found["database_identity"], found["owner_identity"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unknown", "unknown"
    return tuple(str(one["__identity__"] if isinstance(one, dict) else one).removeprefix("0x") for one in pair)  # type: ignore[return-value]  # two of them


def _open_connection(server: str, token: Token | None) -> PooledConnection:
    return PooledConnection(SpacetimeDbSettings(server.rstrip("/"), "", "", token, 1, 120.0, 1, 0.0))


def _read_server_version(health: SpacetimeDbResponse, server: str) -> str:
    version = parse_version(health)
    if version is None:
        raise PublishError(f"{server} does not say its version as SpacetimeDB does (status {health.status}): mend --server")
    if not version.startswith(("1.", "2.")):
        raise PublishError(f"{server} is SpacetimeDB {version}; the module is built for 1.x and 2.x")
    return version


async def _is_published(connection: PooledConnection, database: str) -> bool:
    """Whether our module is under that name; raises where another one is."""
    reply = await connection.request("GET", f"/v1/database/{database}/schema?version=9")
    if reply.status == 404:
        return False
    if reply.status != 200:
        raise PublishError(
            f"cannot see what is in {database} (status {reply.status}: {reply.excerpt}); is the token this server's?"
        )
    try:
        schema = DatabaseSchema(reply.body)
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
            f"{database} has another module (tables {tables}; functions {functions}), which is not overwritten: "
            "choose another name, or take table and function into that module (docs/how-to/spacetimedb.md)"
        )
    return True


def _explain_failure(response: SpacetimeDbResponse, server: str, database: str) -> str:
    match response.status:
        case _ if "does not own" in response.excerpt:  # a 500 on servers 1.x
            return f"{database} belongs to another identity ({response.excerpt}): use its owner's token, or another name"
        case 401:
            return f"{server} does not accept the token (401: {response.excerpt}): it must be one that this server gave"
        case 403:
            return f"{database} belongs to another identity (403: {response.excerpt}): use its owner's token, or another name"
        case _:
            return f"{server} did not take the module (status {response.status}: {response.excerpt})"
