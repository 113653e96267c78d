"""`pillarbox deliver`: deliver what other processes store in a directory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pillarbox.admin.text import counted
from pillarbox.cli.context import require_setting
from pillarbox.cli.options import JsonOption, OutboxOptions, QuietOption, SinkOption, expand_options
from pillarbox.cli.output import (
    ExitCode,
    discard_stdout,
    err,
    flush_stdout,
    limited_writes,
    log_to_terminal,
    out,
    print_json,
)
from pillarbox.cli.signals import interrupt_on_sigterm
from pillarbox.clock import SystemClock
from pillarbox.delivery.build import build_local_runner, build_sinks
from pillarbox.delivery.runner import ONLY_SINK, combine_stats
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.exporters import MetricsExporters
from pillarbox.hooks import Hooks
from pillarbox.stats import SinkStats
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at
from pillarbox.system import threads

if TYPE_CHECKING:
    from pillarbox.delivery.build import LocalRunner
    from pillarbox.settings import Settings
    from pillarbox.store.directory import Directory

_POLL_S: Final = 0.05
_STOPPED_S: Final = 0.5  # --once ends after a sink was stopped for so long, which gives the other sinks time to start
_STOP_TIMEOUT_S: Final = 10.0  # for the batch in flight when the command is interrupted


class DeliverResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox deliver --json`, printed at its end; counts are of this run."""

    pending_batches: int  # batches that are still pending at the end
    total: SinkStats  # the counts of all sinks together
    sinks: dict[str, SinkStats]  # with several sinks: the counts of each, by name


@expand_options
def deliver(
    *,
    options: OutboxOptions,
    sink: SinkOption = None,
    once: Annotated[bool, typer.Option("--once", help="Exit when nothing is pending.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --once: exit after SECONDS without progress.", min=0.1)
    ] = 30.0,
    max_rate: Annotated[
        float | None, typer.Option(metavar="EVENTS", help="Maximum events per second, per sink.", show_default=False)
    ] = None,
    live_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Fraction of sends given to new events while a backlog drains (0 = strict FIFO).",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve GET /metrics for Prometheus.", show_default=False)
    ] = None,
    otlp: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Export metrics by OTLP, e.g. to http://127.0.0.1:4318.", show_default=False),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Deliver pending batches until stopped.

    Also recovers the segments of dead writers; it does not touch those of running writers. One process delivers at a time; a
    second one waits as a standby. On SIGINT or SIGTERM it finishes the batch in flight and exits with 0 within 11 seconds (16
    with --otlp); a second signal exits immediately. With --once it exits with 1 if something is left; the last line says why.
    It also exits with 1 if counts are lost because the ledger could not be written. Without --otlp, metrics are exported if
    OTEL_EXPORTER_OTLP_ENDPOINT is set.
    """
    log_to_terminal(quiet=quiet)
    interrupt_on_sigterm()
    try:
        settings = options.load_settings(sink=sink, max_rate=max_rate, live_share=live_share)
        if not settings.sinks:
            require_setting(settings, "sink", "URL")
        return _deliver(settings, timeout if once else None, metrics, otlp, json=json, quiet=quiet)
    except KeyboardInterrupt:  # during the start, or a second signal: the batch in flight will be sent again
        return ExitCode.PARTIAL if once else ExitCode.DONE


def _deliver(
    settings: Settings, once_timeout_s: float | None, metrics: str | None, otlp: str | None, *, json: bool, quiet: bool
) -> int:
    clock = SystemClock()
    directory = directory_at(settings.directory, local_filesystem(), clock)
    directory.ensure_usable()
    directory.create_control_files()
    exporters = MetricsExporters(directory, settings, clock, metrics, otlp)
    on_dead_letter = Hooks(settings.directory, on_dead_letter=settings.on_dead_letter).report_dead_letter
    callbacks = DeliveryCallbacks(on_duration=exporters.record_flush, on_dead_letter=on_dead_letter)
    ledger = LedgerWriter(directory, clock)
    runner = build_local_runner(settings, directory, clock, ledger, callbacks, build_sinks(settings, {}), only_delivers=True)
    directory.seal_after(directory.disk_usage().newest_sealed_at)
    interrupted = False
    try:
        exporters.start(runner.sinks)
        runner.start()
        done = _wait_until_done(runner, directory, once_timeout_s, quiet=quiet)
    except KeyboardInterrupt:
        done, interrupted = once_timeout_s is None, True
    finally:
        runner.stop(_STOP_TIMEOUT_S)
        unwritten = ledger.finish() + runner.unwritten_ledger_entries
        exporters.close()
    try:
        with limited_writes() if interrupted else nullcontext():
            _print_result(runner.sinks(), directory.disk_usage().sealed_files, json=json)
            flush_stdout()
    except TimeoutError:
        discard_stdout()
    return ExitCode.DONE if done and not unwritten else ExitCode.PARTIAL


def _print_result(sinks: dict[str, SinkStats], pending: int, *, json: bool) -> None:
    total = combine_stats(sinks)
    if json:
        named = {name: sink for name, sink in sinks.items() if name != ONLY_SINK}
        print_json(DeliverResult(pending_batches=pending, total=total, sinks=named))
        return
    duplicates = f" ({counted(total.duplicates, 'duplicate')})" if total.duplicates else ""
    parts = [
        f"delivered {counted(total.delivered, 'event')}{duplicates}",
        counted(total.dead, "dead letter"),
        f"{total.quarantined:,} quarantined; {counted(pending, 'batch', 'batches')} pending",
    ]
    out.print(", ".join(parts) + (f"; {total.state}" if total.state.reason else ""))


def _wait_until_done(runner: LocalRunner, directory: Directory, once_timeout_s: float | None, *, quiet: bool) -> bool:
    """Show progress until nothing is pending, or without `once_timeout_s` forever. Returns whether nothing is left."""
    total = directory.disk_usage().pending_bytes
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[events]} events"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal or once_timeout_s is None,
        transient=True,
    ) as progress:
        task = progress.add_task("deliver", total=total, events=0)
        clock = SystemClock()
        last_count, last_progress_at = 0, clock.monotonic()
        while once_timeout_s is None or not runner.is_idle():
            threads.pause(_POLL_S)
            stats = combine_stats(runner.sinks())
            progress.update(task, completed=stats.flushed_bytes, events=stats.delivered)
            if once_timeout_s is None:
                continue
            if stats.flushed_files != last_count:
                last_count, last_progress_at = stats.flushed_files, clock.monotonic()
            waited_s = clock.monotonic() - last_progress_at
            if (runner.is_stopped() and waited_s > _STOPPED_S) or waited_s > once_timeout_s:
                return False
    return not directory.waiting_batch_ids()
