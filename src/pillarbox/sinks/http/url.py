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

from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.sinks import redact_path_part, redact_url

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
_SECRET_CHARS_MIN: Final = 4  # characters; a shorter value would be found in half of all texts
_VARIABLE_NAME = re.compile(r"[A-Z][A-Z0-9_]*")  # in capitals, so that a secret written in its place is refused, and not shown
_OPTION_NAME = re.compile(r"[a-z_]{1,24}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!$%&'*+.^_`|~-]+")
_RESERVED_HEADERS: Final = re.compile(  # headers that the call itself needs
    r"(?i)(accept|accept-encoding|connection|content-.*|expect|host|idempotency-key|te|trailer|transfer-encoding|upgrade|webhook-.*)"
)
OPTION_NAMES: Final = (
    *("format", "compress", "answer", "timeout", "connections", "records_max", "bytes_max", "survives"),
    *("token_env", "header_env", "secret_env", "proxy_env", "ca_file", "source", "type", "type_field"),
)
_N = TypeVar("_N", int, float)


class HttpSettings(NamedTuple):
    """Where to deliver, and how."""

    url: str  # what is asked for: no user, no password, no options
    origin: str  # the same for people: scheme, host and port
    userinfo: str  # name:password, or nothing
    format: str
    compress: str
    reads_response_body: bool  # whether an answer's body may say what became of each event
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
    cloudevent_source: str  # of a CloudEvent
    cloudevent_type: str | None  # of a CloudEvent, where it is always the same
    cloudevent_type_field: str | None  # of the event that holds its type as a CloudEvent

    def __repr__(self) -> str:
        return f"HttpSettings({self.origin})"


class Credentials(NamedTuple):
    """What proves to the destination who calls. Shows nothing of itself."""

    headers: tuple[tuple[str, str], ...] = ()
    signing_keys: tuple[bytes, ...] = ()  # that each body is signed with
    proxy_url: str | None = None
    secrets: tuple[str, ...] = ()  # what must appear in no text

    def __repr__(self) -> str:
        return "Credentials(...)"

    def redact(self, text: str) -> str:
        """The text without our secrets: a destination may repeat in its answer what it was sent."""
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return text


def parse_url(url: str, field_names: Mapping[str, str]) -> HttpSettings:
    """The target that a URL means; raises `ConfigurationError` that names the part at fault.

    `field_names` are the event type's fields, and what each is called in JSON.
    """
    parts, port = _split_url(url)
    option_values = parse_qs(parts.fragment, keep_blank_values=True)
    for name in option_values:
        if name not in OPTION_NAMES:
            shown = name if _OPTION_NAME.fullmatch(name) else "..."
            raise ConfigurationError(
                f"sink option {shown}", None, _SOURCE, f"unknown sink option {shown!r}; use one of {', '.join(OPTION_NAMES)}"
            )
    options = {name: values[-1] for name, values in option_values.items()}
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"{parts.scheme.lower()}://{host}" + (f":{port}" if port is not None else "")
    user = parts.netloc.rpartition("@")[0]
    if user and "token_env" in options:
        raise ConfigurationError("sink option token_env", None, _SOURCE, "use either a user in the URL or token_env, not both")
    return HttpSettings(
        url=server + (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        origin=server,
        userinfo=":".join(unquote(part) for part in user.partition(":")[::2]) if user else "",
        format=_parse_choice(options, "format", tuple(FORMATS), "ndjson"),
        compress=_parse_choice(options, "compress", COMPRESSIONS, "none"),
        reads_response_body=_parse_choice(options, "answer", ("body", "status"), "body") == "body",
        timeout_s=_parse_number(options, "timeout", float, 30.0, 0.01, TIMEOUT_MAX_S),
        connections=_parse_number(options, "connections", int, 8, 1, 256),
        records_max=_parse_number(options, "records_max", int, 0, 1, 10**6) or None,
        bytes_max=_parse_number(options, "bytes_max", int, BYTES_MAX, 1, 2**30),
        survives="power" if _parse_choice(options, "survives", ("process", "power"), "process") == "power" else "process",
        secret_env=_parse_variable_name(options, "secret_env"),
        token_env=_parse_variable_name(options, "token_env"),
        header_env=tuple(
            _parse_header_option(text, authorized=bool(user or "token_env" in options))
            for text in option_values.get("header_env", ())
        ),
        proxy_env=_parse_variable_name(options, "proxy_env"),
        ca_file=options.get("ca_file"),
        cloudevent_source=options.get("source") or "pillarbox",
        cloudevent_type=options.get("type") or None,
        cloudevent_type_field=_parse_type_field(options, field_names),
    )


def _split_url(url: str) -> tuple[SplitResult, int | None]:
    advice = "use https://host/path?query#option=value&... (within its parts, / ? # @ % are written as %2F %3F %23 %40 %25)"
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        raise ConfigurationError("sink", redact_url(url), "the call", advice) from None
    if not parts.hostname or "@" in parts.path + parts.query + parts.fragment or not url.isprintable() or " " in url:
        raise ConfigurationError("sink", redact_url(url), "the call", advice)
    return parts, port


def _parse_choice(options: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = options.get(name, default)
    if value not in allowed:
        raise ConfigurationError(f"sink option {name}", value, _SOURCE, f"use one of {', '.join(allowed)}")
    return value


def _parse_number(options: Mapping[str, str], name: str, kind: Callable[[str], _N], default: _N, least: _N, most: _N) -> _N:
    text = options.get(name)
    if text is None:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        advice = f"use a {'whole number' if kind is int else 'number of seconds'} from {least:.10g} to {most:.10g}"
        raise ConfigurationError(f"sink option {name}", text, _SOURCE, advice)
    return value


def _parse_variable_name(options: Mapping[str, str], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not _VARIABLE_NAME.fullmatch(value):
        _reject_variable_name(name)
    return value


def _reject_variable_name(name: str) -> NoReturn:
    form = "HEADER:NAME, where NAME is " if name == "header_env" else ""
    advice = f"sink option {name}: use {form}the name, in capitals, of an environment variable that holds the secret"
    raise ConfigurationError(f"sink option {name}", None, _SOURCE, advice)


def _parse_header_option(text: str, *, authorized: bool) -> tuple[str, str]:
    header, _, variable = text.partition(":")
    if not _VARIABLE_NAME.fullmatch(variable) or not _HEADER_NAME.fullmatch(header):
        _reject_variable_name("header_env")
    if _RESERVED_HEADERS.fullmatch(header) or (authorized and header.lower() == "authorization"):
        raise ConfigurationError("sink option header_env", header, _SOURCE, "use a header that the sink does not set itself")
    return header, variable


def _parse_type_field(options: Mapping[str, str], field_names: Mapping[str, str]) -> str | None:
    name = options.get("type_field")
    if name is not None and name not in field_names:
        raise ConfigurationError("sink option type_field", name, _SOURCE, f"use one of {', '.join(field_names)}")
    return name


def read_credentials(settings: HttpSettings, environ: Mapping[str, str]) -> Credentials:
    """What the variables hold; raises `SinkUnusableError` for one that is missing or holds what cannot be sent."""
    headers: list[tuple[str, str]] = []
    secrets: list[str] = []
    if settings.userinfo:
        basic = b64encode(settings.userinfo.encode()).decode()
        headers.append(("Authorization", f"Basic {basic}"))
        secrets += [basic, settings.userinfo, settings.userinfo.partition(":")[2] or settings.userinfo.partition(":")[0]]
    if settings.token_env:
        token = _read_variable(environ, settings.token_env, "token_env")
        headers.append(("Authorization", f"Bearer {token}"))
        secrets.append(token)
    for header, variable in settings.header_env:
        value = _read_variable(environ, variable, "header_env")
        headers.append((header, value))
        secrets.append(value)
    signing_keys: list[bytes] = []
    for secret in _read_variable(environ, settings.secret_env, "secret_env").split() if settings.secret_env else ():
        signing_keys.append(_decode_signing_key(secret, settings.secret_env or ""))
        secrets += [secret, secret.removeprefix("whsec_")]
    proxy = _read_variable(environ, settings.proxy_env, "proxy_env") if settings.proxy_env else None
    if proxy is not None:
        _check_proxy_url(proxy, settings.proxy_env or "")
        secrets.append(proxy)
    parts = urlsplit(settings.url)
    secrets += [value for values in parse_qs(parts.query).values() for value in values]
    secrets += [part for part in parts.path.split("/") if redact_path_part(part) != part]
    ordered = sorted(
        {text for text in (*secrets, *(quote(text, safe="") for text in secrets)) if len(text) >= _SECRET_CHARS_MIN},
        key=len,
        reverse=True,
    )
    return Credentials(tuple(headers), tuple(signing_keys), proxy, tuple(ordered))


def _read_variable(environ: Mapping[str, str], variable: str, option: str) -> str:
    value = environ.get(variable, "").strip()
    if not value:
        raise SinkUnusableError(
            f"the environment variable {variable}, which the sink's URL names as {option}, is not set: "
            "set it for this process and start it again"
        )
    if not value.isascii() or not value.isprintable():
        raise SinkUnusableError(
            f"the environment variable {variable} must hold one line of printable ASCII: mend it, and start again"
        )
    return value


def _decode_signing_key(secret: str, variable: str) -> bytes:
    """Standard Webhooks writes a key as `whsec_` and Base64; anything else is a key as it stands."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise SinkUnusableError(
            f"the environment variable {variable} holds a whsec_ secret that is not Base64: copy it anew"
        ) from None


def _check_proxy_url(url: str, variable: str) -> None:
    try:
        is_valid = httpx.URL(url).scheme in {"http", "https"} and bool(urlsplit(url).hostname)
    except (ValueError, httpx.InvalidURL):
        is_valid = False
    if not is_valid:
        raise SinkUnusableError(
            f"the environment variable {variable} must hold a proxy's address, as http://host:port: mend it, and start again"
        )
