"""A server in a thread of the tests, with the shipped micro model."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from apollo.chat import load_model
from apollo.serve.api import Server, Settings, build
from apollo.serve.engine import Engine
from apollo.serve.guards import Guard
from apollo.serve.sources import Fetcher


@dataclass
class Running:
    """A server that runs: its address and its parts."""

    url: str
    engine: Engine
    server: Server
    app: Guard

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
    app = build(engine, settings or Settings(name="micro"), fetcher)
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", engine, app.app.state.server, app)
    finally:
        server.should_exit = True
        thread.join()


def ask(text: str, *parts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A request's body: a question after the parts that show what it is about."""
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], **settings}


def show(url: str, kind: str = "video") -> dict[str, Any]:
    """The part that shows what lies at an address."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
