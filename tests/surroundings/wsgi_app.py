"""A WSGI application that stores an event for each request, under any server.

`OUTBOX` in the environment has the settings of the outbox, as JSON. `POST /enqueue/NUMBER` stores an event, `GET /asyncio` runs a
coroutine as the application's own code may, `GET /flush` waits for delivery and answers with the process id.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import pillarbox

outbox = pillarbox.Outbox(**json.loads(os.environ["OUTBOX"]))
if os.environ.get("USE_AT_IMPORT"):
    outbox.enqueue(pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id="import"))


async def _answer() -> str:
    await asyncio.sleep(0)
    return "a coroutine ran"


def _respond(path: str) -> str:
    if path.startswith("/enqueue/"):
        durability: Any = "power" if path.endswith("0") else None
        event = pillarbox.TrackingEvent(event_key="k", scope_kind="Site", scope_id=path.rpartition("/")[2])
        return "stored" if outbox.enqueue(event, durability=durability) else "dropped"
    if path == "/asyncio":
        loop = asyncio.new_event_loop()  # `asyncio.run` takes SIGINT from uWSGI for good
        try:
            return loop.run_until_complete(_answer())
        finally:
            loop.close()
    if path == "/flush":
        return f"{outbox.flush(20)} {os.getpid()}"
    return str(outbox.stats())


def application(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """The application."""
    body = _respond(environ["PATH_INFO"]).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
