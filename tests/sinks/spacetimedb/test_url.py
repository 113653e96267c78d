"""Parsing of a SpacetimeDB sink's URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from pillarbox import ConfigurationError, TrackingEvent
from pillarbox.sinks import make_sink, redact_url
from pillarbox.sinks.spacetimedb.url import TOKEN_VARIABLE, parse_url

SECRET = "eyJ0.secret.part"  # noqa: S105 - not a real token


@pytest.mark.parametrize(
    ("url", "server", "path"),
    [
        ("spacetimedb://db.example/events", "http://db.example:3000", "/v1/database/events/call/record_tracking_events"),
        ("spacetimedb://127.0.0.1:1/e?function=f", "http://127.0.0.1:1", "/v1/database/e/call/f"),
        ("spacetimedb+https://db.example/my-db", "https://db.example:443", "/v1/database/my-db/call/record_tracking_events"),
        ("spacetimedb://[::1]:5/e?function=a%2Fb", "http://[::1]:5", "/v1/database/e/call/a%2Fb"),
    ],
)
def test_a_url_names_server_database_and_function(url: str, server: str, path: str) -> None:
    """With default ports."""
    settings = parse_url(url)
    assert (settings.server, settings.database_path("call", settings.function)) == (server, path)


def test_options_and_their_defaults() -> None:
    """All options with a number."""
    plain = parse_url("spacetimedb://h/d")
    assert (plain.connections, plain.timeout_s, plain.unconfirmed_max, plain.confirm_wait_s) == (2, 30.0, 256, 1.0)
    settings = parse_url("spacetimedb://h/d?connections=5&timeout=2.5&window=7&confirm_wait=0.02")
    assert (settings.connections, settings.timeout_s, settings.unconfirmed_max, settings.confirm_wait_s) == (5, 2.5, 7, 0.02)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("spacetimedb://h", "spacetimedb://host:port/database"),
        ("spacetimedb:///d", "spacetimedb://host:port/database"),
        ("spacetimedb://h:x/d", "spacetimedb://host:port/database"),
        ("spacetimedb://h/d/e", "spacetimedb://host:port/database"),
        ("spacetimedb://h/d?colour=red", "unknown sink option 'colour'"),
        ("spacetimedb://h/d?timeout=soon", "sink option timeout"),
        ("spacetimedb://h/d?connections=0", "a whole number from 1 to 64"),
        ("spacetimedb://h/d?token_file=/no/such/file", "/no/such/file"),
        ("spacetimedb://two%20words@h/d", "token"),
    ],
)
def test_an_error_names_the_part_that_is_wrong(url: str, message: str) -> None:
    """It shows nothing that may be secret."""
    with pytest.raises(ConfigurationError) as caught:
        parse_url(url)
    assert message in str(caught.value)
    assert "words" not in str(caught.value)


@pytest.mark.parametrize("origin", ["url", "file", "environment"])
def test_a_token_is_read_from_url_file_or_environment_and_never_shown(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a `repr` nor in the redacted URL."""
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET if origin == "environment" else "")
    url = {
        "url": f"spacetimedb://:{SECRET}@h/d",
        "file": f"spacetimedb://h/d?token_file={file}",
        "environment": "spacetimedb://h/d",
    }[origin]
    settings = parse_url(url)
    assert settings.token is not None
    assert settings.token.auth_header() == {"Authorization": f"Bearer {SECRET}"}
    assert SECRET not in f"{settings} {settings!r} {settings.token}"
    assert SECRET not in redact_url(url)
    assert SECRET not in repr(make_sink(url, TrackingEvent))
