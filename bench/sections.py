"""The modules with sections, in the order in which they run. A module has a `SECTION` or several `SECTIONS`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.definitions import Section

MODULES = ("bench.accept", "bench.peers", "bench.power", "bench.draining", "bench.deliver", "bench.scale")


def sections_of(module: str) -> tuple[Section, ...]:
    """The sections of a module."""
    imported = import_module(module)
    sections: tuple[Section, ...] = imported.SECTIONS if hasattr(imported, "SECTIONS") else (imported.SECTION,)
    return sections


def sections_by_key(modules: Sequence[str]) -> dict[str, tuple[str, Section]]:
    """Key -> module name and section."""
    return {section.key: (module, section) for module in modules for section in sections_of(module)}
