"""The HTTP interface: OpenAI's chat completions, models and files, health, metrics, and the page.

`build` makes the application of its parts, so that tests can run it with a small model; `main` is
`apollo serve`. A request is parsed (`schema.py`), its media are found (`sources.py`) and made ready
(`media.py`), and the engine's words are passed on as they come.
"""

import argparse
import asyncio
import importlib.resources
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from apollo.messages import Message, map_media, media_parts
from apollo.serve import schema
from apollo.serve.engine import Engine, Event, Job, Prompt, PromptError
from apollo.serve.guards import BodyLimits, Gate, Guard, error_body, send_error
from apollo.serve.media import MediaLimits, MediaStore, Medium
from apollo.serve.sources import (
    BLOCK,
    Fetcher,
    RefusedError,
    Source,
    Uploads,
    find_under,
    read_data_url,
)

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ValueError(
        f"`apollo serve` needs more packages: pip install 'apollo-lmm[serve]' ({error})"
    ) from error

Result = TypeVar("Result")
Json = dict[str, Any]
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a server may be told.

    Attributes:
        name: What the model is called.
        api_key: What clients must bring; empty for none.
        only_local: See `guards.Guard`.
        media_root: Folder whose files may be asked about.
        max_waiting: Requests that wait while others are answered.
        max_media: Most images and videos of one request.
        longest_answer: Most tokens of an answer.
        max_stored_bytes: Most disk space of uploads.
        body: Limits of what requests bring.
        media: Limits of images and videos.
        num_processes: How many decode.
    """

    name: str = "apollo"
    api_key: str = field(default="", repr=False)
    only_local: bool = False
    media_root: Path | None = None
    max_waiting: int = 64
    max_media: int = 8
    longest_answer: int = 1024
    max_stored_bytes: int = 4 * 2**30
    body: BodyLimits = BodyLimits()
    media: MediaLimits = MediaLimits()
    num_processes: int = 2


class Server:
    """What the routes share; made when the application starts and ended with it."""

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.engine, self.settings = engine, settings
        self.uploads = Uploads(settings.body.max_upload_bytes, settings.max_stored_bytes)
        self.fetcher = fetcher or Fetcher(self.uploads, settings.body.time_limit_s)
        self.fetcher.uploads = self.uploads
        self.store = MediaStore(engine, settings.media, settings.num_processes)
        self.gate = Gate(engine.max_rows + settings.max_waiting, lambda: engine.seconds_per_job)
        self._fetching = asyncio.Semaphore(4)

    async def find(self, address: str) -> Source:
        """Find what an address of a request means."""
        if address.startswith("data:"):
            limit = self.settings.body.max_body_bytes
            return await run_in_threadpool(read_data_url, address, limit)
        if address.startswith("file-"):
            return self.uploads.get(address).source
        if address.lower().startswith(("https:", "http:")):
            async with self._fetching:
                upload = await run_in_threadpool(self.fetcher.fetch, address)
            return upload.source
        return await run_in_threadpool(find_under, self.settings.media_root, address)

    async def prompt(self, messages: list[Message], sampling: str | None) -> Prompt:
        """Get the media of a conversation ready and turn it into tokens."""
        asked = media_parts(messages)
        if len(asked) > self.settings.max_media:
            raise RefusedError(
                400, "too_many_media", f"at most {self.settings.max_media} images and videos"
            )
        media: list[Medium] = []
        for kind, address in asked:
            media.append(await self.store.get(kind, await self.find(address.url), sampling))
        return await run_in_threadpool(self._tokens, messages, media)

    def _tokens(self, messages: list[Message], media: list[Medium]) -> Prompt:
        shown = iter(media)
        loaded = map_media(messages, lambda kind, source: next(shown).shown)
        try:
            batch = self.engine.processor(loaded, add_generation_prompt=True, with_pixels=False)
            known = [(medium.key, medium.tokens) for medium in media]
            return Prompt.of(self.engine.model, batch["input_ids"][0], known)
        except PromptError as error:
            raise RefusedError(400, "context_length_exceeded", str(error)) from None
        except ValueError as error:
            raise RefusedError(400, "invalid_request", str(error)) from None

    def submit(self, prompt: Prompt, request: schema.ChatRequest) -> "Answer":
        """Begin an answer."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(prompt, request.wishes(self.settings.longest_answer), emit)
        self.engine.submit(job)
        return Answer(job, events)

    def collect(self) -> Iterator[Any]:
        """What `/metrics` shows."""
        engine, store = self.engine, self.store
        gauges = {
            "requests_open": self.gate.num_open,
            "jobs_waiting": engine.num_waiting,
            "jobs_running": engine.num_running,
            "prefix_cache_bytes": engine.cache_bytes,
            "seconds_per_job": engine.seconds_per_job,
        }
        counters = {
            **engine.counts,
            "requests_turned_away": self.gate.num_turned_away,
            "media_loaded": store.num_loaded,
            "media_reused": store.num_found,
        }
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"apollo_{name}", name.replace("_", " "), value=value)
        for name, value in counters.items():
            yield CounterMetricFamily(f"apollo_{name}", name.replace("_", " "), value=value)


@dataclass(frozen=True)
class Answer:
    """An answer that is being written."""

    job: Job
    events: "asyncio.Queue[Event]"

    def usage(self) -> schema.Usage:
        """Tokens so far."""
        job = self.job
        return schema.Usage(len(job.prompt.ids), job.num_reused, len(job.written))

    async def whole(self) -> tuple[str, str]:
        """Wait for the end: the text and why it ended.

        Raises:
            RefusedError: It failed.
        """
        text = ""
        while True:
            event = await self.events.get()
            text += event.text
            if event.reason == "error":
                raise RefusedError(503, "answer_failed", event.message)
            if event.reason:
                return text, event.reason

    async def chunks(self, reply: schema.Reply, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, as the words come."""
        yield _sse(reply.chunk({"role": "assistant", "content": ""}))
        while True:
            event = await self.events.get()
            if event.reason == "error":
                yield _sse(error_body(RefusedError(503, "answer_failed", event.message)))
                return
            if event.text:
                yield _sse(reply.chunk({"content": event.text}))
            if event.reason:
                break
        yield _sse(reply.chunk({}, event.reason))
        if with_usage:
            yield _sse(reply.usage_chunk(self.usage()))
        yield "data: [DONE]\n\n"


def _sse(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Do what a client waits for, and stop if it leaves."""
    task: asyncio.Future[Result] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        both: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError(499, "client_left", "the client left")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- routes --------------------------------------------------------------------------------------


def build(engine: Engine, settings: Settings, fetcher: Fetcher | None = None) -> Guard:
    """Make the application, which starts the engine and ends it.

    Args:
        engine: Not started yet.
        settings: See there.
        fetcher: Of https URLs, if not the usual one.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = server = Server(engine, settings, fetcher)
        registry = CollectorRegistry()
        registry.register(server)  # type: ignore[arg-type]
        app.state.registry = registry
        engine.start()
        yield
        num_cut = await run_in_threadpool(engine.stop)
        if num_cut:
            logger.warning("%d answers could not be finished", num_cut)
        await server.store.close()
        server.uploads.close()

    app = FastAPI(title="Apollo", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_chat(app)
    _add_files(app)
    _add_rest(app)
    app.add_exception_handler(RefusedError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _fault)
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
        asked = await run_in_threadpool(schema.parse, await request.body())
        if asked.model not in (None, server.settings.name):
            raise RefusedError(
                404, "model_not_found", f"there is only the model {server.settings.name!r} here"
            )
        messages = schema.conversation(asked.messages)
        prompt = await unless_gone(request, server.prompt(messages, asked.sampling))
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


async def _fault(request: Request, error: Exception) -> Response:
    return await _refused(request, RefusedError(500, "fault", "a fault of the server"))


# ---- the command ---------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Run `apollo serve`.

    Args:
        args: model, host, port, api_key, media_root, max_batch, max_waiting, max_upload,
            max_duration, max_new_tokens, grace.
    """
    import uvicorn

    from apollo.chat import DEFAULT_MODEL, load_model
    from apollo.serve.guards import _is_local

    root = Path(args.media_root) if args.media_root else None
    if root and not root.is_dir():
        raise ValueError(f"--media-root {root} is no folder")
    key = args.api_key or os.environ.get("APOLLO_API_KEY", "")
    name = Path(args.model or DEFAULT_MODEL).name
    settings = Settings(
        name=name,
        api_key=key,
        only_local=not key and _is_local(args.host),
        media_root=root,
        max_waiting=args.max_waiting,
        longest_answer=args.max_new_tokens,
        body=BodyLimits(max_upload_bytes=args.max_upload * 2**20),
        media=MediaLimits(max_duration_s=args.max_duration),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if not key and not _is_local(args.host):
        logger.warning("no API key: whoever reaches %s:%d may ask", args.host, args.port)
    model, processor = load_model(args.model)
    app = build(Engine(model, processor, max_rows=args.max_batch), settings)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=4 * (args.max_batch + args.max_waiting) + 64,
        timeout_graceful_shutdown=args.grace,
        lifespan="on",
    )
    logger.info("the model %s at http://%s:%d", name, args.host, args.port)
    uvicorn.Server(config).run()
    return 0
