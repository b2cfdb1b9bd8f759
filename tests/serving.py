"""A server for the tests, with the shipped micro model: in a thread, or in a process of its own."""

import functools
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo.chat import load_model
from apollo.serve.api import build
from apollo.serve.engine import Engine
from apollo.serve.guards import BodyLimits, Guard
from apollo.serve.process import Runner, reserve
from apollo.serve.server import Server, Settings
from apollo.serve.sources import Fetcher


@dataclass
class Client:
    """Asks a server."""

    url: str

    def request(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is) and headers of a response."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text, found = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, text, found = error.code, error.read(), error.headers
        is_json = found.get("Content-Type", "").startswith("application/json")
        return status, json.loads(text) if is_json else text.decode(), dict(found)

    def connect(self) -> socket.socket:
        """A connection, for bytes as they are."""
        port = int(self.url.rpartition(":")[2])
        return socket.create_connection(("127.0.0.1", port), timeout=60)


@dataclass
class Running(Client):
    """A server that runs in a thread, and its parts."""

    engine: Engine
    server: Server
    app: Guard

    def wait_until_idle(self) -> None:
        """Wait until nothing is going on; a test that waits for ever fails by its own limit."""
        end_s = time.monotonic() + 30
        while self.engine.num_running or self.engine.num_waiting or self.server.gate.num_open:
            assert time.monotonic() < end_s, "the server is still at work"
            time.sleep(0.01)


@contextmanager
def running(
    settings: Settings | None = None, fetcher: Fetcher | None = None, **engine_options: Any
) -> Iterator[Running]:
    """Serve the micro model on a free port."""
    engine = Engine(*load_model("micro"), **engine_options)
    server = Server(engine, settings or Settings(name="micro"), fetcher)
    app = build(server)
    sockets = reserve("127.0.0.1", 0)
    runner = Runner(app, server.stop, grace_s=5)
    thread = threading.Thread(target=runner.run, args=[sockets])
    thread.start()
    try:
        while not runner.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.01)
        port = sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", engine, server, app)
    finally:
        runner.should_exit = True
        thread.join()


def ask(text: str, *parts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A request's body: a question after the parts that show what it is about."""
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], **settings}


def show(url: str, kind: str = "video") -> dict[str, Any]:
    """The part that shows what lies at an address."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


# ---- in a process of its own ---------------------------------------------------------------------

ROOT = Path(__file__).parent
START = "import sys, serving; serving.prepare(*{}); from apollo.cli import main; sys.exit(main())"


def prepare(*kinds: str) -> None:
    """In the server's process: make things happen that a test needs to happen."""
    for kind in kinds:
        PREPARATIONS[kind]()


def write_without_end() -> None:
    """Answers go on until they are as long as they may be, and do not hurry."""
    made, write = Engine.__init__, Engine._write

    def make(self: Engine, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self._ends = set()

    def write_slowly(self: Engine) -> None:
        time.sleep(0.02)
        write(self)

    Engine.__init__, Engine._write = make, write_slowly  # type: ignore[method-assign]


def decode_without_end() -> None:
    """The processes that decode are busy for ever."""
    from apollo.video import GuardedLoader

    run = GuardedLoader.run

    def run_for_ever(self: GuardedLoader, *args: Any) -> Any:
        return run(self, time.sleep, 1000)  # type: ignore[type-var]

    GuardedLoader.run = run_for_ever  # type: ignore[assignment, method-assign]


def reach_a_bad_internet() -> None:
    """What is fetched comes from `internet.py`."""
    import internet

    from apollo.serve import server

    world = internet.WholeInternet()
    context = internet.PlainContext(ssl.PROTOCOL_TLS_CLIENT)
    server.Fetcher = functools.partial(  # type: ignore[assignment, misc]
        Fetcher, resolve=world.resolve, connect=world.connect, context=context
    )


def have_little_patience() -> None:
    """Who is slow is given up in seconds rather than in minutes."""
    from apollo.serve import api, process

    process.HEADER_LIMIT_S = 2.0
    limits, media = functools.partial(BodyLimits, time_limit_s=6, pause_limit_s=2), api.MediaLimits
    api.BodyLimits = limits  # type: ignore[assignment, misc]
    api.MediaLimits = functools.partial(media, time_limit_s=30)  # type: ignore[assignment, misc]


PREPARATIONS = {
    "endless answers": write_without_end,
    "endless videos": decode_without_end,
    "bad internet": reach_a_bad_internet,
    "little patience": have_little_patience,
}


class Process(Client):
    """`apollo serve` as users start it; its temporary files lie in a folder of its own."""

    def __init__(self, folder: Path, *options: str, prepared: tuple[str, ...] = ()) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        self.log_path, self.temporary, self.mark = (
            folder / "log",
            folder / "tmp",
            secrets.token_hex(),
        )
        self.temporary.mkdir()
        command = [sys.executable, "-c", START.format(prepared), "serve", "--port", str(port)]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        extra = {"PYTHONPATH": paths, "TMPDIR": str(self.temporary), "MARK": self.mark}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=log, stderr=log, env={**os.environ, **extra}
            )

    def __enter__(self) -> "Process":
        while True:
            assert self.process.poll() is None, self.log
            try:
                assert self.request("/health")[0] == 200
                return self
            except urllib.error.URLError:
                time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        """What the server said so far."""
        return self.log_path.read_text()

    def pids(self) -> list[int]:
        """The server and whatever it has started, also what is nobody's child any more."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or is another user's
                pass
        return found

    def end(self, timeout_s: float = 60.0) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout_s)
