"""`pillarbox doctor`: can this directory, and the file system below it, keep what is promised?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.cli.app import ConfigOption, DirectoryOption, Exit, JsonOption, app, out, require, settings_from, stop_on_sigterm
from pillarbox.clock import SystemClock
from pillarbox.delivery.lease import last_heartbeat
from pillarbox.delivery.state import SILENT_AFTER_S
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import RealFilesystem
from pillarbox.store.probe import Finding, Limits, bad, examine, good

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.settings import Settings


@app.command("doctor")
def doctor(
    directory: DirectoryOption = None,
    durability: Annotated[
        str | None, typer.Option(metavar="process|power", help="What is to be promised.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Look whether a directory can keep what is promised, and what stands in the way. Exit code 1 where something does.

    Safe at any time: it tries locks, renames and syncs on files of its own, doctor-*.probe, which it removes, and locks,
    creates and adopts nothing else.
    """
    stop_on_sigterm()  # or the probe files would stay
    settings = settings_from(config, directory=directory, durability=durability)
    require(settings, "directory", "DIR")
    findings = _findings(settings, SystemClock())
    if json:
        sys.stdout.write(msgspec.json.encode([finding._asdict() for finding in findings]).decode() + "\n")
    else:
        out.print(f'{settings.directory}, durability "{settings.durability}"', markup=False)
        for ok, check, text in findings:
            out.print(f"  {'ok ' if ok else 'BAD'}  {check}: {text}", markup=False, style=None if ok else "red")
    return Exit.DONE if all(finding.ok for finding in findings) else Exit.PARTLY


def _findings(settings: Settings, clock: Clock) -> list[Finding]:
    place = Directory(settings.directory, RealFilesystem(), clock)
    limits = Limits(
        power=settings.durability == "power",
        max_bytes=settings.max_bytes,
        max_files=settings.max_files,
        min_free_bytes=settings.min_free_bytes,
        evicts=settings.when_full == "drop_oldest",
    )
    findings = examine(place, clock, limits)
    try:
        return [*findings, _deliverer(place, clock)]
    except OSError:
        return findings  # the directory cannot be used, which is among them


def _deliverer(place: Directory, clock: Clock) -> Finding:
    beat = last_heartbeat(place)
    account = place.account()
    now = clock.micros()
    waits_s = 0.0 if account.oldest_stamp is None else (now - account.oldest_stamp) / 1e6
    waiting = f"{account.sealed_files:,} sealed files wait"
    if beat is None or now - beat.at_micros > SILENT_AFTER_S * 1e6:
        silent = "none so far" if beat is None else f"process {beat.pid}, silent for {(now - beat.at_micros) / 1e6:,.0f} s"
        if waits_s > SILENT_AFTER_S:
            return bad("deliverer", f"{silent}; {waiting}: run pillarbox deliver, or an application with a sink")
        return good("deliverer", f"{silent}; {waiting}")
    text = f"process {beat.pid} to {beat.sink}, {beat.state}"
    if beat.state.name in ("stopped", "degraded"):
        return bad("deliverer", f"{text}: mend that; {waiting}")
    return good("deliverer", f"{text}; {waiting}")
