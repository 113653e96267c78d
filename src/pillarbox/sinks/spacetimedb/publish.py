"""The module that ships in `wasm/`, and putting it on a server."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from pillarbox.errors import SinkUnusable, WorldError
from pillarbox.event import TrackingEvent
from pillarbox.sinks.spacetimedb.pool import Lane, TransportError
from pillarbox.sinks.spacetimedb.responses import version_of
from pillarbox.sinks.spacetimedb.schema import Schema, SchemaUnreadable
from pillarbox.sinks.spacetimedb.url import DEFAULT_FUNCTION, Target, Token

if TYPE_CHECKING:
    from pillarbox.sinks.spacetimedb.responses import Reply

TABLE: Final = "tracking_event"
_OURS: Final = {DEFAULT_FUNCTION, f"{DEFAULT_FUNCTION}_counted"}


class NotPublished(WorldError):  # noqa: N818 - reads as the sentence it is
    """The module was not put on the server; the message says why, and what to do."""


class Published(NamedTuple):
    """What is on the server now, and how it came there."""

    server: str
    version: str  # of the server
    module: str  # the file in `wasm/`
    database: str
    database_identity: str
    owner: str  # the identity that the token proves
    done: Literal["made", "replaced", "was there"]


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


async def publish(server: str, database: str, token: Token, *, replace: bool = False) -> Published:
    """Put the module that fits the server on it; one of ours that is there is replaced only if that is asked for."""
    lane = _lane(server, token)
    path = f"/v1/database/{database}"
    try:
        version = _version(await lane.call("GET", "/v1/health"), server)
        there = await _is_there(lane, database)
        name = f"{TABLE}_v{2 if version.startswith('2.') else 1}.wasm"
        if not there or replace:
            reply = await lane.call("PUT", path, wasm(name), "application/wasm")
            if reply.status != 200 or b"Success" not in reply.body:
                raise NotPublished(_why_not(reply, server, database))
        facts = await lane.call("GET", path)
    except TransportError as error:
        raise SinkUnusable(str(error)) from None
    finally:
        await lane.close()
    identity, owner = _identities(facts)
    if token.identity() not in (None, owner):
        raise NotPublished(f"{database} belongs to another identity, {owner}: use its owner's token, or another name")
    done: Literal["made", "replaced", "was there"] = "made" if not there else "replaced" if replace else "was there"
    return Published(server, version, name, database, identity, owner, done)


def _identities(facts: Reply) -> tuple[str, str]:
    """The database's identity and its owner's."""
    try:
        found = msgspec.json.decode(facts.body)
        pair = [found["database_identity"], found["owner_identity"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        return "unknown", "unknown"
    return tuple(str(one["__identity__"] if isinstance(one, dict) else one).removeprefix("0x") for one in pair)  # type: ignore[return-value]  # two of them


def _lane(server: str, token: Token | None) -> Lane:
    return Lane(Target(server.rstrip("/"), "", "", token, 1, 120.0, 1, 0.0))


def _version(health: Reply, server: str) -> str:
    version = version_of(health)
    if version is None:
        raise NotPublished(f"{server} does not say its version as SpacetimeDB does (status {health.status}): mend --server")
    if not version.startswith(("1.", "2.")):
        raise NotPublished(f"{server} is SpacetimeDB {version}; the module is built for 1.x and 2.x")
    return version


async def _is_there(lane: Lane, database: str) -> bool:
    """Whether our module is under that name; raises where another one is."""
    reply = await lane.call("GET", f"/v1/database/{database}/schema?version=9")
    if reply.status == 404:
        return False
    if reply.status != 200:
        raise NotPublished(
            f"cannot see what is in {database} (status {reply.status}: {reply.text}); is the token this server's?"
        )
    try:
        schema = Schema(reply.body)
    except SchemaUnreadable as error:
        raise NotPublished(f"cannot read the schema of {database} ({error}); choose another name") from None
    columns, private = schema.table(TABLE)
    ours = (
        schema.tables == [TABLE]
        and [column.name for column in columns] == list(TrackingEvent.__struct_fields__)
        and private
        and schema.functions.keys() <= _OURS
        and not schema.lifecycle
    )
    if not ours:
        tables, functions = ", ".join(schema.tables) or "none", ", ".join([*schema.functions, *schema.lifecycle]) or "none"
        raise NotPublished(
            f"{database} has another module (tables {tables}; functions {functions}), which is not overwritten: "
            "choose another name, or take table and function into that module (docs/how-to/spacetimedb.md)"
        )
    return True


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
