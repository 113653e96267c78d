"""What `enqueue` and `import` share: events from lines that somebody else wrote, and the progress over them."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Final, Self

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pillarbox.cli.main import err
from pillarbox.errors import InvalidEventError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINES_REPORTED_MAX: Final = 20  # lines that are no event are named one by one up to here; all are counted
_UPDATE_EVERY: Final = 1000  # lines between two looks at the progress display


def strict_decoder(event_type: type[msgspec.Struct]) -> Callable[[bytes], Any]:
    """Bytes -> event, with unknown members an error."""
    decode = msgspec.json.Decoder(event_type).decode
    members = {field.encode_name for field in msgspec.structs.fields(event_type)}
    decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

    def strict(line: bytes) -> Any:
        line.decode()  # msgspec does not look into strings that it skips
        unknown = decode_members(line).keys() - members
        if unknown:
            raise InvalidEventError(min(unknown), f"is no member of {event_type.__name__}")
        return decode(line)

    return strict


class InputProgress:
    """Progress on standard error, where that is a terminal, over the lines of the input; over events where it has none."""

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
        """Line `number` is read, and `done` bytes."""
        if number % _UPDATE_EVERY == 0:
            self._progress.update(self._task, completed=done if self._by_bytes else number, events=number)

    def raw_lines(self) -> Iterator[bytes]:
        """Every line."""
        done = 0
        for number, line in enumerate(self._file or (), 1):
            done += len(line)
            self.update(number, done)
            yield line

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, line) of every line that is not blank."""
        return ((number, line) for number, line in enumerate(self.raw_lines(), 1) if not line.isspace())


def _file_size(file: IO[bytes]) -> int | None:
    try:
        size = file.seek(0, 2)
        file.seek(0)
    except (OSError, ValueError):
        return None
    return size
