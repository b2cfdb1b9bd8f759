"""The HTTP interface: OpenAI's chat completions, models and files, health, metrics, and the page.

`build` makes the application of its parts, so that tests can run it with a small model; `main` is
`apollo serve`. Read next: `server.py` for what the routes do, `process.py` for how it all ends.
"""

import argparse
import asyncio
import importlib.resources
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from prometheus_client import CollectorRegistry, generate_latest
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ValueError(
        f"`apollo serve` needs more packages: pip install 'apollo-lmm[serve]' ({error})"
    ) from error

from apollo.serve import schema
from apollo.serve.engine import Engine
from apollo.serve.guards import BodyLimits, Guard, is_local, send_error
from apollo.serve.media import MediaLimits
from apollo.serve.process import Runner, reserve
from apollo.serve.server import Server, Settings
from apollo.serve.sources import BLOCK, RefusedError

Result = TypeVar("Result")
Json = dict[str, Any]
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
logger = logging.getLogger(__name__)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Do what a client waits for, and stop if it leaves."""
    task: asyncio.Future[Result] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        both: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_left()
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def client_left() -> RefusedError:
    """Say what nobody will hear, for the log."""
    return RefusedError(499, "client_left", "the client left")


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- routes --------------------------------------------------------------------------------------


def build(server: Server) -> Guard:
    """Make the application, which starts the server's engine and ends it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.stop()
        server.uploads.close()

    app = FastAPI(title="Apollo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.state.registry = CollectorRegistry()
    app.state.registry.register(server)
    _add_chat(app)
    _add_files(app)
    _add_rest(app)
    app.add_exception_handler(RefusedError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _fault)
    settings = server.settings
    return Guard(app, settings.body, settings.api_key, settings.only_local)


def _server(request: Request) -> Server:
    return request.app.state.server


_CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": schema.ChatRequest.model_json_schema()}},
    }
}


def _add_chat(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_CHAT_BODY, response_model=None)
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        server, stack = _server(request), request.scope["stack"]
        stack.enter_context(server.gate.enter())  # before a large body is read
        body = b"".join([block async for block in request.stream()])
        asked = await run_in_threadpool(schema.parse, body)
        if asked.model not in (None, server.settings.name):
            raise RefusedError(
                404, "model_not_found", f"there is only the model {server.settings.name!r} here"
            )
        messages = schema.conversation(asked.messages)
        prompt = await unless_gone(request, server.prompt(messages, asked.sampling))
        del body, messages  # videos in data URLs are not held while the answer is written
        asked.messages.clear()
        request.scope["forget_body"]()
        answer = server.submit(prompt, asked)
        stack.callback(server.engine.cancel, answer.job)  # harmless once it is finished
        reply = schema.Reply(server.settings.name)
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            chunks = answer.chunks(reply, with_usage)
            return StreamingResponse(chunks, media_type="text/event-stream")
        text, reason = await unless_gone(request, answer.whole())
        return JSONResponse(reply.whole(text, reason, answer.usage()))

    @app.get("/v1/models")
    async def models(request: Request) -> Json:
        """List the one model."""
        return {"object": "list", "data": [_model(_server(request).settings.name)]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Json:
        """Describe the model."""
        known = _server(request).settings.name
        if name != known:
            raise RefusedError(404, "model_not_found", f"there is only the model {known!r} here")
        return _model(known)


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "apollo"}


_FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                    },
                    "required": ["file"],
                }
            }
        },
    }
}


def _add_files(app: FastAPI) -> None:
    @app.post("/v1/files", openapi_extra=_FILE_BODY)
    async def upload(request: Request) -> Json:
        """Store a file, to be named by its id in conversations."""
        server = _server(request)
        async with request.form(max_files=1, max_fields=8) as form:
            sent = form.get("file")
            if not isinstance(sent, UploadFile):
                raise RefusedError(400, "invalid_request", "the form needs a file called `file`")
            blocks = iter(lambda: sent.file.read(BLOCK), b"")
            name = (sent.filename or "file")[:200]
            stored = await run_in_threadpool(server.uploads.save, blocks, name)
        return _file(server, stored.file_id)

    @app.get("/v1/files/{file_id}")
    async def describe(request: Request, file_id: str) -> Json:
        """Describe a file."""
        return _file(_server(request), file_id)

    @app.delete("/v1/files/{file_id}")
    async def delete(request: Request, file_id: str) -> Json:
        """Delete a file."""
        server = _server(request)
        server.uploads.get(file_id)
        server.uploads.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @app.get("/v1/files/{file_id}/clips")
    async def clips(request: Request, file_id: str) -> Json:
        """What the model sees of a video: the clips, their times and small frames."""
        server = _server(request)
        request.scope["stack"].enter_context(server.gate.enter())
        source = server.uploads.get(file_id).source
        return (await unless_gone(request, server.store.get("video", source))).description


def _file(server: Server, file_id: str) -> Json:
    upload = server.uploads.get(file_id)
    return {
        "id": file_id,
        "object": "file",
        "bytes": upload.num_bytes,
        "created_at": upload.created_s,
        "filename": upload.filename,
        "purpose": "user_data",
        "status": "processed",
    }


def _add_rest(app: FastAPI) -> None:
    page = (importlib.resources.files("apollo.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """Whether requests are being answered."""
        is_well = _server(request).engine.is_alive()
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counts, for Prometheus."""
        text = generate_latest(request.app.state.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(request: Request, error: RefusedError) -> Response:
    class Refusal(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send_error(error, send)

    return Refusal()


async def _http_error(request: Request, error: HTTPException) -> Response:
    refused = RefusedError(error.status_code, "not_possible", str(error.detail))
    return await _refused(request, refused)


async def _left(request: Request, error: Exception) -> Response:
    return await _refused(request, client_left())


async def _fault(request: Request, error: Exception) -> Response:
    return await _refused(request, RefusedError(500, "fault", "a fault of the server"))


# ---- the command ---------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Run `apollo serve`.

    Args:
        args: model, host, port, api_key, media_root, max_batch, max_waiting, max_upload,
            max_duration, max_new_tokens, grace.
    """
    from apollo.chat import DEFAULT_MODEL, load_model

    root = Path(args.media_root) if args.media_root else None
    if root and not root.is_dir():
        raise ValueError(f"--media-root {root} is no folder")
    sockets = reserve(args.host, args.port)  # before the slow part: it may be taken
    key = args.api_key or os.environ.get("APOLLO_API_KEY", "")
    name = Path(args.model or DEFAULT_MODEL).name
    settings = Settings(
        name=name,
        api_key=key,
        only_local=not key and is_local(args.host),
        media_root=root,
        max_waiting=args.max_waiting,
        longest_answer=args.max_new_tokens,
        body=BodyLimits(max_upload_bytes=args.max_upload * 2**20),
        media=MediaLimits(max_duration_s=args.max_duration),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not key and not is_local(args.host):
        logger.warning("no API key: whoever reaches %s:%d may ask", args.host, args.port)
    model, processor = load_model(args.model)
    server = Server(Engine(model, processor, max_rows=args.max_batch), settings)
    logger.info("the model %s at http://%s:%d", name, args.host, args.port)
    max_connections = 4 * (args.max_batch + args.max_waiting) + 64
    Runner(build(server), server.stop, args.grace, max_connections).run(sockets)
    return 0
