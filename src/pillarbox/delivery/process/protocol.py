"""The messages between parent and child, one a line: JSON from the child; to the child a `ChildSetup`, then plain orders."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pillarbox.errors import ConfigurationError
from pillarbox.redaction import SecretUrl
from pillarbox.settings import Settings
from pillarbox.stats import SinkStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.system.sockets import Socket

GO: Final = b"go"  # the lock is free: deliver
NOTIFY: Final = b"notify"  # there may be something to do
STOP: Final = b"stop "  # followed by the seconds that this may take

_SENT_BY_NAME: Final = {"event_type": "class", "on_dead_letter": "function"}  # settings that the child imports

_READ_BYTES: Final = 1 << 16


class ChildSetup(msgspec.Struct):
    """The first line to the child."""

    log_level: int  # the parent's logger drops lines below it
    settings: msgspec.Raw


class ChildReady(msgspec.Struct, tag="ready"):
    """The child is ready to acquire the lease."""


class ChildFailed(msgspec.Struct, tag="trouble"):
    """Why the child cannot deliver."""

    text: str


class LogLine(msgspec.Struct, tag="line"):
    """A log record."""

    logger: str
    level: int
    text: str
    created: float
    trace: str | None = None


class StatsReport(msgspec.Struct, tag="report"):
    """The stats of delivery. Lists cover the time since the last report; numbers, the time since the child started."""

    sinks: dict[str, SinkStats]
    released_bytes: list[int]  # of each file
    delivery_seconds: list[tuple[float, str]]  # of each file, with the name of the sink
    hook_failures: int
    is_surplus: bool  # another process has delivered for a while: this child is not needed


ChildMessage = ChildReady | ChildFailed | LogLine | StatsReport
decode_message: Final = msgspec.json.Decoder(ChildMessage).decode


def qualified_name(value: Any) -> str:
    """`module:name` of a class or function; empty if it has none."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}:{name}" if module and name else ""


def import_named(name: str) -> Any:
    """Import what `module:name` names. Raises `ImportError` or `AttributeError`."""
    module, _, name = name.partition(":")
    return attrgetter(name)(import_module(module))


def check_importable(settings: Settings) -> None:
    """Raise `ConfigurationError` if another process cannot import what the settings name."""
    for setting, kind in _SENT_BY_NAME.items():
        value = getattr(settings, setting)
        if value is not None and not _is_importable(value):
            advice = (
                f'with deliver="process" another process imports the {kind} as module:name; '
                f'move it out of the script, or out of the function, into a module, or use deliver="thread"'
            )
            raise ConfigurationError(setting, value, "the call", advice)


def _is_importable(value: Any) -> bool:
    text = qualified_name(value)
    if not text or text.startswith("__main__:"):  # the child does not run the script
        return False
    try:
        return import_named(text) is value
    except (ImportError, AttributeError):
        return False


def encode_settings(settings: Settings) -> msgspec.Raw:
    """Encode settings as JSON, classes and functions by name. Leaves out the hooks that only the parent calls."""
    sent = msgspec.structs.replace(settings, deliver="thread", before_send=None, on_drop=None)
    return msgspec.Raw(msgspec.json.encode(sent, enc_hook=_encode_object))


def _encode_object(value: Any) -> str:
    return value.reveal() if isinstance(value, SecretUrl) else qualified_name(value)


def decode_settings(data: msgspec.Raw) -> Settings:
    """Decode them in the child. Raises what an import raises."""
    find: Callable[[type, str], Any] = lambda _kind, text: import_named(text)  # noqa: E731 - msgspec names the kind first
    return msgspec.json.decode(data, type=Settings, dec_hook=find)


def read_lines(connection: Socket, has_data: Callable[[], bool] = lambda: True) -> Iterator[bytes]:
    """Yield what the other process sends, line by line, until it closes the socket or `has_data` says that it is over."""
    rest = b""
    while has_data():
        try:
            data = connection.recv(_READ_BYTES)
        except OSError:
            return
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
