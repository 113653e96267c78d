"""What commands write: text, tables and JSON on standard output; progress and problems on standard error."""

from __future__ import annotations

import os
import sys
from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    PARTIAL = 1
    USAGE = 2
    INTERRUPTED = 130


def printable(text: str) -> str:
    """Escape everything but printable characters and line feeds, so that stored text cannot control the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def print_json(value: object) -> None:
    """Print indented JSON on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


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
        out.print("  ".join(padded).rstrip(), markup=False, style=None if number else "bold")


def discard_stdout() -> None:
    """Point standard output at the null device: its reader has closed the pipe, and the buffer must not be flushed into it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
