"""Options of a sink's URL that more than one sink has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from pillarbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SOURCE: Final = "the sink's URL"

_N = TypeVar("_N", int, float)


def parse_number(options: Mapping[str, str], name: str, kind: Callable[[str], _N], default: _N, least: _N, most: _N) -> _N:
    """Return the number that an option has; raises `ConfigurationError` if it is not one from `least` to `most`."""
    text = options.get(name)
    if text is None:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        advice = f"use a {'whole number' if kind is int else 'number of seconds'} from {least:.10g} to {most:.10g}"
        raise ConfigurationError(f"sink option {name}", text, SOURCE, advice)
    return value
