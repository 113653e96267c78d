"""`pillarbox enqueue`: store events from a file or from standard input."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from pillarbox.admin.text import counted
from pillarbox.cli.input import LINES_REPORTED_MAX, InputProgress, strict_decoder
from pillarbox.cli.options import JsonOption, OutboxOptions, QuietOption, SinkOption, expand_options
from pillarbox.cli.output import ExitCode, err, log_to_terminal, out, print_json_line, write_id
from pillarbox.errors import InvalidEventError
from pillarbox.outbox import Outbox


class EnqueueResult(msgspec.Struct, frozen=True):
    """The shape of `pillarbox enqueue --json`; on standard error with --ack."""

    accepted: int  # events stored
    dropped: int  # lines that are not valid events, and events that the outbox dropped


@expand_options
def enqueue(
    options: OutboxOptions,
    file: Annotated[typer.FileBinaryRead, typer.Argument(metavar="[FILE|-]", help="File with one JSON event per line.")] = "-",  # type: ignore[assignment]  # typer opens the default
    sink: SinkOption = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Maximum events per batch.", show_default=False)] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum bytes of pending events, e.g. 512Mi.", show_default=False)
    ] = None,
    ack: Annotated[bool, typer.Option("--ack", help="Print the id of each event once it is accepted.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> int:
    """Store events: one JSON object per line.

    Fields that a line omits get their defaults (an id, the time); a field that the event type does not have is an error. An
    invalid line is reported with its number and skipped. With --sink the events are also delivered while the command runs;
    otherwise `pillarbox deliver`, or another process that delivers the directory, delivers them.
    """
    log_to_terminal(quiet=quiet)
    settings = options.load_settings(sink=sink, batch_size=batch_size, max_bytes=max_bytes)
    if settings.deliver == "process":  # a child could not import an event type from the working directory
        settings = msgspec.structs.replace(settings, deliver="thread")
    accepted = dropped = 0
    decode = strict_decoder(settings.event_type)
    source = sys.stdin.buffer if file is None else file
    with Outbox.from_settings(settings) as outbox, InputProgress(source, quiet=quiet) as progress:
        for number, line in progress.lines():
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
                    write_id(str(event.event_id))
                continue
            dropped += 1
            if dropped <= LINES_REPORTED_MAX:
                err.print(f"line {number}: {problem}")
    if json:
        print_json_line(EnqueueResult(accepted, dropped), to_stderr=ack)
    elif not quiet or dropped:
        more = f" (the first {LINES_REPORTED_MAX} are listed above)" if dropped > LINES_REPORTED_MAX else ""
        console = err if ack else out
        console.print(f"accepted {counted(accepted, 'event')}, dropped {dropped:,}{more}")
    return ExitCode.PARTIAL if dropped or outbox.stats().unwritten_ledger_entries else ExitCode.DONE
