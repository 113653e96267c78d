"""What an `http://` or `https://` URL says, checked; and what the variables that it names hold.

All up to the `#` is the destination's and is sent as it stands. What follows the `#` is ours and is never sent.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import httpx

from pillarbox.errors import ConfigurationError, SinkUnusable
from pillarbox.sinks import redacted, without_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from urllib.parse import SplitResult

    from pillarbox.sinks.base import Survives

BYTES_MAX: Final = 8 * 2**20  # of one body before it is compressed, unless the URL says otherwise: it is held in memory
TIMEOUT_MAX_S: Final = 600.0
FORMATS: Final = {
    "ndjson": "application/x-ndjson",
    "json": "application/json",
    "cloudevents": "application/cloudevents-batch+json",
}
COMPRESSIONS: Final = ("none", "gzip", "zstd")
_SOURCE: Final = "the sink's URL"
_HIDDEN_MIN: Final = 4  # characters; a shorter value would be found in half of all texts
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")  # in capitals, so that a secret written in its place is refused, and not shown
_OPTION = re.compile(r"[a-z_]{1,24}")
_HEADER = re.compile(r"[A-Za-z0-9!$%&'*+.^_`|~-]+")
_OURS: Final = re.compile(  # headers that the call itself needs
    r"(?i)(accept|accept-encoding|connection|content-.*|expect|host|idempotency-key|te|trailer|transfer-encoding|upgrade|webhook-.*)"
)
_OPTIONS: Final = (
    *("format", "compress", "answer", "timeout", "connections", "records_max", "bytes_max", "survives"),
    *("token_env", "header_env", "secret_env", "proxy_env", "ca_file", "source", "type", "type_field"),
)
_N = TypeVar("_N", int, float)


class Target(NamedTuple):
    """Where to deliver, and how."""

    url: str  # what is asked for: no user, no password, no options
    host: str  # the same for people: scheme, host and port
    user: str  # name:password, or nothing
    format: str
    compress: str
    counts: bool  # whether an answer's body may say what became of each event
    timeout_s: float  # of one call as a whole
    connections: int
    records_max: int | None
    bytes_max: int
    survives: Survives
    secret_env: str | None
    token_env: str | None
    header_env: tuple[tuple[str, str], ...]  # (header, variable)
    proxy_env: str | None
    ca_file: str | None
    source: str  # of a CloudEvent
    type: str | None  # of a CloudEvent, where it is always the same
    type_field: str | None  # of the event that holds its type as a CloudEvent

    def __repr__(self) -> str:
        return f"Target({self.host})"


class Credentials(NamedTuple):
    """What proves to the destination who calls. Shows nothing of itself."""

    headers: tuple[tuple[str, str], ...] = ()
    keys: tuple[bytes, ...] = ()  # that each body is signed with
    proxy: str | None = None
    hidden: tuple[str, ...] = ()  # what must appear in no text

    def __repr__(self) -> str:
        return "Credentials(...)"

    def hide(self, text: str) -> str:
        """The text without our secrets: a destination may repeat in its answer what it was sent."""
        for secret in self.hidden:
            text = text.replace(secret, "...")
        return text


def parse(url: str, field_names: Mapping[str, str]) -> Target:
    """The target that a URL means; raises `ConfigurationError` that names the part at fault.

    `field_names` are the event type's fields, and what each is called in JSON.
    """
    parts, port = _split(url)
    given = parse_qs(parts.fragment, keep_blank_values=True)
    for name in given:
        if name not in _OPTIONS:
            shown = name if _OPTION.fullmatch(name) else "..."
            raise ConfigurationError(f"sink option {shown}", "...", _SOURCE, f"one of {', '.join(_OPTIONS)}")
    options = {name: values[-1] for name, values in given.items()}
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"{parts.scheme.lower()}://{host}" + (f":{port}" if port is not None else "")
    user = parts.netloc.rpartition("@")[0]
    if user and "token_env" in options:
        raise ConfigurationError("sink option token_env", "...", _SOURCE, "left out where the URL has a user: one of the two")
    return Target(
        url=server + (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        host=server,
        user=":".join(unquote(part) for part in user.partition(":")[::2]) if user else "",
        format=_choice(options, "format", tuple(FORMATS), "ndjson"),
        compress=_choice(options, "compress", COMPRESSIONS, "none"),
        counts=_choice(options, "answer", ("body", "status"), "body") == "body",
        timeout_s=_number(options, "timeout", float, 30.0, 0.01, TIMEOUT_MAX_S),
        connections=_number(options, "connections", int, 8, 1, 256),
        records_max=_number(options, "records_max", int, 0, 1, 10**6) or None,
        bytes_max=_number(options, "bytes_max", int, BYTES_MAX, 1, 2**30),
        survives="power" if _choice(options, "survives", ("process", "power"), "process") == "power" else "process",
        secret_env=_variable(options, "secret_env"),
        token_env=_variable(options, "token_env"),
        header_env=tuple(
            _header(text, authorized=bool(user or "token_env" in options)) for text in given.get("header_env", ())
        ),
        proxy_env=_variable(options, "proxy_env"),
        ca_file=options.get("ca_file"),
        source=options.get("source") or "pillarbox",
        type=options.get("type") or None,
        type_field=_field(options, field_names),
    )


def _split(url: str) -> tuple[SplitResult, int | None]:
    allowed = "https://host/path?query#option=value&... (within its parts, / ? # @ % are written as %2F %3F %23 %40 %25)"
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError("sink", redacted(url), "the call", allowed) from None
    if not parts.hostname or "@" in parts.path + parts.query + parts.fragment or not url.isprintable() or " " in url:
        raise ConfigurationError("sink", redacted(url), "the call", allowed)
    return parts, port


def _choice(options: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = options.get(name, default)
    if value not in allowed:
        raise ConfigurationError(f"sink option {name}", value, _SOURCE, f"one of {', '.join(allowed)}")
    return value


def _number(options: Mapping[str, str], name: str, kind: Callable[[str], _N], default: _N, least: _N, most: _N) -> _N:
    text = options.get(name)
    if text is None:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        allowed = f"a {'whole number' if kind is int else 'number of seconds'} from {least:.10g} to {most:.10g}"
        raise ConfigurationError(f"sink option {name}", text, _SOURCE, allowed)
    return value


def _variable(options: Mapping[str, str], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not _VARIABLE.fullmatch(value):
        _not_a_variable(name)
    return value


def _not_a_variable(name: str) -> NoReturn:
    form = "HEADER:NAME, NAME being " if name == "header_env" else ""
    allowed = f"{form}the name of an environment variable, in capitals, that holds the secret"
    raise ConfigurationError(f"sink option {name}", "...", _SOURCE, allowed)


def _header(text: str, *, authorized: bool) -> tuple[str, str]:
    header, _, variable = text.partition(":")
    if not _VARIABLE.fullmatch(variable) or not _HEADER.fullmatch(header):
        _not_a_variable("header_env")
    if _OURS.fullmatch(header) or (authorized and header.lower() == "authorization"):
        raise ConfigurationError("sink option header_env", header, _SOURCE, "a header that the sink does not set itself")
    return header, variable


def _field(options: Mapping[str, str], field_names: Mapping[str, str]) -> str | None:
    name = options.get("type_field")
    if name is not None and name not in field_names:
        raise ConfigurationError("sink option type_field", name, _SOURCE, f"one of {', '.join(field_names)}")
    return name


def read_credentials(target: Target, environ: Mapping[str, str]) -> Credentials:
    """What the variables hold; raises `SinkUnusable` for one that is missing or holds what cannot be sent."""
    headers: list[tuple[str, str]] = []
    hidden: list[str] = []
    if target.user:
        basic = b64encode(target.user.encode()).decode()
        headers.append(("Authorization", f"Basic {basic}"))
        hidden += [basic, target.user, target.user.partition(":")[2] or target.user.partition(":")[0]]
    if target.token_env:
        token = _held(environ, target.token_env, "token_env")
        headers.append(("Authorization", f"Bearer {token}"))
        hidden.append(token)
    for header, variable in target.header_env:
        value = _held(environ, variable, "header_env")
        headers.append((header, value))
        hidden.append(value)
    keys: list[bytes] = []
    for secret in _held(environ, target.secret_env, "secret_env").split() if target.secret_env else ():
        keys.append(_key(secret, target.secret_env or ""))
        hidden += [secret, secret.removeprefix("whsec_")]
    proxy = _held(environ, target.proxy_env, "proxy_env") if target.proxy_env else None
    if proxy is not None:
        _check_proxy(proxy, target.proxy_env or "")
        hidden.append(proxy)
    parts = urlsplit(target.url)
    hidden += [value for values in parse_qs(parts.query).values() for value in values]
    hidden += [part for part in parts.path.split("/") if without_key(part) != part]
    ordered = sorted(
        {text for text in (*hidden, *(quote(text, safe="") for text in hidden)) if len(text) >= _HIDDEN_MIN},
        key=len,
        reverse=True,
    )
    return Credentials(tuple(headers), tuple(keys), proxy, tuple(ordered))


def _held(environ: Mapping[str, str], variable: str, option: str) -> str:
    value = environ.get(variable, "").strip()
    if not value:
        raise SinkUnusable(
            f"the environment variable {variable}, which the sink's URL names as {option}, is not set: "
            "set it for this process and start it again"
        )
    if not value.isascii() or not value.isprintable():
        raise SinkUnusable(
            f"the environment variable {variable} must hold one line of printable ASCII: mend it, and start again"
        )
    return value


def _key(secret: str, variable: str) -> bytes:
    """Standard Webhooks writes a key as `whsec_` and Base64; anything else is a key as it stands."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise SinkUnusable(
            f"the environment variable {variable} holds a whsec_ secret that is not Base64: copy it anew"
        ) from None


def _check_proxy(url: str, variable: str) -> None:
    try:
        fits = httpx.URL(url).scheme in {"http", "https"} and bool(urlsplit(url).hostname)
    except (ValueError, httpx.InvalidURL):
        fits = False
    if not fits:
        raise SinkUnusable(
            f"the environment variable {variable} must hold a proxy's address, as http://host:port: mend it, and start again"
        )
