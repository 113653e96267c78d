"""`pillarbox resend`: sends again what was delivered and is kept."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Final

import msgspec
import typer

from pillarbox.admin.redelivery import PendingLimits, Redelivery, RetainedFile
from pillarbox.admin.text import format_time
from pillarbox.cli.context import AllOption, BatchOption, CommandContext, LimitOption, YesOption, plural, require_filter
from pillarbox.cli.main import ConfigOption, DirectoryOption, EventTypeOption, ExitCode, JsonOption, QuietOption, app
from pillarbox.errors import UsageError
from pillarbox.store import layout
from pillarbox.store.retention import retention_directories

_SECOND_MICROS: Final = 1_000_000


class RedeliveredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One delivered file, in the `items` of `pillarbox resend --json`; times in microseconds since 1970."""

    batch: str
    redelivered_as: str | None  # the batch that it is now; None where nothing was done
    sink: str  # of several; "" where there is one
    events: int
    bytes: int
    sealed_at_micros: int | None  # None where the name does not say
    delivered_at_micros: int | None


@app.command("resend")
def redeliver(
    directory: DirectoryOption = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Delivered since then: 2h (ago), 3d, or ISO 8601.", show_default=False),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="Delivered before that.", show_default=False)
    ] = None,
    sink: Annotated[
        str | None, typer.Option("--sink", metavar="NAME", help="To this one of several sinks only.", show_default=False)
    ] = None,
    batch: BatchOption = None,
    everything: AllOption = False,
    yes: YesOption = False,
    limit: LimitOption = 20,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Send again what was delivered and is kept: to a destination that lost what it had acknowledged.

    With `keep_delivered` set, delivered files stay for a while. Each waits again under a new batch id, with the same event ids,
    so that a destination that deduplicates has every event once; whoever delivers the directory sends them, in the order in
    which they came. What was a dead letter or damaged the first time is again. Killed anywhere, nothing is lost and nothing
    goes twice. Without --yes nothing is done.
    """
    site = CommandContext(config, quiet=quiet, directory=directory, event_type=event_type)
    selection = site.parse_filter(batches=batch, since=since, until=until)
    require_filter(selection, everything=everything)
    path = PurePath(site.directory.path)
    if (queue := layout.sink_of_queue(path.name)) is not None:
        raise UsageError(f"{path} is one of several queues: -d {path.parent} --sink {queue} sends again from it")
    chosen = retention_directories(site.directory)
    if sink is not None:
        if sink not in chosen or not sink:
            names = ", ".join(filter(None, chosen)) or "none: leave --sink out"
            raise UsageError(f"--sink {sink}: no sink of this directory has that name; it has {names}")
        chosen = {sink: chosen[sink]}
    items: list[RedeliveredBatch] = []
    now = site.clock.micros()
    again = Redelivery(
        site.directory, chosen, site.clock, selection, site.report, _RedeliveryPreview(site.item_lines, items, limit, json=json)
    )
    if not yes:
        with site.progress() as progress:
            again.preview(progress)
    else:
        limits = PendingLimits(site.settings.max_bytes, site.settings.max_files)
        if not site.run_locked(lambda stop, progress: again.execute(limits, stop, progress)):
            return site.print_locked()
    if not again.retained_count:
        text = f"no delivered batches in {site.directory.path}; set keep_delivered to retain batches delivered from now on"
        site.print_result([], text, yes=yes, json=json)
        return ExitCode.PARTIAL
    done = f"{plural(site.report.events, 'event')} of {plural(site.report.files, 'file')}"
    text = site.summary(done, "wait to be sent again", "would be sent again", yes=yes)
    if again.oldest_delivered_at_micros is not None:
        text += f" (what is kept was delivered from {format_time(again.oldest_delivered_at_micros)} on)"
    if site.report.drop_reason or site.report.interrupted:
        # What is sent again is delivered again, and would be meant once more.
        rest = format_time(min(now + _SECOND_MICROS, selection.until_micros or now + _SECOND_MICROS))
        text += f"\nonce these are delivered, the same with --until {rest} sends the rest"
    return site.print_result(items, text, yes=yes, json=json)


class _RedeliveryPreview:
    """The files that are concerned; the first ones are said, one by one."""

    def __init__(self, lines: list[str], items: list[RedeliveredBatch], limit: int, *, json: bool) -> None:
        self._lines = lines
        self._items = items
        self._limit = limit
        self._json = json
        self._count = 0

    def __call__(self, file: RetainedFile, events: int, anew: str | None) -> None:
        """One more."""
        self._count += 1
        at = layout.delivered_at(file.name)
        if self._json:
            self._items.append(
                RedeliveredBatch(
                    batch=file.batch,
                    redelivered_as=anew,
                    sink=file.sink,
                    events=events,
                    bytes=file.size,
                    sealed_at_micros=layout.sealed_at(file.name),
                    delivered_at_micros=at,
                )
            )
        elif not self._limit or self._count <= self._limit:
            to = f"  to {file.sink}" if file.sink else ""
            new = f"  as {anew}" if anew else ""
            self._lines.append(f"{file.batch}  {plural(events, 'event')}  delivered {format_time(at)}{to}{new}")
        elif self._count == self._limit + 1:
            self._lines.append("...")
