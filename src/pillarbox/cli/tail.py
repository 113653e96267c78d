"""`pillarbox tail`: the accepted events as they come. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from pillarbox.admin.filters import EventHeaderDecoder
from pillarbox.admin.tail import AcceptedEvent, Tailer
from pillarbox.admin.text import format_time
from pillarbox.cli.context import CommandContext, plural, printable
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, ExitCode, JsonOption, app, err
from pillarbox.cli.options import (
    ContainsOption,
    IdOption,
    KeyOption,
    ScopeOption,
    SinceOption,
    UntilOption,
    UserOption,
    WhereOption,
    parse_event_filter,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEFAULT_LINES: Final = 10  # events that are shown where nothing else is asked for
_BUSY_S: Final = 0.02  # between two looks while events come, unless listing takes more than a tenth of that
_LISTING_SHARE: Final = 10


class TailLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `pillarbox tail --json`."""

    batch: str | None  # None while the event is in an active file
    file: str  # from the outbox directory on
    offset: int  # of the event's line in it, in bytes
    writer: str | None  # None where the file's name does not tell
    event: msgspec.Raw  # as it stands


@app.command("tail")
def tail(
    directory: DirectoryOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is accepted from then on.")] = False,
    newest: Annotated[
        int | None,
        typer.Option(
            "--lines", "-n", metavar="N", min=0, help="Show the newest N; 10, or with --since all.", show_default=False
        ),
    ] = None,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    scope: ScopeOption = None,
    user: UserOption = None,
    contains: ContainsOption = None,
    where: WhereOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.02, max=60, help="Between two looks while nothing comes.")
    ] = 0.2,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Show the accepted events, the newest ones or with --follow as they come, each once, from all writers and files.

    An option that is given several times means any of them; different options must all fit. An event is shown once its line is
    whole, in the order of its writer. Events that were delivered and removed between two looks are counted, on standard error.
    Safe at any time: takes no lock and changes nothing. With --json, a line an event.
    """
    site = CommandContext(config, directory=directory, event_type=event_type)
    chosen = parse_event_filter(site, event_key, event_id, scope, user, contains, where, since, until)
    follower = Tailer(site.directory, site.clock, EventHeaderDecoder(site.settings.event_type), chosen)
    printer = _TailPrinter(follower, json=json)
    try:
        printer.print_events(follower.read_backlog(_DEFAULT_LINES if newest is None and since is None else newest))
        while follow:
            busy = printer.print_events(follower.read_new())
            _pause(max(_BUSY_S if busy else interval, follower.listing_s * _LISTING_SHARE))
    finally:
        follower.close()
    return ExitCode.PARTIAL if printer.has_problems else ExitCode.DONE


class _TailPrinter:
    """Events -> lines on standard output, what is to be said beside them -> standard error."""

    def __init__(self, follower: Tailer, *, json: bool) -> None:
        self.has_problems = False
        self._follower = follower
        self._line = _json_line if json else _text_line

    def print_events(self, events: Iterable[AcceptedEvent]) -> bool:
        """Print them; whether there were any."""
        some = False
        for event in events:
            sys.stdout.write(self._line(event))
            some = True
        sys.stdout.flush()
        for trouble in self._follower.problems:
            err.print(printable(str(trouble)), markup=False)
            self.has_problems = True
        self._follower.problems.clear()
        gaps = self._follower.gap_detector.gaps
        for gap in gaps:
            what = "an unknown number of events" if gap.events is None else plural(gap.events, "event")
            err.print(f"not seen: {what} of {gap.batch}, which came and went between two looks", markup=False)
        gaps.clear()
        return some


def _json_line(event: AcceptedEvent) -> str:
    line = TailLine(
        batch=event.batch or None,
        file=event.file,
        offset=event.offset,
        writer=event.writer or None,
        event=msgspec.Raw(event.payload),
    )
    return msgspec.json.encode(line).decode() + "\n"


def _text_line(event: AcceptedEvent) -> str:
    face = event.header
    if face.event_key is None:  # of a type that has no key
        return printable(f"{format_time(face.occurred_at_micros)}  {event.payload.decode()}").replace("\n", " ") + "\n"
    scope = "-" if face.scope_kind is None else f"{face.scope_kind}:{face.scope_id}"
    cells = (format_time(face.occurred_at_micros), face.event_key, scope, face.user_id or "-", face.event_id or "-")
    return printable("  ".join(cells)).replace("\n", " ") + "\n"


def _pause(seconds: float) -> None:
    """Wait; no longer than whoever reads standard output is there."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if poll.poll(seconds * 1000):
        raise BrokenPipeError
