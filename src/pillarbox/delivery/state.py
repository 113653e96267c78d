"""What the deliverer is doing, in words that `stats()`, `status`, metrics and logs share."""

from __future__ import annotations

from typing import Final

import msgspec

from pillarbox.stats import State

STANDBY_REASON: Final = "another process delivers this directory"  # the reason of `standby`
HEARTBEAT_STALE_AFTER_S: Final = 10.0  # a deliverer that has not said anything for so long is gone, or hangs


class Heartbeat(msgspec.Struct, frozen=True):
    """What the process that delivers writes into `deliver.lock`: who, how, and when it last said so."""

    pid: int
    sink: str
    state: State
    at_micros: int
    delivered: int
    last_error: str = ""
    durability: str = ""  # of the outbox in that process; empty where it only delivers
