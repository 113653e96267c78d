"""Secrets do not appear in messages: neither those of the settings, nor what a destination repeats of a request."""

from __future__ import annotations

import asyncio
import base64
import copy
import html
import json
import pickle
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import msgspec
import pytest

from pillarbox import ConfigurationError, Settings, resolve
from pillarbox.delivery.process.protocol import decode_settings, encode_settings
from pillarbox.errors import SinkUnusableError
from pillarbox.redaction import TEXT_BYTES_MAX, Redactor, SecretUrl, excerpt, redact_text, url_secrets
from pillarbox.sinks.base import CheckResult, Misconfigured, PartialFailure, Rejected, Rejection, Retry, SinkCapabilities
from pillarbox.sinks.guard import RedactingSink

SECRETS = [
    "s3cret-token",
    "p@ss/w\"o'rd<&>+ %25ö",
    "a b\\c=d",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJlLTE",
]


def lower_hex(text: str) -> str:
    return "".join(part.lower() if index and index <= 2 else part for index, part in enumerate(text))


ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "percent-encoded": lambda text: quote(text, safe=""),
    "percent-encoded as a path": quote,
    "percent-encoded by JavaScript": lambda text: quote(text, safe="!'()*"),
    "percent-encoded in lower case": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "percent-encoded twice": lambda text: quote(quote(text, safe=""), safe=""),
    "form-encoded": quote_plus,
    "JSON": lambda text: json.dumps({"message": text}),
    "JSON with its own characters": lambda text: json.dumps([text], ensure_ascii=False),
    "JSON with escaped slashes": lambda text: json.dumps(text).replace("/", "\\/"),
    "JSON inside of JSON": lambda text: json.dumps(json.dumps(text)),
    "JSON for HTML": lambda text: json.dumps(text).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    "HTML": html.escape,
    "HTML with decimal entities": lambda text: html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    "HTML without quotes": lambda text: html.escape(text, quote=False),
    "Base64": lambda text: base64.b64encode(text.encode()).decode(),
    "Base64 without padding": lambda text: base64.b64encode(text.encode()).decode().rstrip("="),
    "Base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "Base64 behind a word": lambda text: base64.b64encode(f"Bearer {text}".encode()).decode(),
    "Base64 behind a name": lambda text: base64.b64encode(f"me:{text}\n".encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex(),
    "hexadecimal capitals": lambda text: text.encode().hex().upper(),
    "repr": repr,
    "in Latin-1": lambda text: text.encode().decode("latin-1"),
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_secret_is_hidden_in_every_usual_encoding(encoding: str, secret: str) -> None:
    """Also inside of a longer text. No eight characters of its encoded form remain."""
    encoded = ENCODINGS[encoding](secret)
    redacted = Redactor([secret])(f"you sent: {encoded}, which is wrong")
    assert "..." in redacted
    first = len(ENCODINGS[encoding]("").rstrip("="))  # what stands in front of the secret is no secret
    pieces = [encoded[at : at + 8] for at in range(first, len(encoded) - 7)]
    assert [piece for piece in pieces if piece in redacted] == []


def test_a_secret_that_is_cut_off_is_hidden_too() -> None:
    """A text is cut before it is searched, and the cut may fall into a secret."""
    secret = "s3cret-token-of-some-length"  # noqa: S105 - not a real one
    redact = Redactor([secret])
    for shown in range(len(secret) + 1):
        text = " " * (TEXT_BYTES_MAX - shown) + secret + " and more"
        assert "s3cr" not in excerpt(text, 200, redact)
        assert "s3cr" not in excerpt(text.encode(), 200, redact)
    assert excerpt("all of s3cr", 200, redact) == "all of s3cr"  # whole, so this is not the beginning of the secret


def test_an_ordinary_text_stays() -> None:
    """Secrets of less than four characters would match in any text."""
    assert Redactor(["a", "pw", ""])("a plain password") == "a plain password"
    assert Redactor()("text") == "text"


def test_the_secrets_of_a_url_are_found() -> None:
    """As they are written, and as they are meant."""
    secrets = set(url_secrets("https://us%2Fer:p%40ss@host/hooks/T024BE7LD1234567/x?key=a%2Bb%20c&flag"))
    basic = base64.b64encode(b"us/er:p@ss").decode()
    assert {"us%2Fer", "us/er", "p%40ss", "p@ss", "us/er:p@ss", basic, "a+b c", "T024BE7LD1234567"} <= secrets
    assert list(url_secrets("https://[broken")) == []


URL = "https://me:s3cret-pw@example.com/path?key=s3cret-key#format=json"


def test_a_secret_url_shows_no_secret_but_works_as_a_text() -> None:
    """However it is printed."""
    url = SecretUrl(URL)
    texts = [str(url), repr(url), f"{url}", f"{url:>80}", "{}".format(url), "%s %r" % (url, url), repr([url])]  # noqa: UP031, UP032 - other ways
    assert not [text for text in texts if "s3cret" in text]
    assert all("example.com" in text for text in texts)
    assert (url, hash(url), url.reveal(), type(url.reveal())) == (URL, hash(URL), URL, str)
    assert urlsplit(url).password == "s3cret-pw"  # noqa: S105 - not a real one
    for again in (copy.copy(url), copy.deepcopy(url), pickle.loads(pickle.dumps(url))):  # noqa: S301 - our own
        assert (again, repr(again)) == (URL, repr(url))


def test_settings_never_print_a_secret() -> None:
    """Neither of one sink nor of several, wherever they come from, nor after they were sent to a child process."""
    several = {"live": URL, "other": f"sqlite://u:{'s3cret-pw'}@/x.db"}
    made = [
        Settings(sink=URL),
        Settings(sinks=several),
        resolve({"sink": URL}),
        resolve({"sinks": several}),
        resolve({}, {"PILLARBOX_SINKS": f"live={URL}"}),
        msgspec.structs.replace(Settings(), sink=URL),
    ]
    made += [decode_settings(encode_settings(settings)) for settings in made]
    for settings in made:
        for text in (repr(settings), str(settings), f"{settings.sink} {settings.sinks}"):
            assert "s3cret" not in text
        assert URL in (settings.sink, settings.sinks.get("live"))


@pytest.mark.parametrize(
    "values",
    [
        {"deliver": URL},
        {"directory": 5, "sink": URL, "durability": f"host {URL}, thread"},
        {"when_full": "me:s3cret-pw@example.com"},
        {"sinks": URL},
        {"sinks": f"{URL}=x"},
        {"sinks": {URL: "sqlite:///x.db"}},
        {"sinks": {"me:s3cret-pw@host": "sqlite:///x.db"}},
        {"sinks": {"s3cret-" * 20: "sqlite:///x.db"}},
        {"event_type": {"url": URL}},
    ],
)
def test_a_url_in_the_wrong_place_is_not_shown(values: dict[str, Any]) -> None:
    """A slip of the hand must not put a password into a log."""
    with pytest.raises(ConfigurationError) as caught:
        resolve(values)
    assert "s3cret" not in str(caught.value)


def test_a_text_is_shown_without_the_secrets_of_the_urls_in_it() -> None:
    """Whatever stands around them."""
    assert redact_text("see 'https://u:pw@h/x?k=v', then go") == "see 'https://h/x?k=...', then go"
    assert redact_text("user:password@host") == "...@host"
    assert redact_text("var/outbox a@b 12:30") == "var/outbox a@b 12:30"


class LeakySink:
    """A sink of another package: everything that it reports contains its URL."""

    capabilities = SinkCapabilities("batch_id", "process")

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def prepare(self, batch: Any) -> None:
        """Do nothing."""

    async def open(self) -> None:
        raise SinkUnusableError(f"cannot open {URL}")

    async def deliver(self, batch: Any) -> Any:
        if self.result is None:
            raise OSError(f"connection to {URL} refused")
        return self.result

    async def confirm(self, batches: Any) -> int:
        raise RuntimeError(URL)

    async def check(self) -> Any:
        return [CheckResult(ok=False, message=URL)]

    async def close(self) -> None:
        raise ValueError(URL)


@pytest.mark.parametrize(
    "result",
    [
        Retry(f"at {URL}"),
        Misconfigured(URL),
        Rejected(Rejection("x", URL)),
        PartialFailure({0: Rejection(URL, URL)}),
    ],
)
def test_a_sink_of_another_package_reports_no_secret_of_its_url(result: Any) -> None:
    """In no result."""
    sink = RedactingSink(LeakySink(result), Redactor(url_secrets(URL)))
    answer = asyncio.run(sink.deliver(None))  # type: ignore[arg-type]
    assert type(answer) is type(result)
    assert "example.com" in repr(answer)
    assert "s3cret" not in repr(answer)


@pytest.mark.parametrize("method", ["open", "deliver", "confirm", "check", "close"])
def test_an_error_of_a_sink_of_another_package_contains_no_secret_of_its_url(method: str) -> None:
    """In no exception either, nor in what it was raised from."""
    sink = RedactingSink(LeakySink(), Redactor(url_secrets(URL)))
    call = getattr(sink, method)(*[None] * (method in ("deliver", "confirm")))
    if method == "check":
        text = repr(asyncio.run(call))
    else:
        with pytest.raises(Exception, match=r"example\.com") as caught:
            asyncio.run(call)
        text = repr(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert "example.com" in text
    assert "s3cret" not in text
