"""`pillarbox status`: what waits, who delivers, and what was set aside. Takes no lock, creates and adopts nothing."""

from __future__ import annotations

import sys

import msgspec
from rich.table import Table

from pillarbox.cli.app import ConfigOption, DirectoryOption, Exit, JsonOption, app, out, require, settings_from
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import last_heartbeat
from pillarbox.delivery.state import SILENT_AFTER_S, Heartbeat
from pillarbox.errors import DirectoryUnusable
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import RealFilesystem


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of `pillarbox status --json`; bytes, numbers of files, seconds."""

    directory: str
    pending_bytes: int
    pending_files: int
    active_files: int
    sealed_files: int
    oldest_age_s: float | None
    corrupt_files: int
    corrupt_bytes: int
    dead_files: int
    dead_bytes: int
    durability: str  # of the outbox that delivers, or where none does, as it is set here
    deliverer: Heartbeat | None
    deliverer_silent_s: float | None


@app.command("status")
def status(directory: DirectoryOption = None, config: ConfigOption = None, json: JsonOption = False) -> int:
    """Show what waits, who delivers it and how that goes, and what was set aside.

    Safe at any time: it only lists the directory and reads the heartbeat of the process that delivers.
    """
    settings = settings_from(config, directory=directory)
    require(settings, "directory", "DIR")
    clock = SystemClock()
    place = Directory(settings.directory, RealFilesystem(), clock)
    try:
        account = place.account()
    except OSError as error:
        raise DirectoryUnusable(settings.directory, f"cannot be listed: {error.strerror}", "name an outbox directory") from None
    now = clock.micros()
    beat = last_heartbeat(place)
    found = Status(
        directory=settings.directory,
        pending_bytes=account.pending_bytes,
        pending_files=account.pending_files,
        active_files=account.active_files,
        sealed_files=account.sealed_files,
        oldest_age_s=None if account.oldest_stamp is None else max(0.0, (now - account.oldest_stamp) / 1e6),
        corrupt_files=account.corrupt_files,
        corrupt_bytes=account.corrupt_bytes,
        dead_files=account.dead_files,
        dead_bytes=account.dead_bytes,
        durability=beat.durability if beat is not None and beat.durability else settings.durability,
        deliverer=beat,
        deliverer_silent_s=None if beat is None else max(0.0, (now - beat.at_micros) / 1e6),
    )
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        out.print(_table(found))
    return Exit.DONE


def _table(found: Status) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "directory": found.directory,
        "waiting": f"{found.pending_bytes:,} bytes in {found.pending_files:,} files ({found.active_files} active)",
        "oldest": "-" if found.oldest_age_s is None else f"sealed {found.oldest_age_s:,.0f} s ago",
        "deliverer": deliverer_text(found.deliverer, found.deliverer_silent_s),
        "dead letters": f"{found.dead_bytes:,} bytes in {found.dead_files:,} files",
        "quarantine": f"{found.corrupt_bytes:,} bytes in {found.corrupt_files:,} files",
        "durability": found.durability,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def deliverer_text(beat: Heartbeat | None, silent_s: float | None) -> str:
    """Who delivers, or did, and how that goes, in a line."""
    if beat is None or silent_s is None:
        return "none so far"
    again = ""
    if beat.state.retry_at_micros is not None:
        left = (beat.state.retry_at_micros - beat.at_micros) / 1e6 - silent_s
        again = f", next try in {max(0.0, left):,.0f} s"
    text = f"process {beat.pid} to {beat.sink}, {beat.state}{again}; {beat.delivered:,} delivered"
    if silent_s > SILENT_AFTER_S:
        return f"silent for {silent_s:,.0f} s (gone, or it hangs); it was {text}"
    return text
