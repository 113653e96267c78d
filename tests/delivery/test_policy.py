"""What follows from an answer: the whole product of the table's inputs."""

from __future__ import annotations

from itertools import product

import pytest

from pillarbox.delivery.backoff import Backoff
from pillarbox.delivery.policy import Resend, Settle, Split, Stop, Wait, decide
from pillarbox.sinks.base import Batch, Delivered, Misconfigured, Partly, Refusal, Refused, Retry

BACKOFF = Backoff(base_s=0.5, max_s=30.0)
NO = Refusal("no", "it says so")
ANSWERS = [
    Delivered(3),
    Delivered(3, 1),
    Retry("busy"),
    Retry("busy", 7.0),
    Refused(NO),
    Partly({0: NO}, 2),
    Partly({0: NO}),
    Misconfigured("no such table"),
]


@pytest.mark.parametrize(
    ("answer", "size", "attempt", "share"), list(product(ANSWERS, [0, 1, 2, 500], [1, 2, 10, 10**6], [0.0, 0.5, 0.999]))
)
def test_every_answer_has_an_action(answer: object, size: int, attempt: int, share: float) -> None:
    """None gives up, and none drops a record without a dead letter."""
    action = decide(answer, size, attempt, share, BACKOFF, 15.0)  # type: ignore[arg-type]
    match answer:
        case Delivered(accepted, duplicates):
            assert action == Settle(accepted, duplicates, {})
        case Retry(_, after):
            assert isinstance(action, Wait)
            assert (after or 0) <= action.seconds <= max(after or 0, BACKOFF.max_s)
        case Refused(refusal):
            assert action == (Split() if size > 1 else Settle(0, 0, {0: refusal}))
        case Partly(refused, None):
            assert action == Resend(refused)
        case Partly(refused, _, _):
            assert action == Settle(2, 0, refused)
        case Misconfigured(reason):
            assert action == Stop(15.0, reason)


def test_backoff_doubles_up_to_its_bound_with_full_jitter() -> None:
    """A uniform share of it."""
    assert [BACKOFF.delay(attempt, 1.0) for attempt in (1, 2, 3, 6, 7, 1000)] == [1.0, 2.0, 4.0, 30.0, 30.0, 30.0]
    assert BACKOFF.delay(3, 0.25) == 1.0
    assert BACKOFF.delay(3, 0.0) == 0.0


def test_halves_are_fixed_and_say_which_records_they_hold() -> None:
    """The same batch is always cut in the same way."""
    batch = Batch("sealed-a", [b"%d" % number for number in range(5)])
    first, second = batch.halves()
    assert [(part.id, part.payloads) for part in (first, second)] == [
        ("sealed-a:0-2", [b"0", b"1", b"2"]),
        ("sealed-a:3-4", [b"3", b"4"]),
    ]
    assert [part.id for part in second.halves()] == ["sealed-a:3-3", "sealed-a:4-4"]


def test_what_is_between_refused_records_keeps_its_place() -> None:
    """Runs, by the records' places in the whole file."""
    batch = Batch("sealed-a", [b"%d" % number for number in range(6)])
    assert [part.id for part in batch.between([0, 3])] == ["sealed-a:1-2", "sealed-a:4-5"]
    assert batch.between(range(6)) == []
    (_, tail) = batch.halves()
    assert [part.id for part in tail.between([1])] == ["sealed-a:3-3", "sealed-a:5-5"]
