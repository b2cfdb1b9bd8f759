"""What stands before every request: who may ask, how much, how fast, and what is logged.

`Guard` wraps the whole application, so that no route can forget it: hosts and origins, the API key,
sizes and times of bodies, safe headers, and one line in the log without any contents. `Gate` counts
the answers that are open. Both refuse with `RefusedError`, which becomes OpenAI's form of an error.
Read next: `api.py`.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apollo.serve.sources import RefusedError, stopping, too_large

OPEN_PATHS = ("/", "/health")  # the page has no secrets, and asks for the key itself
LINGER_S = 3.0
UPLOAD_PATH = "/v1/files"
FILE_ID = re.compile(r"file-\w+")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BodyLimits:
    """What requests may bring.

    Attributes:
        max_body_bytes: Largest JSON, data URLs included; it is held in memory.
        max_upload_bytes: Largest file that is uploaded or fetched; it is held on disk.
        time_limit_s: Longest that a body may take to arrive.
        pause_limit_s: Longest that a sender may pause.
        max_at_once: So many bodies of the largest size may be on their way together.
    """

    max_body_bytes: int = 32 * 2**20
    max_upload_bytes: int = 512 * 2**20
    time_limit_s: float = 300.0
    pause_limit_s: float = 20.0
    max_at_once: int = 4


class Gate:
    """Lets so many requests in at once and asks others to come back later.

    Attributes:
        num_open: Requests inside.
        num_turned_away: Requests that were not let in.
    """

    def __init__(self, max_open: int, seconds_each: Callable[[], float]) -> None:
        """`seconds_each`: About how long until a place is free again."""
        self.max_open, self._seconds_each = max_open, seconds_each
        self.num_open = self.num_turned_away = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside.

        Raises:
            RefusedError: It is full.
        """
        if self.num_open >= self.max_open:
            self.num_turned_away += 1
            raise busy(self._seconds_each())
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


def busy(wait_s: float) -> RefusedError:
    """Ask to come back in a while."""
    seconds = str(min(60, max(1, math.ceil(wait_s))))
    message = f"too many requests at once; try again in {seconds} s"
    return RefusedError(429, "queue_full", message, {"Retry-After": seconds})


def error_body(error: RefusedError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


class Guard:
    """The outermost layer of the application.

    Each request's scope gets `stack`, an `ExitStack` that is closed when the request is over,
    however it ends, and `forget_body`, to be called when the body is no longer held in memory.
    """

    def __init__(
        self, app: ASGIApp, limits: BodyLimits, api_key: str = "", only_local: bool = False
    ) -> None:
        """Wrap an application.

        Args:
            app: The application.
            limits: Of bodies.
            api_key: What `Authorization: Bearer` must bring; empty for no key.
            only_local: Refuse host names other than localhost: a page elsewhere could have its own
                name resolve to this machine and so talk to a server without a key.
        """
        self.app, self.limits, self.only_local = app, limits, only_local
        self._key_hash = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self._num_bytes = {False: 0, True: 0}  # on their way; True: of uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_s, status = time.monotonic(), 0

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message.get("headers", [])}
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [
                    *message.get("headers", []),
                    *(pair for pair in extra if pair[0] not in given),
                ]
            await send(message)

        with ExitStack() as stack:
            scope["stack"] = stack
            try:
                self._check(scope)
                await self.app(scope, self._limited(scope, receive, stack), send_safely)
            except RefusedError as error:
                if status == 0:
                    await _discard(receive)
                    await send_error(error, send_safely)
            except asyncio.CancelledError:  # the server does not wait for it any longer
                if status == 0:
                    await send_error(stopping(), send_safely)
            finally:
                # Neither query nor body nor the ids of files, which are secrets.
                path = FILE_ID.sub("file-...", scope["path"])[:100]
                spent_s = time.monotonic() - start_s
                logger.info("%s %r %d %.3f s", scope["method"], path, status, spent_s)

    def _check(self, scope: Scope) -> None:
        """Check whatever stands in the headers."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self.only_local and not is_local(host):
            raise RefusedError(421, "wrong_host", "ask this server as localhost, or give it a key")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD") and _host_of(origin) != host:
            raise RefusedError(403, "wrong_origin", "pages of other sites may not ask this server")
        if self._key_hash and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(key.strip()).digest() if scheme.lower() == b"bearer" else b""
            if not hmac.compare_digest(given, self._key_hash):
                raise RefusedError(
                    401,
                    "invalid_api_key",
                    "the API key is missing or wrong",
                    {"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes(scope):
            raise too_large("the request", self._max_bytes(scope))

    def _max_bytes(self, scope: Scope) -> int:
        limits = self.limits
        # A form is a little larger than the file in it.
        return limits.max_upload_bytes + 2**16 if _is_upload(scope) else limits.max_body_bytes

    def _limited(self, scope: Scope, receive: Receive, stack: ExitStack) -> Receive:
        """`receive`, which refuses bodies that are too large, too slow, or too many."""
        end_s = time.monotonic() + self.limits.time_limit_s
        kind, max_bytes, num_bytes, is_over = _is_upload(scope), self._max_bytes(scope), 0, False

        def forget() -> None:
            nonlocal num_bytes
            self._num_bytes[kind] -= num_bytes
            num_bytes = 0

        scope["forget_body"] = stack.callback(forget)

        async def receive_limited() -> Message:
            nonlocal num_bytes, is_over
            if is_over:
                return await receive()  # waits for the client to leave
            wait_s = min(self.limits.pause_limit_s, max(0.0, end_s - time.monotonic()))
            try:
                message = await asyncio.wait_for(receive(), wait_s)
            except TimeoutError:
                raise RefusedError(
                    408, "too_slow", "the request's body came too slowly", {"Connection": "close"}
                ) from None
            size = len(message.get("body", b""))
            is_over = not message.get("more_body", False)
            num_bytes += size
            self._num_bytes[kind] += size
            if num_bytes > max_bytes:
                await _discard(receive)
                raise too_large("the request", max_bytes)
            if self._num_bytes[kind] > self.limits.max_at_once * max_bytes:
                raise busy(2.0)
            return message

        return receive_limited


async def _discard(receive: Receive) -> None:
    """Let a sender finish, within reason: many read no answer before."""
    try:
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass


async def send_error(error: RefusedError, send: Send) -> None:
    """Respond with an error."""
    body = json.dumps(error_body(error)).encode()
    headers = {"Content-Type": "application/json", **error.headers}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _is_upload(scope: Scope) -> bool:
    return scope["path"] == UPLOAD_PATH


def _host_of(origin: str) -> str:
    return origin.partition("://")[2]


def is_local(host: str) -> bool:
    """Whether a host, perhaps with a port, is this machine."""
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
