"""`pillarbox quarantine`: look at damaged bytes, have from them what can be had, or give them up."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.admin.quarantine import QuarantinedBatch, QuarantineRepairer, RangeRepair
from pillarbox.admin.scan import FileProblem
from pillarbox.admin.text import format_time
from pillarbox.cli.context import (
    AllOption,
    BatchOption,
    CommandContext,
    LimitOption,
    ReasonOption,
    SinceOption,
    UntilOption,
    YesOption,
    plural,
    print_json,
    print_table,
    printable,
    require_filter,
)
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, JsonOption, QuietOption, app, out
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.filters import RecordFilter

quarantine = typer.Typer(
    name="quarantine",
    help="Quarantine: bytes that are no record. Look, repair, give up.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=app.info.context_settings,
)
app.add_typer(quarantine)


class QuarantineListItem(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one batch, in `pillarbox quarantine list --json`."""

    batch: str
    ranges: int
    repaired: int  # of them
    bytes: int
    reasons: dict[str, int]
    sealed_at_micros: int | None  # microseconds since 1970; None where the batch's name does not say
    queue: str = ""  # whose queue it is in, where there are several sinks


class QuarantineListing(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox quarantine list --json`."""

    files: int
    ranges: int
    bytes: int
    batches: list[QuarantineListItem]
    problems: list[FileProblem]


class DamagedRange(msgspec.Struct, frozen=True, kw_only=True):
    """A damaged span, in `pillarbox quarantine show --json`."""

    batch: str
    number: int  # from 1
    offset: int  # in the sealed file, bytes
    length: int
    reason: str
    repaired_at_micros: int | None
    repaired_events: int
    data: bytes  # base64
    queue: str = ""  # as of `list`


class RecoveredEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was found in a span."""

    event: msgspec.Raw
    checksum_ok: bool  # its checksum fits
    how: str


class RepairedRange(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in a span, in `pillarbox quarantine repair --json`."""

    batch: str
    number: int  # from 1
    reason: str
    events: list[RecoveredEvent]
    problems: list[str]  # why other pieces of it hold none


def _summarize_batch(found: QuarantinedBatch, queue: str = "") -> QuarantineListItem:
    reasons: dict[str, int] = {}
    for span in found.ranges:
        reasons[span.reason] = reasons.get(span.reason, 0) + 1
    return QuarantineListItem(
        batch=found.batch,
        ranges=len(found.ranges),
        repaired=len(found.ranges) - found.unrepaired_count,
        bytes=sum(map(len, found.pieces)),
        reasons=reasons,
        sealed_at_micros=found.sealed_at_micros,
        queue=queue,
    )


def _find_all(site: CommandContext, selection: RecordFilter) -> Iterator[tuple[str, QuarantinedBatch]]:
    """What is meant in the directory and in each queue in it, with the sink whose queue that is."""
    for place in site.directories:
        for found in QuarantineRepairer(place, site.clock, selection, site.report).selected_batches():
            yield "" if place is site.directory else place.sink, found


@quarantine.command("list")
def list_(
    directory: DirectoryOption = None,
    batch: BatchOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = 50,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """List the batches of which damaged bytes are kept. Times are those at which the batch was sealed.

    An option that is given several times means any of them; different options must all fit. Safe at any time: takes no lock
    and changes nothing.
    """
    site = CommandContext(config, directory=directory)
    selection = site.parse_filter(batches=batch, reasons=reason, since=since, until=until)
    found: list[QuarantineListItem] = []
    files = spans = size = 0
    queues: set[str] = set()
    for queue, one in _find_all(site, selection):
        kept = _summarize_batch(one, queue)
        queues.add(queue)
        files, spans, size = files + 1, spans + kept.ranges, size + kept.bytes
        if not limit or files <= limit:
            found.append(kept)
    if json:
        print_json(QuarantineListing(files=files, ranges=spans, bytes=size, batches=found, problems=site.report.problems))
    else:
        if found:
            columns = [("batch", "left"), ("spans", "right"), ("repaired", "right"), ("bytes", "right"), ("sealed", "left")]
            several = [("sink", "left")] if any(queues) else []
            rows = [
                (*([one.queue or "-"] if several else []), one.batch, one.ranges, one.repaired, f"{one.bytes:,}",
                 format_time(one.sealed_at_micros), _describe_reasons(one.reasons))
                for one in found
            ]  # fmt: skip
            print_table([*several, *columns, ("reasons", "left")], rows)
        more = f", {files - len(found):,} of them are not shown (--limit)" if files > len(found) else ""
        out.print(f"{plural(spans, 'span')}, {plural(size, 'byte')} in {plural(files, 'file')}{more}", markup=False)
        site.print_queue_hints(queues)
    site.print_problems()
    return site.exit_code()


def _describe_reasons(found: dict[str, int]) -> str:
    return ", ".join(reason if count == 1 else f"{count} {reason}" for reason, count in sorted(found.items()))


@quarantine.command("show")
def show(
    directory: DirectoryOption = None,
    batch: BatchOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="The bytes alone, as they are.")] = False,
    limit: LimitOption = 20,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Show damaged bytes, span by span: where they stood, what is wrong, and what they are, escaped where they are no text.

    Safe at any time: takes no lock and changes nothing.
    """
    site = CommandContext(config, directory=directory)
    selection = site.parse_filter(batches=batch, reasons=reason, since=since, until=until)
    shown: list[DamagedRange] = []
    count = 0
    for queue, kept in _find_all(site, selection):
        for number, (span, piece) in enumerate(zip(kept.ranges, kept.pieces, strict=True), 1):
            if not selection.matches_reason(span.reason):
                continue
            count += 1
            if limit and count > limit and not raw:
                continue
            if raw:
                sys.stdout.buffer.write(piece)
            elif json:
                at, events = span.repaired_at_micros, span.repaired_events
                shown.append(
                    DamagedRange(
                        batch=kept.batch, number=number, offset=span.offset, length=span.length, reason=span.reason,
                        repaired_at_micros=at, repaired_events=events, data=piece, queue=queue,
                    )
                )  # fmt: skip
            else:
                out.print(_describe_range(kept, number, piece, queue), markup=False)
    if json and not raw:
        print_json(shown)
    elif not raw and limit and count > limit:
        out.print(f"{count - limit:,} more are not shown (--limit)", markup=False)
    elif not raw and not count:
        out.print("no such damage", markup=False)
    sys.stdout.flush()
    site.print_problems()
    return site.exit_code()


def _describe_range(kept: QuarantinedBatch, number: int, piece: bytes, queue: str) -> str:
    span = kept.ranges[number - 1]
    text = piece.removesuffix(b"\n").decode("utf-8", "backslashreplace")
    mended = ""
    if span.repaired_at_micros is not None:
        mended = f", repaired {format_time(span.repaired_at_micros)}: {plural(span.repaired_events, 'event')}"
    where = f"{plural(span.length, 'byte')} at {span.offset:,}" + (f", kept for {queue}" if queue else "")
    return printable(f"{kept.batch}, span {number}\n  {span.reason}; {where}{mended}\n  {text}\n".replace("\r", "\\r"))


@quarantine.command("repair")
def repair(
    directory: DirectoryOption = None,
    batch: BatchOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    checked: Annotated[bool, typer.Option("--checked", help="Only events whose checksum fits.")] = False,
    yes: YesOption = False,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Send what can be had from damaged bytes: whole events whose line was torn, or whose checksum is wrong.

    Says for each span what is in it, and how sure that is: where a checksum does not fit, the event may say something that
    nobody sent; look at it first. The events go into the outbox under their own ids. The bytes are kept, and marked as
    repaired, so that nothing is repaired twice. Without --yes nothing is done.
    """
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    selection = site.parse_filter(batches=batch, reasons=reason, since=since, until=until)
    require_filter(selection, everything=everything)
    items: list[RepairedRange] = []
    hopeless = 0

    def see(seen: RangeRepair) -> None:
        nonlocal hopeless
        hopeless += not seen.salvage.events
        if json:
            items.append(_repaired_range(seen))
        elif not quiet:
            site.item_lines.append(_describe_repair(seen, checked=checked))

    site.require_single_directory(Kind.CORRUPT)
    changes = QuarantineRepairer(site.directory, site.clock, selection, site.report).repair_changes(
        site.gate, see, only_verified=checked
    )
    if not site.apply_changes(changes, yes=yes, sends=True):
        return site.print_locked()
    done = f"{plural(site.report.events, 'event')} of {plural(site.report.files, 'file')}"
    text = site.summary(done, "went into the outbox", "would go into the outbox", yes=yes)
    if hopeless:
        text += f"; {plural(hopeless, 'span')} can only be kept or purged"
    return site.print_result(items, text, yes=yes, json=json)


def _repaired_range(seen: RangeRepair) -> RepairedRange:
    events = [
        RecoveredEvent(event=msgspec.Raw(one.payload), checksum_ok=one.verified, how=one.how) for one in seen.salvage.events
    ]
    return RepairedRange(
        batch=seen.batch, number=seen.number, reason=seen.range.reason, events=events, problems=list(seen.salvage.problems)
    )


def _describe_repair(seen: RangeRepair, *, checked: bool) -> str:
    lines = [f"{seen.batch}, span {seen.number}: {seen.range.reason}"]
    for event in seen.salvage.events:
        left = "left out: " if checked and not event.verified else ""
        lines += [f"  event: {left}{event.how}", f"    {event.payload.decode()}"]
    lines += [f"  no event: it {problem}" for problem in seen.salvage.problems]
    return "\n".join(lines)


@quarantine.command("purge")
def purge(
    directory: DirectoryOption = None,
    batch: BatchOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    repaired: Annotated[bool, typer.Option("--repaired", help="Only where every span has been repaired.")] = False,
    yes: YesOption = False,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Give damaged bytes up for good, by whole batches. The ledger counts them as purged. Without --yes nothing is done."""
    site = CommandContext(config, quiet=quiet, directory=directory)
    selection = site.parse_filter(batches=batch, reasons=reason, since=since, until=until)
    require_filter(selection, everything=everything or repaired)
    items: list[QuarantineListItem] = []
    spans = 0

    def see(found: QuarantinedBatch) -> None:
        nonlocal spans
        spans += len(found.ranges)
        if json:
            items.append(_summarize_batch(found))
        elif not quiet:
            kept = _summarize_batch(found)
            site.item_lines.append(f"{kept.batch}  {plural(kept.bytes, 'byte')}  {_describe_reasons(kept.reasons)}")

    site.require_single_directory(Kind.CORRUPT)
    changes = QuarantineRepairer(site.directory, site.clock, selection, site.report).purge_changes(see, only_repaired=repaired)
    if not site.apply_changes(changes, yes=yes, sends=False):
        return site.print_locked()
    done = f"{plural(spans, 'span')} of {plural(site.report.files, 'file')}"
    text = site.summary(done, "purged", "would be gone for good", yes=yes)
    return site.print_result(items, text, yes=yes, json=json)
