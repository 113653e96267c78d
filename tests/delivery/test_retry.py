"""Retry decisions: every combination of a result and the other inputs of the decision table."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from pillarbox.delivery.config import Backoff, DeliveryConfig
from pillarbox.delivery.retry import (
    AttemptContext,
    Defer,
    Expire,
    PartDone,
    SendRest,
    Split,
    Stop,
    Verdict,
    Wait,
    decide,
    is_expired,
    judge_rejections,
    validate_answer,
)
from pillarbox.settings import resolve
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry

BACKOFF = Backoff(base_s=0.5, max_s=30.0)
RULES = [
    DeliveryConfig(backoff=BACKOFF),
    DeliveryConfig(backoff=BACKOFF, stop_after_rejected_batches=0),
    DeliveryConfig(backoff=BACKOFF, stop_after_rejected_batches=1),
    DeliveryConfig(backoff=BACKOFF, max_age_s=3600.0),
    DeliveryConfig(backoff=BACKOFF, max_age_s=60.0),
]
NO = Rejection("no", "it says so")
ANSWERS = [
    Delivered(3),
    Delivered(3, 1),
    Retry("busy"),
    Retry("busy", 0.0),
    Retry("busy", 7.0),
    Retry("busy", 86_400.0),
    Rejected(NO),
    PartialFailure({0: NO}, 2),
    PartialFailure({0: NO}),
    Misconfigured("no such table"),
]
LATELY = [
    AttemptContext(proven, accepted, repeatable, 500, refused_calls, refused_batches, condemned, age_s, failing_s)
    for proven, accepted, repeatable, refused_calls, refused_batches, condemned, age_s, failing_s in product(
        [False, True],
        [False, True],
        [False, True],
        [0, 19, 20, 80],
        [0, 2],
        [0, 2, 3],
        [-86_400.0, 61.0, 1e9],
        [0.0, 61.0, 1e9],
    )
]


def is_splitting_futile(lately: AttemptContext, rules: DeliveryConfig) -> bool:
    """Whether the search for bad records in this batch has taken too long."""
    if rules.stop_after_rejected_batches == 0 or (
        lately.accepted_since_rejection and lately.dead_lettered_batches < rules.stop_after_rejected_batches
    ):
        return False
    if lately.partly_accepted:
        return lately.deduplicates and lately.rejected_calls_in_row >= 80
    return lately.rejected_calls_in_row >= 20


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.stop_after_rejected_batches}-{rules.max_age_s}")
def test_every_result_has_an_action(answer: DeliveryResult, rules: DeliveryConfig) -> None:
    """The whole table: only an age limit expires a batch, and no record is dropped without a dead letter."""
    for lately, size, attempt, share in product(LATELY, [0, 1, 2, 500], [1, 10, 10**6], [0.0, 0.999]):
        action = decide(answer, size, attempt, share, lately, rules)
        too_old = is_expired(lately, rules)
        match answer:
            case Delivered(accepted, duplicates):
                assert action == PartDone(accepted, duplicates, {})
            case PartialFailure(refused, None):
                assert isinstance(action, (Expire if too_old else Defer) if is_splitting_futile(lately, rules) else SendRest)
            case PartialFailure(refused, _, _):
                assert action == PartDone(2, 0, refused)
            case Rejected(refusal) if size <= 1:
                assert action == PartDone(0, 0, {0: refusal})
            case Retry() | Misconfigured() if too_old:
                assert isinstance(action, Expire)
                assert action.rejection.code == "too_old"
            case Retry(_, after) if after:
                assert action == Wait(min(after, rules.retry_after_max_s), "busy")
            case Retry():
                assert isinstance(action, Wait)
                assert action.seconds == share * min(BACKOFF.max_s, BACKOFF.base_s * 2.0 ** min(attempt, 32))
            case Misconfigured(reason):
                assert action == Stop(rules.recheck_s, reason)
            case Rejected():
                assert isinstance(action, (Expire if too_old else Defer) if is_splitting_futile(lately, rules) else Split)


@pytest.mark.parametrize(("asked_s", "waited_s"), [(7.0, 7.0), (3600.0, 3600.0), (3601.0, 3600.0), (1e11, 3600.0)])
def test_no_destination_can_ask_for_a_longer_pause_than_allowed(asked_s: float, waited_s: float) -> None:
    """Its clock may be wrong by years, and delivery would be too."""
    context = AttemptContext()
    assert decide(Retry("busy", asked_s), 1, 1, 0.5, context, DeliveryConfig()) == Wait(waited_s, "busy")
    short = DeliveryConfig(retry_after_max_s=5.0)
    assert decide(Retry("busy", asked_s), 1, 1, 0.5, context, short) == Wait(5.0, "busy")
    assert resolve({}).delivery_config.retry_after_max_s == 3600.0
    assert resolve({"retry_after_max": "5"}).delivery_config.retry_after_max_s == 5.0


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.stop_after_rejected_batches}-{rules.max_age_s}")
def test_a_whole_rejection_is_final_if_another_batch_is_accepted(rules: DeliveryConfig) -> None:
    """It is also final if the circuit breaker is off."""
    for lately, accepted in product(LATELY, [0, 1]):
        verdict = judge_rejections(accepted, lately, rules)
        if (
            accepted
            or rules.stop_after_rejected_batches == 0
            or is_expired(lately, rules)
            or (lately.accepted_since_rejection and lately.dead_lettered_batches < rules.stop_after_rejected_batches)
        ):
            assert verdict is Verdict.FINAL
        elif lately.other_rejected_batches + lately.dead_lettered_batches + 1 >= rules.stop_after_rejected_batches:
            assert verdict is Verdict.STOPPED
        else:
            assert verdict is Verdict.DEFERRED


def test_the_age_limit_applies_only_after_a_batch_has_failed_for_a_while() -> None:
    """So a clock that is years ahead at boot causes no dead letters."""
    rules = DeliveryConfig(max_age_s=86_400.0)
    assert not is_expired(AttemptContext(age_s=1e9, failing_s=599.0), rules)
    assert is_expired(AttemptContext(age_s=1e9, failing_s=600.0), rules)
    assert not is_expired(AttemptContext(age_s=86_400.0, failing_s=1e9), rules)
    assert is_expired(AttemptContext(age_s=11.0, failing_s=10.0), DeliveryConfig(max_age_s=10.0))
    assert not is_expired(AttemptContext(age_s=1e9, failing_s=1e9), DeliveryConfig())


@pytest.mark.parametrize("records", [2, 3, 7, 500, 513, 10_000])
def test_the_search_for_one_poisoned_record_always_completes(records: int) -> None:
    """It takes fewer consecutive rejections than the limit."""
    for poison in {0, 1, records // 2, records - 1}:
        refused_calls, parts = 0, [(0, records)]
        accepted = False
        while parts:
            first, last = parts.pop()
            if not first <= poison < last:
                accepted = True
                continue
            lately = AttemptContext(partly_accepted=accepted, batch_records=records, rejected_calls_in_row=refused_calls)
            action = decide(Rejected(NO), last - first, 1, 0.0, lately, DeliveryConfig())
            refused_calls += 1
            if last - first == 1:
                assert action == PartDone(0, 0, {0: NO})
                continue
            assert action == Split()
            middle = first + (last - first + 1) // 2
            parts += [(middle, last), (first, middle)]


def test_backoff_doubles_up_to_its_bound_with_full_jitter() -> None:
    """The delay is a uniform share of the bound."""
    assert [BACKOFF.delay(attempt, 1.0) for attempt in (1, 2, 3, 6, 7, 1000)] == [1.0, 2.0, 4.0, 30.0, 30.0, 30.0]
    assert BACKOFF.delay(3, 0.25) == 1.0
    assert BACKOFF.delay(3, 0.0) == 0.0


def test_a_batch_is_always_split_in_the_same_way() -> None:
    """The id of a part says which records it has."""
    batch = Batch("sealed-a", [b"%d" % number for number in range(5)])
    first, second = batch.halves()
    assert [(part.id, part.payloads) for part in (first, second)] == [
        ("sealed-a:0-2", [b"0", b"1", b"2"]),
        ("sealed-a:3-4", [b"3", b"4"]),
    ]
    assert [part.id for part in second.halves()] == ["sealed-a:3-3", "sealed-a:4-4"]


def test_the_records_between_rejected_ones_keep_their_indexes() -> None:
    """In runs, with their indexes in the whole file."""
    batch = Batch("sealed-a", [b"%d" % number for number in range(6)])
    assert [part.id for part in batch.split_around([0, 3])] == ["sealed-a:1-2", "sealed-a:4-5"]
    assert batch.split_around(range(6)) == []
    (_, tail) = batch.halves()
    assert [part.id for part in tail.split_around([1])] == ["sealed-a:3-3", "sealed-a:5-5"]


NOT_TEXT: Any = None


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "ok",
        Retry(NOT_TEXT),
        Misconfigured(NOT_TEXT),
        Rejected(NOT_TEXT),
        PartialFailure({0: NOT_TEXT}, 1),
        PartialFailure({2: NO}, 1),
        Delivered(1),
    ],
    ids=str,
)
def test_the_reason_for_an_invalid_result_says_that_the_sink_must_be_fixed(answer: object) -> None:
    """It does not become an error of Pillarbox."""
    assert isinstance(validate_answer(answer, 2), Misconfigured)
