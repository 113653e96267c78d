"""Shared code of the commands that change dead letters, quarantine or retained batches."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.admin.changes import ChangeExecutor, ChangeReport, WriteLimits, acquire_lock
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import counted
from pillarbox.cli.context import CommandContext
from pillarbox.cli.output import ExitCode, err, out, print_json
from pillarbox.cli.signals import on_interrupt
from pillarbox.errors import DirectoryUnusableError, UsageError
from pillarbox.outbox import Outbox
from pillarbox.store import layout
from pillarbox.store.ledger import LedgerWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.admin.changes import BatchChange
    from pillarbox.admin.filters import RecordFilter
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory
    from pillarbox.store.layout import Kind

PROBLEMS_SHOWN_MAX: Final = 20  # problems that are printed individually; all are counted


class ChangeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `--json` of the commands that change something."""

    applied: bool  # the changes were made; False without --yes
    events: int  # number of events concerned; for `quarantine purge`, of damaged byte ranges
    files: int  # number of files that were or would be changed
    items: list[Any]  # the records, byte ranges or batches; the shape depends on the command
    problems: list[FileProblem]  # what was left unchanged, and why; the first 1,000
    problem_count: int  # number of all problems, also of those that `problems` leaves out
    dropped_reason: str  # why the outbox dropped an event, which ended the command; "" if it dropped none
    interrupted: bool  # Ctrl-C or SIGTERM ended the command
    ledger_write_failed: bool  # the ledger could not be written, so it lacks the changes


class ChangeContext(CommandContext):
    """The outbox directory of a command that changes it, and the report of what was changed."""

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        super().__init__(settings, quiet=quiet)
        self.report = ChangeReport()
        self.item_lines: list[str] = []  # printed at the end, so that a closed pipe does not end the work

    def require_single_directory(self, kind: Kind) -> None:
        """Raise `UsageError` if files of this kind are only in the queues of several sinks, and no queue was chosen."""

        def has_files(directory: Directory) -> bool:
            return any(layout.kind_of(name) is kind for name, _ in directory.filesystem.list_files(directory.path))

        if has_files(self.directory):
            return
        queues = " or ".join(f"-d {queue.path}" for queue in self.directory.queues() if has_files(queue))
        if queues:
            raise UsageError(f"choose one sink: {queues}")

    def apply_changes(self, changes: Iterable[BatchChange], *, yes: bool, enqueues: bool) -> bool:
        """Apply the changes, or only count them without `yes`; False if another command holds the lock."""
        if not yes:
            for change in changes:
                self.report.files += 1
                self.report.events += len(change.payloads) or change.event_count
            return True
        outbox: Outbox | None = None
        if enqueues:
            # Without a sink: the directory's delivery worker delivers them. Replayed events must not evict pending ones.
            settings = msgspec.structs.replace(self.settings, sink=None, when_full="drop_newest", on_invalid="drop")
            outbox = Outbox.from_settings(settings)
        else:
            self.directory.ensure_usable()

        def execute(should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> None:
            with outbox or nullcontext():
                ChangeExecutor(
                    self.directory,
                    LedgerWriter(self.directory, self.clock),
                    self.report,
                    should_stop,
                    on_progress,
                    outbox,
                    self._durability(),
                    WriteLimits(self.settings.batch_size, self.settings.batch_bytes),
                ).execute(changes)

        return self.run_locked(execute)

    def run_locked(self, work: Callable[[Callable[[], bool], Callable[[int], None]], None]) -> bool:
        """Call `work(should_stop, on_progress)` under the directory's lock; False if another command holds it."""
        try:
            locked_file = acquire_lock(self.directory)
        except OSError as error:
            raise DirectoryUnusableError(self.directory.path, f"cannot be locked: {error.strerror}", "check the disk") from None
        if locked_file is None:
            return False

        def note_interrupt() -> None:
            self.report.interrupted = True

        try:
            with on_interrupt(note_interrupt), self.show_progress() as on_progress:
                work(lambda: self.report.interrupted, on_progress)
        finally:
            self.directory.filesystem.close(locked_file.fd)
        return True

    def _durability(self) -> Any:
        try:
            self.directory.check_power_durability()
        except DirectoryUnusableError:
            return "process"  # on a file system in memory, what is replayed would not survive power loss either
        return "power"

    @contextmanager
    def show_progress(self) -> Iterator[Callable[[int], None]]:
        """Show on a terminal how many events are done."""
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} done"), TimeElapsedColumn())
        with Progress(*columns, console=err, disable=self.quiet or not err.is_terminal, transient=True) as display:
            task = display.add_task("change", total=None)
            yield lambda events: display.update(task, advance=events)

    def print_queue_hints(self, sinks: Iterable[str]) -> None:
        """Say with which directory a command changes what belongs to each of several sinks."""
        for sink in sorted(filter(None, set(sinks))):
            out.print(f"to change those of {sink}: -d {self.directory.queue(sink).path}")

    def exit_code(self) -> int:
        """The exit code that the report calls for."""
        if self.report.interrupted:
            return ExitCode.INTERRUPTED
        return ExitCode.DONE if self.report.complete else ExitCode.PARTIAL

    def print_result(self, items: list[Any], text: str, *, yes: bool, json: bool, note: str = "") -> int:
        """Print what was changed and what was not, and a note on a line of its own; returns the exit code."""
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
                out.print(line)
            out.print(text)
            if note:
                out.print(note)
        self.print_problems()
        return self.exit_code()

    def print_problems(self) -> None:
        """Print on standard error what was left unchanged, and why."""
        report = self.report
        for problem in report.problems[:PROBLEMS_SHOWN_MAX]:
            err.print(str(problem))
        if report.problems_count > PROBLEMS_SHOWN_MAX:
            more = counted(report.problems_count - PROBLEMS_SHOWN_MAX, "more problem")
            err.print(f"and {more}; --json lists them")
        if report.drop_reason:
            err.print(f"stopped: the outbox accepts no more events ({report.drop_reason}); the rest is unchanged")
        if report.ledger_behind:
            err.print("the ledger could not be written: it does not have these changes")
        if report.interrupted:
            err.print("interrupted: the rest is unchanged")

    def summary(self, count: str, done: str, planned: str, *, yes: bool, how: str = "add --yes to do it") -> str:
        """What was changed; without `yes`, what would be changed and how to do it."""
        if not self.report.files:
            return "nothing was changed" if yes else "nothing to do"
        return f"{count} {done}" if yes else f"{count} {planned}; {how}"

    def print_lock_conflict(self) -> int:
        """Say that another command holds the lock; returns the exit code."""
        err.print(f"{self.settings.directory}: another command is changing it; try again when that has ended")
        return ExitCode.PARTIAL


def require_filter(record_filter: RecordFilter, *, everything: bool) -> None:
    """Raise a usage error if a command that changes something got neither a filter nor --all."""
    if record_filter.matches_all and not everything:
        raise typer.BadParameter("give a filter, or --all for everything", param_hint="filter")
