"""An event loop of asyncio that uses the sockets and the selector of the system.

asyncio imports its selector and its sockets from modules that gevent and eventlet patch. Patched ones wait in the greenlet loop
of their thread, which does not run in the threads of Pillarbox.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from pillarbox.system import originals
from pillarbox.system.sockets import Socket, selectors, socket_pair

# asyncio imports these modules when it first needs them. A delivery thread must not import: if the process forks or gevent
# replaces its locks meanwhile, it would wait for the import lock forever.
for _name in ("concurrent.futures.thread", "encodings.idna"):
    import_module(_name)


class SystemEventLoop(asyncio.SelectorEventLoop):
    """An event loop of asyncio for a thread of `threads.Thread`."""

    def __init__(self) -> None:
        super().__init__(selectors.DefaultSelector())

    def _make_self_pipe(self) -> None:
        """Make the sockets through which other threads wake the loop."""
        loop: Any = self
        loop._ssock, loop._csock = socket_pair()
        loop._ssock.setblocking(False)
        loop._csock.setblocking(False)
        loop._internal_fds += 1
        loop._add_reader(loop._ssock.fileno(), loop._read_from_self)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """Connect. If sockets are patched, connect a socket of the system to the first address that accepts."""
        if options.get("sock") is not None or host is None or not originals.are_sockets_replaced():
            return await super().create_connection(protocol_factory, host, port, **options)
        for name in ("happy_eyeballs_delay", "interleave", "all_errors"):
            options.pop(name, None)
        query = {name: options.pop(name, 0) for name in ("family", "proto", "flags")}
        connected = await self._connect(host, port, query, options.pop("local_addr", None))
        if options.get("ssl") and options.get("server_hostname") is None:
            options["server_hostname"] = host
        try:
            return await super().create_connection(protocol_factory, sock=connected, **options)
        except BaseException:
            connected.close()
            raise

    async def _connect(self, host: Any, port: Any, query: dict[str, int], local_address: Any) -> Any:
        errors: list[OSError] = []
        for family, kind, proto, _, address in await self.getaddrinfo(host, port, type=1, **query):
            connecting: Any = Socket(family, kind, proto)
            try:
                connecting.setblocking(False)
                if local_address is not None:
                    connecting.bind(local_address)
                await self.sock_connect(connecting, address)
            except OSError as error:
                connecting.close()
                errors.append(error)
            except BaseException:
                connecting.close()
                raise
            else:
                return connecting
        raise errors[0] if errors else OSError(f"{host} has no address")
