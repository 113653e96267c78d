"""One round of one contestant, or a section's `prepare`, in a process of its own, which `bench/run.py` starts."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import sections
from bench.plan import RoundPaths, UnavailableError


class Order(NamedTuple):
    """What is to be done, as JSON on the command line."""

    module: str
    key: str  # of one of its sections
    contestant: str  # "": `prepare`
    own: str
    shared: str
    answer: str  # the file that the answer goes into
    quick: bool


class Answer(msgspec.Struct):
    """What came of it."""

    figures: dict[str, float] = {}
    failed: str = ""


def carry_out(order: Order) -> Answer:
    """Every figure is a number; whatever goes wrong is an answer too."""
    try:
        (section,) = (one for one in sections.sections_of(order.module) if one.key == order.key)
        if not order.contestant:
            assert section.prepare is not None
            section.prepare(Path(order.shared), order.quick)
            return Answer()
        (contestant,) = (one for one in section.contestants if one.name == order.contestant)
        found = contestant.run(RoundPaths(Path(order.own), Path(order.shared), order.quick))
        return Answer({metric: float(value) for metric, value in found.items()})
    except UnavailableError as error:
        return Answer(failed=str(error))
    except BaseException as error:  # noqa: BLE001 - a contestant may even try to exit
        traceback.print_exc()
        return Answer(failed=f"{type(error).__name__}: {error}")


def main() -> None:
    """Write the answer and go at once: what a contestant's library does at exit is not measured, and may take long."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    answer = Path(order.answer)
    answer.with_suffix(".part").write_bytes(msgspec.json.encode(carry_out(order)))
    answer.with_suffix(".part").replace(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
