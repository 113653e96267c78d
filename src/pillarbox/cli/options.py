"""Options that several commands share.

A group of options that belong together is a dataclass. A command that takes a parameter of such a class, and is decorated
with `expand_options`, has the group's fields as options of its own.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pillarbox.admin.filters import EventFilter, RecordFilter, parse_batch_id, parse_conditions
from pillarbox.admin.text import parse_time
from pillarbox.cli.completion import complete_batch, complete_url
from pillarbox.cli.context import load_settings, require_setting
from pillarbox.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.settings import Settings

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

DirectoryOption = Annotated[
    str | None, typer.Option("--directory", "-d", metavar="DIR", help="Outbox directory.", show_default=False)
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file with an [outbox] table.", show_default=False)
]
EventTypeOption = Annotated[
    str | None,
    typer.Option(
        "--event-type",
        metavar="MODULE:CLASS",
        help="Event type (a msgspec.Struct). [default: TrackingEvent]",
        show_default=False,
    ),
]
SinkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sink",
        metavar="[NAME=]URL",
        help="Destination, e.g. sqlite:///events.db; repeat as NAME=URL for several.",
        show_default=False,
        autocompletion=complete_url,
    ),
]
UrlArgument = Annotated[
    str | None, typer.Argument(metavar="URL", help="Destination, e.g. sqlite:///events.db.", autocompletion=complete_url)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress, and log lines below errors.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Show at most N; 0 for all.", min=0)]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Apply the changes; without it they are only listed.")]
AllOption = Annotated[bool, typer.Option("--all", help="Select everything when no filter is given.")]


def _filter_option(name: str, metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, **more)


BatchOption = Annotated[
    list[str] | None, _filter_option("--batch", "ID", "Filter by batch id, or its prefix.", autocompletion=complete_batch)
]
ReasonOption = Annotated[list[str] | None, _filter_option("--reason", "TEXT", "Filter by text in the reason.")]
EventKeyOption = Annotated[list[str] | None, _filter_option("--event-key", "KEY", "Filter by event key.")]
EventIdOption = Annotated[list[str] | None, _filter_option("--event-id", "ID", "Filter by event id.")]


@dataclass(frozen=True, kw_only=True)
class DirectoryOptions:
    """Which outbox a command works on."""

    directory: DirectoryOption = None
    config: ConfigOption = None

    def load_settings(self, **more: object) -> Settings:
        """The settings that these and `more` options give; raises a usage error if no directory is named."""
        settings = load_settings(self.config, directory=self.directory, **more)
        require_setting(settings, "directory", "DIR")
        return settings


@dataclass(frozen=True, kw_only=True)
class OutboxOptions(DirectoryOptions):
    """Which outbox a command works on, and the type of its events."""

    event_type: EventTypeOption = None

    def load_settings(self, **more: object) -> Settings:
        """As of `DirectoryOptions`."""
        return super().load_settings(event_type=self.event_type, **more)


@dataclass(frozen=True, kw_only=True)
class RecordFilterOptions:
    """Which batches of dead letters or of quarantined bytes a command works on."""

    batch: BatchOption = None
    reason: ReasonOption = None
    since: Annotated[str | None, _filter_option("--since", "TIME", "Only at or after TIME (2h, 3d or ISO 8601).")] = None
    until: Annotated[str | None, _filter_option("--until", "TIME", "Only before TIME.")] = None

    def to_filter(self, now_micros: int) -> RecordFilter:
        """The filter that the options describe; raises `UsageError` for an invalid time."""
        return RecordFilter(
            batches=tuple(map(parse_batch_id, self.batch or ())),
            reasons=tuple(self.reason or ()),
            since_micros=None if self.since is None else parse_time(self.since, now_micros),
            until_micros=None if self.until is None else parse_time(self.until, now_micros),
        )


@dataclass(frozen=True, kw_only=True)
class DeadLetterFilterOptions(RecordFilterOptions):
    """Which dead letters a command works on."""

    record: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECORD", help="Dead letters by name, as `dead list --each` shows them.", show_default=False),
    ] = None
    code: Annotated[list[str] | None, _filter_option("--code", "CODE", "Filter by rejection code.")] = None
    event_key: EventKeyOption = None
    event_id: EventIdOption = None
    sink: Annotated[list[str] | None, _filter_option("--sink", "TEXT", "Filter by text in the destination's URL.")] = None

    def to_filter(self, now_micros: int) -> RecordFilter:
        """The filter that the options describe; raises `UsageError` for an invalid name or time."""
        for name in self.record or ():
            if "#" not in name:
                raise UsageError(f"{name!r} is not the name of a dead letter; `pillarbox dead list --each` shows the names")
        return (
            super()
            .to_filter(now_micros)
            ._replace(
                records=tuple(self.record or ()),
                codes=tuple(self.code or ()),
                sinks=tuple(self.sink or ()),
                event_keys=tuple(self.event_key or ()),
                event_ids=tuple(self.event_id or ()),
            )
        )


@dataclass(frozen=True, kw_only=True)
class EventFilterOptions:
    """Which events a command prints."""

    event_key: EventKeyOption = None
    event_id: EventIdOption = None
    scope: Annotated[list[str] | None, _filter_option("--scope", "KIND[:ID]", "Filter by scope: User, or User:u-17.")] = None
    user: Annotated[list[str] | None, _filter_option("--user", "ID", "Filter by user_id.")] = None
    contains: Annotated[list[str] | None, _filter_option("--contains", "TEXT", "Filter by text in the event's JSON.")] = None
    where: Annotated[
        list[str] | None, _filter_option("--where", "PATH=VALUE", "Filter by field; metadata_json.page for a nested one.")
    ] = None
    since: Annotated[
        str | None, _filter_option("--since", "TIME", "Only events that occurred at or after TIME (2h, 3d or ISO 8601).")
    ] = None
    until: Annotated[str | None, _filter_option("--until", "TIME", "Only events that occurred before TIME.")] = None

    def to_filter(self, now_micros: int) -> EventFilter:
        """The filter that the options describe; raises `UsageError` for an invalid time or condition."""
        return EventFilter(
            event_keys=tuple(self.event_key or ()),
            event_ids=tuple(self.event_id or ()),
            scopes=tuple(self.scope or ()),
            users=tuple(self.user or ()),
            texts=tuple(self.contains or ()),
            conditions=parse_conditions(self.where or ()),
            since_micros=None if self.since is None else parse_time(self.since, now_micros),
            until_micros=None if self.until is None else parse_time(self.until, now_micros),
        )


def expand_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace each parameter that is an option group by the options in it, for typer to see."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not is_dataclass(hint):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
            continue
        groups[parameter.name] = hint
        field_hints = get_type_hints(hint, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field_hints[field.name]
            )
            for field in fields(hint)
        ]

    @functools.wraps(command)
    def run(**values: Any) -> int:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads the options from it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
