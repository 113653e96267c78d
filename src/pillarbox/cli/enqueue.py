"""`pillarbox enqueue`: a bare event a line -> the outbox."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from pillarbox.cli.input import LINES_REPORTED_MAX, InputProgress, strict_decoder
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
    load_settings,
    log_to_terminal,
    out,
    require_setting,
)
from pillarbox.errors import InvalidEventError
from pillarbox.outbox import Outbox


class EnqueueResult(msgspec.Struct, frozen=True):
    """The shape of `pillarbox enqueue --json`; on standard error with --ack."""

    accepted: int
    dropped: int


@app.command("enqueue")
def enqueue(
    file: Annotated[typer.FileBinaryRead, typer.Argument(metavar="[FILE|-]", help="One event as a JSON object a line.")] = "-",  # type: ignore[assignment]  # typer opens what the default names
    directory: DirectoryOption = None,
    sink: SinkOption = None,
    event_type: EventTypeOption = None,
    config: ConfigOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Events a sealed file.", show_default=False)] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Pending bytes at the most, e.g. 512Mi.", show_default=False)] = None,
    ack: Annotated[bool, typer.Option("--ack", help="Print each event's id once it is accepted.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Store events from a file or from standard input, one JSON object a line.

    Members that are left out get their defaults (an id, the time); members that the event type does not have are errors. A line
    that is no event is reported with its number and stepped over. With --sink the events are delivered as well while the
    command runs; without, by `pillarbox deliver` or by whatever process delivers the directory.
    """
    log_to_terminal(quiet=quiet)
    settings = load_settings(
        config,
        directory=directory,
        sink=sink,
        event_type=event_type,
        batch_size=batch_size,
        max_bytes=max_bytes,
    )
    require_setting(settings, "directory", "DIR")
    accepted = refused = 0
    decode = strict_decoder(settings.event_type)
    with (
        Outbox.from_settings(settings) as outbox,
        InputProgress(sys.stdin.buffer if file is None else file, quiet=quiet) as display,
    ):
        for number, line in display.lines():
            problem = None
            try:
                event = decode(line)
            except (InvalidEventError, msgspec.DecodeError, UnicodeDecodeError) as error:
                problem = str(error)
            else:
                outcome = outbox.enqueue(event)
                if not outcome:
                    problem = f"dropped: {outcome.reason}"
            if problem is None:
                accepted += 1
                if ack:
                    sys.stdout.write(f"{event.event_id}\n")
                    sys.stdout.flush()  # whoever reads may act on it: it must not wait in a buffer
                continue
            refused += 1
            if refused <= LINES_REPORTED_MAX:
                err.print(f"line {number}: {problem}", markup=False)
    if json:
        (sys.stderr if ack else sys.stdout).write(msgspec.json.encode(EnqueueResult(accepted, refused)).decode() + "\n")
    elif not quiet or refused:
        more = f" (the first {LINES_REPORTED_MAX} are named above)" if refused > LINES_REPORTED_MAX else ""
        (err if ack else out).print(f"accepted {accepted}, refused {refused}{more}", markup=False)
    return ExitCode.PARTIAL if refused else ExitCode.DONE
