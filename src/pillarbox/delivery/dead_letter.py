"""A dead letter: a record that the destination rejected for good, and why."""

from __future__ import annotations

import msgspec


class DeadLetter(msgspec.Struct, frozen=True):
    """A well-formed record that the destination rejected for good; one line of a `dead-` file."""

    event: msgspec.Raw
    code: str
    reason: str
    sink: str
    index: int  # position among the well-formed records of the batch, from 0
    attempts: int
    first_at_micros: int
    last_at_micros: int
