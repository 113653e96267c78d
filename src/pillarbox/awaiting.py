"""Lets a coroutine wait for a blocking call while its event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


async def run_on_thread(function: Callable[[], T]) -> T:
    """Call a function on a new thread. If the waiting coroutine is cancelled, the call continues.

    Raises:
        RuntimeError: The coroutine runs on a loop other than asyncio's.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        text = "this waits on asyncio's loop only; on another one, call flush or close in a thread: trio.to_thread.run_sync"
        raise RuntimeError(text) from None
    future: asyncio.Future[T] = loop.create_future()

    def set_result(result: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

    def call() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_result, result, failure)

    try:
        threads.Thread(target=call, name="pillarbox-wait").start()
    except RuntimeError:  # the system cannot start another thread: the loop must wait
        return function()
    return await future
