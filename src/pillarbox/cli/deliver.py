"""`pillarbox deliver`: delivers a directory that other processes write to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pillarbox.cli.app import (
    ConfigOption,
    DirectoryOption,
    EventTypeOption,
    Exit,
    QuietOption,
    SinkOption,
    app,
    err,
    log_to_terminal,
    out,
    require,
    settings_from,
    stop_on_sigterm,
)
from pillarbox.clock import SystemClock
from pillarbox.delivery.settlement import Callbacks
from pillarbox.delivery.thread import DeliveryThread
from pillarbox.delivery.worker import Worker
from pillarbox.exposition import Exposition
from pillarbox.hooks import Hooks
from pillarbox.sinks import make_sink, redacted
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import RealFilesystem
from pillarbox.store.ledger import Ledger
from pillarbox.telemetry import DeliveryCounters

if TYPE_CHECKING:
    from pillarbox.settings import Settings

_LOOK_S: Final = 0.1
_STOP_S: Final = 10.0  # for the batch that is on its way when the command is interrupted


@app.command("deliver")
def deliver(
    directory: DirectoryOption = None,
    sink: SinkOption = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    once: Annotated[bool, typer.Option("--once", help="Deliver what waits, then end.")] = False,
    timeout: Annotated[float, typer.Option(help="With --once: seconds without progress to give up after.", min=0.1)] = 30.0,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve GET /metrics for Prometheus.", show_default=False)
    ] = None,
    otlp: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Export metrics to an OpenTelemetry collector, e.g. http://127.0.0.1:4318.", show_default=False
        ),
    ] = None,
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
    stop_on_sigterm()
    try:
        settings = settings_from(config, directory=directory, sink=sink, event_type=event_type)
        require(settings, "directory", "DIR")
        require(settings, "sink", "URL")
        return _deliver(settings, timeout if once else None, metrics, otlp, quiet=quiet)
    except KeyboardInterrupt:  # before there was anything to end, or a second time: what is on its way is sent again
        return Exit.PARTLY if once else Exit.DONE


def _deliver(settings: Settings, give_up_s: float | None, metrics: str | None, otlp: str | None, *, quiet: bool) -> int:
    clock = SystemClock()
    place = Directory(settings.directory, RealFilesystem(), clock)
    place.open()
    shown = Exposition(place, settings, clock, metrics, otlp)
    url = settings.sink or ""
    counters = DeliveryCounters()
    worker = Worker(
        place,
        make_sink(url, settings.event_type),
        redacted(url),
        clock,
        settings.rules,
        counters,
        Callbacks(
            on_duration=shown.flushed, on_dead=Hooks(settings.directory, on_dead_letter=settings.on_dead_letter).dead_letter
        ),
        kept=settings.kept,
        ledger=Ledger(place, clock),
    )
    place.note_stamp(place.account().newest_stamp)
    thread = DeliveryThread(worker)
    shown.begin(thread.sinks)
    thread.start()
    try:
        done = _watch(worker, place, give_up_s, quiet=quiet)
    except KeyboardInterrupt:
        done = give_up_s is None
    finally:
        thread.stop(_STOP_S)
        shown.close()
    left = place.account()
    out.print(
        f"delivered {counters.delivered} ({counters.duplicates} were there already), dead letters {counters.dead}, "
        f"damaged {counters.quarantined}; {left.sealed_files} files wait"
        + (f"; {worker.state}" if worker.state.reason else ""),
        markup=False,
    )
    return Exit.DONE if done else Exit.PARTLY


def _watch(worker: Worker, place: Directory, give_up_s: float | None, *, quiet: bool) -> bool:
    """Show progress until nothing waits (with `give_up_s`) or for ever; whether nothing is left."""
    total = place.account().pending_bytes
    counters = worker.counters
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
        last_count, last_moment = counters.flushed_files, clock.monotonic()
        while not worker.idle.wait(_LOOK_S) or give_up_s is None:
            progress.update(task, completed=counters.flushed_bytes, events=counters.delivered)
            if give_up_s is None:
                if worker.idle.is_set():
                    with worker.settled:
                        worker.settled.wait(_LOOK_S)
                continue
            if counters.flushed_files != last_count:
                last_count, last_moment = counters.flushed_files, clock.monotonic()
            if worker.state.name == "stopped" or clock.monotonic() - last_moment > give_up_s:
                return False
    return place.account().sealed_files == 0
