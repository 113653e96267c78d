"""`pillarbox inspect`: where a file, a batch or an event is now. Takes no lock and changes nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pillarbox.admin.filters import EventHeaderDecoder, parse_batch_id
from pillarbox.admin.locate import BatchHistory, EventLocation, FileSummary, Locator
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import counted, format_time
from pillarbox.cli.context import CommandContext
from pillarbox.cli.options import JsonOption, OutboxOptions, QuietOption, expand_options
from pillarbox.cli.output import ExitCode, err, out, print_json
from pillarbox.store.layout import batch_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NOT_FOUND: Final = (
    "not found: no file contains this event id, and no file or ledger has a batch of this name. The ledger has batches, not "
    "events: a delivered event is only at its destination"
)
_STATES: Final = {
    "active": "accepted, not sealed yet",
    "pending": "pending",
    "retained": "delivered and retained",
}


class InspectResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox inspect --json`; times in microseconds since 1970."""

    name: str  # the argument of the command
    kind: Literal["file", "batch", "event", "unknown"]  # what the argument names
    files: list[FileSummary]  # the files with this name
    events: list[EventLocation]  # each place where the event is
    batches: list[BatchHistory]  # the history of each batch concerned
    problems: list[FileProblem]  # files that could not be read


@expand_options
def inspect(
    *,
    name: Annotated[str, typer.Argument(metavar="FILE|BATCH|EVENT_ID", help="Name of a file, batch id or event id.")],
    options: OutboxOptions,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Show where an event, batch or file is, and its history.

    Finds an event by reading all files of the directory and of the queues. Events no longer on disk can be traced only by
    batch, through the ledger. Exits with 1 if nothing is found. Safe at any time: takes no lock and changes nothing.
    """
    context = CommandContext(options.load_settings(), quiet=quiet)
    locator = Locator(context.directory, EventHeaderDecoder(context.settings.event_type), context.identity_decoder)
    files = [locator.read_summary(file) for file in locator.find_files(name)]
    batch = batch_id(parse_batch_id(name.partition("#")[0]))
    events: list[EventLocation] = []
    kind: Literal["file", "batch", "event", "unknown"]
    if files:
        kind, batches = "file", [file.batch for file in files]
    elif locator.knows_batch(batch):
        kind, batches = "batch", [batch]
    else:
        with _show_progress(locator.total_bytes, hidden=quiet) as show:
            events = list(locator.find_event(name, show))
        kind, batches = "event" if events else "unknown", [event.batch for event in events]
    result = InspectResult(
        name=name,
        kind=kind,
        files=files,
        events=events,
        batches=[locator.batch_history(batch) for batch in dict.fromkeys(batches) if batch],
        problems=locator.problems,
    )
    if json:
        print_json(result)
    else:
        _print_result(result)
    return ExitCode.PARTIAL if result.kind == "unknown" or result.problems else ExitCode.DONE


@contextmanager
def _show_progress(size: int, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("search"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=hidden or not err.is_terminal, transient=True) as display:
        task = display.add_task("search", total=size)
        yield lambda done: display.update(task, advance=done)


def _print_result(result: InspectResult) -> None:
    lines: list[str] = []
    for file in result.files:
        lines += _file_lines(file)
    for event in result.events:
        lines += _event_lines(result.name, event)
    for history in result.batches:
        lines.append(history.batch)
        for entry in history.entries:
            where = f"  ({entry.file})" if entry.file else f"  (ledger of {entry.sink})" if entry.sink else ""
            lines.append(f"  {format_time(entry.at_micros):20}  {entry.text}{where}")
    if result.kind == "unknown":
        lines.append(f"{result.name}: {_NOT_FOUND}")
    for line in lines:
        out.print(line)
    for problem in result.problems:
        err.print(str(problem))


def _file_lines(file: FileSummary) -> list[str]:
    lines = [f"{file.file}: {file.state}, {counted(file.bytes, 'byte')}, {counted(file.events, 'event')}"]
    if file.writer:
        lines.append(f"  writer {file.writer}")
    if file.first_micros is not None:
        lines.append(f"  events from {format_time(file.first_micros)} to {format_time(file.last_micros)}")
    if file.unfinished_bytes:
        lines.append(f"  an incomplete last line of {counted(file.unfinished_bytes, 'byte')}")
    lines += [
        f"  damaged: {counted(damage.length, 'byte')} at offset {damage.offset}: {damage.reason}" for damage in file.damaged
    ]
    return lines


def _event_lines(name: str, event: EventLocation) -> list[str]:
    if event.event is None:
        return [
            f"{name}: possibly in damaged bytes in {event.file}, from offset {event.offset} of the batch file: {event.reason}"
        ]
    if event.record is not None:
        lines = [f"{name}: dead letter, {event.code}: {event.reason}", f"  pillarbox dead show {event.record}"]
    else:
        lines = [f"{name}: {_STATES[event.state]}, in {event.file} at offset {event.offset}"]
    return [*lines, f"  {bytes(event.event).decode(errors='replace')}"]
