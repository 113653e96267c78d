"""`pillarbox status`: what waits, who delivers, and what was set aside. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from pillarbox.admin.status import OutboxStatus, describe_worker, read_status
from pillarbox.cli.context import printable
from pillarbox.cli.main import ConfigOption, DirectoryOption, ExitCode, JsonOption, app, load_settings, out, require_setting
from pillarbox.cli.watch import watch_until_stopped
from pillarbox.clock import SystemClock
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at


@app.command("status")
def status(
    directory: DirectoryOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="With --watch: between two looks.", min=0.1)] = 2.0,
    looks: Annotated[int, typer.Option(metavar="N", help="With --watch: end after so many; 0: never.", min=0)] = 0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Show what waits, who delivers it and how that goes, and what was set aside.

    Safe at any time: it only lists the directory and reads the heartbeat of the process that delivers. With --watch a
    terminal shows it live, with rates; elsewhere each look is a line, or with --json an object on a line. Ctrl-C is how
    that ends, with exit code 0.
    """
    settings = load_settings(config, directory=directory)
    require_setting(settings, "directory", "DIR")
    clock = SystemClock()
    place = directory_at(settings.directory, local_filesystem(), clock)
    if watch:
        watch_until_stopped(place, clock, settings.durability, interval=interval, looks=looks, json=json)
        return ExitCode.DONE
    found = read_status(place, clock, settings.durability)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        out.print("\n".join(_status_lines(found)), markup=False)
    return ExitCode.DONE


def _status_lines(found: OutboxStatus) -> list[str]:
    rows = {
        "directory": found.directory,
        "waiting": f"{found.pending_bytes:,} bytes in {found.pending_files:,} files ({found.active_files} active)",
        "oldest": "-" if found.oldest_age_s is None else f"sealed {found.oldest_age_s:,.0f} s ago",
        "deliverer": describe_worker(found.heartbeat, found.heartbeat_age_s),
    }
    for sink in found.sinks:
        rows[f"to {sink.name}"] = (
            f"{sink.backlog_bytes:,} bytes in {sink.backlog_files:,} files wait; "
            f"{describe_worker(sink.heartbeat, sink.heartbeat_age_s)}"
        )
    rows |= {
        "dead letters": f"{found.dead_bytes:,} bytes in {found.dead_files:,} files",
        "quarantine": f"{found.quarantine_bytes:,} bytes in {found.quarantine_files:,} files",
        "delivered": f"{found.delivered_bytes:,} bytes in {found.delivered_files:,} files are kept",
        "durability": found.durability,
    }
    width = max(map(len, rows))
    return [printable(f"{name:<{width}}  {text}").replace("\n", " ") for name, text in rows.items()]
