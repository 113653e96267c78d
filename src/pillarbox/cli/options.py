"""What `tail` and `export` share: the options that choose among events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pillarbox.admin.filters import EventFilter, parse_conditions
from pillarbox.admin.text import parse_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.cli.context import CommandContext

KeyOption = Annotated[list[str] | None, typer.Option("--event-key", metavar="KEY", help="With this key.", show_default=False)]
IdOption = Annotated[list[str] | None, typer.Option("--event-id", metavar="ID", help="With this id.", show_default=False)]
ScopeOption = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="KIND[:ID]", help="Of this scope: User, or User:u-17.", show_default=False),
]
UserOption = Annotated[list[str] | None, typer.Option("--user", metavar="ID", help="With this user_id.", show_default=False)]
ContainsOption = Annotated[
    list[str] | None, typer.Option("--contains", metavar="TEXT", help="With this in its JSON.", show_default=False)
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="PATH=VALUE", help="A member, or metadata_json.page for one inside.", show_default=False),
]
SinceOption = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Happened not earlier: 2h, 3d, or ISO 8601.", show_default=False)
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Happened earlier than that.", show_default=False)
]


def parse_event_filter(
    site: CommandContext,
    event_keys: Sequence[str] | None,
    event_ids: Sequence[str] | None,
    scopes: Sequence[str] | None,
    users: Sequence[str] | None,
    texts: Sequence[str] | None,
    members: Sequence[str] | None,
    since: str | None,
    until: str | None,
) -> EventFilter:
    """What the options amount to."""
    now = site.clock.micros()
    return EventFilter(
        event_keys=tuple(event_keys or ()),
        event_ids=tuple(event_ids or ()),
        scopes=tuple(scopes or ()),
        users=tuple(users or ()),
        texts=tuple(texts or ()),
        conditions=parse_conditions(members or ()),
        since_micros=None if since is None else parse_time(since, now),
        until_micros=None if until is None else parse_time(until, now),
    )
