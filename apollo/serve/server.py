"""What the routes share: how a request becomes a prompt, and a prompt an answer.

A request's media are found (`sources.py`) and made ready (`media.py`), its words become tokens, and
the engine's words are passed on as they come. Read next: `engine.py`.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.concurrency import run_in_threadpool

from apollo.messages import Message, map_media, media_parts
from apollo.serve import schema
from apollo.serve.engine import Engine
from apollo.serve.guards import BodyLimits, Gate, error_body
from apollo.serve.jobs import Event, Job, Prompt, PromptError
from apollo.serve.media import MediaLimits, MediaStore, Medium
from apollo.serve.sources import (
    MAX_ADDRESS,
    Fetcher,
    RefusedError,
    Source,
    Uploads,
    find_under,
    read_data_url,
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
    """What the routes share."""

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher | None = None) -> None:
        self.engine, self.settings = engine, settings
        self.uploads = Uploads(settings.body.max_upload_bytes, settings.max_stored_bytes)
        self.fetcher = fetcher or Fetcher(self.uploads, settings.body.time_limit_s)
        self.fetcher.uploads = self.uploads
        self.store = MediaStore(engine, settings.media, settings.num_processes)
        self.gate = Gate(engine.max_rows + settings.max_waiting, lambda: engine.seconds_per_job)
        self._fetching = asyncio.Semaphore(4)
        self._rendering = asyncio.Lock()  # the processor is not made for several threads
        self._post = _Post()
        window = engine.model.config.text_config.max_position_embeddings
        longest_token = max(map(len, engine.processor.tokenizer.get_vocab()))
        self._longest_text = window * longest_token  # more characters never fit
        self._stopping: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Break off what is not answered yet; each is told so. May be called again."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self.gate.num_open:
            logger.warning("stopped: %d requests could not be finished", self.gate.num_open)
        await run_in_threadpool(self.engine.stop)
        self.fetcher.close()
        await self.store.close()

    async def find(self, address: str) -> Source:
        """Find what an address of a request means."""
        if address.startswith("data:"):
            limit = self.settings.body.max_body_bytes
            return await run_in_threadpool(read_data_url, address, limit)
        if len(address) > MAX_ADDRESS:
            raise RefusedError(400, "invalid_url", "the address is too long; upload the file")
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
        texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
        if sum(map(len, texts)) > self._longest_text:  # to count its tokens could take minutes
            raise RefusedError(400, "context_length_exceeded", "the conversation is far too long")
        media: list[Medium] = []
        for kind, address in asked:
            media.append(await self.store.get(kind, await self.find(address.url), sampling))
        async with self._rendering:
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
        wishes = request.wishes(self.settings.longest_answer)
        job = Job(prompt, wishes, lambda event: self._post.send(loop, events, event))
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


class _Post:
    """Takes the engine's events to the event loop: all of a round at once, as waking it is slow."""

    def __init__(self) -> None:
        self._bag: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._is_on_its_way = False

    def send(
        self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], event: Event
    ) -> None:
        self._bag.append((queue, event))
        if not self._is_on_its_way and not loop.is_closed():
            self._is_on_its_way = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_on_its_way = False  # before the bag is emptied: what comes later calls again
        while self._bag:
            queue, event = self._bag.popleft()
            queue.put_nowait(event)


@dataclass(frozen=True)
class Answer:
    """An answer that is being written."""

    job: Job
    events: "asyncio.Queue[Event]"

    def usage(self) -> schema.Usage:
        """Tokens so far."""
        job = self.job
        return schema.Usage(len(job.prompt.ids), job.num_reused, len(job.written))

    async def _next(self) -> Event:
        """All that has come meanwhile, as one event: who is slow gets longer pieces."""
        event = await self.events.get()
        while not self.events.empty():
            later = self.events.get_nowait()
            event = replace(later, text=event.text + later.text)
        return event

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
            event = await self._next()
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


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
