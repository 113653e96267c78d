"""The context of a command: settings, log output, and the outbox directory."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final

import typer

from pillarbox.admin.dead_letters import IdentityDecoder
from pillarbox.admin.replay import ReplayValidator
from pillarbox.cli.output import log_to_terminal
from pillarbox.clock import SystemClock
from pillarbox.errors import DirectoryUnusableError
from pillarbox.settings import Settings, resolve
from pillarbox.store.os_filesystem import local_filesystem, working_directory
from pillarbox.store.queues import directory_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.store.directory import Directory

_NAMED_SINK: Final = re.compile(r"([^=:/?#]*)=(.*)", re.DOTALL)  # the "=" of a URL's query comes after its colon


def load_settings(config: str | None, **options: object) -> Settings:
    """Combine the options, the environment and the TOML file `config` into settings.

    Raises:
        ConfigurationError: A setting is unknown or has a value that is not allowed.
    """
    if isinstance(options.get("sink"), list):
        options |= _parse_sinks(options["sink"])  # type: ignore[arg-type]  # a list of text: typer made it
    # The module of an --event-type may lie in the working directory.
    return resolve(options, os.environ, config, keyword_source="the command line", import_directory=working_directory() or None)


def _parse_sinks(sinks: Sequence[str]) -> dict[str, Any]:
    """The settings `sink` and `sinks` from the values of --sink."""
    named = [_NAMED_SINK.fullmatch(sink) for sink in sinks]
    if not any(named):
        if len(sinks) > 1:
            raise typer.BadParameter("give each sink a name: --sink NAME=URL --sink NAME=URL", param_hint="--sink")
        return {"sink": sinks[0] if sinks else None}
    if not all(named) or len({match[1] for match in named if match}) < len(sinks):
        raise typer.BadParameter("give each sink a different name: --sink NAME=URL --sink NAME=URL", param_hint="--sink")
    return {"sink": None, "sinks": {match[1]: match[2] for match in named if match}}


def require_setting(settings: Settings, name: str, metavar: str) -> None:
    """Raise a usage error if a setting that the command needs is missing."""
    if not getattr(settings, name):
        raise typer.BadParameter(f"missing; give --{name} {metavar} or set PILLARBOX_{name.upper()}", param_hint=f"--{name}")


class CommandContext:
    """The settings and the outbox directory of a command that only reads. Creates nothing.

    Raises:
        DirectoryUnusableError: The directory cannot be listed.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        log_to_terminal(quiet=quiet)
        # The user asked for this command's output, not for what an outbox logs while it starts and stops.
        logging.getLogger("pillarbox").setLevel(logging.WARNING)
        self.quiet = quiet
        self.settings = settings
        self.clock = SystemClock()
        self.directory = directory_at(self.settings.directory, local_filesystem(), self.clock)
        self.identity_decoder = IdentityDecoder(self.settings.event_type)
        self.validator = ReplayValidator(self.settings.event_type, self.identity_decoder.id_field)
        try:
            self.directory.disk_usage()
        except OSError as error:
            raise DirectoryUnusableError(
                self.settings.directory, f"cannot be listed: {error.strerror}", "name an outbox directory"
            ) from None

    @property
    def directories(self) -> list[Directory]:
        """The outbox directory, and the queue of each of several sinks."""
        return [self.directory, *self.directory.queues()]
