"""Fixtures of the crash harnesses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash import compiled_order
from tests.crash.compiled_order import Order


@pytest.fixture(params=["portable", pytest.param("compiled", marks=pytest.mark.proof)])
def each_order(request: pytest.FixtureRequest) -> Iterator[Order]:
    """Run a test with the batch operations and directory scans in Python, and again with those in C."""
    if request.param == "compiled" and (reason := compiled_order.why_not()):
        pytest.skip(reason)
    with compiled_order.order(request.param):
        yield request.param
