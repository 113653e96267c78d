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

from pillarbox.admin.export import EventExporter, ExportScope
from pillarbox.admin.filters import EventHeaderDecoder
from pillarbox.admin.scan import FileProblem
from pillarbox.cli.context import PROBLEMS_SHOWN_MAX, CommandContext, plural, printable
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, ExitCode, JsonOption, QuietOption, app, err, out
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
from pillarbox.errors import UsageError
from pillarbox.store.os_filesystem import atomic_output, exists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UPDATE_EVERY: Final = 1000  # events between two looks at the progress display
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox export --json`; on standard output with -o, otherwise on standard error."""

    events: int
    file: str | None
    new_events: int  # accepted meanwhile, and exported too
    missed_batches: int  # delivered or given up before they were read, and so not exported
    unrecoverable_ranges: int  # damaged bytes from which no event can be had
    incomplete_events: int  # events that have members which are no columns, or are no objects
    problems: list[FileProblem]  # files that cannot be read, lines that are no events


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
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    chosen = parse_event_filter(site, event_key, event_id, scope, user, contains, where, since, until)
    if output is not None and exists(output) and not force:
        raise UsageError(f"{output} is there already; --force writes over it")
    stock = EventExporter(
        site.directory, site.clock, EventHeaderDecoder(site.settings.event_type), chosen, site.heading, site.gate
    )
    table = _CsvEncoder(site.settings.event_type) if kind == "csv" else None
    count = 0
    with _destination(output, force=force) as write, _progress(site, output) as progress:
        if table is not None:
            write(table.header())
        for event in stock.events(what):
            write(event.payload + b"\n" if table is None else table.row(event.payload))
            count += 1
            if count % _UPDATE_EVERY == 0:
                progress(count)
    summary = ExportResult(
        events=count,
        file=output,
        new_events=stock.arrived_events,
        missed_batches=stock.vanished_batches,
        unrecoverable_ranges=stock.unrecoverable_ranges,
        incomplete_events=0 if table is None else table.incomplete,
        problems=stock.problems,
    )
    _print_result(summary, json=json, quiet=quiet)
    return ExitCode.PARTIAL if stock.problems or stock.unrecoverable_ranges or summary.incomplete_events else ExitCode.DONE


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
def _progress(site: CommandContext, output: str | None) -> Iterator[Callable[[int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} events"), TimeElapsedColumn())
    hidden = site.quiet or not err.is_terminal or (output is None and out.is_terminal)
    with Progress(*columns, console=err, disable=hidden, transient=True) as display:
        task = display.add_task("export", total=None)
        yield lambda count: display.update(task, completed=count)


def _print_result(summary: ExportResult, *, json: bool, quiet: bool) -> None:
    console = err if summary.file is None else out
    if json:
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
        (sys.stderr if summary.file is None else sys.stdout).write(text + "\n")
        return
    for trouble in summary.problems[:PROBLEMS_SHOWN_MAX]:
        err.print(printable(str(trouble)), markup=False)
    if len(summary.problems) > PROBLEMS_SHOWN_MAX:
        err.print(f"and {len(summary.problems) - PROBLEMS_SHOWN_MAX} more like these; --json names them", markup=False)
    notes = [f"{plural(summary.events, 'event')} exported"]
    if summary.new_events:
        notes.append(f"{summary.new_events:,} of them accepted meanwhile")
    if summary.missed_batches:
        notes.append(f"{plural(summary.missed_batches, 'batch', 'batches')} delivered or given up meanwhile, and not in it")
    if summary.unrecoverable_ranges:
        notes.append(f"no event can be had from {plural(summary.unrecoverable_ranges, 'damaged span')}")
    if summary.incomplete_events:
        notes.append(f"{plural(summary.incomplete_events, 'event')} with what is no column: NDJSON has it")
    if not quiet or len(notes) > 1:
        console.print("; ".join(notes), markup=False)


class _CsvEncoder:
    """Events -> rows of CSV, a column for each member of the event type."""

    def __init__(self, event_type: type[msgspec.Struct]) -> None:
        self.incomplete = 0  # events with further members
        self._members = [field.encode_name for field in msgspec.structs.fields(event_type)]
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")

    def header(self) -> bytes:
        """The names of the members."""
        return self._encode_row(self._members)

    def row(self, payload: bytes) -> bytes:
        """Text as it is, null and what is not there as nothing, all else as JSON."""
        try:
            members = _decode_members(payload)
        except msgspec.DecodeError:  # a dead letter may be any JSON
            self.incomplete += 1
            return b""
        self.incomplete += not members.keys() <= set(self._members)
        return self._encode_row([_csv_cell(bytes(members.get(name, b"null"))) for name in self._members])

    def _encode_row(self, cells: list[str]) -> bytes:
        self._writer.writerow(cells)
        line = self._text.getvalue().encode()
        self._text.seek(0)
        self._text.truncate()
        return line


def _csv_cell(value: bytes) -> str:
    if value == b"null":
        return ""
    return str(msgspec.json.decode(value)) if value.startswith(b'"') else value.decode()
