"""The process around the application: its port, its connections, and its end.

uvicorn speaks HTTP for us. What it leaves open is here: the port is taken before the model is
loaded, whoever sends headers too slowly is cut off, and a signal ends things in an order in which
everybody learns what happens to them. Read next: `server.py`.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_LIMIT_S = 20.0
LAST_WORDS_S = 1.0
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def reserve(host: str, port: int) -> list[socket.socket]:
    """Take a port at all addresses of a host; nobody is answered before `Runner.run`.

    Raises:
        ValueError: There is no such host here, or the port is not free.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            sockets.append(socket.socket(family))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # or it would take the port of IPv4, too
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        for taken in sockets:
            taken.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot listen at {host} port {port}: {reason}; choose another --port or --host"
        ) from error
    return sockets


class Connection(H11Protocol):
    """A connection that has to send a request's headers in time.

    By h11, also where httptools is installed, with which uvicorn takes headers of any size; h11
    gives up on more than 64 KiB that do not end, or the 256 KiB that may come in one piece.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _look_again(self) -> None:
        self._last_cycle = self.cycle
        self._timer = self.loop.call_later(HEADER_LIMIT_S, self._look)

    def _look(self) -> None:
        """Give up where no request is open, and none has begun since the last look."""
        is_open = self.cycle is not None and not self.cycle.response_complete
        if is_open or self.cycle is not self._last_cycle:
            self._look_again()
        else:
            self.transport.write(TOO_SLOW)
            self.transport.close()


class Runner(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C; then ends the port, the answers, and what is left over."""

    def __init__(
        self,
        app: ASGIApp,
        stop: Callable[[], Awaitable[None]],
        grace_s: float = 30.0,
        max_connections: int = 384,
    ) -> None:
        """Prepare; `run(sockets)` serves.

        Args:
            app: The application.
            stop: Breaks off what has not been answered `grace_s` after the first signal, or at the
                second.
            grace_s: How long to wait for answers that are being written.
            max_connections: More are turned away with status 503.
        """
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=max_connections,
        )
        super().__init__(config)
        self._stop, self._grace_s, self._is_hurried = stop, grace_s, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at the first signal, and at the second without waiting."""
        self._is_hurried = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait until all have been answered."""
        cutting = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_off(self) -> None:
        """Break off what does not end in time, and let it say so."""
        end_s = time.monotonic() + self._grace_s
        while time.monotonic() < end_s and not self._is_hurried:
            await asyncio.sleep(0.05)
        try:
            await self._stop()
            await asyncio.sleep(LAST_WORDS_S)
        finally:
            left = list(self.server_state.tasks)
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=LAST_WORDS_S)
            for connection in list(self.server_state.connections):  # clients that do not read
                connection.transport.abort()
