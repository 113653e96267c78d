"""`pillarbox import`: NDJSON, CSV or another outbox directory -> the outbox, through its front door."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import typer

from pillarbox.admin.dead_letters import FileProblem, IdentityDecoder
from pillarbox.admin.event_filters import EventFilter, EventHeaderDecoder
from pillarbox.admin.export import EventExporter, ExportScope
from pillarbox.admin.mend import ReplayValidator
from pillarbox.cli.app import (
    ConfigOption,
    DirectoryOption,
    EventTypeOption,
    Exit,
    JsonOption,
    QuietOption,
    app,
    err,
    log_to_terminal,
    out,
    require,
    settings_from,
)
from pillarbox.cli.context import print_json, printable
from pillarbox.cli.intake import REPORTED_MAX, Display
from pillarbox.cli.sources import Item, Reader
from pillarbox.clock import SystemClock
from pillarbox.errors import FileUnusableError, UsageError
from pillarbox.outbox import Outbox
from pillarbox.outcome import Dropped
from pillarbox.store.filesystem import file_identity, open_for_reading, os_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from pillarbox.settings import Settings

_TROUBLES_MAX: Final = 1000  # kept to be named; all are counted
_SAY_EVERY: Final = 100_000  # lines between two words on how far it came, where no terminal shows it
_ONES_OWN: Final = frozenset({"invalid", "filtered"})  # an event is refused for itself: others may still go in


class Imported(msgspec.Struct, kw_only=True):
    """The shape of `pillarbox import --json`."""

    dry_run: bool
    accepted: int = 0  # with --dry-run: that would be
    refused: int = 0  # lines that are no events
    done: int = 0  # up to this line, or row, everything is accepted or refused: --skip goes on behind it
    complete: bool = False  # that was the last one
    full: str = ""  # why the outbox took nothing more
    interrupted: bool = False
    troubles: list[FileProblem]  # why lines were refused; the first 1,000


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
    settings = settings_from(config, directory=directory, event_type=event_type)
    require(settings, "directory", "DIR")
    full: dict[str, Any] = {"when_full": "block", "block_timeout": wait} if wait else {"when_full": "drop_newest"}
    settings = msgspec.structs.replace(settings, sink=None, on_invalid="drop", **full)
    heading = IdentityDecoder(settings.event_type)
    gate = ReplayValidator(settings.event_type, heading.id_field)
    reader = Reader(settings.event_type, gate)
    report = Imported(dry_run=dry_run, troubles=[])
    with ExitStack() as stack:
        if _is_outbox(source, kind):
            display = stack.enter_context(Display(None, quiet=quiet))
            stock = _stock(source, settings, heading, gate)
            items = reader.of_stock(stock.events(what))
        else:
            stock = None
            file = stack.enter_context(nullcontext(sys.stdin.buffer) if source == "-" else _opened(source))
            display = stack.enter_context(Display(file, quiet=quiet))
            is_csv = kind == "csv" or (kind == "auto" and source.endswith(".csv"))
            items = reader.of_rows(display.raw()) if is_csv else reader.of_lines(display.lines())
        outbox = None if dry_run else stack.enter_context(Outbox.from_settings(settings))
        put_aside = stack.enter_context(_rejects(rejects))
        carrier = _Carrier(outbox, report, settings, put_aside)
        _carry(carrier, items, skip, display, by_events=stock is not None, quiet=quiet)
    if stock is not None:
        for trouble in stock.problems:
            carrier.refuse(trouble)
    _say(report, json=json, quiet=quiet)
    if report.interrupted:
        return Exit.INTERRUPTED
    return Exit.DONE if report.complete and not report.refused else Exit.PARTLY


def _is_outbox(source: str, kind: str) -> bool:
    facts = None if source == "-" else os_filesystem().inspect_directory(source)
    is_directory = facts is not None and facts.is_directory
    if kind != "auto" and is_directory != (kind == "outbox"):
        raise UsageError(f"{source}: for --format {kind} name {'an outbox directory' if kind == 'outbox' else 'a file'}")
    return is_directory


def _stock(source: str, settings: Settings, heading: IdentityDecoder, gate: ReplayValidator) -> EventExporter:
    if file_identity(source) == file_identity(settings.directory):
        raise UsageError(f"{source} is the outbox that the events would go into")
    clock = SystemClock()
    other = directory_at(source, os_filesystem(), clock)
    return EventExporter(other, clock, EventHeaderDecoder(settings.event_type), EventFilter(), heading, gate)


def _opened(source: str) -> Any:
    try:
        return open_for_reading(source)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None


@contextmanager
def _rejects(path: str | None) -> Iterator[Callable[[bytes], None]]:
    if path is None:
        yield lambda _raw: None
        return
    filesystem = os_filesystem()
    try:
        fd = filesystem.open_append(path)
    except (OSError, FileUnusableError) as error:
        raise UsageError(f"--rejects {path}: {error}") from None
    try:
        yield lambda raw: filesystem.write_all(fd, raw)
    finally:
        filesystem.close(fd)


class _Carrier:
    """Puts items into the outbox, as many at a time as make a batch, and keeps the report."""

    def __init__(self, outbox: Outbox | None, report: Imported, settings: Settings, put_aside: Callable[[bytes], None]) -> None:
        self._outbox = outbox
        self.report = report
        self._put_aside = put_aside
        self._events_max = settings.batch_size
        self._bytes_max = settings.batch_bytes
        self._items: list[Item] = []
        self._bytes = 0
        self.storing = False  # an interrupt waits until that is over

    def add(self, item: Item) -> None:
        """One more."""
        self._items.append(item)
        self._bytes += len(item.payload)
        if len(self._items) >= self._events_max or self._bytes >= self._bytes_max:
            self.store()

    def store(self) -> None:
        """Put in what was added; what the outbox has no room for is left where it was."""
        self.storing = True
        good = [item for item in self._items if not item.problem]
        refused = {item.number: item.problem for item in self._items if item.problem}
        outcomes = self._outbox.enqueue_json([item.payload for item in good]) if self._outbox is not None and good else []
        for item, outcome in zip(good, outcomes, strict=False):
            if isinstance(outcome, Dropped):
                if outcome.reason not in _ONES_OWN:
                    self.report.full = outcome.reason
                    self.storing = False
                    return
                refused[item.number] = f"refused at the door: {outcome.reason}"
        self.report.accepted += len(self._items) - len(refused)
        for item in self._items:
            if item.number in refused:
                self._put_aside(item.raw)
                self.refuse(FileProblem("", refused[item.number], item.number))
            self.report.done = item.number
        self._items, self._bytes = [], 0
        self.storing = False

    def refuse(self, trouble: FileProblem) -> None:
        """Something is not in."""
        self.report.refused += 1
        if len(self.report.troubles) < _TROUBLES_MAX:
            self.report.troubles.append(trouble)


def _carry(carrier: _Carrier, items: Iterable[Item], skip: int, display: Display, *, by_events: bool, quiet: bool) -> None:
    report = carrier.report
    report.done = skip
    with _patiently(carrier):
        try:
            for item in items:
                if by_events:
                    display.show(item.number, 0)
                if item.number > skip:
                    carrier.add(item)
                if not (quiet or err.is_terminal) and item.number % _SAY_EVERY == 0 and not report.full:
                    err.print(f"line {item.number}: what came up to line {report.done} is in", markup=False)
                if report.full or report.interrupted:
                    return
            carrier.store()
            report.complete = not report.full
        except KeyboardInterrupt:
            report.interrupted = True


@contextmanager
def _patiently(carrier: _Carrier) -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM end the reading at once, and the storing after what is under way."""

    def note(_number: int, _frame: FrameType | None) -> None:
        carrier.report.interrupted = True
        if not carrier.storing:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(report: Imported, *, json: bool, quiet: bool) -> None:
    for trouble in report.troubles[:REPORTED_MAX]:
        where = trouble.file if trouble.line is None else f"line {trouble.line}"
        err.print(printable(f"{where}: {trouble.problem}"), markup=False)
    if json:
        print_json(report)
        return
    if quiet and report.complete and not report.refused:
        return
    more = f" (the first {REPORTED_MAX} are named above)" if report.refused > REPORTED_MAX else ""
    would = "would be accepted" if report.dry_run else "accepted"
    out.print(f"{would} {report.accepted}, refused {report.refused}{more}", markup=False)
    if not report.complete:
        why = "interrupted" if report.interrupted else f"the outbox takes nothing more ({report.full})"
        out.print(f"{why}; what came up to line {report.done} is done: --skip {report.done} goes on from there", markup=False)
