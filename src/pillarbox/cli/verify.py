"""`pillarbox verify`: whether every accepted event is accounted for. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pillarbox.cli.context import print_table
from pillarbox.cli.main import (
    ConfigOption,
    DirectoryOption,
    ExitCode,
    JsonOption,
    app,
    err,
    load_settings,
    out,
    require_setting,
)
from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError
from pillarbox.store import layout
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.store.reconciliation import Reconciliation, ReconciliationReport, reconcile, reconcile_queues

if TYPE_CHECKING:
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger_entries import LedgerRow

_FIGURES: Final = ("accepted", "handed over", "delivered", "pending", "dead", "quarantined", "evicted")
_NAMED_MAX: Final = 20  # batches that do not balance are named one by one up to here; all are in --json


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox verify --json`; numbers of events unless they say otherwise."""

    directory: str
    balances: bool
    account: Reconciliation
    unread_entries: int  # lines of the ledger that are damaged, or of a later version
    unreadable_files: list[str]
    sinks: dict[str, VerifyResult]  # of several, each one's account of what was handed over to it


@app.command("verify")
def verify(
    directory: DirectoryOption = None,
    config: ConfigOption = None,
    writers: Annotated[bool, typer.Option("--writers", help="A row for each writer.")] = False,
    json: JsonOption = False,
) -> int:
    """Prove that accepted = delivered + pending + dead + quarantined + evicted, from the ledger and the files.

    Safe at any time, also while writers and a deliverer run. Where a crash has made a count unknowable, it is a range. The exit
    code is 1 where it does not balance: what is missing, or too much, is named.
    """
    settings = load_settings(config, directory=directory)
    require_setting(settings, "directory", "DIR")
    place = directory_at(settings.directory, local_filesystem(), SystemClock())
    try:
        found = _audit_all(place)
    except OSError as error:
        raise DirectoryUnusableError(
            settings.directory, f"cannot be read: {error.strerror}", "name an outbox directory"
        ) from None
    balances = all(one.balances for one in found.values())
    if json:
        answer = _to_result(settings.directory, found[""], {sink: one for sink, one in found.items() if sink})
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
        return ExitCode.DONE if balances else ExitCode.PARTIAL
    for sink, one in found.items():
        named = f"{sink}: " if sink else ""
        out.print(named + reconciliation_line(one), markup=False)
        if writers:
            rows = [*one.reconciliation.writers, msgspec.structs.replace(one.reconciliation.total, writer="all")]
            print_table([("writer", "left"), *((name, "right") for name in _FIGURES)], map(_row_cells, rows))
        for line in _notes(one):
            out.print(named + line, markup=False)
    return ExitCode.DONE if balances else ExitCode.PARTIAL


def _to_result(path: str, found: ReconciliationReport, sinks: dict[str, ReconciliationReport]) -> VerifyResult:
    return VerifyResult(
        directory=path,
        balances=found.balances and all(one.balances for one in sinks.values()),
        account=found.reconciliation,
        unread_entries=found.unread_entries,
        unreadable_files=found.unreadable,
        sinks={sink: _to_result(f"{path}/{layout.queue_name(sink)}", one, {}) for sink, one in sinks.items()},
    )


def _audit_all(place: Directory) -> dict[str, ReconciliationReport]:
    """The account of the directory under "", and those of several sinks under their names."""
    with Progress(
        TextColumn("verify"), BarColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("verify", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        whole = reconcile(place, show)
        return {"": whole, **reconcile_queues(place, whole, show)}


def reconciliation_line(found: ReconciliationReport) -> str:
    """The account as an equation."""
    account = found.reconciliation
    row = account.total
    parts = [
        f"delivered {row.delivered:,}",
        f"pending {_range(row.pending, row.pending_max)}",
        f"dead {row.dead:,}",
        f"quarantined {_range(row.quarantined, row.quarantined_max)}",
        f"evicted {row.evicted:,}",
    ]
    if row.shared_max:
        parts.insert(0, f"handed over {_range(row.shared, row.shared_max)}")
    word, sign = ("balanced", "=") if found.balances else ("does not balance", "<>")
    mended = [
        f"{name} {number:,}"
        for name, number in (
            ("duplicates", row.duplicates),
            ("sent again", row.resent),
            ("replayed", account.replayed),
            ("repaired", account.repaired),
            ("resent", account.resent_on_request),
            ("purged", account.purged_dead + account.purged_quarantine),
        )
        if number
    ]
    more = f" ({', '.join(mended)})" if mended else ""
    return f"{word}: accepted {_range(row.accepted, row.accepted_max)} {sign} {' + '.join(parts)}{more}"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def _notes(found: ReconciliationReport) -> list[str]:
    account = found.reconciliation
    notes = []
    for wrong in account.discrepancies[:_NAMED_MAX]:
        how = f"{wrong.events} missing" if wrong.events >= 0 else f"{-wrong.events} too many"
        notes.append(f"{wrong.batch} of writer {wrong.writer}: {how}: {wrong.problem}")
    if len(account.discrepancies) > _NAMED_MAX:
        notes.append(f"and {len(account.discrepancies) - _NAMED_MAX} more; --json has them all")
    if account.earlier_discrepancy:
        notes.append(f"batches that are summed up by now were wrong by {account.earlier_discrepancy} events")
    if account.dead_missing:
        notes.append(f"{account.dead_missing} dead letters are neither on disk nor replayed or purged")
    if account.lost_entries:
        notes.append(f"{account.lost_entries} entries could not be written while the disk was full, and are lost")
    if found.unread_entries:
        notes.append(f"{found.unread_entries} lines of the ledger are damaged, or of a later version of Pillarbox")
    notes += [f"{name} cannot be read" for name in found.unreadable]
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
