"""The settings of an outbox: read from keywords, options, the environment and a TOML file, and checked.

A setting has one name everywhere: keyword `batch_size`, option `--batch-size`, `batch_size` in the TOML table `[outbox]`, and
`PILLARBOX_BATCH_SIZE` in the environment. The older names (`tracking_outbox_batch_size`, in capitals in the environment) are
aliases. A keyword or option wins over the environment, the environment over TOML, and that over the default.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any, Final

import msgspec

from pillarbox.delivery.config import Backoff, DeliveryConfig, SettlementLimits
from pillarbox.delivery.pacing import PacingConfig
from pillarbox.errors import ConfigurationError, PicklableError
from pillarbox.event import TrackingEvent
from pillarbox.outcome import DURABILITIES
from pillarbox.redaction import SecretUrl, redact_text, reveal
from pillarbox.store import compression
from pillarbox.store.layout import is_sink_name
from pillarbox.store.os_filesystem import read_file

_ENVIRONMENT_PREFIX: Final = "PILLARBOX_"
_ALIASES: Final = {
    "tracking_outbox_enabled": "enabled",
    "tracking_outbox_dir": "directory",
    "tracking_outbox_batch_size": "batch_size",
    "tracking_outbox_flush_interval": "flush_interval",
    "tracking_outbox_max_bytes": "max_bytes",
}
INTERVAL_MAX_S: Final = 86_400.0  # an interval longer than a day is probably a mistake
AGE_MAX_S: Final = 100 * 365 * 86_400.0  # added to the present in microseconds, it still fits into 64 bits
RATE_MIN: Final = 0.001  # events/s; keeps the pause between two sends finite
RATE_MAX: Final = 1e9  # events/s
IN_FLIGHT_MAX: Final = 64  # batches; each batch in flight is in memory
_NAME_SHOWN_CHARS_MAX: Final = 64  # a longer text is not a name; it may be a token
_BOOLEANS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_TIME_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SIZE_UNITS: Final = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The checked settings of an outbox. Sizes are in bytes, times in seconds.

    `resolve` makes one; `docs/reference/settings.md` describes each setting.
    """

    enabled: bool = True
    directory: str = ""
    sink: str | None = None  # a `SecretUrl`
    sinks: dict[str, Any] = {}  # by name: a URL or a `Sink` each; empty with one sink or none
    event_type: type[msgspec.Struct] = TrackingEvent
    deliver: str = "thread"
    trusted: bool = False
    batch_size: int = 500
    batch_bytes: int = 1_000_000
    flush_interval: float = 1.0
    max_bytes: int = 512 * 2**20
    max_files: int = 200_000
    when_full: str = "drop_newest"
    block_timeout: float = 5.0
    min_free_bytes: int | None = None
    durability: str = "process"
    on_invalid: str = "drop"
    max_in_flight: int = 1
    backoff_max: float = 30.0
    retry_after_max: float = 3600.0
    call_timeout: float = 60.0
    stop_after_rejected_batches: int = 3
    max_rate: float | None = None
    live_share: float = 0.0
    max_age: float | None = None
    compress_after: float | None = None
    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    on_quarantine_full: str = "hold"
    keep_delivered: float | None = None
    max_delivered_bytes: int = 2**30
    before_send: Callable[[Any], Any] | None = None
    on_drop: Callable[[str, int], object] | None = None
    on_dead_letter: Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        """Hide the secrets of URLs from `repr` and `str`, however the settings were made."""
        if self.sink is not None:
            msgspec.structs.force_setattr(self, "sink", SecretUrl(reveal(self.sink)))
        if self.sinks:
            sinks = {name: SecretUrl(reveal(sink)) if isinstance(sink, str) else sink for name, sink in self.sinks.items()}
            msgspec.structs.force_setattr(self, "sinks", sinks)

    @property
    def delivery_config(self) -> DeliveryConfig:
        """The settings of the delivery worker."""
        return DeliveryConfig(
            poll_interval_s=self.flush_interval,
            backoff=Backoff(max_s=self.backoff_max),
            retry_after_max_s=self.retry_after_max,
            stop_after_rejected_batches=self.stop_after_rejected_batches,
            max_age_s=self.max_age,
            max_in_flight=self.max_in_flight,
            call_timeout_s=self.call_timeout,
            pacing=PacingConfig(max_rate=self.max_rate),
            live_share=self.live_share,
            compress_after_s=self.compress_after,
            limits=self.settlement_limits,
        )

    @property
    def settlement_limits(self) -> SettlementLimits:
        """Limits of dead letters, quarantine and retained batches."""
        return SettlementLimits(
            self.max_dead_bytes,
            self.max_quarantine_bytes,
            self.on_quarantine_full == "discard",
            self.keep_delivered,
            self.max_delivered_bytes,
        )


class _InvalidValueError(PicklableError):
    """A parser rejects a value; `advice` says what to use instead. `_parse_setting` adds the setting and the source."""

    def __init__(self, advice: str, *, shows_value: bool = True) -> None:
        super().__init__(advice)
        self.advice = advice
        self.shows_value = shows_value  # False: the value may hold a secret, or is not the cause of the error


def _parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    parsed = _BOOLEANS.get(str(value).strip().lower())
    if parsed is None:
        raise _InvalidValueError("use true or false")
    return parsed


def _parse_sink(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _InvalidValueError(f"sink: use a URL, a Sink or None, not {type(value).__name__}", shows_value=False)
    return value


def _parse_path(value: object) -> str:
    text = str(value) if hasattr(value, "__fspath__") else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise _InvalidValueError("use the path of a directory")
    return text.rstrip("/") or "/"


def _integer_parser(advice: str, least: int, most: float = float("inf")) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str):
            text = value.strip().lower().replace("_", "").removesuffix("b")
            digits = text.rstrip("kmgi")
            try:
                value = int(digits) * _SIZE_UNITS.get(text[len(digits) :], 0 if text != digits else 1)
            except ValueError:
                raise _InvalidValueError(advice) from None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _InvalidValueError(advice)
        return value

    return parse


def _parse_batch_size(value: object) -> int:
    # Less than 1 means 1: `tracking_outbox_batch_size` has always been read so.
    return max(1, _integer_parser("use a whole number of events, 1 or more", -(2**63))(value))


def _number_parser(advice: str, is_allowed: Callable[[float], bool]) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _InvalidValueError(advice)
        unit = 1
        if isinstance(value, str) and value.strip()[-1:] in _TIME_UNITS:
            value = value.strip()
            value, unit = value[:-1], _TIME_UNITS[value[-1]]
        try:
            number = float(value) * unit
        except (ValueError, OverflowError):
            raise _InvalidValueError(advice) from None
        if not is_allowed(number):
            raise _InvalidValueError(advice)
        return number

    return parse


def _seconds_parser(most: float) -> Callable[[object], float]:
    advice = f"use a number of seconds above 0 and at most {most:.0f}, for example 0.5 or 10m"
    return _number_parser(advice, lambda number: 0 < number <= most)


def _parse_compress_after(value: object) -> float:
    if not compression.is_available():
        raise _InvalidValueError(f"compress_after needs zstd: {compression.INSTALL_COMMAND}", shows_value=False)
    return _seconds_parser(AGE_MAX_S)(value)


def _parse_sinks(value: object) -> dict[str, object]:
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split()]
        value = {name: url for name, _, url in pairs}
        if len(value) < len(pairs):
            raise _InvalidValueError("sinks: two sinks have one name; give each a name of its own", shows_value=False)
    if not isinstance(value, Mapping) or not value:
        raise _InvalidValueError("sinks: use a table of names and URLs, or text: name=URL name=URL", shows_value=False)
    for name, sink in value.items():
        if not isinstance(name, str) or not is_sink_name(name):
            advice = f"sinks: {_shown_name(name)} is not a name; use 1 to 32 of the characters a-z, 0-9, _ and -"
            raise _InvalidValueError(advice, shows_value=False)
        if not sink or not (isinstance(sink, str) or callable(getattr(sink, "deliver", None))):
            raise _InvalidValueError(f"sinks: give {name!r} a URL, as in {name}=URL", shows_value=False)
    return dict(value)


def _shown_name(name: object) -> str:
    """The text given as the name of a sink; a URL given there by mistake is shown without its secrets."""
    text = redact_text(name) if isinstance(name, str) else repr(name)
    return repr(text) if len(text) <= _NAME_SHOWN_CHARS_MAX and "=" not in text else "..."


def _choice_parser(*choices: str) -> Callable[[object], str]:
    quoted = [repr(choice) for choice in choices]
    advice = f"use {', '.join(quoted[:-1])} or {quoted[-1]}"

    def parse(value: object) -> str:
        if value in choices:
            return str(value)
        raise _InvalidValueError(advice)

    return parse


def _import_object(text: object, advice: str, directory: str | None) -> object:
    """The object that `module:name` stands for; `directory` as in `resolve`."""
    module, _, name = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not name or not all(part.isidentifier() for part in module.split(".")):
        raise _InvalidValueError(advice)
    try:
        with _import_also_from(directory):
            return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _InvalidValueError(f"{advice} ({error})") from None


@contextmanager
def _import_also_from(directory: str | None) -> Iterator[None]:
    """Inside the block, also import modules from a directory; a module that is found elsewhere has precedence."""
    if directory is None:
        yield
        return
    sys.path.append(directory)
    try:
        yield
    finally:
        # A module may have changed the path: remove the last entry that is ours, wherever it is now.
        at = next((at for at in reversed(range(len(sys.path))) if sys.path[at] == directory), None)
        if at is not None:
            del sys.path[at]


def _parse_event_type(value: object, directory: str | None = None) -> type[msgspec.Struct]:
    advice = "use a subclass of msgspec.Struct, or its name as text: module:Class"
    parsed = value if isinstance(value, type) else _import_object(value, advice, directory)
    if isinstance(parsed, type) and issubclass(parsed, msgspec.Struct):
        return parsed
    raise _InvalidValueError(advice)


def _parse_hook(value: object, directory: str | None = None) -> Callable[..., Any]:
    advice = "use a function that is not a coroutine function, or its name as text: module:function"
    parsed = value if callable(value) else _import_object(value, advice, directory)
    if not callable(parsed) or iscoroutinefunction(parsed):
        raise _InvalidValueError(advice)
    return parsed


_PARSE_BYTES: Final = _integer_parser("use a whole number of bytes, 0 or more, for example 64Mi", 0)
_PARSE_INTERVAL: Final = _seconds_parser(INTERVAL_MAX_S)
_PARSERS: Final[dict[str, Callable[[object], Any]]] = {
    "enabled": _parse_bool,
    "directory": _parse_path,
    "sink": _parse_sink,
    "sinks": _parse_sinks,
    "event_type": _parse_event_type,
    "deliver": _choice_parser("thread", "process", "external"),
    "trusted": _parse_bool,
    "batch_size": _parse_batch_size,
    "batch_bytes": _integer_parser("use a whole number of bytes, 1 or more, for example 1Mi", 1),
    "flush_interval": _PARSE_INTERVAL,
    "max_bytes": _PARSE_BYTES,
    "max_files": _integer_parser("use a whole number of files, 1 or more", 1),
    "when_full": _choice_parser("drop_newest", "drop_oldest", "block", "raise"),
    "block_timeout": _PARSE_INTERVAL,
    "min_free_bytes": _PARSE_BYTES,
    "durability": _choice_parser(*DURABILITIES),
    "on_invalid": _choice_parser("drop", "raise"),
    "max_in_flight": _integer_parser(f"use a whole number of batches from 1 to {IN_FLIGHT_MAX}", 1, IN_FLIGHT_MAX),
    "backoff_max": _PARSE_INTERVAL,
    "retry_after_max": _seconds_parser(AGE_MAX_S),
    "call_timeout": _PARSE_INTERVAL,
    "stop_after_rejected_batches": _integer_parser("use a whole number of batches, 0 or more", 0),
    "max_rate": _number_parser(
        f"use a number of events per second from {RATE_MIN:g} to {RATE_MAX:g}", lambda number: RATE_MIN <= number <= RATE_MAX
    ),
    "live_share": _number_parser("use a number from 0 to 1", lambda number: 0 <= number <= 1),
    "max_age": _seconds_parser(AGE_MAX_S),
    "compress_after": _parse_compress_after,
    "max_dead_bytes": _PARSE_BYTES,
    "max_quarantine_bytes": _PARSE_BYTES,
    "on_quarantine_full": _choice_parser("hold", "discard"),
    "keep_delivered": _seconds_parser(AGE_MAX_S),
    "max_delivered_bytes": _PARSE_BYTES,
    "before_send": _parse_hook,
    "on_drop": _parse_hook,
    "on_dead_letter": _parse_hook,
}
# The parsers that import what a text names.
_IMPORTING_PARSERS: Final[Mapping[str, Callable[[object, str | None], Any]]] = {
    "event_type": _parse_event_type,
    **dict.fromkeys(("before_send", "on_drop", "on_dead_letter"), _parse_hook),
}


def resolve(
    keywords: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    config: str | None = None,
    *,
    keyword_source: str = "the call",
    import_directory: str | None = None,
) -> Settings:
    """Read settings from all sources and check them.

    A keyword wins over the environment, the environment over the TOML file, and that over the default.

    Args:
        keywords: Settings by name. A value of None counts as not given.
        environ: Environment variables, usually `os.environ`. None: the environment is not read.
        config: Path of a TOML file with a table `[outbox]`. None: no file is read.
        keyword_source: Where the keywords come from, for error messages.
        import_directory: Directory in which a module that a setting names is looked for after everywhere else. It is on
            `sys.path` only while that module is imported. None: only `sys.path` counts.

    Returns:
        The checked settings.

    Raises:
        ConfigurationError: A setting is unknown or has a value that is not allowed, or the file cannot be read.
    """
    values: dict[str, tuple[object, str]] = {}  # by setting: the value, and its source
    if config is not None:
        _override(values, _read_toml(config, keyword_source))
    if environ is not None:
        _override(values, _read_environment(environ))
    named = {_canonical_name(name, keyword_source): value for name, value in keywords.items()}
    _override(values, {name: (value, keyword_source) for name, value in named.items() if value is not None})
    return Settings(**{name: _parse_setting(name, value, source, import_directory) for name, (value, source) in values.items()})


def sink_and_sinks_error(source: str) -> ConfigurationError:
    """The error for a source that sets both `sink` and `sinks`."""
    return ConfigurationError("sinks", None, source, "pass either sink or sinks, not both")


def _override(values: dict[str, tuple[object, str]], nearer: dict[str, tuple[object, str]]) -> None:
    """Replace values by those of a source with precedence; there, `sink` replaces `sinks` and the reverse."""
    if "sink" in nearer and "sinks" in nearer:
        raise sink_and_sinks_error(nearer["sinks"][1])
    if "sink" in nearer:
        values.pop("sinks", None)
    if "sinks" in nearer:
        values.pop("sink", None)
    values |= nearer


def _canonical_name(name: str, source: str) -> str:
    canonical = _ALIASES.get(name.lower(), name)
    if canonical not in _PARSERS:
        similar = get_close_matches(canonical, _PARSERS, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else "help(pillarbox.Outbox) lists the settings"
        raise ConfigurationError(canonical, None, source, f"unknown setting {canonical!r}; {hint}")
    return canonical


def _parse_setting(name: str, value: object, source: str, import_directory: str | None) -> Any:
    try:
        if name in _IMPORTING_PARSERS:
            return _IMPORTING_PARSERS[name](value, import_directory)
        return _PARSERS[name](value)
    except _InvalidValueError as error:
        raise ConfigurationError(name, value if error.shows_value else None, source, error.advice) from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    names = {alias.upper(): name for alias, name in _ALIASES.items()}
    names |= {_ENVIRONMENT_PREFIX + name.upper(): name for name in _PARSERS}
    return {name: (environ[variable], f"environment {variable}") for variable, name in names.items() if variable in environ}


def _read_toml(path: str, path_source: str) -> dict[str, tuple[object, str]]:
    try:
        table = tomllib.loads(read_file(path).decode()).get("outbox", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError("config", path, path_source, f"cannot read the TOML file: {error}") from None
    if not isinstance(table, dict):
        raise ConfigurationError("config", path, path_source, "outbox is not a table; write [outbox] above the settings")
    source = f"{path}, [outbox]"
    return {_canonical_name(name, source): (value, source) for name, value in table.items()}
