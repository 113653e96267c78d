"""`pillarbox inspect`: where a file, a batch or an event is now. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pillarbox.admin.filters import EventHeaderDecoder, parse_batch_id
from pillarbox.admin.locate import BatchHistory, EventLocation, FileSummary, Locator
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import format_time
from pillarbox.cli.context import CommandContext, plural, print_json, printable
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, ExitCode, JsonOption, QuietOption, app, err, out
from pillarbox.store.layout import batch_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NOT_FOUND = (
    "in no file that is here, and no batch's name. The ledger remembers batches, not events: one that was delivered is gone "
    "from here, and only its destination can tell"
)


class InspectResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox inspect --json`; times in microseconds since 1970."""

    name: str
    kind: Literal["file", "batch", "event", "unknown"]
    files: list[FileSummary]  # of this name, with what is in them
    events: list[EventLocation]  # places where the event is
    batches: list[BatchHistory]  # what is known of the batches concerned
    problems: list[FileProblem]  # what could not be read


@app.command("inspect")
def inspect(
    name: Annotated[str, typer.Argument(metavar="FILE|BATCH|EVENT_ID", help="What to look for.")],
    directory: DirectoryOption = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Say where an event, a batch or a file is now, and what became of it: in files, queues, dead letters, and the ledger.

    An event is searched by reading all files. What is in no file any more only the ledger can tell of, and that knows batches.
    The exit code is 1 where nothing is found. Safe at any time: takes no lock and changes nothing.
    """
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    known = Locator(site.directory, EventHeaderDecoder(site.settings.event_type), site.heading)
    files = [known.read_summary(sight) for sight in known.find_files(name)]
    batch = batch_id(parse_batch_id(name.partition("#")[0]))
    events: list[EventLocation] = []
    if files:
        is_a, batches = "file", [file.batch for file in files]
    elif known.knows_batch(batch):
        is_a, batches = "batch", [batch]
    else:
        with _progress(known.total_bytes, hidden=quiet) as progress:
            events = list(known.find_event(name, progress))
        is_a, batches = "event" if events else "unknown", [event.batch for event in events]
    found = InspectResult(
        name=name,
        kind=is_a,  # type: ignore[arg-type]  # one of those
        files=files,
        events=events,
        batches=[known.batch_history(one) for one in dict.fromkeys(batches) if one],
        problems=known.problems,
    )
    if json:
        print_json(found)
    else:
        _print_result(found)
    return ExitCode.PARTIAL if found.kind == "unknown" or found.problems else ExitCode.DONE


@contextmanager
def _progress(size: int, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("search"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=hidden or not err.is_terminal, transient=True) as display:
        task = display.add_task("search", total=size)
        yield lambda done: display.update(task, advance=done)


def _print_result(found: InspectResult) -> None:
    lines: list[str] = []
    for file in found.files:
        lines += _file_lines(file)
    for event in found.events:
        lines += _event_lines(found.name, event)
    for story in found.batches:
        lines.append(story.batch)
        for fact in story.entries:
            where = f"  ({fact.file})" if fact.file else f"  (ledger of {fact.sink})" if fact.sink else ""
            lines.append(f"  {format_time(fact.at_micros):20}  {fact.text}{where}")
    if found.kind == "unknown":
        lines.append(f"{found.name}: {_NOT_FOUND}")
    for line in lines:
        out.print(printable(line), markup=False)
    for trouble in found.problems:
        err.print(printable(str(trouble)), markup=False)


def _file_lines(file: FileSummary) -> list[str]:
    lines = [f"{file.file}: {file.state}, {file.bytes:,} bytes, {plural(file.events, 'event')}"]
    if file.writer:
        lines.append(f"  of writer {file.writer}")
    if file.first_micros is not None:
        lines.append(f"  events of {format_time(file.first_micros)} to {format_time(file.last_micros)}")
    if file.unfinished_bytes:
        lines.append(f"  {file.unfinished_bytes:,} bytes of a line that is not whole yet")
    lines += [f"  damaged: {span.length:,} bytes at {span.offset}: {span.reason}" for span in file.damaged]
    return lines


def _event_lines(name: str, event: EventLocation) -> list[str]:
    if event.event is None:
        return [f"{name}: perhaps in damaged bytes of {event.file}, at {event.offset} of the sealed file: {event.reason}"]
    if event.record is not None:
        lines = [f"{name}: refused, {event.code}: {event.reason}", f"  pillarbox dead show {event.record}"]
    else:
        state = {"active": "accepted, not sealed yet", "pending": "pending", "retained": "retained after delivery"}[event.state]
        lines = [f"{name}: {state}, in {event.file} at {event.offset}"]
    return [*lines, f"  {bytes(event.event).decode(errors='replace')}"]
