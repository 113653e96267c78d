"""What a URL says, what the environment adds, and what of it is shown."""

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
SECRET = "s3cret-do-not-show"  # noqa: S105 - what the tests look for


def target(url: str) -> HttpSettings:
    return parse_url(url, FIELDS)


def test_what_stands_before_the_hash_is_the_destinations() -> None:
    """Path and query go as they are; user and options do not go."""
    found = target("https://me:pw@Example.com:8443/a/%2Fb?x=1&y=%20z#format=json&timeout=5")
    assert found.url == "https://example.com:8443/a/%2Fb?x=1&y=%20z"
    assert (found.origin, found.userinfo, found.format, found.timeout_s) == ("https://example.com:8443", "me:pw", "json", 5.0)
    assert target("http://[::1]:80").url == "http://[::1]:80/"


def test_the_defaults() -> None:
    """Of a URL that says nothing else."""
    found = target("https://example.com/events")
    assert found[2:] == (
        *("", "ndjson", "none", True, 30.0, 8, None, 8 * 2**20, "process", None, None, (), None, None, "pillarbox", None, None),
    )


def test_every_option_is_read() -> None:
    """With the value that was given."""
    found = target(
        "https://example.com/#format=cloudevents&compress=zstd&answer=status&timeout=1.5&connections=3&records_max=7&bytes_max=9"
        "&survives=power&secret_env=A&token_env=B&header_env=X-Key:C&header_env=X-Other:D&proxy_env=E&ca_file=%2Fx.pem"
        "&source=urn:x&type=t&type_field=event_key"
    )
    assert found[2:] == (
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
        ("token_env=lower", "in capitals"),
        ("header_env=X-Key", "HEADER:NAME"),
        ("header_env=X%20Key:A", "HEADER:NAME"),
        ("header_env=content-type:A", "does not set itself"),
        ("header_env=Webhook-Id:A", "does not set itself"),
        ("header_env=Authorization:A&token_env=B", "does not set itself"),
        ("type_field=nothing", "event_id, event_key"),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(options: str, at_fault: str) -> None:
    """As every setting is."""
    with pytest.raises(ConfigurationError) as caught:
        target(f"https://example.com/#{options}")
    assert at_fault in str(caught.value)
    assert options.partition("=")[0] in str(caught.value)


def test_every_option_and_every_remedy_is_in_the_guide() -> None:
    """With a row of its own; and no status that stops delivery is left out."""
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
def test_a_url_that_is_none_is_refused_without_showing_it(url: str) -> None:
    """Also where the secret stands where none belongs."""
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
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    """Where it leads, and nothing that opens a door."""
    assert redact_url(url) == shown


def test_nothing_that_is_held_shows_itself() -> None:
    """In `repr`, f-strings and logs."""
    sink: Any = make_sink(f"https://me:{SECRET}@example.com/?key={SECRET}", TrackingEvent)
    held = read_credentials(sink._settings, {})
    for thing in (sink, sink._settings, held):
        for text in (repr(thing), str(thing), f"{thing}", "%s" % (thing,)):  # noqa: UP031 - the logging module does it so
            assert SECRET not in text
    assert isinstance(sink, Sink)


def test_the_extra_is_named_and_the_schemes_are_there() -> None:
    """Both of them are the same sink."""
    assert {"http", "https"} <= set(schemes())


def test_what_the_variables_hold_is_sent() -> None:
    """Bearer, other headers, and secrets to sign with: several, while they are changed."""
    whsec = "whsec_" + base64.b64encode(b"k" * 32).decode()
    held = read_credentials(
        target("https://example.com/#token_env=T&header_env=X-Key:K&secret_env=S"),
        {"T": f" {SECRET}\n", "K": "v a l u e", "S": f"{whsec} plain-secret"},
    )
    assert held.headers == (("Authorization", f"Bearer {SECRET}"), ("X-Key", "v a l u e"))
    assert held.signing_keys == (b"k" * 32, b"plain-secret")


def test_user_and_password_are_sent_as_they_were_meant() -> None:
    """Percent-decoded, in UTF-8; also a key in the user's place."""
    held = read_credentials(target("https://us%2Fer:p%40ss:w%C3%B6rd@example.com/"), {})
    ((name, value),) = held.headers
    assert (name, base64.b64decode(value.removeprefix("Basic ")).decode()) == ("Authorization", "us/er:p@ss:wörd")
    assert held.redact("wrong: p@ss:wörd") == "wrong: ..."
    assert read_credentials(target("https://writekey@example.com/"), {}).redact("not writekey") == "not ..."


@pytest.mark.parametrize("option", ["token_env=V", "header_env=X-Key:V", "secret_env=V", "proxy_env=V"])
@pytest.mark.parametrize("value", [None, "", " ", f"{SECRET}\nX: y", f"{SECRET}ö"])
def test_a_variable_that_is_missing_or_odd_is_named_with_the_way_out(option: str, value: str | None) -> None:
    """Its name, never what it holds: a line feed would begin another header."""
    with pytest.raises(SinkUnusableError) as caught:
        read_credentials(target(f"https://example.com/#{option}"), {} if value is None else {"V": value})
    assert " V" in str(caught.value)
    assert "set it" in str(caught.value) or "mend it" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("secret_env", f"whsec_{SECRET}!"), ("proxy_env", f"ftp://u:{SECRET}@host"), ("proxy_env", SECRET)]
)
def test_a_value_of_the_wrong_form_is_not_shown(option: str, value: str) -> None:
    """Only that it is wrong."""
    with pytest.raises(SinkUnusableError) as caught:
        read_credentials(target(f"https://example.com/#{option}=V"), {"V": value})
    assert SECRET not in str(caught.value)


def test_the_longest_secret_is_hidden_first() -> None:
    """Or the end of one that begins with another would show; percent-encoded as well, as a URL in an answer has it."""
    held = read_credentials(
        target("https://me:p%2Fss%2Fword@example.com/#header_env=A:A&header_env=B:B"), {"A": "begin", "B": "begin-and-end"}
    )
    assert held.redact("begin-and-end, begin, p/ss/word, p%2Fss%2Fword") == "..., ..., ..., ..."


def test_what_is_hidden_is_hidden_in_all_its_forms() -> None:
    """As it is, percent-encoded, in Base64; also what the query and a secret path hold."""
    held = read_credentials(target(f"https://me:{SECRET}%25@example.com/T024BE7LD1234567/x?key={SECRET}%2B"), {})
    basic = base64.b64encode(f"me:{SECRET}%".encode()).decode()
    said = held.redact(f"{SECRET} {SECRET}% {SECRET}%25 {SECRET}+ {basic} T024BE7LD1234567 x")
    assert SECRET not in said.replace(f"{SECRET} ", "", 1)
    assert basic not in said
    assert "T024BE7LD1234567" not in said
