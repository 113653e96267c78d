"""`pillarbox verify`: check that every accepted event is accounted for. Takes no lock and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pillarbox.admin.text import counted
from pillarbox.cli.options import DirectoryOptions, JsonOption, expand_options
from pillarbox.cli.output import ExitCode, err, out, print_json, print_table
from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError
from pillarbox.store import layout
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.store.reconciliation import Reconciliation, ReconciliationReport, reconcile, reconcile_queues

if TYPE_CHECKING:
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger_entries import LedgerRow

_COLUMNS: Final = ("accepted", "fanned out", "delivered", "pending", "dead", "quarantined", "evicted")
_DISCREPANCIES_SHOWN_MAX: Final = 20  # of batches that do not balance; --json has all


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox verify --json`; numbers of events unless they say otherwise."""

    directory: str  # the outbox directory
    balances: bool  # accepted = delivered + pending + dead + quarantined + evicted, within the ranges
    reconciliation: Reconciliation  # the counts
    unread_entries: int  # ledger lines that are damaged or were written by a later version of Pillarbox
    unreadable_files: list[str]  # names of files that could not be read
    sinks: dict[str, VerifyResult]  # with several sinks: the result for the queue of each


@expand_options
def verify(
    options: DirectoryOptions,
    writers: Annotated[bool, typer.Option("--writers", help="Print a row for each writer.")] = False,
    json: JsonOption = False,
) -> int:
    """Check that every accepted event is accounted for.

    Checks from the ledger and the files that accepted = delivered + pending + dead + quarantined + evicted. Safe at any time,
    also while writers and delivery workers run. A count that a crash made unknowable is printed as a range. Exits with 1 if it
    does not balance, and says which batches have missing or surplus events.
    """
    settings = options.load_settings()
    directory = directory_at(settings.directory, local_filesystem(), SystemClock())
    try:
        reports = _reconcile_all(directory)
    except OSError as error:
        raise DirectoryUnusableError(
            settings.directory, f"cannot be read: {error.strerror}", "name an outbox directory"
        ) from None
    balances = all(report.balances for report in reports.values())
    if json:
        print_json(_to_result(settings.directory, reports[""], {sink: report for sink, report in reports.items() if sink}))
        return ExitCode.DONE if balances else ExitCode.PARTIAL
    for sink, report in reports.items():
        prefix = f"{sink}: " if sink else ""
        out.print(prefix + reconciliation_line(report))
        if writers:
            rows = [*report.reconciliation.writers, msgspec.structs.replace(report.reconciliation.total, writer="all")]
            print_table([("writer", "left"), *((name, "right") for name in _COLUMNS)], map(_row_cells, rows))
        for note in _notes(report):
            out.print(prefix + note)
    return ExitCode.DONE if balances else ExitCode.PARTIAL


def _to_result(path: str, found: ReconciliationReport, sinks: dict[str, ReconciliationReport]) -> VerifyResult:
    return VerifyResult(
        directory=path,
        balances=found.balances and all(one.balances for one in sinks.values()),
        reconciliation=found.reconciliation,
        unread_entries=found.unread_entries,
        unreadable_files=found.unreadable,
        sinks={sink: _to_result(f"{path}/{layout.queue_name(sink)}", one, {}) for sink, one in sinks.items()},
    )


def _reconcile_all(directory: Directory) -> dict[str, ReconciliationReport]:
    """The report of the directory under "", and those of the queues of several sinks under their names."""
    with Progress(
        TextColumn("verify"), BarColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("verify", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        whole = reconcile(directory, show)
        return {"": whole, **reconcile_queues(directory, whole, show)}


def reconciliation_line(found: ReconciliationReport) -> str:
    """The reconciliation as an equation."""
    reconciliation = found.reconciliation
    row = reconciliation.total
    parts = [
        f"delivered {row.delivered:,}",
        f"pending {_range(row.pending, row.pending_max)}",
        f"dead {row.dead:,}",
        f"quarantined {_range(row.quarantined, row.quarantined_max)}",
        f"evicted {row.evicted:,}",
    ]
    if row.shared_max:
        parts.insert(0, f"fanned out {_range(row.shared, row.shared_max)}")
    word, sign = ("balanced", "=") if found.balances else ("does not balance", "<>")
    extras = [
        f"{name} {number:,}"
        for name, number in (
            ("duplicates", row.duplicates),
            ("resent after a crash", row.resent),
            ("replayed", reconciliation.replayed),
            ("repaired", reconciliation.repaired),
            ("redelivered", reconciliation.resent_on_request),
            ("purged", reconciliation.purged_dead + reconciliation.purged_quarantine),
        )
        if number
    ]
    more = f" ({', '.join(extras)})" if extras else ""
    return f"{word}: accepted {_range(row.accepted, row.accepted_max)} {sign} {' + '.join(parts)}{more}"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def _notes(report: ReconciliationReport) -> list[str]:
    reconciliation = report.reconciliation
    notes = []
    for wrong in reconciliation.discrepancies[:_DISCREPANCIES_SHOWN_MAX]:
        how = (
            f"{counted(wrong.events, 'event')} missing" if wrong.events >= 0 else f"{counted(-wrong.events, 'event')} too many"
        )
        notes.append(f"{wrong.batch} of writer {wrong.writer}: {how}: {wrong.problem}")
    hidden = len(reconciliation.discrepancies) - _DISCREPANCIES_SHOWN_MAX
    if hidden > 0:
        notes.append(f"and {counted(hidden, 'more batch', 'more batches')}; --json lists them")
    if reconciliation.earlier_discrepancy:
        notes.append(
            f"older batches, which the ledger has only as sums, are off by {reconciliation.earlier_discrepancy:,} events"
        )
    if reconciliation.dead_missing:
        notes.append(f"{counted(reconciliation.dead_missing, 'dead letter')} missing: not on disk, not replayed, not purged")
    if reconciliation.lost_entries:
        entries = counted(reconciliation.lost_entries, "ledger entry", "ledger entries")
        notes.append(f"{entries} lost: they could not be written, and did not fit into memory")
    if reconciliation.dropped:
        reasons = ", ".join(f"{reason} {events:,}" for reason, events in sorted(reconciliation.dropped.items()))
        dropped = counted(sum(reconciliation.dropped.values()), "event")
        notes.append(f"{dropped} dropped and never accepted: {reasons}")
    if report.unread_entries:
        lines = counted(report.unread_entries, "ledger line")
        notes.append(f"{lines} not read: damaged, or written by a later version of Pillarbox")
    notes += [f"{name} cannot be read" for name in report.unreadable]
    return notes


def _row_cells(row: LedgerRow) -> list[str]:
    return [
        row.writer or "unknown",
        _range(row.accepted, row.accepted_max),
        _range(row.shared, row.shared_max),
        f"{row.delivered:,}",
        _range(row.pending, row.pending_max),
        f"{row.dead:,}",
        _range(row.quarantined, row.quarantined_max),
        f"{row.evicted:,}",
    ]
