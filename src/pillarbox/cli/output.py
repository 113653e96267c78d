"""What commands write: text, tables and JSON on standard output; progress, problems and log lines on standard error.

No other module writes to them. Everything that is printed as text is escaped here, because names of files, events and answers
of servers may contain escape sequences or line feeds. Events that are data for a program (`export`, `quarantine show --raw`)
are written byte for byte, except on a terminal.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

import msgspec
from rich.console import Console

from pillarbox.cli.streams import QueuedStream
from pillarbox.escaping import one_line, printable
from pillarbox.system import originals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_READER_TIMEOUT_S: Final = 1.0  # at the end of a command, for a reader that does not read
_ORDER_TIMEOUT_S: Final = 0.1  # how long a line on standard output waits for earlier lines on standard error
_BMP_MAX = 0xFFFF  # JSON escapes a character beyond it as a surrogate pair


class EscapingConsole(Console):
    """A console that prints each text as one line of printable characters; several texts may be several lines."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, escaped, or what rich renders. Earlier lines on standard error are written first if they are read."""
        if not self.stderr:
            for stream in _queued_streams:
                stream.wait_for_reader(_ORDER_TIMEOUT_S)
        super().print(*(one_line(text) if isinstance(text, str) else text for text in objects), **options)


out = EscapingConsole()
err = EscapingConsole(stderr=True)
_queued_streams: list[QueuedStream] = []


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    PARTIAL = 1
    USAGE = 2
    INTERRUPTED = 130


def log_to_terminal(*, quiet: bool) -> None:
    """Print log lines, of the package and of others, on standard error; `quiet` hides those below errors.

    From then on no thread waits for the reader of standard error.
    """
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor, and never blocks
        sys.stderr = _queue_writes(sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_EscapingFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, handlers=[handler])


class _EscapingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A record as one line, and its traceback indented below it."""
        first, *rest = super().format(record).split("\n")
        return printable("\n  ".join([first, *rest]))


def print_json(value: object, *, to_stderr: bool = False) -> None:
    """Print indented JSON."""
    (sys.stderr if to_stderr else sys.stdout).write(
        _printable_json(msgspec.json.format(_encode_json(value), indent=2).decode()) + "\n"
    )


def print_json_line(value: object, *, to_stderr: bool = False) -> None:
    """Print JSON on one line."""
    (sys.stderr if to_stderr else sys.stdout).write(_printable_json(_encode_json(value).decode()) + "\n")


def _encode_json(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        return msgspec.json.encode(_escape_surrogates(msgspec.to_builtins(value)))


def _escape_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, (list, tuple)):
        return [_escape_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_escape_surrogates(name): _escape_surrogates(item) for name, item in value.items()}
    return value


def _printable_json(text: str) -> str:
    """Escape characters in JSON that a terminal might obey or standard output cannot encode."""
    encodes_all = (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    if text.replace("\n", "").isprintable() and (encodes_all or text.isascii()):
        return text
    return "".join(
        char if char == "\n" or (char.isprintable() and (encodes_all or char.isascii())) else _json_escape(char)
        for char in text
    )


def _json_escape(char: str) -> str:
    if ord(char) > _BMP_MAX:
        high, low = divmod(ord(char) - _BMP_MAX - 1, 0x400)
        return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return f"\\u{ord(char):04x}"


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under (name, "left" | "right") columns.

    A row is never wrapped, however narrow the terminal is, so that it can be copied.
    """
    cells = [[name for name, _ in columns], *([printable(str(cell)).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        padded = [
            cell.rjust(width) if side == "right" else cell.ljust(width)
            for cell, width, (_, side) in zip(row, widths, columns, strict=True)
        ]
        out.print("  ".join(padded).rstrip(), style=None if number else "bold")


def write_line(text: str, *, flush: bool = False) -> None:
    """Write one line of text for people or programs on standard output; a line feed in it becomes a space."""
    sys.stdout.write(printable(text.replace("\n", " ")) + "\n")
    if flush:
        sys.stdout.flush()


def write_id(text: str) -> None:
    """Write an id on a line of its own and flush it, so that a program can act on it at once; on a terminal, escape it."""
    sys.stdout.write((one_line(text) if sys.stdout.isatty() else text.replace("\r", "\\r").replace("\n", "\\n")) + "\n")
    sys.stdout.flush()


def write_bytes(data: bytes) -> None:
    """Write data for a program on standard output, byte for byte; on a terminal, escaped."""
    if sys.stdout.isatty():
        sys.stdout.write(printable(data.decode(errors="backslashreplace")))
    else:
        sys.stdout.buffer.write(data)


def _queue_writes(stream: TextIO) -> QueuedStream:
    queued = QueuedStream(stream)
    _queued_streams.append(queued)
    return queued


def finish_output(*, interrupted: bool) -> None:
    """Flush standard output and standard error, and make sure that neither delays the exit.

    Waits at most a second for a reader of standard error that does not read, and after an interrupt also for one of standard
    output.
    """
    for stream in _queued_streams:
        if stream.drain(_READER_TIMEOUT_S) and sys.stderr is stream:
            sys.stderr = stream.original
    if interrupted:
        try:
            with limited_writes():
                sys.stdout.flush()
        except (OSError, TimeoutError):
            discard_stdout()


@contextmanager
def limited_writes() -> Iterator[None]:
    """Raise `TimeoutError` if the block takes longer than a second, because the reader of a standard stream does not read."""

    def raise_timeout(_number: int, _frame: object) -> None:
        raise TimeoutError

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, _READER_TIMEOUT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


def flush_stdout() -> None:
    """Flush standard output. Raises `OSError`."""
    sys.stdout.flush()


def wait_while_read(seconds: float) -> None:
    """Wait. Raises `BrokenPipeError` as soon as the reader of standard output has closed it."""
    poll = originals.select.poll()
    poll.register(sys.stdout, 0)
    if poll.poll(seconds * 1000):
        raise BrokenPipeError


def screen_console() -> Console:
    """A console for a display that is redrawn. The caller must escape what it shows.

    It does not wait for a stopped terminal (Ctrl-S).
    """
    stream = _queue_writes(sys.stdout) if sys.stdout.isatty() else sys.stdout
    return Console(file=cast("TextIO", stream), highlight=False, markup=False, emoji=False)


def print_usage_error(lines: str) -> None:
    """Print the message of the option parser."""
    err.print(*lines.splitlines(), sep="\n")


def open_missing_streams() -> None:
    """Open the null device for standard streams that the caller closed, and have text escaped that they cannot encode."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Point standard output at the null device, so that the flush at exit does not fail or block."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
