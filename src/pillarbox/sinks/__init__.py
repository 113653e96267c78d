"""Sinks, found by the scheme of their URL.

To add a built-in sink, write one module with a class that implements `base.Sink` and add its scheme to `_BUILT_IN`. Another
package adds one with an entry point in the group `pillarbox.sinks`, named after the scheme. The class is called with the URL
and the event type.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit

from pillarbox.errors import ConfigurationError, SinkUnusableError

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.sinks.base import Sink

_ENTRY_POINT_GROUP: Final = "pillarbox.sinks"
_SCHEMES_WITH_KEYS: Final = ("http", "https")  # the path of a webhook often contains its password
_KEY_CHARS_MIN: Final = 16  # a path segment of at least this length with a digit in it looks like a key
_BUILT_IN: Final = {
    "http": "pillarbox.sinks.http:HttpSink",
    "https": "pillarbox.sinks.http:HttpSink",
    "spacetimedb": "pillarbox.sinks.spacetimedb:SpacetimeDbSink",
    "spacetimedb+https": "pillarbox.sinks.spacetimedb:SpacetimeDbSink",
    "sqlite": "pillarbox.sinks.sqlite:SqliteSink",
}


def schemes() -> list[str]:
    """Return the URL schemes of all sinks, built-in and installed."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=_ENTRY_POINT_GROUP))})


def make_sink(url: str, event_type: type[msgspec.Struct]) -> Sink:
    """Make the sink for a URL.

    Raises:
        ConfigurationError: no sink has the URL's scheme, or the sink rejects the URL.
        SinkUnusableError: the extra that the sink needs is not installed.
    """
    scheme = url.partition(":")[0].lower()
    import_path = _BUILT_IN.get(scheme)
    if import_path is not None:
        module, _, name = import_path.partition(":")
        try:
            factory = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            extra = module.rpartition(".")[2]
            raise SinkUnusableError(f"{scheme}:// needs the package {error.name}: pip install 'pillarbox[{extra}]'") from None
    else:
        matches = list(entry_points(group=_ENTRY_POINT_GROUP, name=scheme))
        if not matches:
            advice = f"use a URL that begins with one of {', '.join(f'{name}://' for name in schemes())}"
            raise ConfigurationError("sink", redact_url(url), "the call", advice)
        factory = matches[0].load()
    return cast("Callable[[str, type[msgspec.Struct]], Sink]", factory)(url, event_type)


def redact_url(url: str) -> str:
    """Return the URL without its possible secrets, so that it can be logged and stored.

    It leaves out user and password, the values of query and fragment, and path segments of an HTTP URL that look like a key.
    Where these cannot be told apart (a password that contains `#`) it leaves out everything after the scheme.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition(':')[0]}://..."
    host = parts.netloc.rpartition("@")[2]
    if parts.netloc and "@" not in parts.netloc and "@" in url:
        return f"{parts.scheme}://..."
    path = "/".join(map(redact_path_segment, parts.path.split("/"))) if parts.scheme in _SCHEMES_WITH_KEYS else parts.path
    query, fragment = _redact_values(parts.query), _redact_values(parts.fragment)
    return f"{parts.scheme}://{host}{path}" + (f"?{query}" if query else "") + (f"#{fragment}" if fragment else "")


def _redact_values(query: str) -> str:
    return "&".join(f"{pair.partition('=')[0]}=..." if "=" in pair else "..." for pair in query.split("&") if pair)


def redact_path_segment(segment: str) -> str:
    """Return a segment of an HTTP URL's path, or dots where it looks like a key: long, with digits in it."""
    return "..." if len(segment) >= _KEY_CHARS_MIN and any(letter.isdigit() for letter in segment) else segment
