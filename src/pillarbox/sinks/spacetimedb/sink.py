"""The sink: fit, call, classify, confirm."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.errors import ConfigurationError, SinkUnusableError
from pillarbox.event import without_post_init
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
from pillarbox.sinks.spacetimedb.pool import ConnectionPool, PooledConnection, TransportError, group_by_connection
from pillarbox.sinks.spacetimedb.responses import SpacetimeDbResponse, classify_response, parse_version
from pillarbox.sinks.spacetimedb.schema import DatabaseSchema, SchemaError
from pillarbox.sinks.spacetimedb.url import TOKEN_VARIABLE, parse_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pillarbox.clock import Clock

log = logging.getLogger("pillarbox")

CALL_BYTES_MAX: Final = 2 * 2**20  # what servers 1.2.0 and 2.8.3 take: 2,097,152 bytes pass, one more is a 413
# Any identity may ask this; a server 2.x answers once everything before it is durable.
_CONFIRMING_QUERY: Final = b"SELECT COUNT(*) AS n FROM st_client"
_CONFIRM_DELAY_MAX_S: Final = 0.1  # how much longer than it must the sink waits to confirm several batches by one ping
_CONFIRM_WAIT_MAX_S: Final = 10.0  # how long `confirm` waits at a time
_BAD_VALUE_CALLS_MAX: Final = (
    3  # calls in a row that are refused for a value, which types cannot explain: then somebody must look
)
_SCHEMA_ERRORS: Final = frozenset({400, 401, 403, 404, 415})  # after these, look at the schema again


class _ModuleBinding(NamedTuple):
    """What was learnt of the database, and how events go into it."""

    schema_text: bytes  # of the schema
    encoder: RowEncoder
    server_version: str  # of the server
    confirms_by_query: bool  # whether a query waits for what came before it to be durable


class _PreparedCall(NamedTuple):
    """A batch's call, ready to be sent."""

    binding: _ModuleBinding
    body: bytes
    indexes: Sequence[int]
    rejected: dict[int, Rejection]


class _SentCall(NamedTuple):
    """Where and when a batch was answered."""

    connection: PooledConnection
    http_connection: Any
    sent_at_s: float


class SpacetimeDbSink:
    """Calls one function of a SpacetimeDB database with batches of events."""

    def __init__(self, url: str, event_type: type[msgspec.Struct], clock: Clock | None = None) -> None:
        self._url = url
        self._settings = parse_url(url)
        self._event_type = event_type
        self._decoder = msgspec.json.Decoder(without_post_init(event_type))
        self._clock = clock or SystemClock()
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
        self._unconfirmed: dict[str, list[_SentCall]] = {}  # by batch id, of what is not confirmed yet
        self._unconfirmable: set[str] = set()  # batches that can be confirmed no more, for their connections were closed
        self._bad_value_calls = 0  # calls in a row that a value was blamed for
        self._token_warning_logged = False

    async def open(self) -> None:
        """Connect and read the schema; raises `SinkUnusableError` where the set-up is at fault."""
        if self._settings.token is None and not self._token_warning_logged:
            self._token_warning_logged = True
            log.warning(
                "%s: no token is set, so that every call has another anonymous identity; "
                "set %s, or token_file= in the sink's URL",
                self._settings.server,
                TOKEN_VARIABLE,
            )
        answer = await self._bind_module()
        if isinstance(answer, Misconfigured):
            raise SinkUnusableError(answer.reason)
        if isinstance(answer, Retry):
            raise ConnectionError(answer.reason)

    def _pick_connection(self) -> PooledConnection:
        if self._pool is None:
            self._pool = ConnectionPool(self._settings)
        return self._pool.pick()

    async def _request(self, method: str, path: str, content: bytes | None = None) -> SpacetimeDbResponse:
        lane = self._pick_connection()
        async with lane.lock:
            return await lane.request(method, path, content)

    async def _bind_module(self) -> _ModuleBinding | Misconfigured | Retry:
        """Read version and schema, and fit the event type to the function."""
        self._binding = None
        await self._reload_token()
        target = self._settings
        try:
            health = await self._request("GET", "/v1/health")
            reply = await self._request("GET", f"{target.database_path('schema')}?version=9")
        except TransportError as error:
            return Retry(str(error))
        version = parse_version(health) or "of an unknown version"
        if reply.status != 200 or reply.is_html:
            answer = classify_response(reply, target.function, (), "nothing")
            if isinstance(answer, (Misconfigured, Retry)) and (reply.status != 400 or reply.is_html):
                return answer
            return Misconfigured(_unknown_server_message(reply, version))
        try:
            schema = DatabaseSchema(reply.body)
        except SchemaError:
            return Misconfigured(_unknown_server_message(reply, version))
        function = schema.functions.get(target.function)
        if function is None:
            there = ", ".join(sorted(schema.functions)) or "none"
            return Misconfigured(
                f"the module of {target.database} has no function {target.function}; it has {there}: "
                "publish one that has, or name another with ?function="
            )
        fitting = RowEncoder(schema, function, self._event_type)
        if fitting.mismatches:
            problems = "; ".join(f"{misfit.field}: {misfit.problem}" for misfit in fitting.mismatches)
            return Misconfigured(f"{self._event_type.__name__} does not fit {target.function}: {problems}")
        self._binding = _ModuleBinding(reply.body, fitting, version, confirms_by_query=_major_version(version) >= 2)
        return self._binding

    async def _reload_token(self) -> None:
        """A token that was mended in its file counts without a restart."""
        try:
            fresh = parse_url(self._url)
        except ConfigurationError as error:
            log.warning("%s: %s", self._settings.server, error)
            return
        if (fresh.token and fresh.token.auth_header()) != (self._settings.token and self._settings.token.auth_header()):
            self._settings = fresh
            await self.close()

    def prepare(self, batch: Batch) -> None:
        """Do what can be done before the batch's turn comes."""
        if self._binding is not None:
            batch.prepared = self._prepare_call(batch, self._binding)

    def _prepare_call(self, batch: Batch, fit: _ModuleBinding) -> _PreparedCall:
        events, indexes, refused = base.decode_records(batch, self._decoder)
        body, indexes = fit.encoder.encode_arguments(events, indexes, refused)
        return _PreparedCall(fit, body, indexes, refused)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Call the function; what it answers is not durable yet."""
        fit = self._binding or await self._bind_module()
        if not isinstance(fit, _ModuleBinding):
            return fit
        ready, batch.prepared = batch.prepared, None
        if not isinstance(ready, _PreparedCall) or ready.binding is not fit:
            ready = self._prepare_call(batch, fit)
        if not ready.indexes:
            return PartialFailure(ready.rejected, 0)
        if len(ready.body) > CALL_BYTES_MAX:
            return Rejected(Rejection("too_large", f"{len(ready.body)} bytes in one call, the server takes {CALL_BYTES_MAX}"))
        if ":" not in batch.id:
            self._unconfirmed.pop(batch.id, None)  # sent afresh: what was sent before does not count
            self._unconfirmable.discard(batch.id)
        try:
            reply, sent = await self._send_call(ready)
        except TransportError as error:
            return Retry(str(error))
        answer = classify_response(reply, self._settings.function, ready.indexes, fit.encoder.returns)
        if isinstance(answer, Delivered):
            self._unconfirmed.setdefault(batch.id.partition(":")[0], []).append(sent)
            self._bad_value_calls = 0
            if ready.rejected:
                return PartialFailure(ready.rejected, answer.accepted, answer.duplicates)
        elif reply.status in _SCHEMA_ERRORS:
            return await self._recheck_schema(fit, answer, reply)
        return answer

    async def _send_call(self, ready: _PreparedCall) -> tuple[SpacetimeDbResponse, _SentCall]:
        lane = self._pick_connection()
        async with lane.lock:
            reply = await lane.request("POST", self._settings.database_path("call", self._settings.function), ready.body)
            return reply, _SentCall(lane, lane.last_used, self._clock.monotonic())

    async def _recheck_schema(
        self, before: _ModuleBinding, answer: DeliveryResult, reply: SpacetimeDbResponse
    ) -> DeliveryResult:
        """After a refusal that the set-up may have caused: where the schema has changed, fit to it and try again."""
        fit = await self._bind_module()
        if not isinstance(fit, _ModuleBinding):
            return answer if isinstance(fit, Retry) and isinstance(answer, Misconfigured) else fit
        if fit.schema_text != before.schema_text:
            log.info("%s: the module has changed; fitted to it anew", self._settings.server)
            return Retry("the module has changed; fitted to it anew")
        if isinstance(answer, PartialFailure):
            self._bad_value_calls += 1
            if self._bad_value_calls > _BAD_VALUE_CALLS_MAX:
                return Misconfigured(f"call after call is refused for a value ({reply.excerpt}): compare event type and module")
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Whether the server that answered still lives, and has made durable what it answered.

        A server 2.x is asked for all batches at once. A 1.x gets its time: those whose time has come are confirmed together.
        """
        fit = self._binding
        by_query = fit is not None and fit.confirms_by_query
        ids = [batch.id for batch in batches]
        if not by_query:
            ids = await self._wait_until_due(ids)
        if self._unconfirmable.intersection(ids):
            self._unconfirmable.difference_update(batch.id for batch in batches)
            raise UnconfirmedError("the connections were closed, for the token has changed")
        marks = [(one.connection, one.http_connection) for batch_id in ids for one in self._unconfirmed.get(batch_id, ())]
        try:
            for lane, sockets in group_by_connection(marks).items():
                await self._confirm_connection(lane, sockets, by_query=by_query)
        except (UnconfirmedError, SinkUnusableError):
            for batch in batches:
                self._unconfirmed.pop(batch.id, None)
            raise
        for batch_id in ids:
            self._unconfirmed.pop(batch_id, None)
        return len(ids)

    async def _wait_until_due(self, ids: list[str]) -> list[str]:
        """Wait for the first batch's time, or a part of it; those whose time has come."""
        wait = self._settings.confirm_wait_s
        gather = min(_CONFIRM_DELAY_MAX_S, wait / 10)  # a little longer, so that several batches are confirmed by one ping
        first = max((one.sent_at_s for one in self._unconfirmed.get(ids[0], ())), default=-wait)
        last = max((one.sent_at_s for batch_id in ids for one in self._unconfirmed.get(batch_id, ())), default=first)
        due = min(first + gather, last) + wait
        await asyncio.sleep(min(max(0.0, due - self._clock.monotonic()), _CONFIRM_WAIT_MAX_S))
        now = self._clock.monotonic()
        return list(
            itertools.takewhile(lambda one: all(sent.sent_at_s + wait <= now for sent in self._unconfirmed.get(one, ())), ids)
        )

    async def _confirm_connection(self, lane: PooledConnection, sockets: set[Any], *, by_query: bool) -> None:
        """Have the server answer on the only connection that was used, and so confirm what it answered there before."""
        async with lane.lock:
            try:
                if by_query:
                    reply = await lane.request("POST", self._settings.database_path("sql"), _CONFIRMING_QUERY)
                else:
                    reply = await lane.request("GET", "/v1/ping")
            except TransportError as error:
                raise UnconfirmedError(str(error)) from None
            if sockets != {lane.last_used}:
                raise UnconfirmedError("the connection is another one by now: the server may have been restarted")
        if reply.status != 200 or reply.is_html:
            answer = classify_response(reply, self._settings.function, (), "nothing")
            what = "the confirming query" if by_query else "the ping"
            if isinstance(answer, Misconfigured):
                raise SinkUnusableError(f"{what}: {answer.reason}")
            raise UnconfirmedError(f"{what} was answered with {reply.status}: {reply.excerpt}")

    async def check(self) -> Iterable[CheckResult]:
        """Ask for version and schema, and compare, field by field."""
        target = self._settings
        token = "a token is set" if target.token else f"no token is set: every call has another identity; set {TOKEN_VARIABLE}"
        findings = [CheckResult(ok=True, message=token)]
        fit = await self._bind_module()
        if not isinstance(fit, _ModuleBinding):
            return [*findings, CheckResult(ok=False, message=fit.reason)]
        how = "a query confirms what is durable" if fit.confirms_by_query else f"{target.confirm_wait_s:g} s and a ping confirm"
        known = _major_version(fit.server_version) in (1, 2)
        findings.append(CheckResult(ok=True, message=f"{target.server}: SpacetimeDB {fit.server_version}; {how}"))
        if not known:
            findings.append(CheckResult(ok=True, message="Pillarbox knows servers 1.x and 2.x; this one is treated as a 1.x"))
        if fit.confirms_by_query:
            findings += await self._check_query()
        if target.server.startswith("https"):
            text = "what ends TLS must end with the server: a proxy that outlives it would confirm for it (see docs/how-to)"
            findings.append(CheckResult(ok=True, message=text))
        kind = fit.encoder.function.kind
        findings.append(
            CheckResult(ok=True, message=f"{target.database}: {kind} {target.function} takes {self._event_type.__name__}")
        )
        return findings

    async def _check_query(self) -> list[CheckResult]:
        try:
            reply = await self._request("POST", self._settings.database_path("sql"), _CONFIRMING_QUERY)
        except TransportError as error:
            return [CheckResult(ok=False, message=str(error))]
        if reply.status == 200 and not reply.is_html:
            return []
        return [
            CheckResult(
                ok=False, message=f"the confirming query was answered with {reply.status}: {reply.excerpt}; let it pass"
            )
        ]

    async def close(self) -> None:
        """Hang up."""
        lanes, self._pool = self._pool, None
        self._unconfirmable.update(self._unconfirmed)
        self._unconfirmed.clear()
        if lanes is not None:
            await lanes.close()


def _major_version(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _unknown_server_message(reply: SpacetimeDbResponse, version: str) -> str:
    return (
        f"the server, {version}, does not describe the database as 1.x and 2.x do "
        f"(status {reply.status}: {reply.excerpt[:200]}): "
        "is this SpacetimeDB, and of a version that Pillarbox knows?"
    )
