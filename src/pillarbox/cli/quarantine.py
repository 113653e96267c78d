"""`pillarbox quarantine`: show damaged bytes, recover events from them, or delete them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.admin.quarantine import QuarantinedBatch, QuarantineRepairer, RangeRepair
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import counted, format_time
from pillarbox.cli.changes import ChangeContext, require_filter
from pillarbox.cli.options import (
    CONTEXT_SETTINGS,
    AllOption,
    DirectoryOptions,
    JsonOption,
    LimitOption,
    OutboxOptions,
    QuietOption,
    RecordFilterOptions,
    YesOption,
    expand_options,
)
from pillarbox.cli.output import flush_stdout, out, print_json, print_table, write_bytes
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.filters import RecordFilter

quarantine = typer.Typer(
    name="quarantine",
    help="List, show, repair or purge damaged bytes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT_SETTINGS,
)


class QuarantineListItem(msgspec.Struct, frozen=True, kw_only=True):
    """The quarantined bytes of one batch, in `pillarbox quarantine list --json`."""

    batch: str  # batch id
    ranges: int  # number of damaged byte ranges
    repaired: int  # how many of them are repaired
    bytes: int  # number of bytes in these ranges
    reasons: dict[str, int]  # number of ranges by reason
    sealed_at_micros: int | None  # when the batch was sealed, in microseconds since 1970; None if the batch id does not tell
    queue: str = ""  # name of the sink whose queue holds the batch; "" with a single sink


class QuarantineListing(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox quarantine list --json`."""

    files: int  # number of batches that match
    ranges: int  # number of damaged byte ranges in them
    bytes: int  # number of bytes in these ranges
    batches: list[QuarantineListItem]  # one item for each batch
    problems: list[FileProblem]  # files that could not be read


class QuarantineRangeItem(msgspec.Struct, frozen=True, kw_only=True):
    """A damaged byte range, in `pillarbox quarantine show --json`."""

    batch: str  # batch id
    number: int  # number of the range in its batch, from 1
    offset: int  # offset in the batch file, in bytes
    length: int  # length in bytes
    reason: str  # what is wrong with the bytes
    repaired_at_micros: int | None  # when it was repaired; None if it was not
    repaired_events: int  # number of events that `quarantine repair` recovered
    data: bytes  # the bytes, as base64
    queue: str = ""  # name of the sink whose queue holds the batch; "" with a single sink


class RecoveredEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was found in a damaged byte range."""

    event: msgspec.Raw  # the event
    checksum_ok: bool  # the checksum of the record matches
    how: str  # how it was recovered


class RepairedRange(msgspec.Struct, frozen=True, kw_only=True):
    """The events in a damaged byte range, in `pillarbox quarantine repair --json`."""

    batch: str  # batch id
    number: int  # number of the range in its batch, from 1
    reason: str  # what is wrong with the bytes
    events: list[RecoveredEvent]  # the events recovered from it
    problems: list[str]  # for each piece of the range without an event, the reason


def _summarize_batch(batch: QuarantinedBatch, queue: str = "") -> QuarantineListItem:
    reasons: dict[str, int] = {}
    for damage in batch.ranges:
        reasons[damage.reason] = reasons.get(damage.reason, 0) + 1
    return QuarantineListItem(
        batch=batch.batch,
        ranges=len(batch.ranges),
        repaired=len(batch.ranges) - batch.unrepaired_count,
        bytes=sum(map(len, batch.pieces)),
        reasons=reasons,
        sealed_at_micros=batch.sealed_at_micros,
        queue=queue,
    )


def _find_all(context: ChangeContext, record_filter: RecordFilter) -> Iterator[tuple[str, QuarantinedBatch]]:
    """(sink, batch) of the directory, where the sink is "", and of each queue."""
    for directory in context.directories:
        for batch in QuarantineRepairer(directory, context.clock, record_filter, context.report).selected_batches():
            yield "" if directory is context.directory else directory.sink, batch


def _describe_reasons(reasons: dict[str, int]) -> str:
    return ", ".join(reason if count == 1 else f"{count} {reason}" for reason, count in sorted(reasons.items()))


@quarantine.command("list")
@expand_options
def list_(options: DirectoryOptions, filters: RecordFilterOptions, limit: LimitOption = 50, json: JsonOption = False) -> int:
    """List the batches that have damaged bytes.

    The time shown is when the batch was sealed. Several values of one filter: any may match; several filters: all must match.
    Safe at any time: takes no lock and changes nothing.
    """
    context = ChangeContext(options.load_settings())
    items: list[QuarantineListItem] = []
    files = ranges = size = 0
    queues: set[str] = set()
    for queue, batch in _find_all(context, filters.to_filter(context.clock.micros())):
        item = _summarize_batch(batch, queue)
        queues.add(queue)
        files, ranges, size = files + 1, ranges + item.ranges, size + item.bytes
        if not limit or files <= limit:
            items.append(item)
    if json:
        print_json(QuarantineListing(files=files, ranges=ranges, bytes=size, batches=items, problems=context.report.problems))
    else:
        if items:
            _print_items(items, several=any(queues))
        hidden = f"; {files - len(items):,} not shown (see --limit)" if files > len(items) else ""
        total = f"{counted(ranges, 'damaged byte range')}, {counted(size, 'byte')} in {counted(files, 'file')}"
        out.print(total + hidden)
        context.print_queue_hints(queues)
    context.print_problems()
    return context.exit_code()


def _print_items(items: list[QuarantineListItem], *, several: bool) -> None:
    columns = [("batch", "left"), ("ranges", "right"), ("repaired", "right"), ("bytes", "right"), ("sealed", "left")]
    rows = [
        (*([item.queue or "-"] if several else []), item.batch, item.ranges, item.repaired, f"{item.bytes:,}",
         format_time(item.sealed_at_micros), _describe_reasons(item.reasons))
        for item in items
    ]  # fmt: skip
    print_table([*([("sink", "left")] if several else []), *columns, ("reasons", "left")], rows)


@quarantine.command("show")
@expand_options
def show(
    options: DirectoryOptions,
    filters: RecordFilterOptions,
    raw: Annotated[bool, typer.Option("--raw", help="Write only the bytes, unchanged.")] = False,
    limit: LimitOption = 20,
    json: JsonOption = False,
) -> int:
    """Show damaged bytes and what is wrong with them.

    Bytes that are not text are escaped. Safe at any time: takes no lock and changes nothing.
    """
    context = ChangeContext(options.load_settings())
    record_filter = filters.to_filter(context.clock.micros())
    items: list[QuarantineRangeItem] = []
    count = 0
    for queue, batch in _find_all(context, record_filter):
        for number, (damage, piece) in enumerate(zip(batch.ranges, batch.pieces, strict=True), 1):
            if not record_filter.matches_reason(damage.reason):
                continue
            count += 1
            if limit and count > limit and not raw:
                continue
            if raw:
                write_bytes(piece)
            elif json:
                at, events = damage.repaired_at_micros, damage.repaired_events
                items.append(
                    QuarantineRangeItem(
                        batch=batch.batch, number=number, offset=damage.offset, length=damage.length, reason=damage.reason,
                        repaired_at_micros=at, repaired_events=events, data=piece, queue=queue,
                    )
                )  # fmt: skip
            else:
                out.print(*_describe_range(batch, number, piece, queue), sep="\n")
    if json and not raw:
        print_json(items)
    elif not raw and limit and count > limit:
        out.print(f"{count - limit:,} not shown (see --limit)")
    elif not raw and not count:
        out.print("no damaged byte range matches")
    flush_stdout()
    context.print_problems()
    return context.exit_code()


def _describe_range(batch: QuarantinedBatch, number: int, piece: bytes, queue: str) -> list[str]:
    damage = batch.ranges[number - 1]
    text = piece.removesuffix(b"\n").decode("utf-8", "backslashreplace")
    repaired = ""
    if damage.repaired_at_micros is not None:
        repaired = f", repaired {format_time(damage.repaired_at_micros)}: {counted(damage.repaired_events, 'event')}"
    where = f"{counted(damage.length, 'byte')} at offset {damage.offset:,}" + (f", in the queue of {queue}" if queue else "")
    content = [f"  {line}" for line in text.split("\n")]
    return [f"{batch.batch}, range {number}", f"  {damage.reason}; {where}{repaired}", *content, ""]


@quarantine.command("repair")
@expand_options
def repair(
    options: OutboxOptions,
    filters: RecordFilterOptions,
    everything: AllOption = False,
    checked: Annotated[bool, typer.Option("--checked", help="Only events whose checksum matches.")] = False,
    yes: YesOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Recover events from damaged bytes and replay them.

    Recovers whole events whose line was torn or whose checksum is wrong, and says for each range what was found and how
    reliable it is. If the checksum is wrong, the event may differ from what the application sent: look at it first. The
    events go into the outbox under their own ids. The bytes stay, marked as repaired, so that nothing is repaired twice.
    Without --yes nothing is changed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    record_filter = filters.to_filter(context.clock.micros())
    require_filter(record_filter, everything=everything)
    items: list[RepairedRange] = []
    unrecoverable = 0

    def on_range(found: RangeRepair) -> None:
        nonlocal unrecoverable
        unrecoverable += not found.salvage.events
        if json:
            items.append(_to_repaired_range(found))
        elif not quiet:
            context.item_lines += _describe_repair(found, checked=checked)

    context.require_single_directory(Kind.CORRUPT)
    repairer = QuarantineRepairer(context.directory, context.clock, record_filter, context.report)
    changes = repairer.repair_changes(context.validator, on_range, only_verified=checked)
    if not context.apply_changes(changes, yes=yes, enqueues=True):
        return context.print_lock_conflict()
    count = f"{counted(context.report.events, 'event')} from {counted(context.report.files, 'file')}"
    text = context.summary(count, "replayed", "would be replayed", yes=yes)
    if unrecoverable:
        text += f"; {counted(unrecoverable, 'range')} without a recoverable event"
    return context.print_result(items, text, yes=yes, json=json)


def _to_repaired_range(found: RangeRepair) -> RepairedRange:
    return RepairedRange(
        batch=found.batch,
        number=found.number,
        reason=found.range.reason,
        events=[
            RecoveredEvent(event=msgspec.Raw(event.payload), checksum_ok=event.verified, how=event.how)
            for event in found.salvage.events
        ],
        problems=list(found.salvage.problems),
    )


def _describe_repair(found: RangeRepair, *, checked: bool) -> list[str]:
    lines = [f"{found.batch}, range {found.number}: {found.range.reason}"]
    for event in found.salvage.events:
        skipped = "skipped: " if checked and not event.verified else ""
        lines += [f"  event: {skipped}{event.how}", f"    {event.payload.decode()}"]
    lines += [f"  no event: it {problem}" for problem in found.salvage.problems]
    return lines


@quarantine.command("purge")
@expand_options
def purge(
    options: DirectoryOptions,
    filters: RecordFilterOptions,
    everything: AllOption = False,
    repaired: Annotated[bool, typer.Option("--repaired", help="Only batches whose byte ranges are all repaired.")] = False,
    yes: YesOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Delete the damaged bytes of whole batches.

    The ledger counts them as purged. Without --yes nothing is changed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    record_filter = filters.to_filter(context.clock.micros())
    require_filter(record_filter, everything=everything or repaired)
    items: list[QuarantineListItem] = []
    ranges = 0

    def on_batch(batch: QuarantinedBatch) -> None:
        nonlocal ranges
        ranges += len(batch.ranges)
        item = _summarize_batch(batch)
        if json:
            items.append(item)
        elif not quiet:
            context.item_lines.append(f"{item.batch}  {counted(item.bytes, 'byte')}  {_describe_reasons(item.reasons)}")

    context.require_single_directory(Kind.CORRUPT)
    repairer = QuarantineRepairer(context.directory, context.clock, record_filter, context.report)
    changes = repairer.purge_changes(on_batch, only_repaired=repaired)
    if not context.apply_changes(changes, yes=yes, enqueues=False):
        return context.print_lock_conflict()
    count = f"{counted(ranges, 'damaged byte range')} in {counted(context.report.files, 'file')}"
    text = context.summary(count, "deleted", "would be deleted", yes=yes)
    return context.print_result(items, text, yes=yes, json=json)
