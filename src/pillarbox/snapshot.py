"""Creates the `Stats` of an outbox from its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pillarbox.delivery.runner import ONLY_SINK, combine_stats
from pillarbox.stats import COUNTER_FIELDS, Stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pillarbox.settings import Settings
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.sealer import Sealer
    from pillarbox.store.writer import Writer


def take_snapshot(
    settings: Settings,
    directory: Directory,
    writer: Writer,
    sealer: Sealer,
    ledger: LedgerWriter,
    sinks: Mapping[str, SinkStats],
    hook_failures: Mapping[str, int],
    start_problem: str,
    *,
    started: bool,
) -> Stats:
    """The stats of an outbox. `sinks` is read before the pending files, so that no delivered event is also pending."""
    total = combine_stats(sinks)
    problem = f"cannot start: {start_problem}" if start_problem else sealer.problem or ledger.problem
    if problem and total.state.name in ("idle", "draining", "standby"):
        total = total.as_degraded(problem)
    accepted, sealed = 0, dict(sealer.sealed)
    if started:
        # A file that was removed before a listing, and is released after it, is subtracted twice until the next listing.
        pending_bytes, pending_files, accepted = (max(0, number) for number in writer.pending_counts())
    elif settings.enabled:
        pending_bytes, pending_files = directory.pending()
    else:
        pending_bytes = pending_files = 0
    return Stats(
        state=total.state,
        durability=settings.durability,
        pending_bytes=pending_bytes,
        pending_files=pending_files,
        accepted=accepted,
        dropped=dict(writer.dropped),
        sealed=sealed,
        evicted=sealer.quota.evicted_events,
        rate=total.rate,
        last_error=total.last_error,
        hook_failures=dict(hook_failures),
        unwritten_ledger_entries=ledger.unwritten_entries,
        sinks={name: sink for name, sink in sinks.items() if name != ONLY_SINK},
        **{name: getattr(total, name) for name in COUNTER_FIELDS},
    )
