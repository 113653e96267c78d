"""`pillarbox check URL`: does a destination fit, before the first event?"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pillarbox.cli.app import ConfigOption, EventTypeOption, Exit, JsonOption, app, out, require, settings_from, urls
from pillarbox.sinks import make_sink, redact_url

if TYPE_CHECKING:
    from pillarbox.sinks.base import CheckResult, Sink


@app.command("check")
def check(
    sink: Annotated[
        str | None, typer.Argument(metavar="URL", help="The destination, e.g. sqlite:///events.db.", autocompletion=urls)
    ] = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> int:
    """Look whether a destination is there and fits the event type. Sends no event. Exit code 1 where something does not fit."""
    settings = settings_from(config, sink=sink, event_type=event_type)
    require(settings, "sink", "URL")
    findings = asyncio.run(_findings(make_sink(settings.sink or "", settings.event_type)))
    if json:
        sys.stdout.write(msgspec.json.encode([finding._asdict() for finding in findings]).decode() + "\n")
    else:
        out.print(redact_url(settings.sink or ""), markup=False)
        for finding in findings:
            out.print(
                f"  {'ok ' if finding.ok else 'BAD'}  {finding.message}", markup=False, style=None if finding.ok else "red"
            )
    return Exit.DONE if all(finding.ok for finding in findings) else Exit.PARTLY


async def _findings(sink: Sink) -> list[CheckResult]:
    try:
        return list(await sink.check())
    finally:
        await sink.close()
