"""The HTTP sink: sends requests, classifies responses and checks the destination.

It uses only the transport of httpx, because the httpx client logs every URL with its query, keeps cookies and reads proxies
from the environment. It retries nothing; delivery does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import ssl
from base64 import b64encode
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import httpx
import msgspec

from pillarbox.clock import SystemClock
from pillarbox.errors import SinkUnusableError
from pillarbox.redaction import excerpt
from pillarbox.sinks.base import (
    Batch,
    CheckResult,
    Delivered,
    DeliveryResult,
    Misconfigured,
    PartialFailure,
    Rejected,
    Retry,
    SinkCapabilities,
    is_loopback,
)
from pillarbox.sinks.http.encoding import BodyEncoder, EncodedBody
from pillarbox.sinks.http.responses import REMEDIES, RESPONSE_BYTES_MAX, HttpResponse, classify_response, needs_body
from pillarbox.sinks.http.url import FORMATS, Credentials, HttpSettings, parse_url, read_credentials

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pillarbox.clock import Clock

log = logging.getLogger("pillarbox")

_PLAIN_HTTP_WARNING: Final = "credentials are sent over http, where the network can read them: use https"
_CONNECT_TIMEOUT_MAX_S: Final = 10.0  # part of the request's timeout, for a server that does not accept the connection
_KEEPALIVE_S: Final = 4.0  # an idle connection is closed before the server does it; many servers do so after 5 s
_EXCERPT_CHARS_MAX: Final = 200
_INCONCLUSIVE: Final = frozenset({400, 404, 405, 422, 501})  # statuses of responses to OPTIONS that say nothing about POST

# httpx imports these modules at the first request. A delivery thread must not import: if the process forks or gevent replaces
# its locks meanwhile, it would wait for the import lock forever.
for _name in ("httpcore", "anyio._backends._asyncio", "sniffio"):
    with contextlib.suppress(ImportError):  # another version of httpx may need none of it
        import_module(_name)


class HttpSink:
    """Sends each batch to one URL with POST."""

    def __init__(self, url: str, event_type: type[msgspec.Struct], clock: Clock | None = None) -> None:
        names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
        self._settings = parse_url(url, names)
        self._encoder = BodyEncoder(self._settings, event_type)
        self._clock = clock or SystemClock()
        self._url = httpx.URL(self._settings.url)
        self._credentials = Credentials()
        self._connect_timeout_s = min(_CONNECT_TIMEOUT_MAX_S, self._settings.timeout_s)
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._connection_slots = asyncio.Semaphore()
        self._plain_http_warning_logged = False
        self._headers = (
            ("User-Agent", f"pillarbox/{version('pillarbox')}"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
        )
        self.capabilities = SinkCapabilities(
            deduplicates_by="batch_id",
            survives=self._settings.survives,
            concurrent=True,
            records_max=self._settings.records_max,
            bytes_max=self._settings.bytes_max,
        )

    def __repr__(self) -> str:
        return f"HttpSink({self._settings.origin})"

    async def open(self) -> None:
        """Read the secrets that the URL names and create the transport; it connects with the first request.

        Raises:
            SinkUnusableError: a secret is missing, or a secret or certificate file cannot be used.
        """
        self._ensure_transport()
        if self._sends_credentials_unencrypted() and not self._plain_http_warning_logged:
            self._plain_http_warning_logged = True
            log.warning("%s: %s", self._settings.origin, _PLAIN_HTTP_WARNING)

    def _sends_credentials_unencrypted(self) -> bool:
        return self._settings.origin.startswith("http:") and bool(self._credentials.headers) and not is_loopback(self._url.host)

    def _ensure_transport(self) -> httpx.AsyncHTTPTransport:
        if self._transport is None:
            self._credentials = read_credentials(self._settings, os.environ)
            proxy = self._credentials.proxy_url
            # Not the pool's own limit, because a cancelled waiter leaks its slot in the pool (encode/httpcore#1093).
            self._connection_slots = asyncio.Semaphore(self._settings.connections)
            self._transport = httpx.AsyncHTTPTransport(
                verify=_ssl_context(self._settings),
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=self._settings.connections, keepalive_expiry=_KEEPALIVE_S
                ),
                proxy=httpx.Proxy(proxy) if proxy else None,
            )
        return self._transport

    def prepare(self, batch: Batch) -> None:
        """Encode the body."""
        batch.prepared = self._encoder.encode(batch)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Send the batch in one request."""
        body = batch.prepared
        if not isinstance(body, EncodedBody):
            self.prepare(batch)
            body = batch.prepared
        if not body.indexes:
            return PartialFailure(body.rejected, 0)
        result = await self._post(self._request_headers(batch, body.content), body)
        if not body.rejected:
            return result
        match result:
            case Delivered(accepted, duplicates):
                return PartialFailure(body.rejected, accepted, duplicates)
            case PartialFailure(rejected, accepted, duplicates):
                return PartialFailure(body.rejected | rejected, accepted, duplicates)
            case Rejected():
                return PartialFailure(body.rejected)  # the other records are sent again without these
        return result

    def _request_headers(self, batch: Batch, content: bytes) -> list[tuple[str, str]]:
        self._ensure_transport()
        settings = self._settings
        # Our batch ids consist of letters, digits, `-` and `:`; a file from another program may have any name.
        key = quote(batch.id, safe=":", errors="surrogateescape")
        headers = [
            *self._headers,
            *self._credentials.headers,
            ("Content-Type", FORMATS[settings.format]),
            ("Idempotency-Key", key),
        ]
        if settings.compress != "none":
            headers.append(("Content-Encoding", settings.compress))
        if self._credentials.signing_keys:
            headers += signature_headers(key, self._clock.micros() // 10**6, content, self._credentials.signing_keys)
        return headers

    async def _post(self, headers: list[tuple[str, str]], body: EncodedBody) -> DeliveryResult:
        response = await self._exchange("POST", headers, body.content)
        if not isinstance(response, HttpResponse):
            return response
        now_s = self._clock.micros() / 1e6
        return classify_response(
            response, body.indexes, now_s, self._credentials.redact, reads_body=self._settings.reads_response_body
        )

    async def _exchange(
        self, method: str, headers: list[tuple[str, str]], content: bytes
    ) -> HttpResponse | Retry | Misconfigured:
        """Send a request and read the response within `timeout_s`; return the response or why there is none."""
        head: HttpResponse | None = None
        try:
            transport = self._ensure_transport()
            async with asyncio.timeout(self._settings.timeout_s), self._connection_slots:
                response = await transport.handle_async_request(self._build_request(method, headers, content))
                try:
                    head = _response_head(response)
                    body, is_complete = await _read_body(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            failure: Retry | Misconfigured = Retry(
                f"{self._settings.origin} sent no complete response within {self._settings.timeout_s:g} s"
            )
        except httpx.HTTPError as error:
            failure = self._classify_error(error)
            if isinstance(failure, Misconfigured):
                await self.close()  # so that a corrected ca_file is read again
        else:
            return head._replace(body=body, is_complete=is_complete and not response.headers.get("content-encoding"))
        # A status that needs no body counts, even if the body was cut off.
        return failure if head is None or needs_body(head.status) else head

    def _build_request(self, method: str, headers: list[tuple[str, str]], content: bytes) -> httpx.Request:
        limits = {"connect": self._connect_timeout_s, "read": None, "write": None, "pool": None}
        return httpx.Request(method, self._url, headers=headers, content=content, extensions={"timeout": limits})

    def _classify_error(self, error: httpx.HTTPError) -> Retry | Misconfigured:
        """Map a request that failed without a response to a result. Quotes system errors only, never the request."""
        host, causes = self._settings.origin, list(_cause_chain(error))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                problem = self._quote(cause.verify_message)
                return Misconfigured(
                    f"the certificate of {host} is not trusted ({problem}): replace it, or name the file of the "
                    "authority that issued it with ca_file= in the sink's options"
                )
        reason = next((str(cause) for cause in reversed(causes) if isinstance(cause, OSError) and str(cause)), "")
        match error:
            case httpx.ConnectTimeout():
                return Retry(f"{host} does not accept a connection within {self._connect_timeout_s:g} s")
            case httpx.ConnectError():
                return Retry(f"cannot connect to {host}: {self._quote(reason) or 'reason unknown'}")
            case httpx.ProxyError() if str(error).startswith("407"):
                return Misconfigured(f"407: {REMEDIES[407]}")
            case httpx.ProxyError():
                return Retry(f"the proxy cannot connect to {host}: {self._quote(str(error))}")
            case httpx.RemoteProtocolError():
                return Retry(f"{host} closed the connection or responded with something other than HTTP")
        return Retry(f"the connection to {host} broke: {self._quote(reason) or type(error).__name__}")

    def _quote(self, text: str) -> str:
        """Quote a text from the network or the system, without secrets."""
        return excerpt(text, _EXCERPT_CHARS_MAX, self._credentials.redact)

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Confirm all: a 2xx response is the confirmation."""
        return len(batches)

    async def check(self) -> Iterable[CheckResult]:
        """Send an OPTIONS request, which carries no event, and judge the response."""
        try:
            self._ensure_transport()
        except SinkUnusableError as error:
            return [CheckResult(ok=False, message=str(error))]
        results = [CheckResult(ok=True, message=self._describe_credentials())]
        if self._settings.origin.startswith("http:") and (self._credentials.headers or self._credentials.proxy_url):
            results.append(CheckResult(ok=True, message=_PLAIN_HTTP_WARNING))
        response = await self._exchange("OPTIONS", [*self._headers, *self._credentials.headers], b"")
        if not isinstance(response, HttpResponse):
            return [*results, CheckResult(ok=False, message=response.reason)]
        host, status = self._settings.origin, response.status
        if response.allow and "POST" not in response.allow.upper():
            problem = f"{host} accepts {self._quote(response.allow)} at this path, but not POST: correct the URL"
            return [*results, CheckResult(ok=False, message=problem)]
        if 200 <= status < 300:
            return [*results, CheckResult(ok=True, message=f"{host} responds with {status}")]
        if status in _INCONCLUSIVE:
            text = f"{host} responds with {status} to OPTIONS, as many servers do where POST works; the first batch will show"
            return [*results, CheckResult(ok=True, message=text)]
        result = classify_response(response, (), self._clock.micros() / 1e6, self._credentials.redact)
        text = result.reason if isinstance(result, (Retry, Misconfigured)) else f"{host} responds with {status}"
        return [*results, CheckResult(ok=False, message=text)]

    def _describe_credentials(self) -> str:
        settings = self._settings
        sent = (
            [f"the token in {settings.token_env}"] if settings.token_env else ["user and password"] if settings.userinfo else []
        )
        sent += [f"{header} from {variable}" for header, variable in settings.header_env]
        sent += [f"a signature with the secret in {settings.secret_env}"] if settings.secret_env else []
        return "sends " + ", ".join(sent) if sent else "sends no credentials; token_env, header_env and secret_env add them"

    async def close(self) -> None:
        """Close all connections."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()


def _ssl_context(settings: HttpSettings) -> ssl.SSLContext:
    """Return the TLS configuration; raises `SinkUnusableError` for a `ca_file` that holds no certificates."""
    if settings.origin.startswith("http:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # required by httpx and not used
    if settings.ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ValueError) as error:
        raise SinkUnusableError(
            f"ca_file {settings.ca_file} cannot be read ({error}): name a file with certificates in PEM format"
        ) from None


def signature_headers(key: str, seconds: int, content: bytes, secrets: Sequence[bytes]) -> list[tuple[str, str]]:
    """Return the three headers of Standard Webhooks 1.0 for a body as it is sent, with one signature for each secret."""
    signed = f"{key}.{seconds}.".encode() + content
    signatures = (b64encode(hmac.digest(secret, signed, "sha256")).decode() for secret in secrets)
    return [
        ("webhook-id", key),
        ("webhook-timestamp", str(seconds)),
        ("webhook-signature", " ".join(f"v1,{signature}" for signature in signatures)),
    ]


def _response_head(response: httpx.Response) -> HttpResponse:
    headers = response.headers
    return HttpResponse(
        response.status_code,
        headers.get("content-type", ""),
        headers.get("retry-after", ""),
        headers.get("date", ""),
        headers.get("location", ""),
        headers.get("allow", ""),
    )


async def _read_body(response: httpx.Response) -> tuple[bytes, bool]:
    """Return at most `RESPONSE_BYTES_MAX` of the body, and whether that is the whole body."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > RESPONSE_BYTES_MAX:
            return bytes(body[:RESPONSE_BYTES_MAX]), False
    return bytes(body), True


def _cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the root cause last."""
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
