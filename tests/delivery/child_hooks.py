"""Hooks and event types that child processes import by name in the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

RECORD_FILE_VARIABLE = "PILLARBOX_TEST_HEARD"  # the variable that names the file


def record_dead_letter(letter: Any) -> None:
    """Record the pid of the process that calls the hook."""
    with Path(os.environ[RECORD_FILE_VARIABLE]).open("a") as file:
        file.write(f"{os.getpid()} {letter.code}\n")
    raise ValueError("and it fails")


if "pytest" in sys.modules:

    class ParentOnlyEvent(msgspec.Struct):
        """An event type that does not exist in the child process."""

        event_id: str
