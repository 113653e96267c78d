"""The module that ships in `wasm/`, and putting it on a server."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.errors import SinkUnusable, WorldError
from pillarbox.sinks.spacetimedb.lanes import Lane, TransportError
from pillarbox.sinks.spacetimedb.schema import Schema, SchemaUnreadable
from pillarbox.sinks.spacetimedb.target import DEFAULT_FUNCTION, Target, Token

if TYPE_CHECKING:
    from pillarbox.sinks.spacetimedb.answers import Reply

TABLE: Final = "tracking_event"
_OURS: Final = {DEFAULT_FUNCTION, f"{DEFAULT_FUNCTION}_counted"}


class NotPublished(WorldError):  # noqa: N818 - reads as the sentence it is
    """The module was not put on the server; the message says why, and what to do."""


class Published(NamedTuple):
    """What is on the server now."""

    server: str
    version: str  # of the server
    module: str  # the file in `wasm/`
    database: str
    database_identity: str
    created: bool  # False: a module of ours was there and was updated


def wasm(name: str) -> bytes:
    """A module that ships with the package, checked against its checksum."""
    folder = files("pillarbox.sinks.spacetimedb") / "wasm"
    data = (folder / name).read_bytes()
    if f"{hashlib.sha256(data).hexdigest()}  {name}" not in (folder / "SHA256SUMS").read_text().splitlines():
        raise NotPublished(f"{name} is not the file that was shipped: its checksum differs; install Pillarbox again")
    return data


async def new_identity(server: str) -> tuple[str, Token]:
    """Ask the server for an identity of its own making, and the token that proves it."""
    lane = _lane(server, None)
    try:
        reply = await lane.call("POST", "/v1/identity")
        found = msgspec.json.decode(reply.body)
        return found["identity"], Token(found["token"])
    except TransportError as error:
        raise SinkUnusable(str(error)) from None
    except (msgspec.DecodeError, KeyError, TypeError):
        raise NotPublished(f"{server} gave no identity (status {reply.status}: {reply.text}); is it SpacetimeDB?") from None
    finally:
        await lane.close()


async def publish(server: str, database: str, token: Token) -> Published:
    """Put the module that fits the server on it, unless another module is there under that name."""
    lane = _lane(server, token)
    try:
        version = _version(await lane.call("GET", "/v1/health"), server)
        there = await _what_is_there(lane, database)
        name = f"{TABLE}_v{2 if version.startswith('2.') else 1}.wasm"
        path = f"/v1/database/{database}"
        reply = await lane.call("PUT", path, wasm(name), "application/wasm")
    except TransportError as error:
        raise SinkUnusable(str(error)) from None
    finally:
        await lane.close()
    try:
        success = msgspec.json.decode(reply.body)["Success"]
        identity = success["database_identity"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise NotPublished(_why_not(reply, server, database)) from None
    if isinstance(identity, dict):
        identity = identity["__identity__"]
    return Published(server, version, name, database, str(identity), created=there is None)


def _lane(server: str, token: Token | None) -> Lane:
    return Lane(Target(server.rstrip("/"), "", "", token, 1, 120.0, 1, 0.0))


def _version(health: Reply, server: str) -> str:
    try:
        version = str(msgspec.json.decode(health.body)["version"])
    except (msgspec.DecodeError, KeyError, TypeError):
        raise NotPublished(
            f"{server} does not say its version as SpacetimeDB does (status {health.status}): mend --server"
        ) from None
    if not version.startswith(("1.", "2.")):
        raise NotPublished(f"{server} is SpacetimeDB {version}; the module is built for 1.x and 2.x")
    return version


async def _what_is_there(lane: Lane, database: str) -> Schema | None:
    """The module under that name, if it is ours; None where there is none."""
    reply = await lane.call("GET", f"/v1/database/{database}/schema?version=9")
    if reply.status == 404:
        return None
    if reply.status != 200:
        raise NotPublished(
            f"cannot see what is in {database} (status {reply.status}: {reply.text}); is the token this server's?"
        )
    try:
        schema = Schema(reply.body)
    except SchemaUnreadable as error:
        raise NotPublished(f"cannot read the schema of {database} ({error}); choose another name") from None
    if set(schema.tables) != {TABLE} or not schema.functions.keys() <= _OURS:
        raise NotPublished(
            f"{database} has another module (tables {', '.join(schema.tables) or 'none'}), which is not overwritten: "
            "choose another name, or take table and function into that module (docs/spacetimedb.md)"
        )
    return schema


def _why_not(reply: Reply, server: str, database: str) -> str:
    match reply.status:
        case _ if "does not own" in reply.text:  # a 500 on servers 1.x
            return f"{database} belongs to another identity ({reply.text}): use its owner's token, or another name"
        case 401:
            return f"{server} does not accept the token (401: {reply.text}): it must be one that this server gave"
        case 403:
            return f"{database} belongs to another identity (403: {reply.text}): use its owner's token, or another name"
        case _:
            return f"{server} did not take the module (status {reply.status}: {reply.text})"
