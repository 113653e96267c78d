"""Whether what is compiled is used: all of it, or nothing where a part is missing or `PILLARBOX_PURE_PYTHON=1` declines it."""

from __future__ import annotations

from importlib import import_module
from os import environ
from typing import Final

_NAMES: Final = ("_event", "store._lines", "store._listing", "store._speed", "store._together", "store._waiter")


def _is_used() -> bool:
    if environ.get("PILLARBOX_PURE_PYTHON"):
        return False
    try:
        for name in _NAMES:
            import_module(f"pillarbox.{name}")
    except ImportError:
        return False
    return True


COMPILED: Final = _is_used()
