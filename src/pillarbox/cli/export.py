"""`pillarbox export`: what an outbox holds -> NDJSON or CSV. Takes no lock, creates and adopts nothing in the outbox."""

from __future__ import annotations

import csv
import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.dead_letters import FileProblem
from pillarbox.admin.event_filters import EventHeaderDecoder
from pillarbox.admin.export import EventExporter, ExportScope
from pillarbox.cli.app import ConfigOption, DirectoryOption, EventTypeOption, Exit, JsonOption, QuietOption, app, err, out
from pillarbox.cli.context import NAMED_MAX, Site, counted, printable
from pillarbox.cli.options import (
    ContainsOption,
    IdOption,
    KeyOption,
    ScopeOption,
    SinceOption,
    UntilOption,
    UserOption,
    WhereOption,
    wanted,
)
from pillarbox.errors import UsageError
from pillarbox.store.filesystem import atomic_output, exists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHOW_EVERY: Final = 1000  # events between two looks at the progress display
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox export --json`; on standard output with -o, otherwise on standard error."""

    events: int
    file: str | None
    came_events: int  # accepted meanwhile, and exported too
    went_batches: int  # delivered or given up before they were read, and so not exported
    hopeless_spans: int  # damaged bytes from which no event can be had
    left_out_members: int  # events that have members which are no columns, or are no objects
    troubles: list[FileProblem]  # files that cannot be read, lines that are no events


@app.command("export")
def export(
    directory: DirectoryOption = None,
    what: Annotated[ExportScope, typer.Option("--what", help="Which events.")] = "pending",
    kind: Annotated[Literal["ndjson", "csv"], typer.Option("--format", help="What to write.")] = "ndjson",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write there, whole or not at all.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file of -o.")] = False,
    event_key: KeyOption = None,
    event_id: IdOption = None,
    scope: ScopeOption = None,
    user: UserOption = None,
    contains: ContainsOption = None,
    where: WhereOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Write out what waits, or was set aside, or is kept after delivery: one event a line, as it stands, or as CSV.

    Every event that is there for the whole of the run is written, once; what came and went meanwhile is counted. An option that
    is given several times means any of them; different options must all fit. Safe at any time: takes no lock and changes
    nothing in the outbox.
    """
    site = Site(config, quiet=quiet, directory=directory, event_type=event_type)
    chosen = wanted(site, event_key, event_id, scope, user, contains, where, since, until)
    if output is not None and exists(output) and not force:
        raise UsageError(f"{output} is there already; --force writes over it")
    stock = EventExporter(site.place, site.clock, EventHeaderDecoder(site.settings.event_type), chosen, site.heading, site.gate)
    table = _Table(site.settings.event_type) if kind == "csv" else None
    count = 0
    with _destination(output, force=force) as write, _progress(site, output) as progress:
        if table is not None:
            write(table.header())
        for event in stock.events(what):
            write(event.payload + b"\n" if table is None else table.row(event.payload))
            count += 1
            if count % _SHOW_EVERY == 0:
                progress(count)
    summary = Exported(
        events=count,
        file=output,
        came_events=stock.arrived_events,
        went_batches=stock.vanished_batches,
        hopeless_spans=stock.unrecoverable_ranges,
        left_out_members=0 if table is None else table.left_out,
        troubles=stock.problems,
    )
    _say(summary, json=json, quiet=quiet)
    return Exit.PARTLY if stock.problems or stock.unrecoverable_ranges or summary.left_out_members else Exit.DONE


@contextmanager
def _destination(path: str | None, *, force: bool) -> Iterator[Callable[[bytes], object]]:
    if path is None:
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    try:
        with atomic_output(path, overwrite=force) as write:
            yield write
    except OSError as error:
        raise UsageError(f"{path} is not written: {error.strerror}") from None


@contextmanager
def _progress(site: Site, output: str | None) -> Iterator[Callable[[int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} events"), TimeElapsedColumn())
    hidden = site.quiet or not err.is_terminal or (output is None and out.is_terminal)
    with Progress(*columns, console=err, disable=hidden, transient=True) as display:
        task = display.add_task("export", total=None)
        yield lambda count: display.update(task, completed=count)


def _say(summary: Exported, *, json: bool, quiet: bool) -> None:
    console = err if summary.file is None else out
    if json:
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
        (sys.stderr if summary.file is None else sys.stdout).write(text + "\n")
        return
    for trouble in summary.troubles[:NAMED_MAX]:
        err.print(printable(str(trouble)), markup=False)
    if len(summary.troubles) > NAMED_MAX:
        err.print(f"and {len(summary.troubles) - NAMED_MAX} more like these; --json names them", markup=False)
    notes = [f"{counted(summary.events, 'event')} exported"]
    if summary.came_events:
        notes.append(f"{summary.came_events:,} of them accepted meanwhile")
    if summary.went_batches:
        notes.append(f"{counted(summary.went_batches, 'batch', 'batches')} delivered or given up meanwhile, and not in it")
    if summary.hopeless_spans:
        notes.append(f"no event can be had from {counted(summary.hopeless_spans, 'damaged span')}")
    if summary.left_out_members:
        notes.append(f"{counted(summary.left_out_members, 'event')} with what is no column: NDJSON has it")
    if not quiet or len(notes) > 1:
        console.print("; ".join(notes), markup=False)


class _Table:
    """Events -> rows of CSV, a column for each member of the event type."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        self.left_out = 0  # events with further members
        self._members = [field.encode_name for field in msgspec.structs.fields(event_type)]
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")

    def header(self) -> bytes:
        """The names of the members."""
        return self._encoded(self._members)

    def row(self, payload: bytes) -> bytes:
        """Text as it is, null and what is not there as nothing, all else as JSON."""
        try:
            members = _decode_members(payload)
        except msgspec.DecodeError:  # a dead letter may be any JSON
            self.left_out += 1
            return b""
        self.left_out += not members.keys() <= set(self._members)
        return self._encoded([_cell(bytes(members.get(name, b"null"))) for name in self._members])

    def _encoded(self, cells: list[str]) -> bytes:
        self._writer.writerow(cells)
        line = self._text.getvalue().encode()
        self._text.seek(0)
        self._text.truncate()
        return line


def _cell(value: bytes) -> str:
    if value == b"null":
        return ""
    return str(msgspec.json.decode(value)) if value.startswith(b'"') else value.decode()
