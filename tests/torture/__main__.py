"""The torture from the command line."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.torture import destinations, run, surroundings

SHARES: Final = {
    "sqlite": 0.2,
    "http": 0.2,
    destinations.TWO: 0.25,
    "spacetimedb": 0.35,
}  # of the time; slower destinations get more


UNAVAILABLE: Final = "this machine cannot provide the environment"


def say(text: object) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 - the report


def main() -> None:
    """Run from the command line. The folder is kept if a violation is found."""
    parser = argparse.ArgumentParser(description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--destination",
        choices=destinations.DESTINATIONS,
        help="a single destination; the default is all, each for its share of the time",
    )
    parser.add_argument("--under", choices=surroundings.KINDS, help="where the processes run; the default is as usual")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the started processes are ended
    shares = {chosen.destination: 1.0} if chosen.destination else SHARES
    reports = []
    for destination, share in shares.items():
        folder = Path(tempfile.mkdtemp(prefix=f"pillarbox-torture-{destination}-"))
        say(f"{destination}, seed {chosen.seed}, in {folder}")
        try:
            where = surroundings.KINDS[chosen.under]() if chosen.under else None
            reports.append(run.run(destination, chosen.minutes * 60 * share, chosen.seed, folder, say, where))
        except surroundings.UnavailableError as error:
            shutil.rmtree(folder)
            sys.exit(f"{UNAVAILABLE} {chosen.under}: {error}")
        shutil.rmtree(folder)
    for report in reports:
        say(report)


if __name__ == "__main__":
    main()
