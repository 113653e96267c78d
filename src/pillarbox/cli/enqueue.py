"""`pillarbox enqueue`: a bare event a line -> the outbox."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Annotated, Any, Final, Self

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
)
from pillarbox.errors import InvalidEvent
from pillarbox.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REPORTED_MAX: Final = 20  # lines that are no event are named one by one up to here; all are counted
_SHOW_EVERY: Final = 1000  # lines between two looks at the progress display


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
    quiet: QuietOption = False,
) -> int:
    """Store events from a file or from standard input, one JSON object a line.

    Members that are left out get their defaults (an id, the time); members that the event type does not have are errors. A line
    that is no event is reported with its number and stepped over. With --sink the events are delivered as well while the
    command runs; without, by `pillarbox deliver` or by whatever process delivers the directory.
    """
    log_to_terminal(quiet=quiet)
    settings = settings_from(
        config,
        directory=directory,
        sink=sink,
        event_type=event_type,
        batch_size=batch_size,
        max_bytes=max_bytes,
    )
    require(settings, "directory", "DIR")
    accepted = refused = 0
    decode = _strict_decoder(settings.event_type)
    with Outbox.from_settings(settings) as outbox, _Display(sys.stdin.buffer if file is None else file, quiet=quiet) as display:
        for number, line in display.lines():
            problem = None
            try:
                event = decode(line)
            except (InvalidEvent, msgspec.DecodeError, UnicodeDecodeError) as error:
                problem = str(error)
            else:
                outcome = outbox.enqueue(event)
                if not outcome:
                    problem = f"dropped: {outcome.reason}"  # type: ignore[union-attr]  # only Dropped is falsy
            if problem is None:
                accepted += 1
                if ack:
                    sys.stdout.write(f"{event.event_id}\n")
                    sys.stdout.flush()  # whoever reads may act on it: it must not wait in a buffer
                continue
            refused += 1
            if refused <= _REPORTED_MAX:
                err.print(f"line {number}: {problem}", markup=False)
    if not quiet or refused:
        more = f" (the first {_REPORTED_MAX} are named above)" if refused > _REPORTED_MAX else ""
        (err if ack else out).print(f"accepted {accepted}, refused {refused}{more}", markup=False)
    return Exit.PARTLY if refused else Exit.DONE


def _strict_decoder(event_type: type[msgspec.Struct]) -> Callable[[bytes], Any]:
    """Bytes -> event, with unknown members an error."""
    decode = msgspec.json.Decoder(event_type).decode
    members = {field.encode_name for field in msgspec.structs.fields(event_type)}
    decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

    def strict(line: bytes) -> Any:
        line.decode()  # msgspec does not look into strings that it skips
        unknown = decode_members(line).keys() - members
        if unknown:
            raise InvalidEvent(min(unknown), f"is no member of {event_type.__name__}")
        return decode(line)

    return strict


class _Display:
    """Progress on standard error, where that is a terminal, over the lines of the input."""

    def __init__(self, file: IO[bytes], *, quiet: bool) -> None:
        self._file = file
        size = _size_of(file)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn() if size is None else TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[events]} events"),
            TimeElapsedColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("enqueue", total=size, events=0)
        self._by_bytes = size is not None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of every line that is not blank."""
        done = 0
        for number, line in enumerate(self._file, 1):
            done += len(line)
            if number % _SHOW_EVERY == 0:
                self._progress.update(self._task, completed=done if self._by_bytes else number, events=number)
            if not line.isspace():
                yield number, line


def _size_of(file: IO[bytes]) -> int | None:
    try:
        size = file.seek(0, 2)
        file.seek(0)
    except (OSError, ValueError):
        return None
    return size
