"""The sections in the order in which they run: a module each, which has it as `SECTION`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from bench.plan import Section

MODULES = ("bench.accept", "bench.power", "bench.draining")


def load(module: str) -> Section:
    """The section of a module."""
    return cast("Section", import_module(module).SECTION)
