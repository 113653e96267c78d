"""The SpacetimeDB sink: binds to the module, sends calls, classifies responses, and confirms batches."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.event import without_post_init
from pillarbox.redaction import TEXT_BYTES_MAX, excerpt
from pillarbox.sinks import base
from pillarbox.sinks.base import (
    Batch,
    CheckResult,
    Delivered,
    DeliveryResult,
    Misconfigured,
    PartialFailure,
    Rejected,
    Rejection,
    Retry,
    SinkCapabilities,
    UnconfirmedError,
)
from pillarbox.sinks.spacetimedb.encoding import RowEncoder
from pillarbox.sinks.spacetimedb.pool import (
    ConnectionPool,
    PooledConnection,
    TransportError,
    UntrustedCertificateError,
    group_by_connection,
)
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse, classify_response, parse_version
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, SchemaError
from pillarbox.sinks.spacetimedb.url import PLAIN_HTTP_WARNING, TOKEN_VARIABLE, parse_url
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pillarbox.clock import Clock

log = logging.getLogger("pillarbox")

CALL_BYTES_MAX: Final = 2 * 2**20  # the limit of servers 1.2.0 and 2.8.3; one byte more is a 413
# Any identity may run this query; a 2.x server responds once everything before it is durable.
_CONFIRMING_QUERY: Final = b"SELECT COUNT(*) AS n FROM st_client"
_CONFIRM_DELAY_MAX_S: Final = 0.1  # extra wait, so that one ping confirms several batches
_CONFIRM_WAIT_MAX_S: Final = 10.0  # the longest wait of one `confirm`
_NAMES_CHARS_MAX: Final = 1000  # characters of the list of the module's functions in a message
_BAD_VALUE_CALLS_MAX: Final = 3  # calls in a row rejected for a value that matches the schema; then delivery stops
_SCHEMA_ERRORS: Final = frozenset({400, 401, 403, 404, 415})  # statuses after which the schema may have changed


class _ModuleBinding(NamedTuple):
    """What `open` learned about the module, and the encoder for its function."""

    schema_text: bytes  # the schema as it was read, to recognize a change
    encoder: RowEncoder
    server_version: str
    confirms_by_query: bool  # whether a query waits until earlier calls are durable


class _PreparedCall(NamedTuple):
    """The encoded call for a batch."""

    binding: _ModuleBinding
    body: bytes
    indexes: Sequence[int]
    rejected: dict[int, Rejection]


class _SentCall(NamedTuple):
    """The connection that carried the response to a call, and when it arrived."""

    connection: PooledConnection
    http_connection: Any
    sent_at_s: float


class SpacetimeDbSink:
    """Calls one function of a SpacetimeDB database with each batch."""

    def __init__(self, url: str, event_type: type[msgspec.Struct], clock: Clock | None = None) -> None:
        self._url = url
        self._settings = parse_url(url)
        self._event_type = event_type
        self._decoder = msgspec.json.Decoder(without_post_init(event_type))
        self._clock = clock or SystemClock()
        self._token_log = StateLog(self._clock)
        self.capabilities = SinkCapabilities(
            deduplicates_by="event_id",
            survives="power",
            needs_confirmation=True,
            unconfirmed_max=self._settings.unconfirmed_max,
            concurrent=True,
            combines_files=True,
        )
        self._pool: ConnectionPool | None = None
        self._binding: _ModuleBinding | None = None
        self._unconfirmed: dict[str, list[_SentCall]] = {}  # accepted calls by batch id
        self._unconfirmable: set[str] = set()  # accepted batches whose connections were closed
        self._bad_value_calls = 0  # calls in a row that were rejected for a value
        self._token_warning_logged = False
        self._plain_http_warning_logged = False

    async def open(self) -> None:
        """Connect and read the schema; raises `SinkUnusableError` for a misconfiguration."""
        if self._settings.token is None and not self._token_warning_logged:
            self._token_warning_logged = True
            log.warning(
                "%s: no token is set, so the server gives each call a new anonymous identity; "
                "set %s, or token_file= in the sink's URL",
                self._settings.server,
                TOKEN_VARIABLE,
            )
        if self._settings.sends_token_unencrypted and not self._plain_http_warning_logged:
            self._plain_http_warning_logged = True
            log.warning("%s: %s", self._settings.server, PLAIN_HTTP_WARNING)
        result = await self._bind_module()
        if isinstance(result, Misconfigured):
            raise SinkUnusableError(result.reason)
        if isinstance(result, Retry):
            raise ConnectionError(result.reason)

    def _pick_connection(self) -> PooledConnection:
        if self._pool is None:
            self._pool = ConnectionPool(self._settings)
        return self._pool.pick()

    async def _request(self, method: str, path: str, content: bytes | None = None) -> SpacetimeDbResponse:
        connection = self._pick_connection()
        async with connection.lock:
            return await connection.request(method, path, content)

    async def _bind_module(self) -> _ModuleBinding | Misconfigured | Retry:
        """Read the version and the schema, and compare the event type with the function."""
        self._binding = None
        await self._reload_token()
        settings = self._settings
        try:
            health = await self._request("GET", "/v1/health")
            response = await self._request("GET", f"{settings.database_path('schema')}?version=9")
        except TransportError as error:
            return _failure_of(error)
        version = parse_version(health) or "unknown version"
        if response.status != 200 or response.is_html:
            result = classify_response(response, settings.function, (), "nothing")
            if isinstance(result, (Misconfigured, Retry)) and (response.status != 400 or response.is_html):
                return result
            return Misconfigured(_unknown_server_message(response, version))
        try:
            schema = DatabaseSchema(response.body)
        except SchemaError:
            return Misconfigured(_unknown_server_message(response, version))
        function = schema.functions.get(settings.function)
        if function is None:
            names = excerpt(", ".join(sorted(schema.functions)), _NAMES_CHARS_MAX, response.redact) or "none"
            return Misconfigured(
                f"the module of {settings.database} has no function {settings.function} (its functions: {names}): "
                "publish a module that has it, or name another function with ?function="
            )
        try:
            encoder = RowEncoder(schema, function, self._event_type)
        except SchemaError as error:
            return Misconfigured(f"{self._event_type.__name__} does not match {settings.function}: {error}")
        if encoder.mismatches:
            problems = "; ".join(f"{mismatch.field}: {mismatch.problem}" for mismatch in encoder.mismatches)
            problems = excerpt(problems, TEXT_BYTES_MAX, response.redact)
            return Misconfigured(f"{self._event_type.__name__} does not match {settings.function}: {problems}")
        self._binding = _ModuleBinding(response.body, encoder, version, confirms_by_query=_major_version(version) >= 2)
        return self._binding

    async def _reload_token(self) -> None:
        """Read the token again, so that a corrected token file needs no restart."""
        try:
            parsed = parse_url(self._url)
        except ConfigurationError as error:
            if self._token_log.is_new_problem(str(error)):
                log.warning("%s: %s", self._settings.server, error)
            return
        self._token_log.is_over()
        if (parsed.token and parsed.token.auth_header()) != (self._settings.token and self._settings.token.auth_header()):
            self._settings = parsed
            await self.close()

    def prepare(self, batch: Batch) -> None:
        """Encode the call."""
        if self._binding is not None:
            batch.prepared = self._prepare_call(batch, self._binding)

    def _prepare_call(self, batch: Batch, binding: _ModuleBinding) -> _PreparedCall:
        events, indexes, rejected = base.decode_records(batch, self._decoder)
        body, indexes = binding.encoder.encode_arguments(events, indexes, rejected)
        return _PreparedCall(binding, body, indexes, rejected)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Call the function. An accepted batch is durable only once it is confirmed."""
        binding = self._binding or await self._bind_module()
        if not isinstance(binding, _ModuleBinding):
            return binding
        call, batch.prepared = batch.prepared, None
        if not isinstance(call, _PreparedCall) or call.binding is not binding:
            call = self._prepare_call(batch, binding)
        if not call.indexes:
            return PartialFailure(call.rejected, 0)
        if len(call.body) > CALL_BYTES_MAX:
            return Rejected(Rejection("too_large", f"the call has {len(call.body)} bytes; the server accepts {CALL_BYTES_MAX}"))
        if ":" not in batch.id:
            self._unconfirmed.pop(batch.id, None)  # an earlier attempt with the batch does not count any more
            self._unconfirmable.discard(batch.id)
        try:
            response, sent = await self._send_call(call)
        except TransportError as error:
            return _failure_of(error)
        result = classify_response(response, self._settings.function, call.indexes, binding.encoder.returns)
        if isinstance(result, Delivered):
            self._unconfirmed.setdefault(batch.id.partition(":")[0], []).append(sent)
            self._bad_value_calls = 0
            if call.rejected:
                return PartialFailure(call.rejected, result.accepted, result.duplicates)
        elif response.status in _SCHEMA_ERRORS:
            return await self._recheck_schema(binding, result, response)
        return result

    async def _send_call(self, call: _PreparedCall) -> tuple[SpacetimeDbResponse, _SentCall]:
        connection = self._pick_connection()
        async with connection.lock:
            response = await connection.request(
                "POST", self._settings.database_path("call", self._settings.function), call.body
            )
            return response, _SentCall(connection, connection.last_used, self._clock.monotonic())

    async def _recheck_schema(
        self, before: _ModuleBinding, result: DeliveryResult, response: SpacetimeDbResponse
    ) -> DeliveryResult:
        """Read the schema again after an error that a changed module may have caused; retry if it has changed."""
        binding = await self._bind_module()
        if not isinstance(binding, _ModuleBinding):
            return result if isinstance(binding, Retry) and isinstance(result, Misconfigured) else binding
        if binding.schema_text != before.schema_text:
            log.info("%s: the module's schema has changed; the sink uses the new schema", self._settings.server)
            return Retry("the module's schema has changed; the sink uses the new schema")
        if isinstance(result, PartialFailure):
            self._bad_value_calls += 1
            if self._bad_value_calls > _BAD_VALUE_CALLS_MAX:
                return Misconfigured(
                    f"{self._bad_value_calls} calls in a row were rejected for a value ({response.excerpt}): "
                    "compare the event type with the module"
                )
        return result

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Confirm the batches that the server has made durable, on the connections that accepted them.

        On a 2.x server a query confirms all batches. On a 1.x server a ping confirms those that are at least
        `confirm_wait_s` old; it waits for the first of them.
        """
        binding = self._binding
        by_query = binding is not None and binding.confirms_by_query
        ids = [batch.id for batch in batches]
        if not by_query:
            ids = await self._wait_until_due(ids)
        if self._unconfirmable.intersection(ids):
            self._unconfirmable.difference_update(batch.id for batch in batches)
            raise UnconfirmedError("the connections that accepted the batches were closed")
        calls = [(call.connection, call.http_connection) for batch_id in ids for call in self._unconfirmed.get(batch_id, ())]
        try:
            for connection, transports in group_by_connection(calls).items():
                await self._confirm_connection(connection, transports, by_query=by_query)
        except (UnconfirmedError, SinkUnusableError):
            for batch in batches:
                self._unconfirmed.pop(batch.id, None)
            raise
        for batch_id in ids:
            self._unconfirmed.pop(batch_id, None)
        return len(ids)

    async def _wait_until_due(self, ids: list[str]) -> list[str]:
        """Wait until the first batch is old enough, at most a while; return the ids that are old enough."""
        wait = self._settings.confirm_wait_s
        delay = min(_CONFIRM_DELAY_MAX_S, wait / 10)
        first = max((call.sent_at_s for call in self._unconfirmed.get(ids[0], ())), default=-wait)
        last = max((call.sent_at_s for batch_id in ids for call in self._unconfirmed.get(batch_id, ())), default=first)
        due = min(first + delay, last) + wait
        await asyncio.sleep(min(max(0.0, due - self._clock.monotonic()), _CONFIRM_WAIT_MAX_S))
        now = self._clock.monotonic()
        return list(
            itertools.takewhile(lambda one: all(sent.sent_at_s + wait <= now for sent in self._unconfirmed.get(one, ())), ids)
        )

    async def _confirm_connection(self, connection: PooledConnection, transports: set[Any], *, by_query: bool) -> None:
        """Send a query or ping over the connection that carried the responses, so that the same process answers."""
        async with connection.lock:
            try:
                if by_query:
                    response = await connection.request("POST", self._settings.database_path("sql"), _CONFIRMING_QUERY)
                else:
                    response = await connection.request("GET", "/v1/ping")
            except UntrustedCertificateError as error:
                raise SinkUnusableError(str(error)) from None
            except TransportError as error:
                raise UnconfirmedError(str(error)) from None
            if transports != {connection.last_used}:
                raise UnconfirmedError("the connection was replaced, so the server may have been restarted")
        if response.status != 200 or response.is_html:
            result = classify_response(response, self._settings.function, (), "nothing")
            request = "the confirming query" if by_query else "the ping"
            if isinstance(result, Misconfigured):
                raise SinkUnusableError(f"{request}: {result.reason}")
            raise UnconfirmedError(f"the server responded to {request} with {response.status}: {response.excerpt}")

    async def check(self) -> Iterable[CheckResult]:
        """Read the version and the schema, and compare the event type with the function, field by field."""
        settings = self._settings
        token = (
            "a token is set" if settings.token else f"no token is set, so each call gets a new identity; set {TOKEN_VARIABLE}"
        )
        results = [CheckResult(ok=True, message=token)]
        if settings.sends_token_unencrypted:
            results.append(CheckResult(ok=True, message=PLAIN_HTTP_WARNING))
        binding = await self._bind_module()
        if not isinstance(binding, _ModuleBinding):
            return [*results, CheckResult(ok=False, message=binding.reason)]
        how = (
            "a query confirms batches"
            if binding.confirms_by_query
            else f"a ping after {settings.confirm_wait_s:g} s confirms batches"
        )
        known = _major_version(binding.server_version) in (1, 2)
        results.append(CheckResult(ok=True, message=f"{settings.server}: SpacetimeDB {binding.server_version}; {how}"))
        if not known:
            results.append(CheckResult(ok=True, message="Pillarbox supports servers 1.x and 2.x, and treats this one as 1.x"))
        if binding.confirms_by_query:
            results += await self._check_query()
        if settings.server.startswith("https"):
            text = "a TLS proxy must stop when the server stops, or it confirms lost batches (docs/how-to/spacetimedb.md)"
            results.append(CheckResult(ok=True, message=text))
        kind = binding.encoder.function.kind
        results.append(
            CheckResult(ok=True, message=f"{settings.database}: {kind} {settings.function} takes {self._event_type.__name__}")
        )
        return results

    async def _check_query(self) -> list[CheckResult]:
        try:
            response = await self._request("POST", self._settings.database_path("sql"), _CONFIRMING_QUERY)
        except TransportError as error:
            return [CheckResult(ok=False, message=str(error))]
        if response.status == 200 and not response.is_html:
            return []
        return [
            CheckResult(
                ok=False,
                message=f"the server responded to the confirming query with {response.status}: {response.excerpt}; allow it",
            )
        ]

    async def close(self) -> None:
        """Close all connections; batches that are not confirmed must be sent again."""
        lanes, self._pool = self._pool, None
        self._unconfirmable.update(self._unconfirmed)
        self._unconfirmed.clear()
        if lanes is not None:
            await lanes.close()


def _failure_of(error: TransportError) -> Retry | Misconfigured:
    """The result of a request that got no response."""
    return Misconfigured(str(error)) if isinstance(error, UntrustedCertificateError) else Retry(str(error))


def _major_version(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _unknown_server_message(response: SpacetimeDbResponse, version: str) -> str:
    return (
        f"the server ({version}) does not describe the database as SpacetimeDB 1.x and 2.x do "
        f"(status {response.status}: {response.excerpt[:200]}): check the URL and the server's version"
    )
