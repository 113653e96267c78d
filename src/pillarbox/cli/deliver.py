"""`pillarbox deliver`: delivers a directory that other processes write to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pillarbox.cli.context import print_json
from pillarbox.cli.main import (
    ConfigOption,
    DirectoryOption,
    EventTypeOption,
    ExitCode,
    JsonOption,
    QuietOption,
    SinkOption,
    app,
    err,
    interrupt_on_sigterm,
    load_settings,
    log_to_terminal,
    out,
    require_setting,
)
from pillarbox.clock import SystemClock
from pillarbox.delivery.deliverer import ONLY_SINK, combine_stats
from pillarbox.delivery.runner import build_local_runner, build_sinks
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.exporters import MetricsExporters
from pillarbox.hooks import Hooks
from pillarbox.stats import SinkStats
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from pillarbox.delivery.runner import LocalRunner
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

_POLL_S: Final = 0.05
_STUCK_S: Final = 0.5  # without progress, where a sink is stopped: the others may be about to begin
_STOP_S: Final = 10.0  # for the batch that is on its way when the command is interrupted


class DeliverResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox deliver --json`, at its end; counts are of this run."""

    pending_batches: int
    total: SinkStats
    sinks: dict[str, SinkStats]  # by name, where there are several


@app.command("deliver")
def deliver(
    directory: DirectoryOption = None,
    sink: SinkOption = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    once: Annotated[bool, typer.Option("--once", help="Deliver what waits, then end.")] = False,
    timeout: Annotated[float, typer.Option(help="With --once: seconds without progress to give up after.", min=0.1)] = 30.0,
    max_rate: Annotated[
        float | None, typer.Option(metavar="EVENTS", help="A second that are sent at most, to each sink.", show_default=False)
    ] = None,
    live_share: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of new events while a backlog is drained: 0 (in order) to 1.", show_default=False),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve GET /metrics for Prometheus.", show_default=False)
    ] = None,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Export metrics to an OpenTelemetry collector, e.g. http://127.0.0.1:4318.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Deliver what waits in a directory, until stopped, or --once.

    What a dead writer left is adopted; a living writer's active file is left to it. One process delivers at a time; a
    second one waits for its turn. Ctrl-C and SIGTERM end it with exit code 0, within 11 seconds, or 16 with --otlp: the batch
    that is on its way may finish; a second time ends it at once. With --once the exit code is 1 where something is left: the
    last line says why.
    Metrics are exported without --otlp too where OTEL_EXPORTER_OTLP_ENDPOINT is set.
    """
    log_to_terminal(quiet=quiet)
    interrupt_on_sigterm()
    try:
        settings = load_settings(
            config, directory=directory, sink=sink, event_type=event_type, max_rate=max_rate, live_share=live_share
        )
        require_setting(settings, "directory", "DIR")
        if not settings.sinks:
            require_setting(settings, "sink", "URL")
        return _deliver(settings, timeout if once else None, metrics, otlp, json=json, quiet=quiet)
    except KeyboardInterrupt:  # before there was anything to end, or a second time: what is on its way is sent again
        return ExitCode.PARTIAL if once else ExitCode.DONE


def _deliver(
    settings: Settings, give_up_s: float | None, metrics: str | None, otlp: str | None, *, json: bool, quiet: bool
) -> int:
    clock = SystemClock()
    place = directory_at(settings.directory, local_filesystem(), clock)
    place.ensure_usable()
    shown = MetricsExporters(place, settings, clock, metrics, otlp)
    on_dead = Hooks(settings.directory, on_dead_letter=settings.on_dead_letter).report_dead_letter
    callbacks = DeliveryCallbacks(on_duration=shown.record_flush, on_dead_letter=on_dead)
    sinks = build_sinks(settings, {})
    deliverer = build_local_runner(
        settings, place, clock, LedgerWriter(place, clock), callbacks, lambda: False, sinks, only_delivers=True
    )
    place.seal_after(place.disk_usage().newest_sealed_at)
    try:
        shown.start(deliverer.sinks)
        deliverer.start()
        done = _wait_until_done(deliverer, place, give_up_s, quiet=quiet)
    except KeyboardInterrupt:
        done = give_up_s is None
    finally:
        deliverer.stop(_STOP_S)
        shown.close()
    _print_result(deliverer.sinks(), place.disk_usage().sealed_files, json=json)
    return ExitCode.DONE if done else ExitCode.PARTIAL


def _print_result(sinks: dict[str, SinkStats], waiting_files: int, *, json: bool) -> None:
    """What was done, at the end."""
    found = combine_stats(sinks)
    several = {name: sink for name, sink in sinks.items() if name != ONLY_SINK}
    if json:
        print_json(DeliverResult(pending_batches=waiting_files, total=found, sinks=several))
        return
    out.print(
        f"delivered {found.delivered} ({found.duplicates} were there already), dead letters {found.dead}, "
        f"damaged {found.quarantined}; {waiting_files} files wait" + (f"; {found.state}" if found.state.reason else ""),
        markup=False,
    )


def _wait_until_done(deliverer: LocalRunner, place: Directory, give_up_s: float | None, *, quiet: bool) -> bool:
    """Show progress until nothing waits (with `give_up_s`) or for ever; whether nothing is left."""
    total = place.disk_usage().pending_bytes
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[events]} events"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal or give_up_s is None,
        transient=True,
    ) as progress:
        task = progress.add_task("deliver", total=total, events=0)
        clock = SystemClock()
        last_count, last_moment = 0, clock.monotonic()
        while give_up_s is None or not deliverer.is_idle():
            threading.Event().wait(_POLL_S)
            found = combine_stats(deliverer.sinks())
            progress.update(task, completed=found.flushed_bytes, events=found.delivered)
            if give_up_s is None:
                continue
            if found.flushed_files != last_count:
                last_count, last_moment = found.flushed_files, clock.monotonic()
            stuck = deliverer.is_stopped() and clock.monotonic() - last_moment > _STUCK_S
            if stuck or clock.monotonic() - last_moment > give_up_s:
                return False
    return not place.waiting_batch_ids()
