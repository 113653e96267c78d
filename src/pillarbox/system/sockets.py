"""Sockets of the system, and a selector for them."""

from __future__ import annotations

import _socket
from typing import TYPE_CHECKING, Any, Final

from pillarbox.system.originals import copy_python_module, select

if TYPE_CHECKING:
    from typing import Self


class Socket(_socket.socket):
    """A socket of the system, which ignores `socket.setdefaulttimeout`."""

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, kind, proto, fileno)
        self.setblocking(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def accept(self) -> tuple[Socket, Any]:
        """Accept a connection. Returns its socket, which child processes do not inherit, and the address of the client."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        return Socket(self.family, self.type, self.proto, fd), address


def socket_pair() -> tuple[Socket, Socket]:
    """Two connected sockets."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, SOCK_STREAM)
    return Socket(fileno=ours.detach()), Socket(fileno=theirs.detach())


AI_PASSIVE: Final = _socket.AI_PASSIVE
MSG_DONTWAIT: Final = _socket.MSG_DONTWAIT
SHUT_WR: Final = _socket.SHUT_WR
SO_REUSEADDR: Final = _socket.SO_REUSEADDR
SOCK_STREAM: Final = _socket.SOCK_STREAM
SOL_SOCKET: Final = _socket.SOL_SOCKET
EAI_AGAIN: Final = _socket.EAI_AGAIN
selectors: Any = copy_python_module("selectors", select=select)
getaddrinfo = _socket.getaddrinfo
getnameinfo = _socket.getnameinfo
gethostname = _socket.gethostname
gaierror = _socket.gaierror
