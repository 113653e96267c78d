"""Sinks, found by the scheme of their URL.

To add a built-in sink, write one module with a class that implements `base.Sink` and add its scheme to `_BUILT_IN`. Another
package adds one with an entry point in the group `pillarbox.sinks`, named after the scheme. The class is called with the URL
and the event type.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, cast

from pillarbox.errors import ConfigurationError, PillarboxError, SinkUnusableError
from pillarbox.redaction import Redactor, redact_url, reveal, url_secrets
from pillarbox.sinks.guard import RedactingSink

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from pillarbox.sinks.base import Sink

__all__ = ["make_sink", "redact_url", "schemes"]

_ENTRY_POINT_GROUP: Final = "pillarbox.sinks"
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
        ConfigurationError: no sink has the URL's scheme, or the sink rejects the URL. The message shows no secret of it.
        SinkUnusableError: the extra that the sink needs is not installed.
    """
    url = reveal(url)
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
    redact = Redactor(url_secrets(url))
    try:
        sink = cast("Callable[[str, type[msgspec.Struct]], Sink]", factory)(url, event_type)
    except PillarboxError:
        raise
    except (ValueError, LookupError, RecursionError) as error:  # from the URL parser, or from a sink of another package
        shown = redact_url(url)
        # The secrets of a text that cannot be split are unknown.
        problem = type(error).__name__ if shown.endswith("...") else redact(str(error))
        raise ConfigurationError("sink", shown, "the call", f"correct the URL ({problem})") from None
    return sink if import_path is not None else RedactingSink(sink, redact)
