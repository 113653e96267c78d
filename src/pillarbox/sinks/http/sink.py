"""The sink: post, classify, check.

Only the transport of httpx is used, not its client: that one logs every URL, query and all, follows cookies and reads proxies
from the environment. Nothing is retried here: the engine does that.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import ssl
from base64 import b64encode
from importlib.metadata import version
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import httpx
import msgspec

from pillarbox.clock import SystemClock
from pillarbox.errors import SinkUnusable
from pillarbox.sinks.base import (
    Answer,
    Batch,
    Delivered,
    Finding,
    Misconfigured,
    Partly,
    Refused,
    Retry,
    Traits,
)
from pillarbox.sinks.http.encoding import Bodies, Body
from pillarbox.sinks.http.responses import ANSWER_BYTES_MAX, REMEDIES, Reply, classify, needs_body
from pillarbox.sinks.http.url import FORMATS, Credentials, Target, parse, read_credentials

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pillarbox.clock import Clock

_CONNECT_MAX_S: Final = 10.0  # of a call's time, for a server that does not even take the connection
_IDLE_MAX_S: Final = 4.0  # after which an unused connection is closed: many servers do so themselves after five
_TEXT_MAX: Final = 200
_UNTOLD: Final = frozenset({400, 404, 405, 422, 501})  # answers to OPTIONS that say nothing of POST


class HttpSink:
    """Posts each batch to one URL."""

    def __init__(self, url: str, event_type: type[msgspec.Struct], clock: Clock | None = None) -> None:
        names = {field.name: field.encode_name for field in msgspec.structs.fields(event_type)}
        self._target = parse(url, names)
        self._bodies = Bodies(self._target, event_type)
        self._clock = clock or SystemClock()
        self._url = httpx.URL(self._target.url)
        self._credentials = Credentials()
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._places = asyncio.Semaphore()
        self._headers = (
            ("User-Agent", f"pillarbox/{version('pillarbox')}"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
        )
        self.traits = Traits(
            deduplicates_by="batch_id",
            survives=self._target.survives,
            concurrent=True,
            records_max=self._target.records_max,
            bytes_max=self._target.bytes_max,
        )

    def __repr__(self) -> str:
        return f"HttpSink({self._target.host})"

    async def open(self) -> None:
        """Read the variables that the URL names and make ready to connect; raises `SinkUnusable` where one is missing."""
        self._ready()

    def _ready(self) -> httpx.AsyncHTTPTransport:
        if self._transport is None:
            self._credentials = read_credentials(self._target, os.environ)
            proxy = self._credentials.proxy
            # The pool has no limit of its own: who waits in it and is cancelled takes a place for good (encode/httpcore#1093).
            self._places = asyncio.Semaphore(self._target.connections)
            self._transport = httpx.AsyncHTTPTransport(
                verify=_trust(self._target),
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=self._target.connections, keepalive_expiry=_IDLE_MAX_S
                ),
                proxy=httpx.Proxy(proxy) if proxy else None,
            )
        return self._transport

    def prepare(self, batch: Batch) -> None:
        """Make the body ahead of its turn."""
        batch.prepared = self._bodies.make(batch)

    async def deliver(self, batch: Batch) -> Answer:
        """Post the batch, once."""
        body = batch.prepared
        if not isinstance(body, Body):
            self.prepare(batch)
            body = batch.prepared
        if not body.indexes:
            return Partly(body.refused, 0)
        answer = await self._call("POST", self._headers_for(batch, body.content), body)
        if not body.refused:
            return answer
        match answer:
            case Delivered(accepted, duplicates):
                return Partly(body.refused, accepted, duplicates)
            case Partly(refused, accepted, duplicates):
                return Partly(body.refused | refused, accepted, duplicates)
            case Refused():
                return Partly(body.refused)  # the others are sent by themselves, and judged then
        return answer

    def _headers_for(self, batch: Batch, content: bytes) -> list[tuple[str, str]]:
        self._ready()
        target = self._target
        # Ids of ours are letters, digits, `-` and `:`; a file that somebody else named may have any.
        key = quote(batch.id, safe=":", errors="surrogateescape")
        headers = [
            *self._headers,
            *self._credentials.headers,
            ("Content-Type", FORMATS[target.format]),
            ("Idempotency-Key", key),
        ]
        if target.compress != "none":
            headers.append(("Content-Encoding", target.compress))
        if self._credentials.keys:
            headers += _signature(key, self._clock.micros() // 10**6, content, self._credentials.keys)
        return headers

    async def _call(self, method: str, headers: list[tuple[str, str]], body: Body) -> Answer:
        reply = await self._reply(method, headers, body.content)
        if not isinstance(reply, Reply):
            return reply
        now_s = self._clock.micros() / 1e6
        return classify(reply, body.indexes, now_s, self._credentials.hide, counts=self._target.counts)

    async def _reply(self, method: str, headers: list[tuple[str, str]], content: bytes) -> Reply | Retry | Misconfigured:
        """What the server answers, within `timeout` in all, or why nothing can be made of it."""
        head: Reply | None = None
        try:
            transport = self._ready()
            async with asyncio.timeout(self._target.timeout_s), self._places:
                response = await transport.handle_async_request(self._request(method, headers, content))
                try:
                    head = _head(response)
                    body, whole = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            problem: Retry | Misconfigured = Retry(
                f"{self._target.host} gave no whole answer within {self._target.timeout_s:g} s"
            )
        except httpx.HTTPError as error:
            problem = self._fault(error)
            if isinstance(problem, Misconfigured):
                await self.close()  # so that a ca_file that is mended is read again
        else:
            return head._replace(body=body, whole=whole and not response.headers.get("content-encoding"))
        # A status that speaks for itself counts, also where the text behind it was cut off.
        return problem if head is None or needs_body(head.status) else head

    def _request(self, method: str, headers: list[tuple[str, str]], content: bytes) -> httpx.Request:
        limits = {"connect": min(_CONNECT_MAX_S, self._target.timeout_s), "read": None, "write": None, "pool": None}
        return httpx.Request(method, self._url, headers=headers, content=content, extensions={"timeout": limits})

    def _fault(self, error: httpx.HTTPError) -> Retry | Misconfigured:
        """What a call that got no answer means. Only what the system said is repeated, never what we were about to send."""
        host, causes = self._target.host, list(_causes(error))
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Misconfigured(
                    f"the certificate of {host} is not accepted ({cause.verify_message}): mend it, or name the authority that "
                    "gave it with ca_file= in the sink's options"
                )
        said = next((str(cause) for cause in reversed(causes) if isinstance(cause, OSError) and str(cause)), "")
        match error:
            case httpx.ConnectTimeout():
                return Retry(f"{host} takes no connection")
            case httpx.ConnectError():
                return Retry(f"cannot connect to {host}: {said[:_TEXT_MAX] or 'no reason is known'}")
            case httpx.ProxyError() if str(error).startswith("407"):
                return Misconfigured(f"407: {REMEDIES[407]}")
            case httpx.ProxyError():
                return Retry(f"the proxy does not lead to {host}: {self._credentials.hide(str(error))[:_TEXT_MAX]}")
            case httpx.RemoteProtocolError():
                return Retry(f"{host} cut the connection, or answered what is not HTTP")
        return Retry(f"the connection to {host} broke: {said[:_TEXT_MAX] or type(error).__name__}")

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """An answer with a status of 2xx is the confirmation."""
        return len(batches)

    async def check(self) -> Iterable[Finding]:
        """Connect, and ask for the options of the URL: that sends no event, and a server that knows no OPTIONS says so."""
        try:
            self._ready()
        except SinkUnusable as error:
            return [Finding(ok=False, text=str(error))]
        findings = [Finding(ok=True, text=self._proof())]
        if self._target.host.startswith("http:") and (self._credentials.headers or self._credentials.proxy):
            findings.append(
                Finding(ok=True, text="what proves who calls goes over http, for everybody in between to read: use https")
            )
        reply = await self._reply("OPTIONS", [*self._headers, *self._credentials.headers], b"")
        if not isinstance(reply, Reply):
            return [*findings, Finding(ok=False, text=reply.reason)]
        host, status = self._target.host, reply.status
        if reply.allow and "POST" not in reply.allow.upper():
            return [*findings, Finding(ok=False, text=f"{host} takes {reply.allow} at this path, and no POST: mend the URL")]
        if 200 <= status < 300:
            return [*findings, Finding(ok=True, text=f"{host} answers {status}")]
        if status in _UNTOLD:
            text = f"{host} answers {status} to OPTIONS: many servers do at a path that takes POST; the first batch will tell"
            return [*findings, Finding(ok=True, text=text)]
        answer = classify(reply, (), self._clock.micros() / 1e6, self._credentials.hide)
        text = answer.reason if isinstance(answer, (Retry, Misconfigured)) else f"{host} answers {status}"
        return [*findings, Finding(ok=False, text=text)]

    def _proof(self) -> str:
        target = self._target
        sent = [f"the token in {target.token_env}"] if target.token_env else ["user and password"] if target.user else []
        sent += [f"{header} from {variable}" for header, variable in target.header_env]
        sent += [f"a signature with the secret in {target.secret_env}"] if target.secret_env else []
        return (
            "sends " + ", ".join(sent)
            if sent
            else "sends nothing that proves who calls: token_env, header_env and secret_env do"
        )

    async def close(self) -> None:
        """Close all connections."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()


def _trust(target: Target) -> ssl.SSLContext:
    """Whom to believe that the server is who it says; raises `SinkUnusable` for a file that holds no certificates."""
    if target.host.startswith("http:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not asked
    if target.ca_file is None:
        return httpx.create_ssl_context()
    try:
        return ssl.create_default_context(cafile=target.ca_file)
    except OSError as error:
        raise SinkUnusable(f"ca_file {target.ca_file} cannot be used ({error}): name a file with certificates in PEM") from None


def _signature(key: str, seconds: int, content: bytes, secrets: Sequence[bytes]) -> list[tuple[str, str]]:
    """The three headers of Standard Webhooks 1.0, over the body as it is sent; one signature for each secret."""
    signed = f"{key}.{seconds}.".encode() + content
    signatures = (b64encode(hmac.digest(secret, signed, "sha256")).decode() for secret in secrets)
    return [
        ("webhook-id", key),
        ("webhook-timestamp", str(seconds)),
        ("webhook-signature", " ".join(f"v1,{signature}" for signature in signatures)),
    ]


def _head(response: httpx.Response) -> Reply:
    headers = response.headers
    return Reply(
        response.status_code,
        headers.get("content-type", ""),
        headers.get("retry-after", ""),
        headers.get("date", ""),
        headers.get("location", ""),
        headers.get("allow", ""),
    )


async def _read(response: httpx.Response) -> tuple[bytes, bool]:
    """The answer's body, at most `ANSWER_BYTES_MAX`, and whether that is all of it."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            return bytes(body[:ANSWER_BYTES_MAX]), False
    return bytes(body), True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what is behind it, the deepest last."""
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
