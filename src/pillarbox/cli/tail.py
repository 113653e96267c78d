"""`pillarbox tail`: print accepted events as they arrive. Takes no lock and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from pillarbox.admin.filters import EventHeaderDecoder
from pillarbox.admin.tail import AcceptedEvent, Tailer
from pillarbox.admin.text import counted, format_time
from pillarbox.cli.context import CommandContext
from pillarbox.cli.options import EventFilterOptions, JsonOption, OutboxOptions, expand_options
from pillarbox.cli.output import ExitCode, err, flush_stdout, print_json_line, wait_while_read, write_line

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEFAULT_LINES: Final = 10
_BUSY_S: Final = 0.02  # between two polls while events arrive
_LISTING_SHARE: Final = 10  # listing the directory takes at most a tenth of the time


class TailLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `pillarbox tail --json`."""

    batch: str | None  # batch id; None while the event is in an active segment
    file: str  # path of the file, relative to the outbox directory
    offset: int  # offset of the event's line in the file, in bytes
    writer: str | None  # id of the writer; None if the file's name does not tell
    event: msgspec.Raw  # the event as it was stored


@expand_options
def tail(
    *,
    options: OutboxOptions,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue with events as they are accepted.")] = False,
    newest: Annotated[
        int | None,
        typer.Option(
            "--lines",
            "-n",
            metavar="N",
            min=0,
            help="Show the newest N events. [default: 10; all with --since]",
            show_default=False,
        ),
    ] = None,
    filters: EventFilterOptions,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.02, max=60, help="Seconds between polls while no events arrive.")
    ] = 0.2,
    json: JsonOption = False,
) -> int:
    """Show the newest events; with --follow, new ones.

    Shows the events of all writers, each event once, as soon as its line is complete. Those of one writer are in order. Several
    values of one filter: any may match; several filters: all must match. Events that were delivered and deleted between two
    polls are counted on standard error. With --json, prints one JSON object per line. Safe at any time: takes no lock and
    changes nothing.
    """
    context = CommandContext(options.load_settings())
    header_decoder = EventHeaderDecoder(context.settings.event_type)
    tailer = Tailer(context.directory, context.clock, header_decoder, filters.to_filter(context.clock.micros()))
    printer = _TailPrinter(tailer, json=json)
    try:
        printer.print_events(tailer.read_backlog(_DEFAULT_LINES if newest is None and filters.since is None else newest))
        while follow:
            busy = printer.print_events(tailer.read_new())
            wait_while_read(max(_BUSY_S if busy else interval, tailer.listing_s * _LISTING_SHARE))
    finally:
        tailer.close()
    return ExitCode.PARTIAL if printer.has_problems else ExitCode.DONE


class _TailPrinter:
    """Prints events on standard output, and problems and gaps on standard error."""

    def __init__(self, tailer: Tailer, *, json: bool) -> None:
        self.has_problems = False
        self._tailer = tailer
        self._print_event = _print_json_event if json else _print_text_event

    def print_events(self, events: Iterable[AcceptedEvent]) -> bool:
        """Print events, problems and gaps; whether there were any events."""
        any_events = False
        for event in events:
            self._print_event(event)
            any_events = True
        flush_stdout()
        for problem in self._tailer.problems:
            err.print(str(problem))
            self.has_problems = True
        self._tailer.problems.clear()
        gaps = self._tailer.gap_detector.gaps
        for gap in gaps:
            events_missed = "an unknown number of events" if gap.events is None else counted(gap.events, "event")
            err.print(f"missed {events_missed} of {gap.batch}: delivered and deleted between two polls")
        gaps.clear()
        return any_events


def _print_json_event(event: AcceptedEvent) -> None:
    line = TailLine(
        batch=event.batch or None,
        file=event.file,
        offset=event.offset,
        writer=event.writer or None,
        event=msgspec.Raw(event.payload),
    )
    print_json_line(line)


def _print_text_event(event: AcceptedEvent) -> None:
    header = event.header
    if header.event_key is None:  # the event type has no such field
        write_line(f"{format_time(header.occurred_at_micros)}  {event.payload.decode()}")
        return
    scope = "-" if header.scope_kind is None else f"{header.scope_kind}:{header.scope_id}"
    cells = (format_time(header.occurred_at_micros), header.event_key, scope, header.user_id or "-", header.event_id or "-")
    write_line("  ".join(cells))
