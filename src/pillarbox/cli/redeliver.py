"""`pillarbox redeliver`: deliver retained batches a second time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Final

import msgspec
import typer

from pillarbox.admin.filters import RecordFilter, parse_batch_id
from pillarbox.admin.redelivery import PendingLimits, Redelivery, RetainedFile
from pillarbox.admin.text import counted, format_time, parse_time
from pillarbox.cli.changes import ChangeContext, require_filter
from pillarbox.cli.options import (
    AllOption,
    BatchOption,
    JsonOption,
    LimitOption,
    OutboxOptions,
    QuietOption,
    YesOption,
    expand_options,
)
from pillarbox.cli.output import ExitCode
from pillarbox.errors import UsageError
from pillarbox.store import layout
from pillarbox.store.retention import retention_directories

_SECOND_MICROS: Final = 1_000_000


class RedeliveredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One retained batch, in the `items` of `pillarbox redeliver --json`; times in microseconds since 1970."""

    batch: str  # batch id when it was delivered
    redelivered_as: str | None  # new batch id; None without --yes
    sink: str  # name of the sink that retained it; "" with a single sink
    events: int  # number of events
    bytes: int  # size of the file
    sealed_at_micros: int | None  # when it was sealed; None if the file's name does not tell
    delivered_at_micros: int | None  # when it was delivered; None if the file's name does not tell


@dataclass(frozen=True, kw_only=True)
class RetainedFilterOptions:
    """Which retained batches a command works on."""

    batch: BatchOption = None
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="Only delivered at or after TIME (2h, 3d or ISO 8601).", show_default=False
        ),
    ] = None
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="Only delivered before TIME.", show_default=False)
    ] = None

    def to_filter(self, now_micros: int) -> RecordFilter:
        """The filter that the options describe; raises `UsageError` for an invalid time."""
        return RecordFilter(
            batches=tuple(map(parse_batch_id, self.batch or ())),
            since_micros=None if self.since is None else parse_time(self.since, now_micros),
            until_micros=None if self.until is None else parse_time(self.until, now_micros),
        )


@expand_options
def redeliver(
    *,
    options: OutboxOptions,
    filters: RetainedFilterOptions,
    sink: Annotated[
        str | None, typer.Option("--sink", metavar="NAME", help="Redeliver only to this sink.", show_default=False)
    ] = None,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Deliver retained batches again.

    Use it when a destination has lost events that it had confirmed. With `keep_delivered` set, delivered batches are retained
    for a while. Each selected batch becomes pending again under a new batch id, with the same event ids, so that a destination
    that deduplicates stores no event twice. The directory's delivery worker delivers the batches in their original order.
    Records that were rejected or damaged the first time become dead letters or quarantine again. If the command is killed, no
    batch is lost or redelivered twice. Without --yes nothing is changed.
    """
    context = ChangeContext(options.load_settings(), quiet=quiet)
    now = context.clock.micros()
    record_filter = filters.to_filter(now)
    require_filter(record_filter, everything=everything)
    path = PurePath(context.directory.path)
    if (queue := layout.sink_of_queue(path.name)) is not None:
        raise UsageError(f"{path} is the queue of a sink; use -d {path.parent} --sink {queue}")
    queues = retention_directories(context.directory)
    if sink is not None:
        if sink not in queues or not sink:
            names = ", ".join(filter(None, queues))
            known = f"its sinks are {names}" if names else "it has no named sinks, leave --sink out"
            raise UsageError(f"--sink {sink}: the directory has no sink of this name; {known}")
        queues = {sink: queues[sink]}
    items: list[RedeliveredBatch] = []
    preview = _RedeliveryPreview(context.item_lines, items, limit, json=json)
    redelivery = Redelivery(context.directory, queues, context.clock, record_filter, context.report, preview)
    if not yes:
        with context.show_progress() as on_progress:
            redelivery.preview(on_progress)
    else:
        limits = PendingLimits(context.settings.max_bytes, context.settings.max_files)
        if not context.run_locked(lambda should_stop, on_progress: redelivery.execute(limits, should_stop, on_progress)):
            return context.print_lock_conflict()
    if not redelivery.retained_count:
        text = f"no retained batches in {context.directory.path}; set keep_delivered to retain batches delivered from now on"
        context.print_result([], text, yes=yes, json=json)
        return ExitCode.PARTIAL
    count = f"{counted(context.report.events, 'event')} in {counted(context.report.files, 'batch', 'batches')}"
    text = context.summary(count, "pending again", "would be redelivered", yes=yes)
    if redelivery.oldest_delivered_at_micros is not None:
        text += f" (the oldest retained batch was delivered {format_time(redelivery.oldest_delivered_at_micros)})"
    note = ""
    if context.report.drop_reason or context.report.interrupted:
        # A redelivered batch is retained again, under the time of its second delivery: without --until it would match.
        rest = format_time(min(now + _SECOND_MICROS, record_filter.until_micros or now + _SECOND_MICROS))
        note = f"once these are delivered, run the same command with --until {rest} for the rest"
    return context.print_result(items, text, yes=yes, json=json, note=note)


class _RedeliveryPreview:
    """Collects the batches concerned: as JSON items, or as lines for the first of them."""

    def __init__(self, lines: list[str], items: list[RedeliveredBatch], limit: int, *, json: bool) -> None:
        self._lines = lines
        self._items = items
        self._limit = limit
        self._json = json
        self._count = 0

    def __call__(self, file: RetainedFile, events: int, new_batch: str | None) -> None:
        """Add a batch, with its new id once it is pending again."""
        self._count += 1
        at = layout.delivered_at(file.name)
        if self._json:
            self._items.append(
                RedeliveredBatch(
                    batch=file.batch,
                    redelivered_as=new_batch,
                    sink=file.sink,
                    events=events,
                    bytes=file.size,
                    sealed_at_micros=layout.sealed_at(file.name),
                    delivered_at_micros=at,
                )
            )
        elif not self._limit or self._count <= self._limit:
            to = f"  to {file.sink}" if file.sink else ""
            new = f"  as {new_batch}" if new_batch else ""
            self._lines.append(f"{file.batch}  {counted(events, 'event')}  delivered {format_time(at)}{to}{new}")
        elif self._count == self._limit + 1:
            self._lines.append("...")
