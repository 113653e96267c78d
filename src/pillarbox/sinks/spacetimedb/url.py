"""Parses the URL of a SpacetimeDB sink, and reads the token from the file or environment variable that holds it."""

from __future__ import annotations

import os
import re
from base64 import urlsafe_b64decode
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import msgspec

from pillarbox.errors import ConfigurationError
from pillarbox.redaction import NO_SECRETS, Redactor
from pillarbox.sinks.base import is_loopback
from pillarbox.sinks.options import SOURCE, parse_number
from pillarbox.store.os_filesystem import read_file

TOKEN_VARIABLE: Final = "PILLARBOX_SPACETIMEDB_TOKEN"  # noqa: S105 - the name of the variable
TIMEOUT_MAX_S: Final = 110.0  # below delivery's own limit for a call, whose error would be less specific
PLAIN_HTTP_WARNING: Final = (
    "the token is sent over plain http, where the network can read it: use spacetimedb+https:// and a server behind TLS"
)
_OPTION_NAME: Final = re.compile(r"[a-z_]{1,24}")
DEFAULT_FUNCTION: Final = "record_tracking_events"
_PART_CHARS_MIN: Final = 16  # lengths from which a part of a token, the claims or the signature, counts as secret
_URL_FORM: Final = "use spacetimedb://host:port/database?function=name, or spacetimedb+https://host/database"


class Token:
    """A token that its `repr` and `str` do not show."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Token(...)"

    __str__ = __repr__

    def redactor(self) -> Redactor:
        """Return a function that removes the token, and each part of it that is secret by itself, from texts."""
        parts = (part for part in self._text.split(".") if len(part) >= _PART_CHARS_MIN)
        return Redactor([self._text, *parts])

    def file_content(self) -> bytes:
        """Return the content of a token file."""
        return f"{self._text}\n".encode()

    def identity(self) -> str | None:
        """Return the identity in a token that the server issued; None for another token."""
        try:
            payload = self._text.split(".")[1]
            claims = msgspec.json.decode(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            return str(claims["hex_identity"])
        except (IndexError, ValueError, msgspec.DecodeError, KeyError, TypeError, RecursionError):
            return None

    def auth_header(self) -> dict[str, str]:
        """Return the header that authenticates a request."""
        return {"Authorization": f"Bearer {self._text}"}


class SpacetimeDbSettings(NamedTuple):
    """The parsed URL of a SpacetimeDB sink."""

    server: str  # http://host:port
    database: str
    function: str
    token: Token | None
    connections: int
    timeout_s: float  # for one request
    unconfirmed_max: int  # batches that may be accepted and not yet confirmed
    confirm_wait_s: float  # time for a 1.x server to make durable what it accepted

    def database_path(self, *parts: str) -> str:
        """Return the request path of a part of the database."""
        return "/".join(["/v1/database", *(quote(part, safe="") for part in (self.database, *parts))])

    @property
    def sends_token_unencrypted(self) -> bool:
        """Whether the token crosses a network that can read it."""
        parts = urlsplit(self.server)
        return self.token is not None and parts.scheme == "http" and not is_loopback(parts.hostname or "")

    def redactor(self) -> Redactor:
        """Return a function that removes the token from texts."""
        return NO_SECRETS if self.token is None else self.token.redactor()


def parse_url(url: str) -> SpacetimeDbSettings:
    """Parse the URL of a SpacetimeDB sink; raises `ConfigurationError`, which names the part that is wrong."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError("sink", f"{url.partition(':')[0]}://...", "the call", _URL_FORM) from None
    options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    database = unquote(parts.path.strip("/"))
    if not host or not database or "/" in database or parts.fragment or not url.isprintable() or " " in host:
        raise ConfigurationError("sink", f"{parts.scheme}://...", "the call", _URL_FORM)
    unknown = options.keys() - {"function", "token_file", "connections", "timeout", "window", "confirm_wait"}
    if unknown:
        advice = "use one of function, token_file, connections, timeout, window, confirm_wait"
        shown = min(unknown) if _OPTION_NAME.fullmatch(min(unknown)) else "..."
        raise ConfigurationError(f"sink option {shown}", None, SOURCE, f"unknown sink option {shown!r}; {advice}")
    uses_tls = parts.scheme.endswith("+https")
    shown_host = f"[{host}]" if ":" in host else host
    return SpacetimeDbSettings(
        server=f"{'https' if uses_tls else 'http'}://{shown_host}:{port or (443 if uses_tls else 3000)}",
        database=database,
        function=options.get("function") or DEFAULT_FUNCTION,
        token=find_token(unquote(parts.password or parts.username or ""), options.get("token_file")),
        connections=parse_number(options, "connections", int, 2, 1, 64),
        timeout_s=parse_number(options, "timeout", float, 30.0, 0.01, TIMEOUT_MAX_S),
        unconfirmed_max=parse_number(options, "window", int, 256, 1, 4096),
        confirm_wait_s=parse_number(options, "confirm_wait", float, 1.0, 0.0, 3600.0),
    )


def find_token(inline_token: str, token_file: str | None) -> Token | None:
    """Return the token from the URL, the token file or the environment, in this order; None where there is none."""
    source = SOURCE if inline_token else f"environment {TOKEN_VARIABLE}"
    text = inline_token
    if not inline_token and token_file:
        source = token_file
        try:
            text = read_file(token_file).decode()
        except (OSError, ValueError) as error:
            raise ConfigurationError("token_file", token_file, SOURCE, f"cannot read the file: {error}") from None
    text = (text or os.environ.get(TOKEN_VARIABLE, "")).strip()
    if not text:
        return None
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigurationError(
            "token", None, source, "use the token as the server issued it: one line of printable characters"
        )
    return Token(text)
