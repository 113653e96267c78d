"""What an outbox holds of its delivery, whether that is one thread, one for each sink, or a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from pillarbox.stats import COUNTER_FIELDS, DeliveryCounters, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pillarbox.stats import SinkStats

ONLY_SINK: Final = ""  # the name of the sink where there are not several
# From bad to good: of several sinks, the first one of these is what is said of all.
_STATES_WORST_FIRST: Final = ("stopped", "waiting", "degraded", "draining", "standby", "idle")


class Runner(Protocol):
    """Delivers a directory from `start` to `stop`."""

    def start(self) -> None:
        """Begin to deliver."""

    def stop(self, timeout: float) -> bool:
        """Deliver what can be delivered without waiting and end; False where that took longer than `timeout` seconds."""

    def notify(self) -> None:
        """There may be something to do; from any thread."""

    def sinks(self) -> dict[str, SinkStats]:
        """How each stands, by its name; `ONLY_SINK` where there are not several."""

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:
        """Wait until the files that were settled are other than `known_files`, at most `timeout` seconds."""


def combine_stats(sinks: Mapping[str, SinkStats]) -> SinkStats:
    """All sinks as one: the sums, and the worst state with the name of the sink that is in it."""
    total = DeliveryCounters()
    for sink in sinks.values():
        for name in COUNTER_FIELDS:
            setattr(total, name, getattr(total, name) + getattr(sink, name))
    rates = [sink.rate for sink in sinks.values()]
    total.rate = None if None in rates else sum(filter(None, rates)) or None
    by_state = sorted(sinks.items(), key=lambda item: _STATES_WORST_FIRST.index(item[1].state.name))
    name, worst = by_state[0] if by_state else (ONLY_SINK, total.to_stats(State("idle"), ""))
    state = worst.state
    if name != ONLY_SINK and state.reason:
        state = State(state.name, f"{name}: {state.reason}", state.retry_at_micros)
    error = next((f"{name}: {sink.last_error}" if name else sink.last_error for name, sink in by_state if sink.last_error), "")
    return total.to_stats(state, error)
