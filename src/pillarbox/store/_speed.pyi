from collections.abc import Callable
from typing import Any

from pillarbox.outcome import Durability, Outcome
from pillarbox.store.plain import Appending as Appending
from pillarbox.store.plain import Counts as Counts
from pillarbox.store.plain import line as line
from pillarbox.store.plain import pack as pack
from pillarbox.store.plain import value as value

class Enqueue:
    def __init__(
        self,
        writer: Appending,
        plain: Callable[..., Outcome],
        encode: Callable[[Any], bytes],
        event_type: type,
        bytes_max: int,
        begin: Callable[[bytes, int], Outcome],
        write: Callable[[int, bytes], int],
        enqueued: Outcome,
        power: bool,
    ) -> None: ...
    def __call__(self, event: Any, *, durability: Durability | None = None) -> Outcome: ...
