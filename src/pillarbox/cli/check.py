"""`pillarbox check URL`: does a destination fit, before the first event?"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.cli.main import (
    ConfigOption,
    EventTypeOption,
    ExitCode,
    JsonOption,
    app,
    complete_url,
    load_settings,
    out,
    require_setting,
)
from pillarbox.sinks import make_sink, redact_url

if TYPE_CHECKING:
    from pillarbox.sinks.base import CheckResult, Sink


@app.command("check")
def check(
    sink: Annotated[
        str | None,
        typer.Argument(metavar="URL", help="The destination, e.g. sqlite:///events.db.", autocompletion=complete_url),
    ] = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Look whether a destination is there and fits the event type. Sends no event. Exit code 1 where something does not fit."""
    settings = load_settings(config, sink=sink, event_type=event_type)
    require_setting(settings, "sink", "URL")
    findings = asyncio.run(_findings(make_sink(settings.sink or "", settings.event_type)))
    if json:
        sys.stdout.write(msgspec.json.encode([finding._asdict() for finding in findings]).decode() + "\n")
    else:
        out.print(redact_url(settings.sink or ""), markup=False)
        for finding in findings:
            out.print(
                f"  {'ok ' if finding.ok else 'BAD'}  {finding.message}", markup=False, style=None if finding.ok else "red"
            )
    return ExitCode.DONE if all(finding.ok for finding in findings) else ExitCode.PARTIAL


async def _findings(sink: Sink) -> list[CheckResult]:
    try:
        return list(await sink.check())
    finally:
        await sink.close()
