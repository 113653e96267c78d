"""`pillarbox import`: store events from NDJSON, CSV or another outbox directory."""

from __future__ import annotations

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
from pillarbox.admin.text import counted
from pillarbox.cli.import_source import ImportItem, ImportReader
from pillarbox.cli.input import LINES_REPORTED_MAX, InputProgress
from pillarbox.cli.options import JsonOption, OutboxOptions, QuietOption, expand_options
from pillarbox.cli.output import ExitCode, err, log_to_terminal, out, print_json
from pillarbox.cli.signals import on_interrupt
from pillarbox.clock import SystemClock
from pillarbox.errors import FileUnusableError, UsageError
from pillarbox.outbox import Outbox
from pillarbox.outcome import Dropped
from pillarbox.store.os_filesystem import file_identity, local_filesystem, open_for_reading
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.settings import Settings

_PROBLEMS_MAX: Final = 1000  # problems in the result; all are counted
_PROGRESS_EVERY_LINES: Final = 100_000  # between two progress lines where there is no terminal
_PER_EVENT_REASONS: Final = frozenset({"invalid", "filtered"})  # other events may still be accepted


class ImportResult(msgspec.Struct, kw_only=True):
    """The shape of `pillarbox import --json`."""

    dry_run: bool  # --dry-run was given: nothing was stored
    accepted: int = 0  # events stored; with --dry-run, events that would be
    dropped: int = 0  # lines that are not valid events, and events that the outbox dropped as such
    processed: int = 0  # number of the last line or row that was accepted or dropped; --skip continues after it
    complete: bool = False  # the whole source was processed
    outbox_dropped: str = ""  # why the outbox stopped accepting events; "" if it did not
    interrupted: bool = False  # Ctrl-C or SIGTERM ended the command
    problems: list[FileProblem]  # why lines were dropped; the first 1,000


@expand_options
def import_(
    *,
    source: Annotated[str, typer.Argument(metavar="FILE|DIR|-", help="File, other outbox directory, or - for standard input.")],
    options: OutboxOptions,
    kind: Annotated[
        Literal["auto", "ndjson", "csv", "outbox"], typer.Option("--format", help="Source format; auto: by the file's name.")
    ] = "auto",
    what: Annotated[ExportScope, typer.Option("--what", help="Which events to import from another outbox.")] = "pending",
    skip: Annotated[int, typer.Option("--skip", metavar="N", min=0, help="Skip the first N lines, rows or events.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="With CSV: do not undo the escaping that `export` applies.")] = False,
    rejects: Annotated[
        str | None,
        typer.Option("--rejects", metavar="FILE", help="Append lines that are not accepted to FILE.", show_default=False),
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds to wait for room in a full outbox.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be accepted.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Import events from NDJSON, CSV or another outbox.

    A line of NDJSON is an event, which is stored byte for byte under its own id, or a record of an outbox with its checksum. An
    event without an id or a time gets one. The first row of CSV names the fields. A line that is not an event is reported,
    counted and skipped, and the exit code is 1. If the import stops early, it says at which line; continue from there with
    --skip. The directory's delivery worker delivers the events.
    """
    log_to_terminal(quiet=quiet)
    when_full: dict[str, Any] = {"when_full": "block", "block_timeout": wait} if wait else {"when_full": "drop_newest"}
    settings = msgspec.structs.replace(options.load_settings(), sink=None, on_invalid="drop", **when_full)
    identity_decoder = IdentityDecoder(settings.event_type)
    validator = ReplayValidator(settings.event_type, identity_decoder.id_field)
    reader = ImportReader(settings.event_type, validator, raw_cells=raw)
    result = ImportResult(dry_run=dry_run, problems=[])
    with ExitStack() as stack:
        if _is_outbox(source, kind):
            progress = stack.enter_context(InputProgress(None, quiet=quiet))
            exporter = _open_source_outbox(source, settings, identity_decoder, validator)
            items = reader.read_outbox(exporter.events(what))
        else:
            exporter = None
            file = stack.enter_context(nullcontext(sys.stdin.buffer) if source == "-" else _open_source_file(source))
            progress = stack.enter_context(InputProgress(file, quiet=quiet))
            is_csv = kind == "csv" or (kind == "auto" and source.endswith(".csv"))
            items = reader.read_rows(progress.raw_lines()) if is_csv else reader.read_lines(progress.lines())
        outbox = None if dry_run else stack.enter_context(Outbox.from_settings(settings))
        write_reject = stack.enter_context(_open_rejects(rejects))
        batch = _ImportBatch(outbox, result, settings, write_reject)
        _import_items(batch, items, skip, progress, by_events=exporter is not None, quiet=quiet)
    if exporter is not None:
        for problem in exporter.problems:
            batch.add_problem(problem)
    _print_result(result, json=json, quiet=quiet)
    if result.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.DONE if result.complete and not result.dropped else ExitCode.PARTIAL


def _is_outbox(source: str, kind: str) -> bool:
    facts = None if source == "-" else local_filesystem().inspect_directory(source)
    is_directory = facts is not None and facts.is_directory
    if kind != "auto" and is_directory != (kind == "outbox"):
        raise UsageError(f"{source}: --format {kind} needs {'an outbox directory' if kind == 'outbox' else 'a file'}")
    return is_directory


def _open_source_outbox(
    source: str, settings: Settings, identity_decoder: IdentityDecoder, validator: ReplayValidator
) -> EventExporter:
    if file_identity(source) == file_identity(settings.directory):
        raise UsageError(f"{source} is both the source and the target of the import; name another directory with -d")
    clock = SystemClock()
    directory = directory_at(source, local_filesystem(), clock)
    header_decoder = EventHeaderDecoder(settings.event_type)
    return EventExporter(directory, clock, header_decoder, EventFilter(), identity_decoder, validator)


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
    """Enqueues items, as many at a time as a batch holds, and counts them in the result."""

    def __init__(
        self, outbox: Outbox | None, result: ImportResult, settings: Settings, write_reject: Callable[[bytes], None]
    ) -> None:
        self._outbox = outbox
        self.result = result
        self._write_reject = write_reject
        self._max_events = settings.batch_size
        self._max_bytes = settings.batch_bytes
        self._items: list[ImportItem] = []
        self._bytes = 0
        self.enqueuing = False  # an interrupt waits until it is False

    def add(self, item: ImportItem) -> None:
        """Add an item, and enqueue the batch if it is full."""
        self._items.append(item)
        self._bytes += len(item.payload)
        if len(self._items) >= self._max_events or self._bytes >= self._max_bytes:
            self.enqueue_items()

    def enqueue_items(self) -> None:
        """Enqueue the items; if the outbox is full, none of the batch counts as processed."""
        self.enqueuing = True
        valid = [item for item in self._items if not item.problem]
        problems = {item.number: item.problem for item in self._items if item.problem}
        outcomes = self._outbox.enqueue_json([item.payload for item in valid]) if self._outbox is not None and valid else []
        for item, outcome in zip(valid, outcomes, strict=False):
            if isinstance(outcome, Dropped):
                if outcome.reason not in _PER_EVENT_REASONS:
                    self.result.outbox_dropped = outcome.reason
                    self.enqueuing = False
                    return
                problems[item.number] = f"dropped: {outcome.reason}"
        self.result.accepted += len(self._items) - len(problems)
        for item in self._items:
            if item.number in problems:
                self._write_reject(item.raw)
                self.add_problem(FileProblem("", problems[item.number], item.number))
            self.result.processed = item.number
        self._items, self._bytes = [], 0
        self.enqueuing = False

    def add_problem(self, problem: FileProblem) -> None:
        """Count a line that was not accepted."""
        self.result.dropped += 1
        if len(self.result.problems) < _PROBLEMS_MAX:
            self.result.problems.append(problem)


def _import_items(
    batch: _ImportBatch, items: Iterable[ImportItem], skip: int, progress: InputProgress, *, by_events: bool, quiet: bool
) -> None:
    result = batch.result
    result.processed = skip

    def interrupt() -> None:
        result.interrupted = True
        if not batch.enqueuing:
            raise KeyboardInterrupt

    with on_interrupt(interrupt):
        try:
            for item in items:
                if by_events:
                    progress.update(item.number, 0)
                if item.number > skip:
                    batch.add(item)
                if not (quiet or err.is_terminal) and item.number % _PROGRESS_EVERY_LINES == 0 and not result.outbox_dropped:
                    err.print(f"read line {item.number:,}; stored up to line {result.processed:,}")
                if result.outbox_dropped or result.interrupted:
                    return
            batch.enqueue_items()
            result.complete = not result.outbox_dropped
        except KeyboardInterrupt:
            result.interrupted = True


def _print_result(result: ImportResult, *, json: bool, quiet: bool) -> None:
    for problem in result.problems[:LINES_REPORTED_MAX]:
        where = problem.file if problem.line is None else f"line {problem.line}"
        err.print(f"{where}: {problem.problem}")
    if json:
        print_json(result)
        return
    if quiet and result.complete and not result.dropped:
        return
    more = f" (the first {LINES_REPORTED_MAX} are listed above)" if result.dropped > LINES_REPORTED_MAX else ""
    verb = "would accept" if result.dry_run else "accepted"
    out.print(f"{verb} {counted(result.accepted, 'event')}, dropped {result.dropped:,}{more}")
    if not result.complete:
        why = "interrupted" if result.interrupted else f"stopped: the outbox accepts no more events ({result.outbox_dropped})"
        done = f"processed up to line {result.processed}; continue with --skip {result.processed}"
        out.print(f"{why}; {done}")
