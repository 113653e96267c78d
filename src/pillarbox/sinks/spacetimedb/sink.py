"""The sink: fit, call, classify, confirm."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from pillarbox.clock import SystemClock
from pillarbox.errors import ConfigurationError, SinkUnusable
from pillarbox.event import plain
from pillarbox.sinks import base
from pillarbox.sinks.base import (
    Answer,
    Batch,
    Delivered,
    Finding,
    Misconfigured,
    Partly,
    Refusal,
    Refused,
    Retry,
    Traits,
    Unconfirmed,
)
from pillarbox.sinks.spacetimedb.encoding import Fitting
from pillarbox.sinks.spacetimedb.pool import Lane, Lanes, TransportError, used
from pillarbox.sinks.spacetimedb.responses import Reply, classify, version_of
from pillarbox.sinks.spacetimedb.schema import Schema, SchemaUnreadable
from pillarbox.sinks.spacetimedb.url import TOKEN_VARIABLE, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pillarbox.clock import Clock

log = logging.getLogger("pillarbox")

CALL_BYTES_MAX: Final = 2 * 2**20  # what servers 1.2.0 and 2.8.3 take: 2,097,152 bytes pass, one more is a 413
# Any identity may ask this; a server 2.x answers once everything before it is durable.
_CONFIRMING_QUERY: Final = b"SELECT COUNT(*) AS n FROM st_client"
_GATHER_MAX_S: Final = 0.1  # how much longer than it must the sink waits to confirm several batches by one ping
_WAIT_SLICE_S: Final = 10.0  # how long `confirm` waits at a time
_BAD_VALUES_MAX: Final = 3  # calls in a row that are refused for a value, which types cannot explain: then somebody must look
_SETUP: Final = frozenset({400, 401, 403, 404, 415})  # after these, look at the schema again


class _Fit(NamedTuple):
    """What was learnt of the database, and how events go into it."""

    text: bytes  # of the schema
    fitting: Fitting
    version: str  # of the server
    confirms: bool  # whether a query waits for what came before it to be durable


class _Prepared(NamedTuple):
    """A batch's call, ready to be sent."""

    fit: _Fit
    body: bytes
    indexes: Sequence[int]
    refused: dict[int, Refusal]


class _Sent(NamedTuple):
    """Where and when a batch was answered."""

    lane: Lane
    socket: Any
    at: float


class SpacetimeDbSink:
    """Calls one function of a SpacetimeDB database with batches of events."""

    def __init__(self, url: str, event_type: type[msgspec.Struct], clock: Clock | None = None) -> None:
        self._url = url
        self._target = parse(url)
        self._event_type = event_type
        self._decoder = msgspec.json.Decoder(plain(event_type))
        self._clock = clock or SystemClock()
        self.traits = Traits(
            deduplicates_by="event_id",
            survives="power",
            confirms=True,
            window=self._target.window,
            concurrent=True,
            combines=True,
        )
        self._lanes: Lanes | None = None
        self._fit: _Fit | None = None
        self._sent: dict[str, list[_Sent]] = {}  # by batch id, of what is not confirmed yet
        self._lost: set[str] = set()  # batches that can be confirmed no more, for their connections were closed
        self._bad_values = 0  # calls in a row that a value was blamed for
        self._warned = False

    async def open(self) -> None:
        """Connect and read the schema; raises `SinkUnusable` where the set-up is at fault."""
        if self._target.token is None and not self._warned:
            self._warned = True
            log.warning(
                "%s: no token is set, so that every call has another anonymous identity; "
                "set %s, or token_file= in the sink's URL",
                self._target.server,
                TOKEN_VARIABLE,
            )
        answer = await self._learn()
        if isinstance(answer, Misconfigured):
            raise SinkUnusable(answer.reason)
        if isinstance(answer, Retry):
            raise ConnectionError(answer.reason)

    def _lane(self) -> Lane:
        if self._lanes is None:
            self._lanes = Lanes(self._target)
        return self._lanes.idle()

    async def _ask(self, method: str, path: str, content: bytes | None = None) -> Reply:
        lane = self._lane()
        async with lane.lock:
            return await lane.call(method, path, content)

    async def _learn(self) -> _Fit | Misconfigured | Retry:
        """Read version and schema, and fit the event type to the function."""
        self._fit = None
        await self._read_token_again()
        target = self._target
        try:
            health = await self._ask("GET", "/v1/health")
            reply = await self._ask("GET", f"{target.path('schema')}?version=9")
        except TransportError as error:
            return Retry(str(error))
        version = version_of(health) or "of an unknown version"
        if reply.status != 200 or reply.is_html:
            answer = classify(reply, target.function, (), "nothing")
            if isinstance(answer, (Misconfigured, Retry)) and (reply.status != 400 or reply.is_html):
                return answer
            return Misconfigured(_unknown_server(reply, version))
        try:
            schema = Schema(reply.body)
        except SchemaUnreadable:
            return Misconfigured(_unknown_server(reply, version))
        function = schema.functions.get(target.function)
        if function is None:
            there = ", ".join(sorted(schema.functions)) or "none"
            return Misconfigured(
                f"the module of {target.database} has no function {target.function}; it has {there}: "
                "publish one that has, or name another with ?function="
            )
        fitting = Fitting(schema, function, self._event_type)
        if fitting.misfits:
            problems = "; ".join(f"{misfit.field}: {misfit.problem}" for misfit in fitting.misfits)
            return Misconfigured(f"{self._event_type.__name__} does not fit {target.function}: {problems}")
        self._fit = _Fit(reply.body, fitting, version, confirms=_major(version) >= 2)
        return self._fit

    async def _read_token_again(self) -> None:
        """A token that was mended in its file counts without a restart."""
        try:
            fresh = parse(self._url)
        except ConfigurationError as error:
            log.warning("%s: %s", self._target.server, error)
            return
        if (fresh.token and fresh.token.header()) != (self._target.token and self._target.token.header()):
            self._target = fresh
            await self.close()

    def prepare(self, batch: Batch) -> None:
        """Do what can be done before the batch's turn comes."""
        if self._fit is not None:
            batch.prepared = self._prepared(batch, self._fit)

    def _prepared(self, batch: Batch, fit: _Fit) -> _Prepared:
        events, indexes, refused = base.decode(batch, self._decoder)
        body, indexes = fit.fitting.body(events, indexes, refused)
        return _Prepared(fit, body, indexes, refused)

    async def deliver(self, batch: Batch) -> Answer:
        """Call the function; what it answers is not durable yet."""
        fit = self._fit or await self._learn()
        if not isinstance(fit, _Fit):
            return fit
        ready, batch.prepared = batch.prepared, None
        if not isinstance(ready, _Prepared) or ready.fit is not fit:
            ready = self._prepared(batch, fit)
        if not ready.indexes:
            return Partly(ready.refused, 0)
        if len(ready.body) > CALL_BYTES_MAX:
            return Refused(Refusal("too_large", f"{len(ready.body)} bytes in one call, the server takes {CALL_BYTES_MAX}"))
        if ":" not in batch.id:
            self._sent.pop(batch.id, None)  # sent afresh: what was sent before does not count
            self._lost.discard(batch.id)
        try:
            reply, sent = await self._call(ready)
        except TransportError as error:
            return Retry(str(error))
        answer = classify(reply, self._target.function, ready.indexes, fit.fitting.returns)
        if isinstance(answer, Delivered):
            self._sent.setdefault(batch.id.partition(":")[0], []).append(sent)
            self._bad_values = 0
            if ready.refused:
                return Partly(ready.refused, answer.accepted, answer.duplicates)
        elif reply.status in _SETUP:
            return await self._look_again(fit, answer, reply)
        return answer

    async def _call(self, ready: _Prepared) -> tuple[Reply, _Sent]:
        lane = self._lane()
        async with lane.lock:
            reply = await lane.call("POST", self._target.path("call", self._target.function), ready.body)
            return reply, _Sent(lane, lane.socket, self._clock.monotonic())

    async def _look_again(self, before: _Fit, answer: Answer, reply: Reply) -> Answer:
        """After a refusal that the set-up may have caused: where the schema has changed, fit to it and try again."""
        fit = await self._learn()
        if not isinstance(fit, _Fit):
            return answer if isinstance(fit, Retry) and isinstance(answer, Misconfigured) else fit
        if fit.text != before.text:
            log.info("%s: the module has changed; fitted to it anew", self._target.server)
            return Retry("the module has changed; fitted to it anew")
        if isinstance(answer, Partly):
            self._bad_values += 1
            if self._bad_values > _BAD_VALUES_MAX:
                return Misconfigured(f"call after call is refused for a value ({reply.text}): compare event type and module")
        return answer

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Whether the server that answered still lives, and has made durable what it answered.

        A server 2.x is asked for all batches at once. A 1.x gets its time: those whose time has come are confirmed together.
        """
        fit = self._fit
        by_query = fit is not None and fit.confirms
        ids = [batch.id for batch in batches]
        if not by_query:
            ids = await self._wait_until_due(ids)
        if self._lost.intersection(ids):
            self._lost.difference_update(batch.id for batch in batches)
            raise Unconfirmed("the connections were closed, for the token has changed")
        marks = [(one.lane, one.socket) for batch_id in ids for one in self._sent.get(batch_id, ())]
        try:
            for lane, sockets in used(marks).items():
                await self._ask_for_confirmation(lane, sockets, by_query=by_query)
        except (Unconfirmed, SinkUnusable):
            for batch in batches:
                self._sent.pop(batch.id, None)
            raise
        for batch_id in ids:
            self._sent.pop(batch_id, None)
        return len(ids)

    async def _wait_until_due(self, ids: list[str]) -> list[str]:
        """Wait for the first batch's time, or a part of it; those whose time has come."""
        wait = self._target.confirm_wait_s
        gather = min(_GATHER_MAX_S, wait / 10)  # a little longer, so that several batches are confirmed by one ping
        first = max((one.at for one in self._sent.get(ids[0], ())), default=-wait)
        last = max((one.at for batch_id in ids for one in self._sent.get(batch_id, ())), default=first)
        due = min(first + gather, last) + wait
        await asyncio.sleep(min(max(0.0, due - self._clock.monotonic()), _WAIT_SLICE_S))
        now = self._clock.monotonic()
        return list(itertools.takewhile(lambda one: all(sent.at + wait <= now for sent in self._sent.get(one, ())), ids))

    async def _ask_for_confirmation(self, lane: Lane, sockets: set[Any], *, by_query: bool) -> None:
        """Have the server answer on the only connection that was used, and so confirm what it answered there before."""
        async with lane.lock:
            try:
                if by_query:
                    reply = await lane.call("POST", self._target.path("sql"), _CONFIRMING_QUERY)
                else:
                    reply = await lane.call("GET", "/v1/ping")
            except TransportError as error:
                raise Unconfirmed(str(error)) from None
            if sockets != {lane.socket}:
                raise Unconfirmed("the connection is another one by now: the server may have been restarted")
        if reply.status != 200 or reply.is_html:
            answer = classify(reply, self._target.function, (), "nothing")
            what = "the confirming query" if by_query else "the ping"
            if isinstance(answer, Misconfigured):
                raise SinkUnusable(f"{what}: {answer.reason}")
            raise Unconfirmed(f"{what} was answered with {reply.status}: {reply.text}")

    async def check(self) -> Iterable[Finding]:
        """Ask for version and schema, and compare, field by field."""
        target = self._target
        token = "a token is set" if target.token else f"no token is set: every call has another identity; set {TOKEN_VARIABLE}"
        findings = [Finding(ok=True, text=token)]
        fit = await self._learn()
        if not isinstance(fit, _Fit):
            return [*findings, Finding(ok=False, text=fit.reason)]
        how = "a query confirms what is durable" if fit.confirms else f"{target.confirm_wait_s:g} s and a ping confirm"
        known = _major(fit.version) in (1, 2)
        findings.append(Finding(ok=True, text=f"{target.server}: SpacetimeDB {fit.version}; {how}"))
        if not known:
            findings.append(Finding(ok=True, text="Pillarbox knows servers 1.x and 2.x; this one is treated as a 1.x"))
        if fit.confirms:
            findings += await self._check_query()
        if target.server.startswith("https"):
            text = "what ends TLS must end with the server: a proxy that outlives it would confirm for it (see docs/how-to)"
            findings.append(Finding(ok=True, text=text))
        kind = fit.fitting.function.kind
        findings.append(Finding(ok=True, text=f"{target.database}: {kind} {target.function} takes {self._event_type.__name__}"))
        return findings

    async def _check_query(self) -> list[Finding]:
        try:
            reply = await self._ask("POST", self._target.path("sql"), _CONFIRMING_QUERY)
        except TransportError as error:
            return [Finding(ok=False, text=str(error))]
        if reply.status == 200 and not reply.is_html:
            return []
        return [Finding(ok=False, text=f"the confirming query was answered with {reply.status}: {reply.text}; let it pass")]

    async def close(self) -> None:
        """Hang up."""
        lanes, self._lanes = self._lanes, None
        self._lost.update(self._sent)
        self._sent.clear()
        if lanes is not None:
            await lanes.close()


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _unknown_server(reply: Reply, version: str) -> str:
    return (
        f"the server, {version}, does not describe the database as 1.x and 2.x do (status {reply.status}: {reply.text[:200]}): "
        "is this SpacetimeDB, and of a version that Pillarbox knows?"
    )
