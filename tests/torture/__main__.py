"""The referee, from the command line."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.torture import places, run


def say(text: object) -> None:
    """To whoever runs it, at once."""
    print(text, flush=True)  # noqa: T201 - it is for people


def main() -> None:
    """The folder stays where something was found."""
    parser = argparse.ArgumentParser(description=run.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--destination", choices=places.PLACES, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that what was started is ended
    folder = Path(tempfile.mkdtemp(prefix=f"pillarbox-torture-{chosen.destination}-"))
    say(f"{chosen.destination}, seed {chosen.seed}, in {folder}")
    say(run.run(chosen.destination, chosen.minutes * 60, chosen.seed, folder, say))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
