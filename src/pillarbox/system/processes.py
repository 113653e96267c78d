"""`subprocess` of the system."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from pillarbox.system import originals
from pillarbox.system.sockets import selectors
from pillarbox.system.threads import Lock


@cache
def original_subprocess() -> Any:
    """A copy of the module `subprocess` that waits for processes, and for nothing but the system."""
    return originals.copy_python_module(
        "subprocess",
        os=originals.original_os(),
        select=originals.select,
        selectors=selectors,
        threading=SimpleNamespace(Lock=Lock),
        time=originals.time,
    )
