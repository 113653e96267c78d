"""The command-line application: registers the commands, and turns their results into exit codes."""

from __future__ import annotations

import io
import platform
import sys
from importlib.metadata import version
from typing import Annotated, Any, Final

import typer

from pillarbox._native import COMPILED
from pillarbox.cli.check import check
from pillarbox.cli.dead import dead
from pillarbox.cli.deliver import deliver
from pillarbox.cli.doctor import doctor
from pillarbox.cli.enqueue import enqueue
from pillarbox.cli.export import export
from pillarbox.cli.failures import describe_os_error
from pillarbox.cli.flush import flush
from pillarbox.cli.import_ import import_
from pillarbox.cli.inspect_ import inspect
from pillarbox.cli.options import CONTEXT_SETTINGS
from pillarbox.cli.output import (
    ExitCode,
    discard_stdout,
    err,
    finish_output,
    flush_stdout,
    open_missing_streams,
    out,
    print_usage_error,
)
from pillarbox.cli.quarantine import quarantine
from pillarbox.cli.redeliver import redeliver
from pillarbox.cli.seal import seal
from pillarbox.cli.signals import end_within, ignore_signals
from pillarbox.cli.sinks import sinks
from pillarbox.cli.spacetimedb import spacetimedb
from pillarbox.cli.status import status
from pillarbox.cli.tail import tail
from pillarbox.cli.verify import verify
from pillarbox.errors import PillarboxError

_EXIT_TIMEOUT_S: Final = 2.0  # for threads that a sink of another package left behind

EPILOG = """Settings come from the options, then from the environment (PILLARBOX_DIRECTORY, PILLARBOX_SINK, ...), then from
the TOML file that --config names. Exit codes: 0 success; 1 incomplete, or a check failed: the output says what; 2 wrong
option, setting or directory; 130 interrupted."""

app = typer.Typer(
    name="pillarbox",
    help="A durable event outbox: stores events on the local disk and delivers them in batches.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        extensions = "C extensions" if COMPILED else "no C extensions"
        out.print(f"pillarbox {version('pillarbox')} ({extensions}), Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _root_command(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and whether the C extensions are in use.", callback=_print_version),
    ] = False,
) -> None:
    pass


for _name, _command in {
    "check": check,
    "deliver": deliver,
    "doctor": doctor,
    "enqueue": enqueue,
    "export": export,
    "flush": flush,
    "import": import_,
    "inspect": inspect,
    "redeliver": redeliver,
    "seal": seal,
    "status": status,
    "tail": tail,
    "verify": verify,
}.items():
    app.command(_name)(_command)
for _group in (dead, quarantine, sinks, spacetimedb):
    app.add_typer(_group)


def run() -> None:
    """Run the command on the command line and exit with its exit code."""
    open_missing_streams()
    interrupted = False
    try:
        code = _exit_code()
        ignore_signals()
    except KeyboardInterrupt:
        ignore_signals()
        code, interrupted = ExitCode.INTERRUPTED, True
    finally:
        finish_output(interrupted=interrupted)
    end_within(_EXIT_TIMEOUT_S, code)
    sys.exit(code)


def _exit_code() -> int:
    try:
        result: Any = app(prog_name="pillarbox", standalone_mode=False)
        flush_stdout()
    except PillarboxError as error:
        err.print(f"pillarbox: {error}", style="red")
        return ExitCode.USAGE
    except BrokenPipeError:
        discard_stdout()
        return ExitCode.DONE
    except OSError as error:  # a disk error at any step; commands that know more about it report it themselves
        err.print(f"pillarbox: {describe_os_error(error)}", style="red")
        _flush_or_discard_stdout()
        return ExitCode.USAGE
    except Exception as error:
        show = getattr(error, "show", None)  # typer's usage errors have it
        if show is None:
            raise
        text = io.StringIO()
        show(file=text)
        print_usage_error(text.getvalue())
        return int(getattr(error, "exit_code", ExitCode.USAGE))
    return result if isinstance(result, int) else ExitCode.DONE


def _flush_or_discard_stdout() -> None:
    """Flush standard output. If that fails, discard it, so that the interpreter does not fail on it at exit."""
    try:
        flush_stdout()
    except OSError:
        discard_stdout()
