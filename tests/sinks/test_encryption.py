"""Certificates and plain http, for each sink that speaks over a network."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
import pytest

from pillarbox import TrackingEvent
from pillarbox.errors import SinkUnusableError
from pillarbox.sinks import make_sink
from pillarbox.sinks.base import Batch, CheckResult, DeliveryResult, Misconfigured, is_loopback
from tests.conftest import event
from tests.sinks.http_server import Server

URLS = ["https://localhost:{port}/events", "spacetimedb+https://localhost:{port}/events"]


def use(url: str) -> tuple[DeliveryResult, str, list[CheckResult]]:
    """The result of a delivery, the error of `open`, and the results of a check."""

    async def run() -> tuple[DeliveryResult, str, list[CheckResult]]:
        sink = make_sink(url, TrackingEvent)
        opened = ""
        try:
            try:
                await sink.open()
            except (SinkUnusableError, OSError) as error:
                opened = f"{type(error).__name__}: {error}"
            result = await sink.deliver(Batch("sealed-1", [msgspec.json.encode(event(1))]))
            return result, opened, list(await sink.check())
        finally:
            await sink.close()

    return asyncio.run(run())


@pytest.mark.parametrize("url", URLS)
def test_an_untrusted_certificate_is_a_misconfiguration(tls_server: Server, url: str) -> None:
    """No retry makes it trusted: a person must act, and the message says how."""
    result, opened, checked = use(url.format(port=tls_server.port))
    assert isinstance(result, Misconfigured), result
    assert "is not trusted (self-signed certificate" in result.reason
    assert "ca_file=" in result.reason or "SSL_CERT_FILE" in result.reason
    assert not checked[-1].ok
    assert "is not trusted" in checked[-1].message
    assert opened == "" or opened.startswith("SinkUnusableError: the certificate of")


def test_spacetimedb_trusts_the_authority_that_the_environment_names(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names this variable."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    result, _, _ = use(URLS[1].format(port=tls_server.port))
    assert isinstance(result, Misconfigured)
    assert "not trusted" not in result.reason  # but this is no SpacetimeDB


@pytest.mark.parametrize(
    "url",
    [
        "http://0.0.0.0:{port}/#token_env=TOKEN_OF_TEST",
        "http://me:password@0.0.0.0:{port}/",
        "spacetimedb://:some-token@0.0.0.0:{port}/events",
    ],
)
def test_credentials_over_plain_http_are_warned_of(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, by the log and by a check; not where they cross no network."""
    monkeypatch.setenv("TOKEN_OF_TEST", "some-token")
    with Server() as server, caplog.at_level(logging.WARNING, logger="pillarbox"):
        for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):  # noqa: S104 - it stands for another machine here
            caplog.clear()
            _, _, checked = use(url.format(port=server.port).replace("0.0.0.0", host))  # noqa: S104
            lines = [record.getMessage() for record in caplog.records if "the network can read" in record.getMessage()]
            assert len(lines) == warned
            assert "some-token" not in caplog.text
            assert not warned or any("the network can read" in message for _, message in checked)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("app.localhost.", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::1%lo", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("", False),
    ],
)
def test_a_loopback_address_is_recognized(host: str, expected: bool) -> None:
    """By its text; nothing is resolved."""
    assert is_loopback(host) is expected
