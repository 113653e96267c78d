"""The event loop that sinks run on. It makes blocking calls on daemon threads, for which nothing waits at the end.

asyncio resolves names and runs the functions of `asyncio.to_thread` in an executor. `asyncio.run` waits for its threads, and so
does the interpreter at exit. `getaddrinfo` cannot be interrupted, and takes minutes if the name server does not answer. Here
each such call runs on a daemon thread, and a name that is not resolved in time is an error that is retried.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar, TypeVarTuple

from pillarbox.system import threads
from pillarbox.system.event_loop import SystemEventLoop
from pillarbox.system.sockets import EAI_AGAIN, gaierror, getaddrinfo, getnameinfo

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# For one name. Longer than the 5 s after which the system's resolver asks the next server; shorter than the connect timeout.
RESOLVE_TIMEOUT_S: Final = 8.0
_LOOKUP_THREADS_MAX: Final = 16  # each resolves one name; further names wait
_CALL_THREADS_MAX: Final = 32  # for `asyncio.to_thread` in sinks of other packages


def run_on_sink_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that uses sinks, as `asyncio.run` does, but without waiting for blocked calls at the end."""
    with asyncio.Runner(loop_factory=SinkEventLoop) as runner:
        return runner.run(main)


def resolve_address(host: str, port: int, *, kind: int, flags: int) -> tuple[int, Any]:
    """The family and the first address of a host. Raises `OSError`, also if there is no answer within `RESOLVE_TIMEOUT_S`."""
    lookup = DaemonExecutor("pillarbox-resolver", 1).submit(getaddrinfo, host, port, type=kind, flags=flags)
    try:
        family, _, _, _, address = lookup.result(RESOLVE_TIMEOUT_S)[0]
    except TimeoutError:
        raise _unresolved(host) from None
    return family, address


class SinkEventLoop(SystemEventLoop):
    """An event loop of asyncio whose blocking calls run on daemon threads."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = DaemonExecutor("pillarbox-sink-call", _CALL_THREADS_MAX)
        self._resolver = DaemonExecutor("pillarbox-resolver", _LOOKUP_THREADS_MAX)
        self._lookups: dict[tuple[Any, ...], asyncio.Future[Any]] = {}  # in progress, by query

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run a function in an executor; by default, on a daemon thread."""
        return super().run_in_executor(executor or self._calls, func, *args)

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """Resolve a name; raises `socket.gaierror`, also if there is no answer within `RESOLVE_TIMEOUT_S`."""
        return await self._look_up(getaddrinfo, host, port, family, type, proto, flags)

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> Any:
        """Find the name of an address; raises `socket.gaierror`, also if there is no answer within `RESOLVE_TIMEOUT_S`."""
        return await self._look_up(getnameinfo, sockaddr, flags)

    async def _look_up(self, function: Callable[..., Any], *query: Any) -> Any:
        """Start a lookup, or wait for the same one if an earlier attempt that timed out left it running."""
        lookup = self._lookups.get((function, *query))
        if lookup is None:
            lookup = self._lookups[function, *query] = self.run_in_executor(self._resolver, function, *query)
            lookup.add_done_callback(lambda ended: self._end_lookup((function, *query), ended))
        done, _ = await asyncio.wait({lookup}, timeout=RESOLVE_TIMEOUT_S)
        if not done:
            raise _unresolved(query[0])
        return lookup.result()

    def close(self) -> None:
        """Close the loop without waiting for the lookups in progress."""
        for lookup in self._lookups.values():
            lookup.cancel()  # otherwise its thread would report to a closed loop
        super().close()

    def _end_lookup(self, query: tuple[Any, ...], lookup: asyncio.Future[Any]) -> None:
        del self._lookups[query]
        if not lookup.cancelled():
            lookup.exception()  # retrieve it: otherwise asyncio logs it if nothing waits for the lookup any more


def _unresolved(host: object) -> gaierror:
    name = host.decode(errors="backslashreplace") if isinstance(host, bytes) else host
    text = f"no name server has resolved {name} within {RESOLVE_TIMEOUT_S:g} s"
    return gaierror(EAI_AGAIN, text)


class _FutureCondition(threads.Condition):
    """The condition of a `Future`, which uses it as a context manager."""

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


class _SystemFuture(Future[T]):
    """A future that threads of the system can wait for, also if locks were replaced by those of greenlets."""

    def __init__(self) -> None:
        super().__init__()
        self._condition: Any = _FutureCondition()


class _Call(NamedTuple):
    future: Future[Any]
    function: Callable[[], Any]


class DaemonExecutor(Executor):
    """Runs each call on a daemon thread, for which neither `asyncio.run` nor the exit of the interpreter waits."""

    def __init__(self, thread_name: str, threads_max: int) -> None:
        self._thread_name = thread_name
        self._threads_max = threads_max
        self._lock = threads.Lock()
        self._waiting: deque[_Call] = deque()
        self._threads = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function once a thread is free. Raises `RuntimeError` if none runs and none can be started."""
        future: Future[T] = _SystemFuture()
        call = _Call(future, lambda: fn(*args, **kwargs))
        with self._lock:
            self._waiting.append(call)
            if self._threads >= self._threads_max:
                return future
            self._threads += 1
        try:
            threads.Thread(target=self._run_calls, name=self._thread_name).start()
        except RuntimeError:  # the system cannot start another thread: a running one makes the call
            with self._lock:
                self._threads -= 1
                if not self._threads and call in self._waiting:
                    self._waiting.remove(call)
                    raise
        return future

    def _run_calls(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                call = self._waiting.popleft()
            if not call.future.set_running_or_notify_cancel():
                continue
            try:
                result = call.function()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                call.future.set_exception(error)
            else:
                call.future.set_result(result)
            del call
