"""What was typed (keywords, options, environment, TOML) -> what it means, checked.

A setting has one name everywhere: keyword and option `batch_size`, TOML `[outbox] batch_size`, environment
`PILLARBOX_BATCH_SIZE`. The names of the system before (`tracking_outbox_batch_size`, in capitals in the environment) mean the
same. What is nearer wins: keyword or option, then environment, then TOML, then the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import iscoroutinefunction
from typing import Any, Final

import msgspec

from pillarbox.delivery.backoff import Backoff
from pillarbox.delivery.pacing import PacingConfig
from pillarbox.delivery.policy import DeliveryConfig
from pillarbox.delivery.settlement import SettlementLimits
from pillarbox.errors import ConfigurationError
from pillarbox.event import TrackingEvent
from pillarbox.outcome import DURABILITIES
from pillarbox.store import compression
from pillarbox.store.filesystem import read_file
from pillarbox.store.layout import is_sink_name

_ENVIRONMENT_PREFIX: Final = "PILLARBOX_"
_ALIASES: Final = {
    "tracking_outbox_enabled": "enabled",
    "tracking_outbox_dir": "directory",
    "tracking_outbox_batch_size": "batch_size",
    "tracking_outbox_flush_interval": "flush_interval",
    "tracking_outbox_max_bytes": "max_bytes",
}
EITHER: Final = "left out where sink is given: name that one among the sinks"
INTERVAL_MAX_S: Final = 86_400.0  # longer than a day is a slip of the pen
AGE_MAX_S: Final = 100 * 365 * 86_400.0  # what still fits beside the present in microseconds, and to spare
RATE_MIN: Final = 0.001  # events/s; so that a pause stays a number that a clock can add
RATE_MAX: Final = 1e9
IN_FLIGHT_MAX: Final = 64  # each batch on its way is in memory
_BOOLEANS: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_TIME_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SIZE_UNITS: Final = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of an outbox, checked. Sizes in bytes, times in seconds."""

    enabled: bool = True
    directory: str = ""
    sink: str | None = None
    sinks: dict[str, Any] = {}  # where there are several: URLs, or a `Sink` each where the application has made it
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

    @property
    def delivery_config(self) -> DeliveryConfig:
        """How a destination's answers are taken."""
        return DeliveryConfig(
            poll_interval_s=self.flush_interval,
            backoff=Backoff(max_s=self.backoff_max),
            stop_after_rejected_batches=self.stop_after_rejected_batches,
            max_age_s=self.max_age,
            max_in_flight=self.max_in_flight,
            call_timeout_s=self.call_timeout,
            pacing=PacingConfig(max_rate=self.max_rate),
            live_share=self.live_share,
            compress_after_s=self.compress_after,
        )

    @property
    def settlement_limits(self) -> SettlementLimits:
        """How much is set aside, and what stays of what was delivered."""
        return SettlementLimits(
            self.max_dead_bytes,
            self.max_quarantine_bytes,
            self.on_quarantine_full == "discard",
            self.keep_delivered,
            self.max_delivered_bytes,
        )


class _InvalidValueError(Exception):
    """The value is not one; the text says what is."""


def _parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    found = _BOOLEANS.get(str(value).strip().lower())
    if found is None:
        raise _InvalidValueError("true or false")
    return found


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _InvalidValueError("text")
    return value


def _parse_path(value: object) -> str:
    text = str(value) if hasattr(value, "__fspath__") else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise _InvalidValueError("the path of a directory")
    return text.rstrip("/") or "/"


def _integer_parser(allowed: str, least: int, most: float = float("inf")) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str):
            digits = value.strip().lower().replace("_", "").removesuffix("b")
            number = digits.rstrip("kmgi")
            try:
                value = int(number) * _SIZE_UNITS.get(digits[len(number) :], 0 if digits != number else 1)
            except ValueError:
                raise _InvalidValueError(allowed) from None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _InvalidValueError(allowed)
        return value

    return parse


def _parse_batch_size(value: object) -> int:
    # Below 1 means 1: so did the system before.
    return max(1, _integer_parser("a whole number of events", -(2**63))(value))


def _number_parser(allowed: str, fits: Callable[[float], bool]) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _InvalidValueError(allowed)
        unit = 1
        if isinstance(value, str) and value.strip()[-1:] in _TIME_UNITS:
            value = value.strip()
            value, unit = value[:-1], _TIME_UNITS[value[-1]]
        try:
            number = float(value) * unit
        except (ValueError, OverflowError):
            raise _InvalidValueError(allowed) from None
        if not fits(number):
            raise _InvalidValueError(allowed)
        return number

    return parse


def _seconds_parser(most: float) -> Callable[[object], float]:
    return _number_parser(f"a number of seconds above 0, at most {most:.0f}", lambda number: 0 < number <= most)


def _parse_compress_after(value: object) -> float:
    if not compression.is_available():
        raise _InvalidValueError(f"left out, for it needs zstd: {compression.INSTALL_COMMAND}")
    return _seconds_parser(AGE_MAX_S)(value)


def _parse_sinks(value: object) -> dict[str, object]:
    allowed = "a table of names and URLs, or as text name=URL name=URL; names of a-z, 0-9, _ and -, at most 32"
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split()]
        value = {name: url for name, _, url in pairs}
        if len(value) < len(pairs):
            raise _InvalidValueError(f"{allowed}; each name once")
    if not isinstance(value, Mapping) or not value:
        raise _InvalidValueError(allowed)
    for name, sink in value.items():
        if not isinstance(name, str) or not is_sink_name(name):
            raise _InvalidValueError(allowed)
        if not sink or not (isinstance(sink, str) or callable(getattr(sink, "deliver", None))):
            raise _InvalidValueError(f"{allowed} ({name} has none)")
    return dict(value)


def _choice_parser(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value in allowed:
            return str(value)
        raise _InvalidValueError(" or ".join(repr(one) for one in allowed))

    return parse


def _import_object(text: object, allowed: str) -> object:
    """What `module:name` names."""
    module, _, name = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not module or not name:
        raise _InvalidValueError(allowed)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _InvalidValueError(f"{allowed} ({error})") from None


def _parse_event_type(value: object) -> type[msgspec.Struct]:
    allowed = "a msgspec.Struct class, or module:Class where text is asked for"
    found = value if isinstance(value, type) else _import_object(value, allowed)
    if isinstance(found, type) and issubclass(found, msgspec.Struct):
        return found
    raise _InvalidValueError(allowed)


def _parse_hook(value: object) -> Callable[..., Any]:
    allowed = "a function that is no coroutine, or module:function where text is asked for"
    found = value if callable(value) else _import_object(value, allowed)
    if not callable(found) or iscoroutinefunction(found):
        raise _InvalidValueError(allowed)
    return found


_PARSE_BYTES: Final = _integer_parser("a whole number of bytes, at least 0", 0)
_PARSE_INTERVAL: Final = _seconds_parser(INTERVAL_MAX_S)
_PARSERS: Final[dict[str, Callable[[object], Any]]] = {
    "enabled": _parse_bool,
    "directory": _parse_path,
    "sink": _parse_text,
    "sinks": _parse_sinks,
    "event_type": _parse_event_type,
    "deliver": _choice_parser("thread", "process", "external"),
    "trusted": _parse_bool,
    "batch_size": _parse_batch_size,
    "batch_bytes": _integer_parser("a whole number of bytes, at least 1", 1),
    "flush_interval": _PARSE_INTERVAL,
    "max_bytes": _PARSE_BYTES,
    "max_files": _integer_parser("a whole number of files, at least 1", 1),
    "when_full": _choice_parser("drop_newest", "drop_oldest", "block", "raise"),
    "block_timeout": _PARSE_INTERVAL,
    "min_free_bytes": _PARSE_BYTES,
    "durability": _choice_parser(*DURABILITIES),
    "on_invalid": _choice_parser("drop", "raise"),
    "max_in_flight": _integer_parser(f"a whole number of batches from 1 to {IN_FLIGHT_MAX}", 1, IN_FLIGHT_MAX),
    "backoff_max": _PARSE_INTERVAL,
    "call_timeout": _PARSE_INTERVAL,
    "stop_after_rejected_batches": _integer_parser("a whole number of batches, at least 0", 0),
    "max_rate": _number_parser(
        f"a number of events a second, from {RATE_MIN:g} to {RATE_MAX:g}", lambda number: RATE_MIN <= number <= RATE_MAX
    ),
    "live_share": _number_parser("a share from 0 to 1", lambda number: 0 <= number <= 1),
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


def resolve(
    keywords: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    config: str | None = None,
    *,
    keyword_source: str = "the call",
) -> Settings:
    """Settings from all places; raises `ConfigurationError` that names setting, source and what is allowed.

    `config` is the path of a TOML file with a table `[outbox]`; an `environ` of None is not looked at. A keyword that is None
    counts as left out.
    """
    found: dict[str, tuple[object, str]] = {}
    if config is not None:
        _override(found, _read_toml(config))
    if environ is not None:
        _override(found, _read_environment(environ))
    known = {_canonical_name(name, keyword_source): value for name, value in keywords.items()}
    _override(found, {name: (value, keyword_source) for name, value in known.items() if value is not None})
    values: dict[str, Any] = {name: _parse_setting(name, value, source) for name, (value, source) in found.items()}
    return Settings(**values)


def _override(found: dict[str, tuple[object, str]], nearer: dict[str, tuple[object, str]]) -> None:
    """What is nearer wins; one sink there takes the place of several, and the other way round."""
    if "sink" in nearer and "sinks" in nearer:
        raise ConfigurationError("sinks", "...", nearer["sinks"][1], EITHER)
    if "sink" in nearer:
        found.pop("sinks", None)
    if "sinks" in nearer:
        found.pop("sink", None)
    found |= nearer


def _canonical_name(name: str, source: str) -> str:
    known = _ALIASES.get(name.lower(), name)
    if known not in _PARSERS:
        raise ConfigurationError(known, "...", source, f"one of the settings {', '.join(_PARSERS)}")
    return known


def _parse_setting(name: str, value: object, source: str) -> object:
    try:
        return _PARSERS[name](value)
    except _InvalidValueError as refusal:
        raise ConfigurationError(name, value, source, str(refusal)) from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    names = {alias.upper(): name for alias, name in _ALIASES.items()}
    names |= {_ENVIRONMENT_PREFIX + name.upper(): name for name in _PARSERS}
    for variable, name in names.items():
        if variable in environ:
            found[name] = (environ[variable], f"environment {variable}")
    return found


def _read_toml(path: str) -> dict[str, tuple[object, str]]:
    try:
        table = tomllib.loads(read_file(path).decode()).get("outbox", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError("config", path, "the call", f"a readable TOML file ({error})") from None
    if not isinstance(table, dict):
        raise ConfigurationError("config", path, "the call", "a TOML file with a table [outbox]")
    source = f"{path}, [outbox]"
    return {_canonical_name(name, source): (value, source) for name, value in table.items()}
