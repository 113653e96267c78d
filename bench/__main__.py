"""`make bench`: runs every measurement and prints it. `python -m bench accept` runs one; `--quick` with less of everything."""

from __future__ import annotations

import platform
import shutil
import sqlite3
import sys
from pathlib import Path

import msgspec

from bench import accept, drain, draining, power, recovery, scale, spacetimedb

MEASUREMENTS = {
    "accept": accept.measure,
    "power": power.measure,
    "drain": drain.measure,
    "draining": draining.measure,
    "spacetimedb": spacetimedb.measure,
    "scale": scale.measure,
    "recovery": recovery.measure,
}
PLACE = Path(__file__).parents[1] / "var" / "bench"


def main() -> None:
    """Measure what was named, or everything."""
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(MEASUREMENTS)
    quick = "--quick" in sys.argv
    print(
        f"{platform.platform()}, {platform.machine()}, CPython {platform.python_version()}, "
        f"msgspec {msgspec.__version__}, SQLite {sqlite3.sqlite_version}"
    )
    for name in chosen:
        shutil.rmtree(PLACE, ignore_errors=True)
        PLACE.mkdir(parents=True)
        try:
            MEASUREMENTS[name](PLACE, quick)
        finally:
            shutil.rmtree(PLACE, ignore_errors=True)


main()
