"""The command line. Each command parses its options, calls the library and prints the result.

`main` registers the commands; a command imports `options`, `context` and `output`, and never `main`.
"""

from __future__ import annotations

import sys

from pillarbox.store.os_filesystem import working_directory


def start() -> None:
    """Run the command line; exits with a hint if the `cli` extra is not installed."""
    _stop_importing_from_working_directory()
    try:
        from pillarbox.cli.main import run  # noqa: PLC0415 - after the check that the extra is installed
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"pillarbox: the command line needs {error.name}; pip install 'pillarbox[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    run()


def _stop_importing_from_working_directory() -> None:
    """Take off `sys.path` what `python -m` and `python -c` put first: the directory may be another user's outbox.

    `python -m pillarbox` itself has imported modules by then; only the command `pillarbox`, and `python -P -m pillarbox`, never
    import from the working directory.
    """
    if sys.path and sys.path[0] in ("", working_directory()):
        del sys.path[0]
    sys.path[:] = [path for path in sys.path if path.startswith("/")]
