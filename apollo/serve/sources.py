"""Where the videos and images of a request lie, and what is refused before they are opened.

A request names media by data URL, by the id of an upload, by a file under the allowed root, or by
an https URL. Whoever may send URLs must not make this server speak to machines that only it can
reach, so the host of every URL, also of every redirect, is resolved once, all of its addresses must
be public, and the connection goes to the very address that was checked. Read next: `media.py`,
which decodes what is found here.
"""

import base64
import binascii
import hashlib
import http.client
import ipaddress
import re
import secrets
import socket
import ssl
import stat
import tempfile
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MAX_REDIRECTS = 3
SOCKET_TIMEOUT_S = 10.0
BLOCK = 2**18
MAX_ADDRESS = 4096  # characters, but for data URLs
REDIRECTS = (301, 302, 303, 307, 308)
DATA_URL = re.compile(r"data:(image|video|application)/[\w.+-]{1,64}(;[\w=.+-]{1,64})*;base64,")


class RefusedError(ValueError):
    """A request that is not answered.

    Attributes:
        status: Of the HTTP response.
        code: A word for programs.
        headers: Of the response.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass(frozen=True)
class Source:
    """An image or a video that was found.

    Attributes:
        name: What messages call it; says nothing about this machine.
        digest: Equal for equal contents.
        data: The bytes, or the file that holds them.
    """

    name: str
    digest: str
    data: bytes | Path = field(repr=False)


# ---- uploads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """A file that was sent here.

    Attributes:
        file_id: A secret: who knows it may use the file.
        filename: As the sender calls it.
        source: The file.
        num_bytes: Its size.
        created_s: When, in seconds since 1970.
    """

    file_id: str
    filename: str
    source: Source
    num_bytes: int
    created_s: int


class Uploads:
    """Files that were sent or fetched, in a temporary folder; the oldest go when it is full."""

    def __init__(self, max_bytes: int, max_total_bytes: int) -> None:
        """Make the folder; `max_bytes` for one file, `max_total_bytes` for all."""
        self.max_bytes, self.max_total_bytes = max_bytes, max_total_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="apollo-serve-")
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def save(self, blocks: Iterable[bytes], filename: str) -> Upload:
        """Store a file.

        Raises:
            RefusedError: It is empty or too large.
        """
        file_id = f"file-{secrets.token_hex(16)}"
        path, digest, num_bytes = Path(self._folder.name) / file_id, hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for block in blocks:
                    num_bytes += len(block)
                    if num_bytes > self.max_bytes:
                        raise too_large("the file", self.max_bytes)
                    digest.update(block)
                    file.write(block)
            if not num_bytes:
                raise RefusedError(400, "empty_file", "the file is empty; send it again")
        except BaseException:  # also when the sender is gone: leave no half file
            path.unlink(missing_ok=True)
            raise
        source = Source(filename, digest.hexdigest(), path)
        upload = Upload(file_id, filename, source, num_bytes, int(time.time()))
        with self._lock:
            self._uploads[file_id] = upload
            while sum(u.num_bytes for u in self._uploads.values()) > self.max_total_bytes:
                self._drop(next(iter(self._uploads)))
        return upload

    def get(self, file_id: str) -> Upload:
        """Find an upload.

        Raises:
            RefusedError: There is none.
        """
        with self._lock:
            if file_id not in self._uploads:
                raise RefusedError(
                    404, "file_not_found", "there is no such file, or no longer; upload it again"
                )
            self._uploads.move_to_end(file_id)
            return self._uploads[file_id]

    def delete(self, file_id: str) -> None:
        """Delete an upload, if there is one."""
        with self._lock:
            if file_id in self._uploads:
                self._drop(file_id)

    def close(self) -> None:
        """Delete all."""
        self._folder.cleanup()

    def _drop(self, file_id: str) -> None:
        path = self._uploads.pop(file_id).source.data
        assert isinstance(path, Path)
        path.unlink(missing_ok=True)


def too_large(what: str, max_bytes: int) -> RefusedError:
    """Say that something is larger than allowed."""
    return RefusedError(413, "too_large", f"{what} is larger than {max_bytes / 2**20:g} MiB")


def stopping() -> RefusedError:
    """Say that it is over."""
    return RefusedError(503, "stopping", "the server is stopping; ask again in a while")


# ---- the kinds of address ------------------------------------------------------------------------


def read_data_url(url: str, max_bytes: int) -> Source:
    """Decode a data URL.

    Raises:
        RefusedError: It is malformed or too large.
    """
    match = DATA_URL.match(url[:512])
    if not match:
        raise RefusedError(
            400, "invalid_url", "a data URL must look like data:video/mp4;base64,... "
        )
    if (len(url) - match.end()) * 3 // 4 > max_bytes + 2:
        raise too_large("the file in the data URL", max_bytes)
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, "invalid_url", "the data URL is not valid base64") from None
    if not data:
        raise RefusedError(400, "empty_file", "the data URL is empty")
    return Source("the file in the data URL", hashlib.sha256(data).hexdigest(), data)


def find_under(root: Path | None, url: str) -> Source:
    """Find a file under the allowed root by its path or file: URL.

    What is outside, links that lead outside included, is not told apart from what does not exist.

    Raises:
        RefusedError: There is no such file under the root, or no root.
    """
    if root is None:
        raise RefusedError(
            403, "no_media_root", "this server opens no files of its own; upload the video instead"
        )
    path = url
    if url.lower().startswith("file:"):
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(parts.path) if parts.netloc in ("", "localhost") else "\0"
    missing = RefusedError(404, "file_not_found", "there is no such file under the media root")
    try:
        resolved_root = root.resolve(strict=True)
        found = (resolved_root / path).resolve(strict=True)
        status = found.stat()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL, a name that is too long
        raise missing from None
    if not found.is_relative_to(resolved_root) or not stat.S_ISREG(status.st_mode):
        raise missing
    # Hashing could take longer than decoding; who may write there is trusted with its times.
    mark = f"{found}\0{status.st_size}\0{status.st_mtime_ns}"
    return Source(found.name, hashlib.sha256(mark.encode("utf-8", "replace")).hexdigest(), found)


Resolve = Callable[[str], list[str]]
Connect = Callable[[str, int], socket.socket]


def resolve(host: str) -> list[str]:
    """Look up all addresses of a host."""
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, whatever it is wrapped in."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if inner := ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]):
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class _Connection(http.client.HTTPSConnection):
    """Connects to an address that was checked, and expects the host's certificate there."""

    def __init__(self, host: str, address: str, connect: Connect, context: ssl.SSLContext) -> None:
        super().__init__(host, 443, timeout=SOCKET_TIMEOUT_S, context=context)
        self._open, self._address, self._tls = connect, address, context
        self.opened: socket.socket | None = None  # `sock` is forgotten once the body is all to come

    def connect(self) -> None:
        plain = self._open(self._address, 443)
        plain.settimeout(SOCKET_TIMEOUT_S)
        self.opened = plain
        self.opened = self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)

    def shut(self) -> None:
        """End whatever waits for it; from another thread."""
        if self.opened is not None:
            with suppress(OSError):  # closed meanwhile
                self.opened.shutdown(socket.SHUT_RDWR)


class Fetcher:
    """Fetches public https URLs into the uploads."""

    def __init__(
        self,
        uploads: Uploads,
        time_limit_s: float,
        resolve: Resolve = resolve,
        connect: Connect = lambda address, port: socket.create_connection(
            (address, port), SOCKET_TIMEOUT_S
        ),
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Set up; `resolve`, `connect` and `context` are what the network is reached by."""
        self.uploads, self.time_limit_s = uploads, time_limit_s
        self._resolve, self._connect = resolve, connect
        self._context = context or ssl.create_default_context()
        self._connections: set[_Connection] = set()
        self._is_closed = False

    def close(self) -> None:
        """End what is being fetched."""
        self._is_closed = True
        for connection in list(self._connections):
            connection.shut()

    def fetch(self, url: str) -> Upload:
        """Fetch a URL, following a few redirects.

        Raises:
            RefusedError: The address is not public https, or the server there does not deliver.
        """
        end_s = time.monotonic() + self.time_limit_s
        try:
            for _ in range(MAX_REDIRECTS + 1):
                host, target = _split(url)
                with self._response(host, target, end_s) as response:
                    if response.status not in REDIRECTS:
                        return self._save(response, end_s)
                    url = _redirected(url, response.headers.get("Location", ""))
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            if self._is_closed:
                raise stopping() from None
            is_late = isinstance(error, TimeoutError)
            raise _bad_fetch("it took too long" if is_late else type(error).__name__) from None
        raise _bad_fetch("it redirects too often")

    @contextmanager
    def _response(self, host: str, target: str, end_s: float) -> Iterator[http.client.HTTPResponse]:
        addresses = self._resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise RefusedError(
                403, "address_refused", "the URL leads to an address that is not public"
            )
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection = _Connection(host, addresses[0], self._connect, self._context)
        # A server that sends a byte now and then never times out at the socket.
        timer = threading.Timer(left_s, connection.shut)
        timer.daemon = True
        timer.start()
        self._connections.add(connection)
        try:
            if self._is_closed:
                raise OSError
            connection.request("GET", target, headers={"User-Agent": "apollo", "Accept": "*/*"})
            yield connection.getresponse()
        except OSError:
            if time.monotonic() >= end_s:
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            self._connections.discard(connection)
            connection.close()

    def _save(self, response: http.client.HTTPResponse, end_s: float) -> Upload:
        if response.status != 200:
            raise _bad_fetch(f"it answers with status {response.status}")
        if (response.length or 0) > self.uploads.max_bytes:
            raise too_large("the file behind the URL", self.uploads.max_bytes)
        upload = self.uploads.save(iter(lambda: response.read(BLOCK), b""), "the file at the URL")
        if time.monotonic() >= end_s or response.length:  # cut off by the timer, or by the sender
            self.uploads.delete(upload.file_id)
            raise TimeoutError if time.monotonic() >= end_s else _bad_fetch("it breaks off")
        return upload


def _split(url: str) -> tuple[str, str]:
    """The host of an https URL and what to ask it for."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urllib.parse.urlsplit("")
    if parts.scheme != "https" or not host or port not in (None, 443) or "@" in parts.netloc:
        raise RefusedError(
            400, "invalid_url", "only https URLs without port, name and password are fetched"
        )
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return host, f"{target}?{query}" if query else target


def _redirected(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError:
        raise _bad_fetch("it redirects to what is no address") from None


def _bad_fetch(reason: str) -> RefusedError:
    return RefusedError(400, "fetch_failed", f"the URL cannot be fetched: {reason}")
