"""`pillarbox check URL`: check a destination before the first event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pillarbox.cli.context import load_settings, require_setting
from pillarbox.cli.options import ConfigOption, EventTypeOption, JsonOption, UrlArgument, expand_options
from pillarbox.cli.output import ExitCode, out, print_json
from pillarbox.sinks import make_sink, redact_url
from pillarbox.sinks.event_loop import run_on_sink_loop

if TYPE_CHECKING:
    from pillarbox.sinks.base import CheckResult, Sink


@expand_options
def check(
    sink: UrlArgument = None, event_type: EventTypeOption = None, config: ConfigOption = None, json: JsonOption = False
) -> int:
    """Check that a destination is up and accepts events.

    If it has a table, checks that the table matches the event type. Sends no event. Exits with 1 if a check fails.
    """
    settings = load_settings(config, sink=sink, event_type=event_type)
    require_setting(settings, "sink", "URL")
    results = run_on_sink_loop(_check_and_close(make_sink(settings.sink or "", settings.event_type)))
    if json:
        print_json([result._asdict() for result in results])
    else:
        out.print(redact_url(settings.sink or ""))
        for result in results:
            mark, style = ("ok ", None) if result.ok else ("BAD", "red")
            out.print(f"  {mark}  {result.message}", style=style)
    return ExitCode.DONE if all(result.ok for result in results) else ExitCode.PARTIAL


async def _check_and_close(sink: Sink) -> list[CheckResult]:
    try:
        return list(await sink.check())
    finally:
        await sink.close()
