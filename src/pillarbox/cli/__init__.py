"""The command line. Each command parses its options, calls the library and prints the result.

`main` registers the commands; a command imports `options`, `context` and `output`, and never `main`.
"""

from __future__ import annotations

import sys


def start() -> None:
    """Run the command line; exits with a hint if the `cli` extra is not installed."""
    try:
        from pillarbox.cli.main import run  # noqa: PLC0415 - after the check that the extra is installed
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"pillarbox: the command line needs {error.name}; pip install 'pillarbox[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    run()
