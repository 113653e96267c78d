"""What `enqueue` and `import` share: decoding of lines that other programs wrote, and the progress display."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Final, Self

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.cli.output import err
from pillarbox.errors import InvalidEventError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINES_REPORTED_MAX: Final = 20  # invalid lines that are reported one by one; all are counted
_UPDATE_EVERY: Final = 1000  # lines between two updates of the progress display


def strict_decoder(event_type: type[msgspec.Struct]) -> Callable[[bytes], Any]:
    """A decoder that raises `InvalidEventError` for fields that the event type does not have."""
    decode = msgspec.json.Decoder(event_type).decode
    known = {field.encode_name for field in msgspec.structs.fields(event_type)}
    decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

    def strict(line: bytes) -> Any:
        line.decode()  # msgspec does not check the UTF-8 of strings that it skips
        unknown = decode_fields(line).keys() - known
        if unknown:
            raise InvalidEventError(min(unknown), f"{event_type.__name__} has no such field")
        return decode(line)

    return strict


class InputProgress:
    """Reads the lines of a file and shows the progress on a terminal: by bytes if the size is known, otherwise by lines."""

    def __init__(self, file: IO[bytes] | None, *, quiet: bool) -> None:
        self._file = file
        size = None if file is None else _file_size(file)
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

    def update(self, number: int, done: int) -> None:
        """Show that `number` lines, of `done` bytes, are read."""
        if number % _UPDATE_EVERY == 0:
            self._progress.update(self._task, completed=done if self._by_bytes else number, events=number)

    def raw_lines(self) -> Iterator[bytes]:
        """All lines, with their line feeds."""
        done = 0
        for number, line in enumerate(self._file or (), 1):
            done += len(line)
            self.update(number, done)
            yield line

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of all lines that are not blank."""
        return ((number, line) for number, line in enumerate(self.raw_lines(), 1) if not line.isspace())


def _file_size(file: IO[bytes]) -> int | None:
    try:
        size = file.seek(0, 2)
        file.seek(0)
    except (OSError, ValueError):
        return None
    return size
