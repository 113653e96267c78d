"""Parses the URL of an HTTP sink, and reads the environment variables that it names.

The part before the `#` is the destination's URL and is requested unchanged. The part after the `#` holds the sink's options
and is never sent.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import httpx

from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.redaction import NO_SECRETS, Redactor, redact_url, url_secrets
from pillarbox.sinks.options import SOURCE, parse_number
from pillarbox.store.os_filesystem import absolute_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

    from pillarbox.outcome import Durability

BODY_BYTES_MAX: Final = 8 * 2**20  # default for one body before compression, which is held in memory
TIMEOUT_MAX_S: Final = 600.0
FORMATS: Final = {
    "ndjson": "application/x-ndjson",
    "json": "application/json",
    "cloudevents": "application/cloudevents-batch+json",
}
COMPRESSIONS: Final = ("none", "gzip", "zstd")
_WORD_CHARS_MIN: Final = 8  # a word of a header's value that may be a secret by itself, as behind `Bearer`
_SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - how Standard Webhooks begins a signing secret
_VARIABLE_NAME = re.compile(
    r"[A-Z][A-Z0-9_]*"
)  # upper case only, so that a secret written here by mistake is rejected and not shown
_OPTION_NAME = re.compile(r"[a-z_]{1,24}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!$%&'*+.^_`|~-]+")
_RESERVED_HEADERS: Final = re.compile(  # headers that the sink sets itself
    r"(?i)(accept|accept-encoding|connection|content-.*|expect|host|idempotency-key|te|trailer|transfer-encoding|upgrade|webhook-.*)"
)
OPTION_NAMES: Final = (
    *("format", "compress", "answer", "timeout", "connections", "records_max", "bytes_max", "survives"),
    *("token_env", "header_env", "secret_env", "proxy_env", "ca_file", "source", "type", "type_field"),
)


class HttpSettings(NamedTuple):
    """The parsed URL of an HTTP sink."""

    url: str  # the URL to request, without user, password and options
    origin: str  # scheme, host and port; safe to log
    userinfo: str  # user:password, or empty
    format: str
    compress: str
    reads_response_body: bool  # whether a response's body may name rejected events
    timeout_s: float  # for one whole request
    connections: int
    records_max: int | None
    bytes_max: int
    survives: Durability
    secret_env: str | None
    token_env: str | None
    header_env: tuple[tuple[str, str], ...]  # (header, environment variable)
    proxy_env: str | None
    ca_file: str | None
    cloudevent_source: str
    cloudevent_type: str | None  # a type for all events
    cloudevent_type_field: str | None  # the event's field that holds its type

    def __repr__(self) -> str:
        return f"HttpSettings({self.origin})"


class Credentials(NamedTuple):
    """The secrets that authenticate the sink to the destination. Its `repr` does not show them."""

    headers: tuple[tuple[str, str], ...] = ()
    signing_keys: tuple[bytes, ...] = ()  # each body is signed with all of them
    proxy_url: str | None = None
    redact: Redactor = NO_SECRETS  # removes the secrets from a text: a destination may repeat a request in its response

    def __repr__(self) -> str:
        return "Credentials(...)"


def parse_url(url: str, field_names: Mapping[str, str]) -> HttpSettings:
    """Parse the URL of an HTTP sink.

    Args:
        url: the sink's URL.
        field_names: the event type's fields, each with its name in JSON.

    Raises:
        ConfigurationError: a part of the URL is wrong; the message names it.
    """
    parts, port = _split_url(url)
    values_by_option = parse_qs(parts.fragment, keep_blank_values=True)
    for name in values_by_option:
        if name not in OPTION_NAMES:
            shown = name if _OPTION_NAME.fullmatch(name) else "..."
            raise ConfigurationError(
                f"sink option {shown}", None, SOURCE, f"unknown sink option {shown!r}; use one of {', '.join(OPTION_NAMES)}"
            )
    options = {name: values[-1] for name, values in values_by_option.items()}
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    server = f"{parts.scheme.lower()}://{host}" + (f":{port}" if port is not None else "")
    user = parts.netloc.rpartition("@")[0]
    if user and "token_env" in options:
        raise ConfigurationError("sink option token_env", None, SOURCE, "use either a user in the URL or token_env, not both")
    return HttpSettings(
        url=server + (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        origin=server,
        userinfo=":".join(unquote(part) for part in user.partition(":")[::2]) if user else "",
        format=_parse_choice(options, "format", tuple(FORMATS), "ndjson"),
        compress=_parse_choice(options, "compress", COMPRESSIONS, "none"),
        reads_response_body=_parse_choice(options, "answer", ("body", "status"), "body") == "body",
        timeout_s=parse_number(options, "timeout", float, 30.0, 0.01, TIMEOUT_MAX_S),
        connections=parse_number(options, "connections", int, 8, 1, 256),
        records_max=parse_number(options, "records_max", int, 0, 1, 10**6) or None,
        bytes_max=parse_number(options, "bytes_max", int, BODY_BYTES_MAX, 1, 2**30),
        survives="power" if _parse_choice(options, "survives", ("process", "power"), "process") == "power" else "process",
        secret_env=_parse_variable_name(options, "secret_env"),
        token_env=_parse_variable_name(options, "token_env"),
        header_env=tuple(
            _parse_header_option(text, authorized=bool(user or "token_env" in options))
            for text in values_by_option.get("header_env", ())
        ),
        proxy_env=_parse_variable_name(options, "proxy_env"),
        ca_file=absolute_path(options["ca_file"]) if options.get("ca_file") else None,
        cloudevent_source=options.get("source") or "pillarbox",
        cloudevent_type=options.get("type") or None,
        cloudevent_type_field=_parse_type_field(options, field_names),
    )


def _split_url(url: str) -> tuple[SplitResult, int | None]:
    advice = "use https://host/path?query#option=value&... (inside a part, write / ? # @ % as %2F %3F %23 %40 %25)"
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
        raise ConfigurationError(f"sink option {name}", value, SOURCE, f"use one of {', '.join(allowed)}")
    return value


def _parse_variable_name(options: Mapping[str, str], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not _VARIABLE_NAME.fullmatch(value):
        _reject_variable_name(name)
    return value


def _reject_variable_name(name: str) -> NoReturn:
    form = "HEADER:NAME, where NAME is " if name == "header_env" else ""
    advice = f"sink option {name}: use {form}the upper-case name of an environment variable that holds the secret"
    raise ConfigurationError(f"sink option {name}", None, SOURCE, advice)


def _parse_header_option(text: str, *, authorized: bool) -> tuple[str, str]:
    header, _, variable = text.partition(":")
    if not _VARIABLE_NAME.fullmatch(variable) or not _HEADER_NAME.fullmatch(header):
        _reject_variable_name("header_env")
    if _RESERVED_HEADERS.fullmatch(header) or (authorized and header.lower() == "authorization"):
        raise ConfigurationError("sink option header_env", header, SOURCE, "use a header that the sink does not set itself")
    return header, variable


def _parse_type_field(options: Mapping[str, str], field_names: Mapping[str, str]) -> str | None:
    name = options.get("type_field")
    if name is not None and name not in field_names:
        raise ConfigurationError("sink option type_field", name, SOURCE, f"use one of {', '.join(field_names)}")
    return name


def read_credentials(settings: HttpSettings, environ: Mapping[str, str]) -> Credentials:
    """Read the secrets that the settings name from environment variables.

    Raises:
        SinkUnusableError: a variable is not set, or its value cannot be sent.
    """
    headers: list[tuple[str, str]] = []
    secrets: list[str] = []
    if settings.userinfo:
        basic = b64encode(settings.userinfo.encode()).decode()
        headers.append(("Authorization", f"Basic {basic}"))
        secrets += [basic, settings.userinfo, *settings.userinfo.partition(":")[::2]]
    if settings.token_env:
        token = _read_variable(environ, settings.token_env, "token_env")
        headers.append(("Authorization", f"Bearer {token}"))
        secrets.append(token)
    for header, variable in settings.header_env:
        value = _read_variable(environ, variable, "header_env")
        headers.append((header, value))
        secrets += [value, *(word for word in value.split() if len(word) >= _WORD_CHARS_MIN)]
    signing_keys: list[bytes] = []
    for secret in _read_variable(environ, settings.secret_env, "secret_env").split() if settings.secret_env else ():
        signing_keys.append(_decode_signing_key(secret, settings.secret_env or ""))
        secrets += [secret, secret.removeprefix(_SECRET_PREFIX)]
    proxy = _read_variable(environ, settings.proxy_env, "proxy_env") if settings.proxy_env else None
    if proxy is not None:
        _check_proxy_url(proxy, settings.proxy_env or "")
        secrets += [proxy, *url_secrets(proxy)]
    secrets += url_secrets(settings.url)
    return Credentials(tuple(headers), tuple(signing_keys), proxy, Redactor(secrets))


def _read_variable(environ: Mapping[str, str], variable: str, option: str) -> str:
    value = environ.get(variable, "").strip()
    if not value:
        raise SinkUnusableError(
            f"the environment variable {variable}, named by {option} in the sink's URL, is not set: "
            "set it for this process and restart the process"
        )
    if not value.isascii() or not value.isprintable():
        raise SinkUnusableError(
            f"the environment variable {variable} is not one line of printable ASCII: correct it and restart the process"
        )
    return value


def _decode_signing_key(secret: str, variable: str) -> bytes:
    """Decode a signing key: `whsec_` and Base64, as Standard Webhooks writes it, or the key's own characters."""
    if not secret.startswith(_SECRET_PREFIX):
        return secret.encode()
    try:
        key = b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise SinkUnusableError(
            f"the environment variable {variable} holds a whsec_ secret that is not valid Base64: copy the secret again"
        ) from None
    if not key:  # anybody could sign with it
        raise SinkUnusableError(
            f"the environment variable {variable} holds {_SECRET_PREFIX} without a key after it: copy the secret again"
        )
    return key


def _check_proxy_url(url: str, variable: str) -> None:
    try:
        is_valid = httpx.URL(url).scheme in {"http", "https"} and bool(urlsplit(url).hostname)
    except (ValueError, httpx.InvalidURL):
        is_valid = False
    if not is_valid:
        raise SinkUnusableError(
            f"the environment variable {variable} is not a proxy's URL: set it to http://host:port and restart the process"
        )
