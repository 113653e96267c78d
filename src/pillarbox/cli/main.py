"""The commands, the options that they share, and what every exit code means."""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import sys
from enum import IntEnum
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from pillarbox._native import COMPILED
from pillarbox.errors import PillarboxError
from pillarbox.settings import Settings, resolve
from pillarbox.sinks import schemes

if TYPE_CHECKING:
    from types import FrameType

EPILOG = """Settings are looked for in the options, then in the environment (PILLARBOX_DIRECTORY, PILLARBOX_SINK, ...), then in
the TOML file named by --config. Exit codes: 0 done; 1 done in part, or the destination does not fit: the output says which;
2 a wrong option, setting or directory; 130 interrupted."""

_NAMED_SINK: Final = re.compile(r"([^=:/?#]*)=(.*)", re.DOTALL)  # a URL's own first "=" comes behind its colon

app = typer.Typer(
    name="pillarbox",
    help="A durable event outbox: stores events on the local disk and delivers them in batches.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    PARTIAL = 1
    USAGE = 2
    INTERRUPTED = 130


def complete_url(incomplete: str) -> list[str]:
    """What a shell offers for a destination, also behind a name."""
    name, sign, begun = incomplete.rpartition("=")
    return [f"{name}{sign}{scheme}://" for scheme in schemes() if scheme.startswith(begun)]


DirectoryOption = Annotated[
    str | None, typer.Option("--directory", "-d", metavar="DIR", help="The outbox directory.", show_default=False)
]
SinkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sink",
        metavar="[NAME=]URL",
        help="Where to deliver, e.g. sqlite:///events.db; once for each of several, with names.",
        show_default=False,
        autocompletion=complete_url,
    ),
]
EventTypeOption = Annotated[
    str | None,
    typer.Option(
        "--event-type", metavar="MODULE:CLASS", help="A msgspec.Struct; TrackingEvent if left out.", show_default=False
    ),
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="A TOML file with a table [outbox].", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log lines below errors.")]


def _print_version(asked: bool) -> None:
    if asked:
        how = "compiled" if COMPILED else "in Python"
        typer.echo(f"pillarbox {version('pillarbox')} ({how}), Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _root_command(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version, and whether what can be compiled is.", callback=_print_version)
    ] = False,
) -> None:
    pass


def load_settings(config: str | None, **options: object) -> Settings:
    """The settings that the options, the environment and the TOML file amount to."""
    sys.path.insert(0, "")  # an --event-type module is looked for where the user stands, as `python -m` does
    if isinstance(options.get("sink"), list):
        options |= _parse_sinks(options["sink"])
    return resolve(options, os.environ, config, keyword_source="the command line")


def _parse_sinks(sinks: Any) -> dict[str, object]:
    """What `--sink` means, given once or several times."""
    named = [_NAMED_SINK.fullmatch(sink) for sink in sinks]
    if not any(named):
        if len(sinks) > 1:
            raise typer.BadParameter("of several, each needs a name: --sink NAME=URL", param_hint="--sink")
        return {"sink": sinks[0] if sinks else None}
    if not all(named) or len({match[1] for match in named if match}) < len(sinks):
        raise typer.BadParameter("of several, each needs a name of its own: --sink NAME=URL", param_hint="--sink")
    return {"sink": None, "sinks": {match[1]: match[2] for match in named if match}}


def require_setting(settings: Settings, name: str, example: str) -> None:
    """End with a usage error where a setting that this command needs is missing."""
    if not getattr(settings, name):
        raise typer.BadParameter(f"missing; give --{name} {example}, or set PILLARBOX_{name.upper()}", param_hint=f"--{name}")


def log_to_terminal(*, quiet: bool) -> None:
    """Show the library's log lines on standard error."""
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)


def interrupt_on_sigterm() -> None:
    """Have SIGTERM end a command as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def discard_stdout() -> None:
    """Write nothing more to whoever has read enough, not even what is buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_app() -> typer.Typer:
    """`app` with all commands in it."""
    # Imported here, for each registers its command with `app`; in the order of the help.
    from pillarbox.cli import (  # noqa: PLC0415
        check,
        dead,
        deliver,
        doctor,
        enqueue,
        export,
        import_,
        inspect_,
        quarantine,
        redeliver,
        seal,
        sinks,
        spacetimedb,
        status,
        tail,
        verify,
    )

    _ = (check, dead, deliver, doctor, enqueue, export, import_, inspect_, quarantine, redeliver, seal, sinks, spacetimedb)
    _ = (status, tail, verify)
    return app


def run() -> None:
    """Run the command that was typed and end with its exit code."""
    try:
        code = _exit_code()
        _ignore_signals()
    except KeyboardInterrupt:
        _ignore_signals()
        code = ExitCode.INTERRUPTED
    sys.exit(code)


def _ignore_signals() -> None:
    """The command is over: an interrupt would only have the interpreter complain of it while it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _exit_code() -> int:
    try:
        result: Any = build_app()(prog_name="pillarbox", standalone_mode=False)
    except PillarboxError as error:
        err.print(f"pillarbox: {error}", style="red", markup=False)
        return ExitCode.USAGE
    except BrokenPipeError:
        discard_stdout()
        return ExitCode.DONE
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own usage errors
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", ExitCode.USAGE))
    return result if isinstance(result, int) else ExitCode.DONE
