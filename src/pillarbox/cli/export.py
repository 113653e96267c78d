"""`pillarbox export`: write the events of an outbox as NDJSON or CSV. Takes no lock and changes nothing in the outbox."""

from __future__ import annotations

import csv
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.export import EventExporter, ExportScope
from pillarbox.admin.filters import EventHeaderDecoder
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import counted
from pillarbox.cli.changes import PROBLEMS_SHOWN_MAX
from pillarbox.cli.context import CommandContext
from pillarbox.cli.csv_cells import escape_cell
from pillarbox.cli.options import EventFilterOptions, JsonOption, OutboxOptions, QuietOption, expand_options
from pillarbox.cli.output import ExitCode, err, flush_stdout, out, print_json, write_bytes
from pillarbox.errors import UsageError
from pillarbox.store.os_filesystem import atomic_output, exists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UPDATE_EVERY: Final = 1000  # events between two updates of the progress display
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox export --json`; on standard output with -o, otherwise on standard error."""

    events: int  # number of exported events
    file: str | None  # output file; None for standard output
    new_events: int  # how many of `events` were accepted while the export ran
    missed_batches: int  # batches that were delivered or evicted before the export read them
    unrecoverable_ranges: int  # damaged byte ranges that contain no event
    incomplete_events: int  # events with fields that have no CSV column, or that are not JSON objects
    problems: list[FileProblem]  # files that cannot be read, and lines that are not events


@expand_options
def export(
    options: OutboxOptions,
    what: Annotated[ExportScope, typer.Option("--what", help="Which events to export.")] = "pending",
    kind: Annotated[Literal["ndjson", "csv"], typer.Option("--format", help="Output format.")] = "ndjson",
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Output file; written whole or not at all.", show_default=False),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="With CSV: do not escape cells that a spreadsheet would run as formulas.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    *,
    filters: EventFilterOptions,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Export stored events as NDJSON or CSV.

    An event that is stored during the whole run is written exactly once; events added or removed meanwhile are counted. Several
    values of one filter: any may match; several filters: all must match. Safe at any time: takes no lock and changes nothing in
    the outbox.
    """
    context = CommandContext(options.load_settings(), quiet=quiet)
    event_filter = filters.to_filter(context.clock.micros())
    if output is not None and exists(output) and not force:
        raise UsageError(f"{output} already exists; --force overwrites it")
    event_type = context.settings.event_type
    exporter = EventExporter(
        context.directory,
        context.clock,
        EventHeaderDecoder(event_type),
        event_filter,
        context.identity_decoder,
        context.validator,
    )
    encoder = _CsvEncoder(event_type, raw=raw) if kind == "csv" else None
    count = 0
    with _open_output(output, force=force) as write, _show_progress(context, output) as show:
        if encoder is not None:
            write(encoder.header())
        for event in exporter.events(what):
            write(event.payload + b"\n" if encoder is None else encoder.row(event.payload))
            count += 1
            if count % _UPDATE_EVERY == 0:
                show(count)
    result = ExportResult(
        events=count,
        file=output,
        new_events=exporter.arrived_events,
        missed_batches=exporter.vanished_batches,
        unrecoverable_ranges=exporter.unrecoverable_ranges,
        incomplete_events=0 if encoder is None else encoder.incomplete,
        problems=exporter.problems,
    )
    _print_result(result, json=json, quiet=quiet)
    return ExitCode.PARTIAL if result.problems or result.unrecoverable_ranges or result.incomplete_events else ExitCode.DONE


@contextmanager
def _open_output(path: str | None, *, force: bool) -> Iterator[Callable[[bytes], object]]:
    if path is None:
        yield write_bytes
        flush_stdout()
        return
    try:
        with atomic_output(path, overwrite=force) as write:
            yield write
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


@contextmanager
def _show_progress(context: CommandContext, output: str | None) -> Iterator[Callable[[int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} events"), TimeElapsedColumn())
    hidden = context.quiet or not err.is_terminal or (output is None and out.is_terminal)
    with Progress(*columns, console=err, disable=hidden, transient=True) as display:
        task = display.add_task("export", total=None)
        yield lambda count: display.update(task, completed=count)


def _print_result(result: ExportResult, *, json: bool, quiet: bool) -> None:
    console = err if result.file is None else out
    if json:
        print_json(result, to_stderr=result.file is None)
        return
    for problem in result.problems[:PROBLEMS_SHOWN_MAX]:
        err.print(str(problem))
    if len(result.problems) > PROBLEMS_SHOWN_MAX:
        more = counted(len(result.problems) - PROBLEMS_SHOWN_MAX, "more problem")
        err.print(f"and {more}; --json lists them")
    notes = [f"exported {counted(result.events, 'event')}"]
    if result.new_events:
        notes.append(f"{result.new_events:,} of them accepted during the export")
    if result.missed_batches:
        notes.append(f"{counted(result.missed_batches, 'batch', 'batches')} delivered or evicted before they could be read")
    if result.unrecoverable_ranges:
        notes.append(f"{counted(result.unrecoverable_ranges, 'damaged byte range')} without a recoverable event")
    if result.incomplete_events:
        notes.append(f"{counted(result.incomplete_events, 'event')} with fields that have no column (use --format ndjson)")
    if not quiet or len(notes) > 1:
        console.print("; ".join(notes))


class _CsvEncoder:
    """Encodes events as CSV rows, with a column for each field of the event type."""

    def __init__(self, event_type: type[msgspec.Struct], *, raw: bool) -> None:
        self._escape: Callable[[str], str] = str if raw else escape_cell
        self.incomplete = 0  # events of which the row does not have everything
        self._columns = [field.encode_name for field in msgspec.structs.fields(event_type)]
        self._text = io.StringIO()
        self._writer = csv.writer(self._text)  # it quotes cells that contain a character of its line end, `\r\n`

    def header(self) -> bytes:
        """The row of column names."""
        return self._encode_row(list(map(self._escape, self._columns)))

    def row(self, payload: bytes) -> bytes:
        """An event's row: text (escaped if a spreadsheet would run it), null and missing fields empty, the rest as JSON."""
        try:
            fields = _decode_fields(payload)
        except msgspec.DecodeError:  # a dead letter can be any JSON
            self.incomplete += 1
            return b""
        self.incomplete += not fields.keys() <= set(self._columns)
        return self._encode_row([self._cell(bytes(fields.get(name, b"null"))) for name in self._columns])

    def _cell(self, value: bytes) -> str:
        if value == b"null":
            return ""
        return self._escape(msgspec.json.decode(value, type=str)) if value.startswith(b'"') else value.decode()

    def _encode_row(self, cells: list[str]) -> bytes:
        self._writer.writerow(cells)
        line = self._text.getvalue().removesuffix("\r\n").encode() + b"\n"
        self._text.seek(0)
        self._text.truncate()
        return line
