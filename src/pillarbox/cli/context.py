"""What `pillarbox dead`, `quarantine` and `resend` share: what is chosen, how changes are done, and what is said of them."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.changes import ChangeExecutor, ChangeReport, WriteLimits, acquire_lock
from pillarbox.admin.dead_letters import IdentityDecoder
from pillarbox.admin.filters import RecordFilter, parse_batch_id
from pillarbox.admin.replay import ReplayValidator
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import parse_time
from pillarbox.cli.completion import complete_batch
from pillarbox.cli.main import ExitCode, err, load_settings, log_to_terminal, out, require_setting
from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError, UsageError
from pillarbox.outbox import Outbox
from pillarbox.store import layout
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from pillarbox.admin.changes import BatchChange
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory
    from pillarbox.store.layout import Kind

PROBLEMS_SHOWN_MAX: Final = 20  # troubles that are named one by one; all are counted

BatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--batch",
        metavar="ID",
        help="Of this batch: its id, or how that begins.",
        show_default=False,
        autocompletion=complete_batch,
    ),
]
ReasonOption = Annotated[
    list[str] | None, typer.Option("--reason", metavar="TEXT", help="With this in its reason.", show_default=False)
]
SinceOption = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Not older: 2h, 3d, or ISO 8601.", show_default=False)
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Older than that.", show_default=False)]
AllOption = Annotated[bool, typer.Option("--all", help="Everything, where nothing else is asked for.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do it; without, only say what would be done.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Show so many at the most; 0: all.", min=0)]


class ChangeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `--json` of the commands that change something."""

    applied: bool  # False: what would be done
    events: int  # for quarantine's purge: damaged spans
    files: int
    items: list[Any]  # what is concerned; its shape is that of `list --each --json`, `quarantine repair` has its own
    problems: list[FileProblem]  # what stays, and why; the first 1,000
    problem_count: int
    dropped_reason: str  # why the outbox took nothing more; "" where it took all
    interrupted: bool
    ledger_write_failed: bool  # the ledger could not be written


class CommandContext:
    """The directory that a command works on; looking at it creates nothing."""

    def __init__(self, config: str | None, *, quiet: bool = False, **options: object) -> None:
        log_to_terminal(quiet=quiet)
        logging.getLogger("pillarbox").setLevel(logging.WARNING)  # what the outbox does is not what was asked for
        self.quiet = quiet
        self.settings: Settings = load_settings(config, **options)
        require_setting(self.settings, "directory", "DIR")
        self.clock = SystemClock()
        self.directory = directory_at(self.settings.directory, local_filesystem(), self.clock)
        self.report = ChangeReport()
        self.item_lines: list[str] = []  # what is to be said of single items; at the end, lest a closed pipe ends the work
        self.heading = IdentityDecoder(self.settings.event_type)
        self.gate = ReplayValidator(self.settings.event_type, self.heading.id_field)
        try:
            self.directory.disk_usage()
        except OSError as error:
            problem = f"cannot be listed: {error.strerror}"
            raise DirectoryUnusableError(self.settings.directory, problem, "name an outbox directory") from None

    @property
    def directories(self) -> list[Directory]:
        """Where something may be kept: the directory, and the queues of several sinks."""
        return [self.directory, *self.directory.queues()]

    def require_single_directory(self, kind: Kind) -> None:
        """What is kept for several sinks is changed for one at a time; raises `UsageError` where it is not said for which."""

        def keeps(place: Directory) -> bool:
            return any(layout.kind_of(name) is kind for name, _ in place.filesystem.list_files(place.path))

        if keeps(self.directory):
            return
        found = " or ".join(f"-d {queue.path}" for queue in self.directory.queues() if keeps(queue))
        if found:
            raise UsageError(f"what is kept here is that of single sinks, and changed for one at a time: {found}")

    def parse_filter(
        self,
        *,
        records: Sequence[str] | None = None,
        batches: Sequence[str] | None = None,
        reasons: Sequence[str] | None = None,
        codes: Sequence[str] | None = None,
        sinks: Sequence[str] | None = None,
        event_keys: Sequence[str] | None = None,
        event_ids: Sequence[str] | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> RecordFilter:
        """What the options amount to."""
        now = self.clock.micros()
        for name in records or ():
            if "#" not in name:
                raise UsageError(f"{name} is no dead letter's name, which is <batch>#<index> as `dead list --each` shows it")
        return RecordFilter(
            records=tuple(records or ()),
            batches=tuple(map(parse_batch_id, batches or ())),
            reasons=tuple(reasons or ()),
            codes=tuple(codes or ()),
            sinks=tuple(sinks or ()),
            event_keys=tuple(event_keys or ()),
            event_ids=tuple(event_ids or ()),
            since_micros=None if since is None else parse_time(since, now),
            until_micros=None if until is None else parse_time(until, now),
        )

    def apply_changes(self, changes: Iterable[BatchChange], *, yes: bool, sends: bool) -> bool:
        """Do it, or with `yes` False count what would be done; False where another command is at it."""
        if not yes:
            for change in changes:
                self.report.files += 1
                self.report.events += len(change.payloads) or change.event_count
            return True
        outbox: Outbox | None = None
        if sends:
            # Whoever delivers the directory sends them; and what waits already is not given up for what comes back.
            settings = msgspec.structs.replace(self.settings, sink=None, when_full="drop_newest", on_invalid="drop")
            outbox = Outbox.from_settings(settings)  # looks at the directory, and starts nothing before the first event
        else:
            self.directory.ensure_usable()

        def act(stop: Callable[[], bool], progress: Callable[[int], None]) -> None:
            with outbox or nullcontext():
                ledger = LedgerWriter(self.directory, self.clock)
                bounds = WriteLimits(self.settings.batch_size, self.settings.batch_bytes)
                durability = self._durability()
                ChangeExecutor(self.directory, ledger, self.report, stop, progress, outbox, durability, bounds).execute(changes)

        return self.run_locked(act)

    def run_locked(self, act: Callable[[Callable[[], bool], Callable[[int], None]], None]) -> bool:
        """Have `act(stop, progress)` change what is kept; False where another command is at it."""
        try:
            taken = acquire_lock(self.directory)
        except OSError as error:
            raise DirectoryUnusableError(self.directory.path, f"cannot be locked: {error.strerror}", "check the disk") from None
        if taken is None:
            return False
        try:
            with _defer_signals(self.report) as stop, self.progress() as progress:
                act(stop, progress)
        finally:
            self.directory.filesystem.close(taken.fd)
        return True

    def _durability(self) -> Any:
        try:
            self.directory.check_power_durability()
        except DirectoryUnusableError:
            return "process"  # in memory: what it is taken from would not survive either
        return "power"

    @contextmanager
    def progress(self) -> Iterator[Callable[[int], None]]:
        """Show how many events are done so far, on a terminal."""
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} done"), TimeElapsedColumn())
        with Progress(*columns, console=err, disable=self.quiet or not err.is_terminal, transient=True) as display:
            task = display.add_task("mend", total=None)
            yield lambda events: display.update(task, advance=events)

    def print_queue_hints(self, sinks: Iterable[str]) -> None:
        """Of what is kept for several sinks, where a command finds it that changes it."""
        for sink in sorted(filter(None, set(sinks))):
            out.print(printable(f"those of {sink} are mended with -d {self.directory.queue(sink).path}"), markup=False)

    def exit_code(self) -> int:
        """What the report amounts to."""
        if self.report.interrupted:
            return ExitCode.INTERRUPTED
        return ExitCode.DONE if self.report.complete else ExitCode.PARTIAL

    def print_result(self, items: list[Any], text: str, *, yes: bool, json: bool) -> int:
        """Say what was done, or would be, and what was not."""
        report = self.report
        if json:
            print_json(
                ChangeResult(
                    applied=yes,
                    events=report.events,
                    files=report.files,
                    items=items,
                    problems=report.problems,
                    problem_count=report.problems_count,
                    dropped_reason=report.drop_reason,
                    interrupted=report.interrupted,
                    ledger_write_failed=report.ledger_behind,
                )
            )
        else:
            for line in self.item_lines:
                out.print(printable(line), markup=False)
            out.print(text, markup=False)
        self.print_problems()
        return self.exit_code()

    def print_problems(self) -> None:
        """Name what stays as it is, on standard error."""
        report = self.report
        for trouble in report.problems[:PROBLEMS_SHOWN_MAX]:
            err.print(printable(str(trouble)), markup=False)
        if report.problems_count > PROBLEMS_SHOWN_MAX:
            err.print(f"and {report.problems_count - PROBLEMS_SHOWN_MAX} more like these; --json names them", markup=False)
        if report.drop_reason:
            err.print(f"the outbox takes nothing more ({report.drop_reason}); what had not gone in stays", markup=False)
        if report.ledger_behind:
            err.print("the ledger could not be written: what was done is not in it", markup=False)
        if report.interrupted:
            err.print("interrupted: what was done is done, the rest stays", markup=False)

    def summary(self, done: str, did: str, does: str, *, yes: bool, how: str = "--yes") -> str:
        """What was done, or would be and how to have it done."""
        if not self.report.files:
            return "nothing was done" if yes else "nothing to do"
        return f"{done} {did}" if yes else f"{done} {does}; {how} does it"

    def print_locked(self) -> int:
        """Another command changes what is kept."""
        err.print(f"{self.settings.directory}: another command is mending it; try again once that has ended", markup=False)
        return ExitCode.PARTIAL


@contextmanager
def _defer_signals(report: ChangeReport) -> Iterator[Callable[[], bool]]:
    """While it lasts, Ctrl-C and SIGTERM end the work after the step that is under way."""

    def note(_number: int, _frame: FrameType | None) -> None:
        report.interrupted = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: report.interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_filter(selection: RecordFilter, *, everything: bool) -> None:
    """What changes something must be told what."""
    if selection.matches_all and not everything:
        raise typer.BadParameter("choose with the options, or give --all", param_hint="what is meant")


def printable(text: str) -> str:
    """Text as a terminal may have it: what could move its cursor or hide text is escaped; line feeds stay."""
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def print_json(value: object) -> None:
    """For programs: indented JSON on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> None:
    """A table of (name, "left" | "right") columns. A row is a line however narrow the terminal, so that it can be copied."""
    cells = [[name for name, _ in columns], *([printable(str(cell)).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        padded = [
            cell.rjust(width) if side == "right" else cell.ljust(width)
            for cell, width, (_, side) in zip(row, widths, columns, strict=True)
        ]
        out.print("  ".join(padded).rstrip(), markup=False, style=None if number else "bold")


def plural(number: int, one: str, many: str = "") -> str:
    """`1 event`, `2 events`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
