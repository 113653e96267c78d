"""Escapes what other programs wrote (file names, events, answers of servers) before it reaches a terminal or a log.

A terminal obeys escape sequences, and a line feed in a name would begin a line of its own in a log. `cli.output` uses this for
everything that commands print, and `EscapingFilter` for everything that the package logs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

_TRACEBACK_INDENT = "  "


def printable(text: str) -> str:
    """Escape everything but printable characters and line feeds, so that stored text cannot control the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Escape everything but printable characters."""
    return text if text.isprintable() else printable(text).replace("\n", "\\n")


class EscapingFilter(logging.Filter):
    """Escapes the arguments of log records and indents their tracebacks, so that every record begins exactly one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape a record in place; none is dropped."""
        if isinstance(record.args, tuple) and record.args:
            record.args = tuple(map(_escape_argument, record.args))
        elif isinstance(record.args, Mapping) and record.args:
            record.args = {name: _escape_argument(value) for name, value in record.args.items()}
        else:  # relayed from a child process, as a whole text
            record.msg = one_line(str(record.msg))
        if record.exc_info and not record.exc_text and record.exc_info[0] is not None:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            lines = printable(record.exc_text).split("\n")
            record.exc_text = "\n".join(
                line if line.startswith(_TRACEBACK_INDENT) else _TRACEBACK_INDENT + line for line in lines
            )
        return True


def _escape_argument(value: object) -> object:
    """The value, or its text if that must be escaped."""
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    return value if text.isprintable() else one_line(text)
