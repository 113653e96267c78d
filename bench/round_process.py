"""Runs one round of one contestant, or the `prepare` of a section, in a process that `bench/run.py` starts."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import sections
from bench.definitions import RoundPaths, UnavailableError


class RoundRequest(NamedTuple):
    """The request: JSON on the command line."""

    module: str
    key: str  # of one of its sections
    contestant: str  # "" runs `prepare`
    own: str
    shared: str
    result: str  # path of the result file
    quick: bool


class RoundResult(msgspec.Struct):
    """The result of a round."""

    figures: dict[str, float] = {}
    failed: str = ""


def run_request(request: RoundRequest) -> RoundResult:
    """Run the request. All figures become numbers, and any failure becomes a result."""
    try:
        (section,) = (candidate for candidate in sections.sections_of(request.module) if candidate.key == request.key)
        if not request.contestant:
            assert section.prepare is not None
            section.prepare(Path(request.shared), request.quick)
            return RoundResult()
        (contestant,) = (candidate for candidate in section.contestants if candidate.name == request.contestant)
        figures = contestant.run(RoundPaths(Path(request.own), Path(request.shared), request.quick))
        return RoundResult({metric: float(value) for metric, value in figures.items()})
    except UnavailableError as error:
        return RoundResult(failed=str(error))
    except BaseException as error:  # noqa: BLE001 - a contestant may even try to exit
        traceback.print_exc()
        return RoundResult(failed=f"{type(error).__name__}: {error}")


def main() -> None:
    """Write the result and exit at once: exit handlers of a contestant's libraries are not measured and may take long."""
    request = msgspec.json.decode(sys.argv[1], type=RoundRequest)
    result = Path(request.result)
    result.with_suffix(".part").write_bytes(msgspec.json.encode(run_request(request)))
    result.with_suffix(".part").replace(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
