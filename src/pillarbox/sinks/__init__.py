"""Destinations, found by the scheme of their URL.

To add one: one module with a class that is a `base.Sink`, and its scheme in `_BUILT_IN`; elsewhere, an entry point in the group
`pillarbox.sinks` named after the scheme. The class is called with the URL and the event type.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit

from pillarbox.errors import ConfigurationError, SinkUnusable

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.sinks.base import Sink

_GROUP: Final = "pillarbox.sinks"
_BUILT_IN: Final = {
    "spacetimedb": "pillarbox.sinks.spacetimedb:SpacetimeDbSink",
    "spacetimedb+https": "pillarbox.sinks.spacetimedb:SpacetimeDbSink",
    "sqlite": "pillarbox.sinks.sqlite:SqliteSink",
}


def schemes() -> list[str]:
    """Every scheme that can be delivered to."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=_GROUP))})


def make_sink(url: str, event_type: type[msgspec.Struct]) -> Sink:
    """The sink for a URL; raises `ConfigurationError` for one that names none, `SinkUnusable` where its extra is missing."""
    scheme = url.partition(":")[0].lower()
    target = _BUILT_IN.get(scheme)
    if target is not None:
        module, _, name = target.partition(":")
        try:
            made = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            extra = scheme.partition("+")[0]
            raise SinkUnusable(f"{scheme}: needs {error.name}; pip install 'pillarbox[{extra}]'") from None
    else:
        found = list(entry_points(group=_GROUP, name=scheme))
        if not found:
            allowed = f"a URL that begins with one of {', '.join(f'{name}://' for name in schemes())}"
            raise ConfigurationError("sink", redacted(url), "the call", allowed)
        made = found[0].load()
    return cast("Callable[[str, type[msgspec.Struct]], Sink]", made)(url, event_type)


def redacted(url: str) -> str:
    """The URL without what may be secret: user, password and query values stay out of logs, errors and files."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = "&".join(f"{pair.partition('=')[0]}=..." for pair in parts.query.split("&") if pair)
    return f"{parts.scheme}://{host}{parts.path}" + (f"?{query}" if query else "")
