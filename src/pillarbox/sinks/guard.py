"""Removes the secrets of a URL from what a sink of another package reports, because its errors may contain the URL."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from pillarbox.errors import SinkUnusableError
from pillarbox.redaction import redact_fields
from pillarbox.sinks.base import CheckResult, UnconfirmedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pillarbox.redaction import Redactor
    from pillarbox.sinks.base import Batch, DeliveryResult, Sink, SinkCapabilities


class SinkError(Exception):
    """An exception of a sink, as text without secrets."""


class RedactingSink:
    """Wraps another sink, and redacts every text in its results and exceptions."""

    def __init__(self, sink: Sink, redact: Redactor) -> None:
        self._sink = sink
        self._redact = redact
        self.capabilities: SinkCapabilities = sink.capabilities

    def __repr__(self) -> str:
        return self._redact(repr(self._sink))

    def prepare(self, batch: Batch) -> None:
        """Encode the batch."""
        self._sink.prepare(batch)

    async def open(self) -> None:
        """Open the sink."""
        with self._redacted_errors():
            await self._sink.open()
        self.capabilities = self._sink.capabilities

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Send the batch."""
        with self._redacted_errors():
            result: Any = await self._sink.deliver(batch)
        if not isinstance(result, msgspec.Struct):
            return result  # type: ignore[no-any-return]  # delivery reports what it is
        fields = {name: getattr(result, name) for name in result.__struct_fields__}
        return type(result)(**redact_fields(fields, self._redact))  # type: ignore[return-value]  # as the sink's

    async def confirm(self, batches: Sequence[Batch]) -> int:
        """Confirm the batches."""
        with self._redacted_errors():
            return await self._sink.confirm(batches)

    async def check(self) -> Iterable[CheckResult]:
        """Check the destination."""
        with self._redacted_errors():
            return [CheckResult(ok, self._redact(message)) for ok, message in await self._sink.check()]

    async def close(self) -> None:
        """Close the sink."""
        with self._redacted_errors():
            await self._sink.close()

    @contextmanager
    def _redacted_errors(self) -> Iterator[None]:
        try:
            yield
        except (SinkUnusableError, UnconfirmedError) as error:
            raise type(error)(self._redact(str(error))) from None
        except Exception as error:
            text = self._redact(str(error))
            if text == str(error):
                raise
            raise SinkError(f"{type(error).__name__}: {text}") from None
