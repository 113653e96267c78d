"""What a shell offers behind options whose values are in the directory. Never fails, never says anything, takes no lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import typer  # noqa: TC002 - typer reads it

from pillarbox.admin.filters import parse_batch_id
from pillarbox.cli.main import load_settings
from pillarbox.clock import SystemClock
from pillarbox.errors import PillarboxError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.store.directory import Directory

_COMPLETIONS_MAX: Final = 100  # more than anybody reads
_KINDS: Final = {"dead": {Kind.DEAD}, "quarantine": {Kind.CORRUPT}}


def complete_batch(ctx: typer.Context, incomplete: str) -> list[str]:
    """The batches of which something is set aside."""
    group = ctx.parent.info_name if ctx.parent is not None else None
    kinds = _KINDS.get(group or "", {Kind.DEAD, Kind.CORRUPT})
    try:
        settings = load_settings(ctx.params.get("config"), directory=ctx.params.get("directory"))
        place = directory_at(settings.directory or ".", local_filesystem(), SystemClock())
        return sorted({name for name in _batch_ids(place, kinds) if name.startswith(incomplete)})[:_COMPLETIONS_MAX]
    except (OSError, PillarboxError):
        return []


def _batch_ids(place: Directory, kinds: set[Kind]) -> Iterator[str]:
    for where in (place, *place.queues()):
        for name, _ in where.filesystem.list_files(where.path):
            if layout.kind_of(name) in kinds:
                yield parse_batch_id(name)
