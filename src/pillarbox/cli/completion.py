"""Values that a shell completes. Completion prints no errors, takes no lock and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import typer  # noqa: TC002 - typer evaluates the annotations

from pillarbox.admin.filters import parse_batch_id
from pillarbox.cli.context import load_settings
from pillarbox.clock import SystemClock
from pillarbox.errors import PillarboxError
from pillarbox.sinks import schemes
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import local_filesystem
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.store.directory import Directory

_COMPLETIONS_MAX: Final = 100  # longer lists do not help anybody
_KINDS_BY_GROUP: Final = {"dead": {Kind.DEAD}, "quarantine": {Kind.CORRUPT}}


def complete_url(incomplete: str) -> list[str]:
    """The beginnings of destination URLs, also after `NAME=`."""
    name, equals, prefix = incomplete.rpartition("=")
    return [f"{name}{equals}{scheme}://" for scheme in schemes() if scheme.startswith(prefix)]


def complete_batch(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ids of the batches that have dead letters or quarantined bytes, whichever the command is about."""
    group = ctx.parent.info_name if ctx.parent is not None else None
    kinds = _KINDS_BY_GROUP.get(group or "", {Kind.DEAD, Kind.CORRUPT})
    try:
        settings = load_settings(ctx.params.get("config"), directory=ctx.params.get("directory"))
        directory = directory_at(settings.directory or ".", local_filesystem(), SystemClock())
        batches = {batch for batch in _batch_ids(directory, kinds) if batch.startswith(incomplete) and batch.isprintable()}
        return sorted(batches)[:_COMPLETIONS_MAX]
    except (OSError, PillarboxError):
        return []


def _batch_ids(directory: Directory, kinds: set[Kind]) -> Iterator[str]:
    for queue_dir in (directory, *directory.queues()):
        for name, _ in queue_dir.filesystem.list_files(queue_dir.path):
            if layout.kind_of(name) in kinds:
                yield parse_batch_id(name)
