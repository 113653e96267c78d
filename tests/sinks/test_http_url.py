"""Parsing of an HTTP sink's URL, the secrets in the environment, and what of them a message shows."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.sinks import make_sink, redact_url, schemes
from pillarbox.sinks.base import Sink
from pillarbox.sinks.http.responses import REMEDIES
from pillarbox.sinks.http.url import OPTION_NAMES, HttpSettings, parse_url, read_credentials

FIELDS = {field.name: field.encode_name for field in msgspec.structs.fields(TrackingEvent)}
SECRET = "s3cret-do-not-show"  # noqa: S105 - must appear in no message


def settings_of(url: str) -> HttpSettings:
    return parse_url(url, FIELDS)


def test_the_part_before_the_hash_is_requested_unchanged() -> None:
    """Without the user and the options."""
    settings = settings_of("https://me:pw@Example.com:8443/a/%2Fb?x=1&y=%20z#format=json&timeout=5")
    assert settings.url == "https://example.com:8443/a/%2Fb?x=1&y=%20z"
    assert (settings.origin, settings.userinfo, settings.format, settings.timeout_s) == (
        "https://example.com:8443",
        "me:pw",
        "json",
        5.0,
    )
    assert settings_of("http://[::1]:80").url == "http://[::1]:80/"


def test_the_defaults_of_all_options() -> None:
    """Those of a URL without options."""
    settings = settings_of("https://example.com/events")
    assert settings[2:] == (
        *("", "ndjson", "none", True, 30.0, 8, None, 8 * 2**20, "process", None, None, (), None, None, "pillarbox", None, None),
    )


def test_every_option_is_parsed() -> None:
    """To the value in the URL."""
    settings = settings_of(
        "https://example.com/#format=cloudevents&compress=zstd&answer=status&timeout=1.5&connections=3&records_max=7&bytes_max=9"
        "&survives=power&secret_env=A&token_env=B&header_env=X-Key:C&header_env=X-Other:D&proxy_env=E&ca_file=%2Fx.pem"
        "&source=urn:x&type=t&type_field=event_key"
    )
    assert settings[2:] == (
        *("", "cloudevents", "zstd", False, 1.5, 3, 7, 9, "power", "A", "B", (("X-Key", "C"), ("X-Other", "D")), "E"),
        *("/x.pem", "urn:x", "t", "event_key"),
    )


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ("colour=red", "format, compress"),
        ("format=xml", "ndjson, json, cloudevents"),
        ("compress=br", "none, gzip, zstd"),
        ("answer=no", "body, status"),
        ("survives=fire", "process, power"),
        ("timeout=0", "0.01 to 600"),
        ("timeout=nan", "0.01 to 600"),
        ("timeout=soon", "0.01 to 600"),
        ("connections=0", "1 to 256"),
        ("records_max=0", "1 to 1000000"),
        ("bytes_max=1.5", "whole number"),
        ("token_env=lower", "upper-case"),
        ("header_env=X-Key", "HEADER:NAME"),
        ("header_env=X%20Key:A", "HEADER:NAME"),
        ("header_env=content-type:A", "does not set itself"),
        ("header_env=Webhook-Id:A", "does not set itself"),
        ("header_env=Authorization:A&token_env=B", "does not set itself"),
        ("type_field=nothing", "event_id, event_key"),
    ],
)
def test_an_error_names_the_option_and_the_allowed_values(options: str, at_fault: str) -> None:
    """As for every setting."""
    with pytest.raises(ConfigurationError) as caught:
        settings_of(f"https://example.com/#{options}")
    assert at_fault in str(caught.value)
    assert options.partition("=")[0] in str(caught.value)


def test_the_guide_describes_every_option_and_status() -> None:
    """Each option has a row, and each status that stops delivery is listed."""
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "http.md").read_text()
    table = guide[guide.index("| option |") : guide.index("User and password")]
    for name in OPTION_NAMES:
        assert f"`{name}`" in table, name
    answers = guide[guide.index("| status | what") : guide.index("*Waits* means")]
    for status in (*REMEDIES.keys() - {101}, 207, 400, 408, 409, 413, 422, 425, 429, 500):
        assert str(status) in answers, status


@pytest.mark.parametrize(
    "url",
    [
        "https:///path",
        "https://",
        "https://example.com:port/",
        "https://example.com:99999/",
        "https://[broken/",
        "https://exa mple.com/",
        "https://example.com/a\nb",
        f"https://user:{SECRET}#x@example.com/",
        f"https://user:{SECRET}/x@example.com/",
        f"https://user:{SECRET}?x@example.com/",
        f"https://user?{SECRET}@example.com/",
        f"https://example.com/#{SECRET}",
        f"https://example.com/#token_env={SECRET}",
        f"https://example.com/#header_env=X-Key:{SECRET}",
        f"https://example.com/#token={SECRET}",
        f"https://me:{SECRET}@example.com/#token_env=A",
    ],
)
def test_an_invalid_url_is_rejected_without_showing_its_secrets(url: str) -> None:
    """Even where a secret stands in the wrong place."""
    with pytest.raises(ConfigurationError) as caught:
        make_sink(url, TrackingEvent)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:pw@example.com:1/a?k=v&flag#token_env=X&y", "https://example.com:1/a?k=...&...#token_env=...&..."),
        (
            "https://hooks.example.com/services/T024BE7LD1234567/XXabcdefgh12345678",
            "https://hooks.example.com/services/.../...",
        ),
        ("https://example.com/a-long-path-without-digits/v1", "https://example.com/a-long-path-without-digits/v1"),
        ("https://u:a#b@example.com/", "https://..."),
        ("https://u:a/b@example.com/", "https://..."),
        ("https://u:a?b@example.com/", "https://..."),
        ("https://[broken", "https://..."),
        (
            "sqlite:///var/lib/a-long-name-with-digits-1234.db?table=x",
            "sqlite:///var/lib/a-long-name-with-digits-1234.db?table=...",
        ),
        ("spacetimedb://:tok@host:3000/db#x", "spacetimedb://host:3000/db#..."),
        ("nothing", "://nothing"),
    ],
)
def test_a_redacted_url_shows_the_host_and_no_secret(url: str, shown: str) -> None:
    """See `redact_url`."""
    assert redact_url(url) == shown


def test_sink_settings_and_credentials_do_not_show_secrets() -> None:
    """In `repr`, f-strings and logs."""
    sink: Any = make_sink(f"https://me:{SECRET}@example.com/?key={SECRET}", TrackingEvent)
    credentials = read_credentials(sink._settings, {})
    for thing in (sink, sink._settings, credentials):
        for text in (repr(thing), str(thing), f"{thing}", "%s" % (thing,)):  # noqa: UP031 - the logging module does it so
            assert SECRET not in text
    assert isinstance(sink, Sink)


def test_http_and_https_are_schemes_of_a_sink() -> None:
    """Both are built in."""
    assert {"http", "https"} <= set(schemes())


def test_credentials_are_read_from_the_environment() -> None:
    """A bearer token, other headers, and several signing secrets, as during a rotation."""
    whsec = "whsec_" + base64.b64encode(b"k" * 32).decode()
    credentials = read_credentials(
        settings_of("https://example.com/#token_env=T&header_env=X-Key:K&secret_env=S"),
        {"T": f" {SECRET}\n", "K": "v a l u e", "S": f"{whsec} plain-secret"},
    )
    assert credentials.headers == (("Authorization", f"Bearer {SECRET}"), ("X-Key", "v a l u e"))
    assert credentials.signing_keys == (b"k" * 32, b"plain-secret")


def test_user_and_password_are_percent_decoded() -> None:
    """In UTF-8; a user without a password is a key and is redacted too."""
    credentials = read_credentials(settings_of("https://us%2Fer:p%40ss:w%C3%B6rd@example.com/"), {})
    ((name, value),) = credentials.headers
    assert (name, base64.b64decode(value.removeprefix("Basic ")).decode()) == ("Authorization", "us/er:p@ss:wörd")
    assert credentials.redact("wrong: p@ss:wörd") == "wrong: ..."
    assert read_credentials(settings_of("https://writekey@example.com/"), {}).redact("not writekey") == "not ..."


@pytest.mark.parametrize("option", ["token_env=V", "header_env=X-Key:V", "secret_env=V", "proxy_env=V"])
@pytest.mark.parametrize("value", [None, "", " ", f"{SECRET}\nX: y", f"{SECRET}ö"])
def test_an_unusable_variable_is_named_and_its_value_is_not_shown(option: str, value: str | None) -> None:
    """A line feed in it would start another header."""
    with pytest.raises(SinkUnusableError) as caught:
        read_credentials(settings_of(f"https://example.com/#{option}"), {} if value is None else {"V": value})
    assert " V" in str(caught.value)
    assert "set it" in str(caught.value) or "correct it" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("secret_env", f"whsec_{SECRET}!"), ("proxy_env", f"ftp://u:{SECRET}@host"), ("proxy_env", SECRET)]
)
def test_a_value_in_the_wrong_format_is_not_shown(option: str, value: str) -> None:
    """Neither a signing secret nor a proxy URL."""
    with pytest.raises(SinkUnusableError) as caught:
        read_credentials(settings_of(f"https://example.com/#{option}=V"), {"V": value})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["whsec_", " whsec_ ", "whsec_ plain-secret", f"{SECRET} whsec_", "whsec_===="])
def test_a_signing_secret_without_a_key_is_rejected(value: str) -> None:
    """Anybody could sign with an empty key; also beside other secrets, as during a rotation."""
    with pytest.raises(SinkUnusableError, match="environment variable V holds"):
        read_credentials(settings_of("https://example.com/#secret_env=V"), {"V": value})


def test_the_longest_secret_is_redacted_first() -> None:
    """Otherwise the end of a secret that begins with another one would show; also percent-encoded."""
    credentials = read_credentials(
        settings_of("https://me:p%2Fss%2Fword@example.com/#header_env=A:A&header_env=B:B"), {"A": "begin", "B": "begin-and-end"}
    )
    assert credentials.redact("begin-and-end, begin, p/ss/word, p%2Fss%2Fword") == "..., ..., ..., ..."


def test_a_secret_is_redacted_in_each_encoding() -> None:
    """Plain, percent-encoded and in Base64; also the values of the query and secret path segments."""
    credentials = read_credentials(settings_of(f"https://me:{SECRET}%25@example.com/T024BE7LD1234567/x?key={SECRET}%2B"), {})
    basic = base64.b64encode(f"me:{SECRET}%".encode()).decode()
    redacted = credentials.redact(f"{SECRET} {SECRET}% {SECRET}%25 {SECRET}+ {basic} T024BE7LD1234567 x")
    assert SECRET not in redacted.replace(f"{SECRET} ", "", 1)
    assert basic not in redacted
    assert "T024BE7LD1234567" not in redacted
