"""Hundreds of hostile inputs at one server: each is refused, it goes on, its memory is bounded.

What they are: `hostile.py` (files and requests) and `internet.py` (hosts); HTTP that is broken,
slow, or more than it should be is here. `test_serve_guards.py` has the guards one by one.
"""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hostile import data_url, hostile_bodies, hostile_images, hostile_videos
from internet import NAMES, WAYS
from serving import Process, ask, show

CHAT, FILES = "/v1/chat/completions", "/v1/files"
KEY = {"Authorization": "Bearer sesame"}
FORM = {**KEY, "Content-Type": "multipart/form-data; boundary=B"}
PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
PREPARED = ("bad internet", "little patience")
MIB = 2**20
# How much more memory than before it is, at any time and afterwards. A body of 32 MiB is held as
# bytes, as text and decoded, several at once, and what was freed is not all given back.
MOST_MORE, MORE_AFTERWARDS = 1000 * MIB, 500 * MIB
# Two processes that decode, each of which is refused more than 2 GiB beyond what it starts with.
MOST_DECODING = 2 * (2048 + 256) * MIB


@dataclass(frozen=True)
class Attack:
    """Something hostile: what it is, how it is done, and with which status it must be refused."""

    name: str
    run: Callable[[Process], int]
    expected: tuple[int, ...]


def post(path: str, body: bytes, headers: dict[str, str] = KEY) -> Callable[[Process], int]:
    def run(server: Process) -> int:
        status, answer, found = server.request(path, body, **headers)
        assert set(answer) == {"error"} and found["x-content-type-options"] == "nosniff"
        assert len(str(answer)) < 1000 and not re.search(
            r"/tmp|/home|Traceback|line \d", str(answer)
        )
        return status

    return run


def question(url: str, kind: str = "video") -> bytes:
    return json.dumps(ask("Why?", show(url, kind))).encode()


def upload(data: bytes) -> Callable[[Process], int]:
    """Upload a file, and ask for its clips."""

    def run(server: Process) -> int:
        status, stored, _ = server.request(FILES, PART + data + b"\r\n--B--\r\n", **FORM)
        if status != 200:
            return status
        path = f"{FILES}/{stored['id']}"
        status = server.request(f"{path}/clips", **KEY)[0]
        assert server.request(path, method="DELETE", **KEY)[0] == 200
        return status

    return run


def media(address: str) -> Iterator[Attack]:
    refused = (400, 413)
    for name, data in hostile_images():
        yield Attack(name, post(CHAT, question(data_url("image", data), "image")), refused)
    for name, data in hostile_videos(address):
        yield Attack(name, post(CHAT, question(data_url("video", data))), refused)
        yield Attack(f"{name}, uploaded", upload(data), refused)


def urls() -> Iterator[Attack]:
    def at(url: str, *expected: int) -> Attack:
        return Attack(f"a video at {url[:200]}", post(CHAT, question(url)), expected)

    for name in NAMES:
        if name != "public.example":
            yield at(f"https://{name}/a.mp4", 403)
    yield at("https://unknown.example/a.mp4", 400)
    for way in WAYS:
        yield at(f"https://public.example/{way}", 400, 413)
    targets = [f"https://{name}/" for name in NAMES if name != "public.example"]
    targets += [
        "http://public.example/",
        "file:///etc/passwd",
        "ftp://public.example/",
        "//[",
        "/x",
    ]
    targets += ["https://127.0.0.1/", "https://public.example:22/", "https://a@public.example/"]
    for target in targets:
        quoted = urllib.parse.quote(target, safe="")
        yield at(f"https://public.example/redirect?{quoted}", 400, 403)
        twice = urllib.parse.quote(f"https://public.example/redirect?{quoted}", safe="")
        yield at(f"https://public.example/redirect?{twice}", 400, 403)
    for number in range(3):  # public when it redirects, private at the next look-up
        target = urllib.parse.quote(f"https://{number}.changing.example/page", safe="")
        yield at(f"https://{number}.changing.example/redirect?{target}", 403)


# ---- HTTP as it should not be --------------------------------------------------------------------


def raw(*pieces: bytes, pause_s: float = 0.0) -> Callable[[Process], int]:
    """Send bytes as they are; the status that comes back, or 0 where the server just closes."""

    def run(server: Process) -> int:
        found = b""
        with server.connect() as connection:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause_s)
            with contextlib.suppress(ConnectionResetError):
                while b"\r\n" not in found and (block := connection.recv(65536)):
                    found += block
        return int(found.split()[1]) if found else 0

    return run


HOST = b"Host: x\r\nAuthorization: Bearer sesame\r\n"
GET, POST = b"GET /v1/models HTTP/1.1\r\n" + HOST, b"POST %s HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
JSON = POST % CHAT.encode()
MULTIPART = POST % FILES.encode() + b"Content-Type: multipart/form-data; boundary=B\r\n"
BROKEN = {
    "a request line of one word": b"GET\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a proxy's request": b"GET http://127.0.0.1:22/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: y\r\n\r\n",
    "a header without colon": GET + b"nonsense\r\n\r\n",
    "a header with a space in its name": GET + b"a b: c\r\n\r\n",
    "a header with a zero": GET + b"a: \0\r\n\r\n",
    "a header of 1 MB": GET + b"a: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "200,000 headers": GET + b"a: b\r\n" * 200_000 + b"\r\n",
    "a path of 100 kB": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path with a zero": b"GET /v1/models/%00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that is no UTF-8": b"GET /v1/models/%ff%fe HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that escapes": b"GET /v1/files/../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that escapes, encoded": b"GET /v1/files/..%2f..%2fetc HTTP/1.1\r\n" + HOST + b"\r\n",
    "a web socket": GET[:14].replace(b"/v1/models", b"/ws") + b" HTTP/1.1\r\n" + HOST
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n",
    "a negative length": JSON + b"Content-Length: -1\r\n\r\n",
    "a signed length": JSON + b"Content-Length: +5\r\n\r\n",
    "a length in words": JSON + b"Content-Length: five\r\n\r\n",
    "two lengths": JSON + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a length of 10^14": JSON + b"Content-Length: 99999999999999\r\n\r\n",
    "a length of 10^5000": JSON + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "an unknown encoding": JSON + b"Transfer-Encoding: gzip\r\n\r\n",
    "a chunk of nonsense": JSON + CHUNKED + b"zz\r\n",
    "a chunk of 2^80 bytes": JSON + CHUNKED + b"f" * 20 + b"\r\n",
    "a chunk with 100 kB of extensions": JSON + CHUNKED + b"1;" + b"x" * 100_000 + b"\r\n",
    "a length and chunks": JSON + b"Content-Length: 5\r\n" + CHUNKED + b"0\r\n\r\n",
    "a compressed body": JSON + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b",
    "GET for an answer": b"GET " + CHAT.encode() + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "DELETE of all files": b"DELETE /v1/files HTTP/1.1\r\n" + HOST + b"\r\n",
    "half a request": JSON + b"Content-Length: 100\r\n\r\n{",
    "half a form": MULTIPART + b"Content-Length: 100\r\n\r\n--B",
    "half a header": JSON + b"Content-Le",
    "nothing": b"",
    "a hundred requests at once": b"GET /nothing HTTP/1.1\r\n%s\r\n" % HOST * 100,
    "a file larger than allowed": MULTIPART + CHUNKED + b"%x\r\n" % (3 * MIB) + bytes(3 * MIB),
}  # fmt: skip
FIELD = b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
FORMS = {
    "an empty form": b"",
    "a form without parts": b"--B--",
    "a form of nonsense": b"nonsense",
    "a form that breaks off": PART,
    "an empty file": PART + b"\r\n--B--\r\n",
    "two files": 2 * (PART + b"a\r\n") + b"--B--\r\n",
    "a file that is a text": FIELD % b"file" + b"x\r\n--B--\r\n",
    "a thousand fields": 1000 * (FIELD % b"a" + b"x\r\n") + b"--B--",
    "a field of 2 MB": FIELD % b"a" + bytes(2_000_000),
    "a part with headers of 100 kB": b"--B\r\n" + b"a: " + b"x" * 100_000 + b"\r\n\r\nx\r\n--B--",
    "a part with 5000 headers": b"--B\r\n" + b"a: b\r\n" * 5000 + b"\r\nx\r\n--B--",
}  # fmt: skip


def broken() -> Iterator[Attack]:
    for name, data in BROKEN.items():
        yield Attack(name, raw(data), (400, 401, 404, 405, 408, 413, 431))
    yield Attack("headers that drip", raw(*[b"x"] * 30, pause_s=0.2), (408,))
    head = JSON + b"Content-Length: 999\r\n\r\n"
    yield Attack("a body that drips", raw(head, *[b" "] * 99, pause_s=0.1), (408,))
    chunks = [b"%x\r\n%s\r\n" % (4 * MIB, bytes(4 * MIB))] * 9
    yield Attack("chunks without end", raw(JSON + CHUNKED, *chunks), (413,))
    for name, body in FORMS.items():
        yield Attack(name, post(FILES, body, FORM), (400, 413))
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=", "x"):
        headers = {**KEY, "Content-Type": kind}
        yield Attack(f"a form of type {kind}", post(FILES, PART, headers), (400,))
    for key in ("", "Bearer", "Bearer ", "Bearer sesam", "Basic c2VzYW1l", "Bearer " + "x" * 9999):
        headers = {"Authorization": key}
        yield Attack(f"the key {key[:20]!r}", post(CHAT, b"{}", headers), (401,))
    for origin in ("https://evil.example", "null", "file://"):
        headers = {**KEY, "Origin": origin}
        yield Attack(f"a page from {origin}", post(CHAT, b"{}", headers), (403,))


def flood() -> Iterator[Attack]:
    """Twelve bodies that do not end, where there is room for four of the largest at once."""
    for number in range(12):
        head = MULTIPART + b"X: %d\r\nContent-Length: %d\r\n\r\n" % (number, 2 * MIB)
        yield Attack(
            f"body {number} of many at once", raw(head, PART, bytes(2 * MIB - 299)), (408, 429)
        )


# ---- the test ------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Watches the memory of a server and of what it starts."""

    server: Process
    most_decoding: int = 0
    _is_over: threading.Event = field(default_factory=threading.Event)

    def memory(self, pid: int, name: str = "VmRSS") -> int:
        """Memory of a process in bytes: now (VmRSS) or at most so far (VmHWM)."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            return sum(1024 * int(line.split()[1]) for line in file if line.startswith(name))
        return 0  # it has ended

    def __enter__(self) -> "Watch":
        self.before = self.memory(self.server.process.pid)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.1):
            decoding = sum(map(self.memory, set(self.server.pids()) - {self.server.process.pid}))
            self.most_decoding = max(self.most_decoding, decoding)


def ask_well(server: Process, video: bytes) -> None:
    """Ask as good people do."""
    status, body, _ = server.request(CHAT, question(data_url("video", video)), **KEY)
    assert status == 200 and body["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_hundreds_of_hostile_inputs(tmp_path, plain_video):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(plain_video.path.read_bytes())
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    options = ("--api-key", "sesame", "--media-root", str(root), "--max-upload", "2")
    good = plain_video.path.read_bytes()
    with (
        socket.create_server(("127.0.0.1", 0)) as canary,
        Process(tmp_path, *options, prepared=PREPARED) as server,
    ):
        address = f"http://127.0.0.1:{canary.getsockname()[1]}/x.ts"
        bodies = (Attack(n, post(CHAT, body), (status,)) for n, body, status in hostile_bodies())
        attacks = [*bodies, *media(address), *urls(), *broken()]
        names = {attack.name for attack in attacks}
        assert len(names) == len(attacks) > 500
        ask_well(server, good)
        with Watch(server) as watch, ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda attack: attack.run(server), attacks))
        wrong = [(a.name, s) for a, s in zip(attacks, found, strict=True) if s not in a.expected]
        assert not wrong, "\n".join(map(str, wrong))
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda attack: attack.run(server), flood()))
        assert set(found) <= {408, 429} and 429 in found
        ask_well(server, good + b"0")  # another file: it is decoded anew
        most = watch.memory(server.process.pid, "VmHWM") - watch.before
        more = watch.memory(server.process.pid) - watch.before
        figures = [round(number / MIB) for number in (most, more, watch.most_decoding)]
        print(len(attacks), "attacks; MiB more at most, and then; most for decoding:", *figures)
        assert most < MOST_MORE and more < MORE_AFTERWARDS and watch.most_decoding < MOST_DECODING
        canary.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody was sent there
            canary.accept()
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0 and server.pids() == []
        assert "Traceback" not in server.log, server.log
        assert "secret" not in server.log
