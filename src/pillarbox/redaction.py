"""Keeps secrets out of messages, logs, dead letters and `repr`.

`SecretUrl` is the type of the URLs in the settings. `redact_url` and `redact_text` leave possible secrets out of what a user
typed. A `Redactor` knows the secrets of one destination and replaces them in what the destination sends, in every encoding in
which servers and proxies usually repeat a request. All sinks use it: it is the only place that replaces secrets.
"""

from __future__ import annotations

import html
import json
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SCHEMES_WITH_KEYS: Final = ("http", "https")  # the path of a webhook often contains its password
_KEY_CHARS_MIN: Final = 16  # a path segment of at least this length with a digit in it looks like a key
_SECRET_CHARS_MIN: Final = 4  # a shorter secret is not replaced, because it would match in ordinary text
_EMBEDDED_CHARS_MIN: Final = 8  # a shorter piece of Base64 would match in ordinary text
TEXT_BYTES_MAX: Final = 4096  # bytes of what a destination sends that are searched for something to quote
_OMITTED: Final = "..."


class SecretUrl(str):
    """The URL of a destination, which may contain secrets. Its `str` and `repr` leave them out; `reveal` returns all of it.

    It compares and slices like the whole text.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return redact_url(self.reveal())

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def reveal(self) -> str:
        """Return the whole URL as plain text."""
        return str.__str__(self)


def reveal(url: str) -> str:
    """Return the whole URL, also of a `SecretUrl`, as plain text."""
    return str.__str__(url)


def redact_url(url: str) -> str:
    """Return the URL without its possible secrets, so that it can be logged and stored.

    It leaves out user and password, the values of query and fragment, and path segments of an HTTP URL that look like a key.
    Where these cannot be told apart (a password that contains `#`) it leaves out everything after the scheme.
    """
    url = reveal(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition(':')[0]}://..."
    host = parts.netloc.rpartition("@")[2]
    if not parts.scheme and (":" in url or "@" in url):
        return _OMITTED  # not a URL, but perhaps meant as one
    if parts.netloc and "@" not in parts.netloc and "@" in url:
        return f"{parts.scheme}://..."
    path = "/".join(map(redact_path_segment, parts.path.split("/"))) if parts.scheme in _SCHEMES_WITH_KEYS else parts.path
    query, fragment = _redact_values(parts.query), _redact_values(parts.fragment)
    return f"{parts.scheme}://{host}{path}" + (f"?{query}" if query else "") + (f"#{fragment}" if fragment else "")


def _redact_values(query: str) -> str:
    return "&".join(f"{pair.partition('=')[0]}=..." if "=" in pair else "..." for pair in query.split("&") if pair)


def redact_path_segment(segment: str) -> str:
    """Return a segment of an HTTP URL's path, or dots where it looks like a key: long, with digits in it."""
    return _OMITTED if len(segment) >= _KEY_CHARS_MIN and any(letter.isdigit() for letter in segment) else segment


def redact_text(text: str) -> str:
    """Return a text that a user typed, without the possible secrets of URLs in it."""
    return " ".join(map(_redact_word, text.split(" ")))


def _redact_word(word: str) -> str:
    before, separator, after = word.partition("://")
    if separator:
        scheme = before.rstrip("+-.")
        start = next((at for at in reversed(range(len(scheme))) if not (scheme[at].isalnum() or scheme[at] in "+-.")), -1) + 1
        end = after.rstrip("'\",;)]}>")
        return f"{before[:start]}{redact_url(f'{before[start:]}://{end}')}{after[len(end) :]}"
    user, at, host = word.rpartition("@")
    return f"{_OMITTED}{at}{host}" if at and ":" in user else word


def url_secrets(url: str) -> Iterator[str]:
    """Yield what may be secret in a URL: user, password, values of the query, and path segments that look like a key."""
    try:
        parts = urlsplit(reveal(url))
    except ValueError:
        return
    user = parts.netloc.rpartition("@")[0]
    if user:
        name, _, password = user.partition(":")
        pair = f"{unquote(name)}:{unquote(password)}"
        for text in (user, name, password, pair):
            yield from (text, unquote(text))
        yield b64encode(pair.encode(errors="replace")).decode()
    yield from (value for _, value in parse_qsl(parts.query))
    yield from (pair.partition("=")[2] for pair in parts.query.split("&"))
    if parts.scheme.lower() in _SCHEMES_WITH_KEYS:
        for segment in parts.path.split("/"):
            if redact_path_segment(segment) != segment:
                yield from (segment, unquote(segment))


class Redactor:
    """Replaces secrets by dots in texts, in each encoding in which a destination may repeat them.

    Args:
        secrets: The secrets; one of less than four characters is ignored, because it would match in ordinary text.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        atoms = {secret for secret in secrets if len(secret) >= _SECRET_CHARS_MIN}
        forms = {form for atom in atoms for form in _encoded_forms(atom) if len(form) >= _SECRET_CHARS_MIN}
        # Replace the longest first: otherwise the end of a secret that begins with another one would stay visible.
        self._forms = sorted(forms, key=len, reverse=True)

    def __repr__(self) -> str:
        return "Redactor(...)"

    def __call__(self, text: str) -> str:
        """Return the text without the secrets."""
        for form in self._forms:
            text = text.replace(form, _OMITTED)
        return text

    def redact_beginning(self, text: str) -> str:
        """Return the beginning of a longer text without the secrets, also without one that is cut off at its end."""
        for form in self._forms:
            head = form[:_SECRET_CHARS_MIN]
            at = text.find(head, max(0, len(text) - len(form) + 1))
            while at >= 0:
                if form.startswith(text[at:]):
                    return self(text[:at])
                at = text.find(head, at + 1)
        return self(text)


NO_SECRETS: Final = Redactor()


def excerpt(data: bytes | str, chars_max: int, redact: Callable[[str], str] = NO_SECRETS) -> str:
    """Quote what a destination sends: its beginning, on one line, without secrets.

    Only `TEXT_BYTES_MAX` of it are processed, so that no answer takes long.
    """
    beginning = data[:TEXT_BYTES_MAX]
    text = beginning.decode(errors="replace") if isinstance(beginning, bytes) else beginning
    if len(beginning) < len(data) and isinstance(redact, Redactor):
        redact = redact.redact_beginning
    return " ".join(redact(text).split())[:chars_max]


def _encoded_forms(atom: str) -> Iterator[str]:
    """Yield a secret in its usual encodings."""
    data = atom.encode(errors="surrogatepass")
    yield from (atom, data.decode("latin-1"), repr(atom)[1:-1], data.hex(), data.hex().upper())
    yield from _percent_forms(data)
    yield from _json_forms(atom)
    yield from _html_forms(atom)
    yield from _base64_forms(data)


def _percent_forms(data: bytes) -> Iterator[str]:
    """The percent-encoded forms of browsers, form encoders and proxies, once and twice encoded, with digits of either case."""
    everything = "".join(f"%{byte:02X}" for byte in data)
    once = {quote(data, safe=safe) for safe in ("", "/", "!'()*", "!'()*;,/?:@&=+$#")} | {everything}
    once |= {text.replace("%20", "+") for text in once}
    for text in once | {quote(text, safe="") for text in once}:
        yield text
        yield _with_lower_hex(text)


def _with_lower_hex(text: str) -> str:
    first, *rest = text.split("%")
    return "%".join([first, *(piece[:2].lower() + piece[2:] for piece in rest)])


def _json_forms(atom: str) -> Iterator[str]:
    """The forms in a JSON string: with and without escapes for non-ASCII, slashes and HTML characters; also encoded twice."""
    for ascii_only in (True, False):
        once = json.dumps(atom, ensure_ascii=ascii_only)[1:-1]
        in_html = "".join(f"\\u{ord(char):04x}" if char in "<>&'+=" else char for char in once)
        few_in_html = "".join(f"\\u{ord(char):04x}" if char in "<>&" else char for char in once)
        for text in (once, once.replace("/", "\\/"), in_html, few_in_html):
            yield text
            yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _html_forms(atom: str) -> Iterator[str]:
    """The forms in HTML and XML, with the entities of several libraries."""
    escaped = html.escape(atom)
    for quotation, apostrophe in (("&quot;", "&#x27;"), ("&quot;", "&#39;"), ("&#34;", "&#39;"), ("&quot;", "&apos;")):
        text = escaped.replace("&quot;", quotation).replace("&#x27;", apostrophe)
        yield text
        yield html.escape(text)
    yield html.escape(atom, quote=False)


def _base64_forms(data: bytes) -> Iterator[str]:
    """The forms in Base64, alone or inside other text: the bytes can be aligned with the digits in three ways."""
    for alphabet in (None, b"-_"):
        yield b64encode(data, alphabet).decode()
        for before in range(3):
            digits = b64encode(bytes(before) + data, alphabet).decode().rstrip("=")
            inner = digits[-(-before * 8 // 6) : len(digits) - ((before + len(data)) % 3 != 0)]
            if len(inner) >= _EMBEDDED_CHARS_MIN:
                yield inner


def redact_fields(value: Any, redact: Callable[[str], str]) -> Any:
    """Return a text, a tuple or a dictionary with every text in it redacted; another value unchanged."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return type(value)(*(redact_fields(inner, redact) for inner in value))
    if isinstance(value, dict):
        return {key: redact_fields(inner, redact) for key, inner in value.items()}
    return value
