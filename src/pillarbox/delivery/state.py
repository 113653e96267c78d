"""What the deliverer is doing, in words that `stats()`, `status`, metrics and logs share."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

STANDBY_REASON: Final = "another process delivers this directory"  # the reason of `standby`
HEARTBEAT_STALE_AFTER_S: Final = 10.0  # a deliverer that has not said anything for so long is gone, or hangs
StateName = Literal["idle", "draining", "waiting", "degraded", "stopped", "standby"]


class State(msgspec.Struct, frozen=True):
    """One state and why.

    `idle`: nothing waits. `draining`: sending. `waiting`: the destination said not now. `degraded`: delivering, but something
    here needs a person. `stopped`: nothing can be delivered until somebody mends the set-up. `standby`: another process
    delivers.
    """

    name: StateName
    reason: str = ""
    retry_at_micros: int | None = None  # when the destination is asked again

    def is_same_state(self, other: State) -> bool:
        """Whether nobody need be told of the change; another time of retry is none."""
        return (self.name, self.reason) == (other.name, other.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


class Heartbeat(msgspec.Struct, frozen=True):
    """What the process that delivers writes into `deliver.lock`: who, how, and when it last said so."""

    pid: int
    sink: str
    state: State
    at_micros: int
    delivered: int
    last_error: str = ""
    durability: str = ""  # of the outbox in that process; empty where it only delivers
