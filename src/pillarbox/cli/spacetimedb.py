"""`pillarbox spacetimedb`: publish the module to a server, or print one for your own event type."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, urlsplit

import typer

from pillarbox.cli.context import load_settings
from pillarbox.cli.options import CONTEXT_SETTINGS, EventTypeOption, JsonOption
from pillarbox.cli.output import ExitCode, err, out, print_json_line
from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.escaping import one_line
from pillarbox.redaction import redact_text
from pillarbox.sinks.base import is_loopback
from pillarbox.sinks.event_loop import run_on_sink_loop
from pillarbox.store.os_filesystem import create_private_file, exists

if TYPE_CHECKING:
    from pillarbox.sinks.spacetimedb.publish import PublishResult

spacetimedb = typer.Typer(
    name="spacetimedb",
    help="Set up a SpacetimeDB database for events.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
)
_QUERY = "SELECT * FROM tracking_event"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@spacetimedb.command("publish")
def publish(
    server: Annotated[str, typer.Option("--server", metavar="URL", help="Server, e.g. http://127.0.0.1:3000.")],
    database: Annotated[str, typer.Option("--database", metavar="NAME", help="Database to create or update.")],
    token_file: Annotated[
        str, typer.Option("--token-file", metavar="FILE", help="Token of the database's owner; created if missing.")
    ] = "spacetimedb.token",  # noqa: S107 - a file's name
    replace: Annotated[bool, typer.Option("--replace", help="Replace an older Pillarbox module in the database.")] = False,
    json: JsonOption = False,
) -> int:
    """Create a database with a table for events.

    Publishes a module with the table tracking_event and the function that fills it. Needs no Rust: the module ships with
    Pillarbox, built for servers 1.x and 2.x. A database that has another module is not changed. The token gives full
    control of the database: keep the file, and keep it secret.
    """
    try:
        from pillarbox.sinks.spacetimedb import publish  # noqa: PLC0415 - needs its extra
        from pillarbox.sinks.spacetimedb.url import TOKEN_VARIABLE, find_token  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SinkUnusableError(f"spacetimedb: needs {error.name}; pip install 'pillarbox[spacetimedb]'") from None
    _check_server(server)
    if not _NAME.fullmatch(database):
        raise ConfigurationError("database", database, "the command line", "use lower-case letters and digits, joined by -")
    token = find_token("", token_file if exists(token_file) else None)
    if not server.startswith("https:") and not is_loopback(urlsplit(server).hostname or ""):
        err.print(f"{server}: the token is sent over plain http, where the network can read it: use https")
    made = token is None
    if token is None:
        _, token = run_on_sink_loop(publish.new_identity(server.rstrip("/")))
        create_private_file(token_file, token.file_content())
    done = run_on_sink_loop(publish.publish(server.rstrip("/"), database, token, replace=replace))
    if json:
        print_json_line(done._asdict())
        return ExitCode.DONE
    file = token_file if exists(token_file) else ""
    origin = f"{file}, just created with a new identity" if made else file or f"environment {TOKEN_VARIABLE}"
    shown = done._replace(
        version=one_line(done.version), database_identity=one_line(done.database_identity), owner=one_line(done.owner)
    )
    out.print(*_describe_published(shown, file, origin).split("\n"), sep="\n")
    return ExitCode.DONE


def _check_server(server: str) -> None:
    """Raise `ConfigurationError` for what is not the plain URL of a server; the message shows no secret of it."""
    advice = "use a URL, for example http://127.0.0.1:3000"
    try:
        parts = urlsplit(server)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and server.isprintable()
    except ValueError:
        raise ConfigurationError("server", redact_text(server), "the command line", advice) from None
    if "@" in server:
        advice = "remove user and password from the URL; --token-file names the file with the token"
    if not is_plain or "@" in server or parts.query or parts.fragment or parts.path.strip("/"):
        raise ConfigurationError("server", redact_text(server), "the command line", advice)


def _describe_published(done: PublishResult, file: str, origin: str) -> str:
    """What the owner of the database needs to know."""
    scheme, _, host = done.server.partition("://")
    option = f"?token_file={quote(file, safe='/')}" if file else ""
    url = shlex.quote(f"spacetimedb{'+https' if scheme == 'https' else ''}://{host}/{done.database}{option}")
    secret = f"$(cat {shlex.quote(file)})" if file else "$PILLARBOX_SPACETIMEDB_TOKEN"
    ask = f"{done.server}/v1/database/{done.database}/sql -d '{_QUERY}'"
    head = {
        "created": f"Created {done.database} on",
        "updated": f"Replaced the module of {done.database} on",
        "unchanged": f"Nothing changed: {done.database} already has the module (--replace publishes it again), on",
    }[done.action]
    return f"""{head} {done.server}, SpacetimeDB {done.version}
  database   {done.database_identity}
  owner      {done.owner}
  module     {done.wasm_file}: table tracking_event (private), function record_tracking_events
  token      {origin}
             It gives full control of the database: keep it secret.

Deliver to it:
  pillarbox check {url}
  pillarbox deliver -d DIR --sink {url}
See what arrived, as the owner:
  curl -H "Authorization: Bearer {secret}" {ask}"""


@spacetimedb.command("scaffold")
def scaffold(
    event_type: EventTypeOption = None,
    major: Annotated[int, typer.Option("--for", metavar="1|2", help="Major version of the server.", min=1, max=2)] = 2,
) -> int:
    """Print a Rust module for your event type.

    The module has a table and the function that fills it. Use it as a starting point for your own.
    """
    from pillarbox.sinks.spacetimedb.scaffold import scaffold as rust  # noqa: PLC0415 - the package needs its extra

    settings = load_settings(None, event_type=event_type)
    out.print(*rust(settings.event_type, major).removesuffix("\n").split("\n"), sep="\n")
    return ExitCode.DONE
