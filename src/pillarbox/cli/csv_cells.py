"""Escapes cells of CSV that a spreadsheet would run as a formula, and takes the escape back.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@`, also behind a tab or a line end, and in some languages with the
wide forms of these (OWASP, "CSV Injection"). An apostrophe in front makes it text. A text that begins with apostrophes and one
of these gets one more, so that nothing is lost on the way back.
"""

from __future__ import annotations

import re
from typing import Final

_FORMULA: Final = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_ESCAPED: Final = re.compile("'" + _FORMULA.pattern)


def escape_cell(text: str) -> str:
    """The text as a cell that no spreadsheet runs."""
    return f"'{text}" if _FORMULA.match(text) else text


def unescape_cell(cell: str) -> str:
    """The text of a cell that `escape_cell` has made."""
    return cell[1:] if _ESCAPED.match(cell) else cell
