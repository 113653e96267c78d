"""What the tests of child processes import by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

RECORD_FILE_VARIABLE = "PILLARBOX_TEST_HEARD"  # the variable that names the file


def record_dead_letter(letter: Any) -> None:
    """Write down which process was told of a dead letter."""
    with Path(os.environ[RECORD_FILE_VARIABLE]).open("a") as file:
        file.write(f"{os.getpid()} {letter.code}\n")
    raise ValueError("and it fails")


if "pytest" in sys.modules:

    class ParentOnlyEvent(msgspec.Struct):
        """An event type that the child does not find."""

        event_id: str
