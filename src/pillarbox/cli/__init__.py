"""The command line: parse, call, print. `pillarbox --help` teaches the rest."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point; says what is missing where the `cli` extra is not installed."""
    try:
        from pillarbox.cli.main import run  # noqa: PLC0415 - after the check that the extra is there
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"pillarbox: the command line needs {error.name}; pip install 'pillarbox[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    run()
