"""`pillarbox status`: what is pending, who delivers it, and what was not delivered. Takes no lock and changes nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from pillarbox.admin.status import OutboxStatus, describe_dropped, describe_worker, read_status
from pillarbox.admin.text import counted, format_duration
from pillarbox.cli.options import DirectoryOptions, JsonOption, expand_options
from pillarbox.cli.output import ExitCode, out, print_json
from pillarbox.cli.watch import watch_until_stopped
from pillarbox.clock import SystemClock
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at


@expand_options
def status(
    options: DirectoryOptions,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="With --watch: seconds between samples.", min=0.1)] = 2.0,
    samples: Annotated[int, typer.Option(metavar="N", help="With --watch: stop after N samples; 0 for never.", min=0)] = 0,
    json: JsonOption = False,
) -> int:
    """Show what is pending and the state of delivery.

    Safe at any time: it lists the directory and reads the heartbeat of the delivery worker. With --watch it refreshes the view
    on a terminal and adds rates; elsewhere it prints each sample as one line, or with --json as one JSON object per line.
    Ctrl-C ends --watch with exit code 0.
    """
    settings = options.load_settings()
    clock = SystemClock()
    directory = directory_at(settings.directory, local_filesystem(), clock)
    if watch:
        watch_until_stopped(
            directory, clock, settings.durability, settings.max_bytes, interval=interval, samples=samples, json=json
        )
        return ExitCode.DONE
    found = read_status(directory, clock, settings.durability, settings.max_bytes)
    if json:
        print_json(found)
    else:
        out.print(*_status_lines(found, clock.micros()), sep="\n")
    return ExitCode.DONE


def _status_lines(found: OutboxStatus, now_micros: int) -> list[str]:
    active = f" ({found.active_files:,} active)" if found.active_files else ""
    rows = {
        "directory": found.directory,
        "pending": f"{counted(found.pending_files, 'file')}{active}, {counted(found.pending_bytes, 'byte')}",
        "events": ("" if found.pending_events_exact else "about ") + f"{found.pending_events:,} pending",
        "limit": _limit_text(found),
        "oldest": "-" if found.oldest_age_s is None else f"sealed {found.oldest_age_s:,.0f} s ago",
        "worker": describe_worker(found.heartbeat, found.heartbeat_age_s),
    }
    for sink in found.sinks:
        pending = f"{counted(sink.backlog_files, 'file')}, {counted(sink.backlog_bytes, 'byte')} pending"
        events = counted(sink.backlog_events, "pending event")
        rows[f"sink {sink.name}"] = f"{pending}; {describe_worker(sink.heartbeat, sink.heartbeat_age_s)}; {events}"
    rows |= {
        "dead letters": f"{counted(found.dead_files, 'file')}, {counted(found.dead_bytes, 'byte')}",
        "quarantine": f"{counted(found.quarantine_files, 'file')}, {counted(found.quarantine_bytes, 'byte')}",
        "retained": f"{counted(found.delivered_files, 'file')}, {counted(found.delivered_bytes, 'byte')}",
        "durability": found.durability,
    }
    if found.dropped:
        rows["dropped"] = describe_dropped(found.dropped, now_micros)
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in [*rows.items(), *(("to do", text) for text in found.advice)]]


def _limit_text(found: OutboxStatus) -> str:
    if not found.max_bytes:
        return "-"
    text = f"{100 * found.pending_bytes / found.max_bytes:.1f} % of max_bytes ({counted(found.max_bytes, 'byte')})"
    return text if found.full_in_s is None else f"{text}, full in {format_duration(found.full_in_s)} at the present rate"
