"""`pillarbox import`: NDJSON, CSV or another outbox directory -> the outbox, through its front door."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import typer

from pillarbox.admin.dead_letters import IdentityDecoder
from pillarbox.admin.export import EventExporter, ExportScope
from pillarbox.admin.filters import EventFilter, EventHeaderDecoder
from pillarbox.admin.replay import ReplayValidator
from pillarbox.admin.scan import FileProblem
from pillarbox.cli.context import print_json, printable
from pillarbox.cli.import_source import ImportItem, ImportReader
from pillarbox.cli.input import LINES_REPORTED_MAX, InputProgress
from pillarbox.cli.main import (
    ConfigOption,
    DirectoryOption,
    EventTypeOption,
    ExitCode,
    JsonOption,
    QuietOption,
    app,
    err,
    load_settings,
    log_to_terminal,
    out,
    require_setting,
)
from pillarbox.clock import SystemClock
from pillarbox.errors import FileUnusableError, UsageError
from pillarbox.outbox import Outbox
from pillarbox.outcome import Dropped
from pillarbox.store.os_filesystem import file_identity, local_filesystem, open_for_reading
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from pillarbox.settings import Settings

_PROBLEMS_MAX: Final = 1000  # kept to be named; all are counted
_PROGRESS_EVERY_LINES: Final = 100_000  # lines between two words on how far it came, where no terminal shows it
_PER_EVENT_REASONS: Final = frozenset({"invalid", "filtered"})  # an event is refused for itself: others may still go in


class ImportResult(msgspec.Struct, kw_only=True):
    """The shape of `pillarbox import --json`."""

    dry_run: bool
    accepted: int = 0  # with --dry-run: that would be
    dropped: int = 0  # lines that are no events
    processed: int = 0  # up to this line, or row, everything is accepted or refused: --skip goes on behind it
    complete: bool = False  # that was the last one
    outbox_dropped: str = ""  # why the outbox took nothing more
    interrupted: bool = False
    problems: list[FileProblem]  # why lines were refused; the first 1,000


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FILE|DIR|-", help="A file, another outbox directory, or standard input.")],
    directory: DirectoryOption = None,
    kind: Annotated[
        Literal["auto", "ndjson", "csv", "outbox"], typer.Option("--format", help="auto: by what is named, and its ending.")
    ] = "auto",
    what: Annotated[ExportScope, typer.Option("--what", help="Of another outbox: which events.")] = "pending",
    skip: Annotated[
        int, typer.Option("--skip", metavar="N", min=0, help="Begin behind the first N lines, rows or events.")
    ] = 0,
    rejects: Annotated[
        str | None,
        typer.Option("--rejects", metavar="FILE", help="Append what is refused there, as it stood.", show_default=False),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="For room, where the outbox is full.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be accepted.")] = False,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Store events that were written elsewhere: NDJSON, CSV, or what another outbox directory holds.

    A line of NDJSON is an event, stored as it stands under the id it has, or a record of an outbox with its checksum; what has
    no id or time gets one. The first row of CSV names members. What is no event is named, stepped over and counted, with exit
    code 1. Where it ends early it says how far it came: --skip goes on from there. Whoever delivers the directory delivers it.
    """
    log_to_terminal(quiet=quiet)
    settings = load_settings(config, directory=directory, event_type=event_type)
    require_setting(settings, "directory", "DIR")
    full: dict[str, Any] = {"when_full": "block", "block_timeout": wait} if wait else {"when_full": "drop_newest"}
    settings = msgspec.structs.replace(settings, sink=None, on_invalid="drop", **full)
    heading = IdentityDecoder(settings.event_type)
    gate = ReplayValidator(settings.event_type, heading.id_field)
    reader = ImportReader(settings.event_type, gate)
    report = ImportResult(dry_run=dry_run, problems=[])
    with ExitStack() as stack:
        if _is_outbox(source, kind):
            display = stack.enter_context(InputProgress(None, quiet=quiet))
            stock = _open_source_outbox(source, settings, heading, gate)
            items = reader.read_outbox(stock.events(what))
        else:
            stock = None
            file = stack.enter_context(nullcontext(sys.stdin.buffer) if source == "-" else _open_source_file(source))
            display = stack.enter_context(InputProgress(file, quiet=quiet))
            is_csv = kind == "csv" or (kind == "auto" and source.endswith(".csv"))
            items = reader.read_rows(display.raw_lines()) if is_csv else reader.read_lines(display.lines())
        outbox = None if dry_run else stack.enter_context(Outbox.from_settings(settings))
        put_aside = stack.enter_context(_open_rejects(rejects))
        carrier = _ImportBatch(outbox, report, settings, put_aside)
        _import_items(carrier, items, skip, display, by_events=stock is not None, quiet=quiet)
    if stock is not None:
        for trouble in stock.problems:
            carrier.add_problem(trouble)
    _print_result(report, json=json, quiet=quiet)
    if report.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.DONE if report.complete and not report.dropped else ExitCode.PARTIAL


def _is_outbox(source: str, kind: str) -> bool:
    facts = None if source == "-" else local_filesystem().inspect_directory(source)
    is_directory = facts is not None and facts.is_directory
    if kind != "auto" and is_directory != (kind == "outbox"):
        raise UsageError(f"{source}: for --format {kind} name {'an outbox directory' if kind == 'outbox' else 'a file'}")
    return is_directory


def _open_source_outbox(source: str, settings: Settings, heading: IdentityDecoder, gate: ReplayValidator) -> EventExporter:
    if file_identity(source) == file_identity(settings.directory):
        raise UsageError(f"{source} is the outbox that the events would go into")
    clock = SystemClock()
    other = directory_at(source, local_filesystem(), clock)
    return EventExporter(other, clock, EventHeaderDecoder(settings.event_type), EventFilter(), heading, gate)


def _open_source_file(source: str) -> Any:
    try:
        return open_for_reading(source)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None


@contextmanager
def _open_rejects(path: str | None) -> Iterator[Callable[[bytes], None]]:
    if path is None:
        yield lambda _raw: None
        return
    filesystem = local_filesystem()
    try:
        fd = filesystem.open_append(path)
    except (OSError, FileUnusableError) as error:
        raise UsageError(f"--rejects {path}: {error}") from None
    try:
        yield lambda raw: filesystem.write_all(fd, raw)
    finally:
        filesystem.close(fd)


class _ImportBatch:
    """Puts items into the outbox, as many at a time as make a batch, and keeps the report."""

    def __init__(
        self, outbox: Outbox | None, report: ImportResult, settings: Settings, put_aside: Callable[[bytes], None]
    ) -> None:
        self._outbox = outbox
        self.result = report
        self._write_reject = put_aside
        self._events_max = settings.batch_size
        self._bytes_max = settings.batch_bytes
        self._items: list[ImportItem] = []
        self._bytes = 0
        self.storing = False  # an interrupt waits until that is over

    def add(self, item: ImportItem) -> None:
        """One more."""
        self._items.append(item)
        self._bytes += len(item.payload)
        if len(self._items) >= self._events_max or self._bytes >= self._bytes_max:
            self.enqueue_items()

    def enqueue_items(self) -> None:
        """Put in what was added; what the outbox has no room for is left where it was."""
        self.storing = True
        good = [item for item in self._items if not item.problem]
        refused = {item.number: item.problem for item in self._items if item.problem}
        outcomes = self._outbox.enqueue_json([item.payload for item in good]) if self._outbox is not None and good else []
        for item, outcome in zip(good, outcomes, strict=False):
            if isinstance(outcome, Dropped):
                if outcome.reason not in _PER_EVENT_REASONS:
                    self.result.outbox_dropped = outcome.reason
                    self.storing = False
                    return
                refused[item.number] = f"refused at the door: {outcome.reason}"
        self.result.accepted += len(self._items) - len(refused)
        for item in self._items:
            if item.number in refused:
                self._write_reject(item.raw)
                self.add_problem(FileProblem("", refused[item.number], item.number))
            self.result.processed = item.number
        self._items, self._bytes = [], 0
        self.storing = False

    def add_problem(self, trouble: FileProblem) -> None:
        """Something is not in."""
        self.result.dropped += 1
        if len(self.result.problems) < _PROBLEMS_MAX:
            self.result.problems.append(trouble)


def _import_items(
    carrier: _ImportBatch, items: Iterable[ImportItem], skip: int, display: InputProgress, *, by_events: bool, quiet: bool
) -> None:
    report = carrier.result
    report.processed = skip
    with _defer_signals(carrier):
        try:
            for item in items:
                if by_events:
                    display.update(item.number, 0)
                if item.number > skip:
                    carrier.add(item)
                if not (quiet or err.is_terminal) and item.number % _PROGRESS_EVERY_LINES == 0 and not report.outbox_dropped:
                    err.print(f"line {item.number}: what came up to line {report.processed} is in", markup=False)
                if report.outbox_dropped or report.interrupted:
                    return
            carrier.enqueue_items()
            report.complete = not report.outbox_dropped
        except KeyboardInterrupt:
            report.interrupted = True


@contextmanager
def _defer_signals(carrier: _ImportBatch) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM end the reading at once, and the storing after what is under way."""

    def note(_number: int, _frame: FrameType | None) -> None:
        carrier.result.interrupted = True
        if not carrier.storing:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_result(report: ImportResult, *, json: bool, quiet: bool) -> None:
    for trouble in report.problems[:LINES_REPORTED_MAX]:
        where = trouble.file if trouble.line is None else f"line {trouble.line}"
        err.print(printable(f"{where}: {trouble.problem}"), markup=False)
    if json:
        print_json(report)
        return
    if quiet and report.complete and not report.dropped:
        return
    more = f" (the first {LINES_REPORTED_MAX} are named above)" if report.dropped > LINES_REPORTED_MAX else ""
    would = "would be accepted" if report.dry_run else "accepted"
    out.print(f"{would} {report.accepted}, refused {report.dropped}{more}", markup=False)
    if not report.complete:
        why = "interrupted" if report.interrupted else f"the outbox takes nothing more ({report.outbox_dropped})"
        out.print(
            f"{why}; what came up to line {report.processed} is done: --skip {report.processed} goes on from there",
            markup=False,
        )
