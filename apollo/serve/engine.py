"""The thread that owns the model and answers everybody at once.

Requests (`Job`) come in from any thread and leave their words through a callback. In each round the
engine encodes a few clips, lets the LLM read a piece of the prompts that have just come, and writes
one token of every answer that is being written; so a newcomer with a long video does not stop the
others, and whoever is finished or has left makes room at once. What was read is kept, so that the
next question on a video pays for its own words only. Read first: `jobs.py`; next: `rows.py`.
"""

import logging
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from apollo.serve.jobs import Event, Job, Prompt
from apollo.serve.rows import PrefixCache, Rows, num_shared

if TYPE_CHECKING:
    from apollo.model import ApolloForConditionalGeneration, ApolloProcessor

LENGTH_MULTIPLE = 32
"""Prompts whose unread parts, rounded up to so many tokens, are equally long are read together."""

READ_TOKENS = 512
"""Tokens of each new prompt that are read in a round: the longest wait between two words of those
who are being answered is one such piece, or `encode_batch_size` clips."""

WORTH_WAITING = 64
"""A prompt waits for another that is being read if it can then skip so many more tokens."""

STOPPING = "the server is stopping"

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs; see the module.

    Attributes:
        num_waiting: Jobs that are not being read yet.
        num_running: Jobs that are being read or written.
        counts: Since the start, by name: what `/metrics` shows.
    """

    def __init__(
        self,
        model: "ApolloForConditionalGeneration",
        processor: "ApolloProcessor",
        max_rows: int = 16,
        max_tokens: int = 131_072,
        cache_bytes: int = 2**31,
    ) -> None:
        """Prepare; `start` starts.

        Args:
            model: An Apollo model, from now on for this engine alone.
            processor: The processor saved with it.
            max_rows: Most answers that are written at once.
            max_tokens: Most tokens of memory for them: rows times the longest.
            cache_bytes: Most memory for what may be asked about again.
        """
        self.model, self.processor = model, processor
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.counts = dict.fromkeys(
            ("clips_encoded", "tokens_read", "tokens_reused", "tokens_written", "jobs", "failed"), 0
        )
        self.seconds_per_job = 1.0  # a running mean
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._encodings: deque[_Encoding] = deque()
        self._waiting: deque[Job] = deque()
        self._joining = _Batch()
        self._running = _Batch()
        self._prefixes = PrefixCache(cache_bytes)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Jobs that are not being read yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that are being read or written."""
        return len(self._joining.jobs) + len(self._running.jobs)

    @property
    def cache_bytes(self) -> int:
        """Memory of what may be asked about again."""
        return self._prefixes.num_bytes

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether jobs are being answered."""
        return self._thread.is_alive() and not self._is_stopping

    def stop(self) -> int:
        """Stop at once; return how many jobs were cut off, each of which is told so."""
        self._is_stopping = True
        self._inbox.put(None)
        self._thread.join()
        return self._fail_all(STOPPING)

    def submit(self, job: Job) -> None:
        """Answer a job."""
        if self._is_stopping:
            job.emit(Event(reason="error", message=STOPPING))
        else:
            self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Forget a job, at the latest after this round; it reports nothing more."""
        job.is_cancelled = True
        self._inbox.put(None)

    def encode(self, pixels: list[Tensor], is_image: bool = False) -> "Future[Tensor]":
        """Turn clips, (C, T, 3, S, S) for each encoder, into LLM tokens (C, N, D).

        A future that is cancelled ends the work.
        """
        future: Future[Tensor] = Future()
        if self._is_stopping:
            future.set_exception(RuntimeError(STOPPING))
        else:
            self._inbox.put(_Encoding(pixels, is_image, future))
        return future

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._take(block=not (self._encodings or self._waiting or self.num_running))
                with torch.inference_mode():
                    self._encode()
                    self._admit()
                    self._read()
                    self._write()
            except Exception as error:  # whatever it is, the next request must find an engine
                logger.exception("a round of the engine failed")
                reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "a fault"
                self._fail_all(f"the answer failed in the server: {reason}")

    def _take(self, block: bool) -> None:
        """Look into the inbox, and drop what was cancelled."""
        while block or not self._inbox.empty():
            item = self._inbox.get()
            block = False
            if isinstance(item, Job):
                self._waiting.append(item)
            elif isinstance(item, _Encoding):
                self._encodings.append(item)
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        for batch in (self._joining, self._running):
            batch.drop_cancelled()

    def _encode(self) -> None:
        """Encode some clips of the video that has waited longest."""
        if not self._encodings:
            return
        encoding = self._encodings[0]
        if encoding.future.cancelled():
            self._encodings.popleft()
            return
        size = self.model.config.encode_batch_size
        pixels = [
            part[encoding.num_done :][:size].to(self.model.device) for part in encoding.pixels
        ]
        is_image = torch.full((len(pixels[0]),), encoding.is_image, device=self.model.device)
        encoding.tokens.append(self.model.connect(self.model.encode(pixels), is_image))
        self.counts["clips_encoded"] += len(pixels[0])
        if encoding.num_done >= len(encoding.pixels[0]):
            self._encodings.popleft()
            if encoding.future.set_running_or_notify_cancel():
                encoding.future.set_result(torch.cat(encoding.tokens))

    def _admit(self) -> None:
        """Choose who is read next: the first in the queue, and others that need as many tokens."""
        if self._joining.jobs:
            return
        group: list[tuple[Job, Any, int]] = []
        for job in list(self._waiting):
            if not self._has_room(job, [other for other, *_ in group]):
                break
            prefix, length = self._prefixes.find(job.prompt.key)
            if group and _padded(job, length) != _padded(group[0][0], group[0][2]):
                continue
            if any(
                num_shared(job.prompt.key, other.prompt.key) > length + WORTH_WAITING
                for other, *_ in group
            ):
                continue
            group.append((job, prefix, length))
            self._waiting.remove(job)
        if not group:
            return
        self._joining = _Batch(
            [job for job, *_ in group], Rows([(prefix, length) for _, prefix, length in group])
        )
        for job, _, length in group:
            job.num_reused = length
            self.counts["tokens_reused"] += length

    def _has_room(self, job: Job, group: list[Job]) -> bool:
        jobs = [*self._running.jobs, *group, job]
        longest = max(len(job.prompt.ids) + job.wishes.max_new_tokens for job in jobs)
        fits = len(jobs) <= self.max_rows and len(jobs) * longest <= self.max_tokens
        return fits or len(jobs) == 1

    def _read(self) -> None:
        """Read a piece of each new prompt; those that are through write their first token."""
        jobs, rows = self._joining.jobs, self._joining.rows
        if not jobs:
            return
        num_left = [len(job.prompt.ids) - n for job, n in zip(jobs, rows.lengths, strict=True)]
        num_new = [min(left, READ_TOKENS) for left in num_left]
        length = max(num_new)
        embeds = torch.stack(
            [
                self._embed(job.prompt, start, num, length)
                for job, start, num in zip(jobs, rows.lengths, num_new, strict=True)
            ]
        )
        hidden = rows.read(self.model, embeds, num_new)
        self.counts["tokens_read"] += sum(num_new)
        if num_new != num_left:
            return
        for row, job in enumerate(jobs):
            self._prefixes.add(rows.prefix(row, job.prompt.key))
        self._joining = _Batch()
        self._running.join(jobs, rows)
        self._go_on(jobs, hidden)

    def _embed(self, prompt: Prompt, start: int, num: int, length: int) -> Tensor:
        """Embed `num` tokens of a prompt from `start` on, padded to (length, D)."""
        ids = prompt.ids.to(self.model.device)
        is_placeholder = self.model.model.placeholders(ids)
        num_before = int(is_placeholder[:start].sum())
        ids, is_placeholder = ids[start : start + num], is_placeholder[start : start + num]
        embeds = self.model.get_input_embeddings()(ids.masked_fill(is_placeholder, 0))
        tokens = prompt.clip_tokens[num_before:].to(embeds)
        embeds = embeds.masked_scatter(is_placeholder[:, None], tokens)
        return torch.nn.functional.pad(embeds, (0, 0, 0, length - num))

    def _write(self) -> None:
        """Write one token of each running answer."""
        jobs, rows = self._running.jobs, self._running.rows
        if not jobs:
            return
        last = torch.tensor([[job.written[-1]] for job in jobs], device=self.model.device)
        embeds = self.model.get_input_embeddings()(last)
        self._go_on(jobs, rows.read(self.model, embeds, [1] * len(jobs)))

    def _go_on(self, jobs: list[Job], hidden: Tensor) -> None:
        """Choose each job's next token by what the LLM made of its last, (B, D)."""
        logits = self.model.lm_head(hidden)
        likeliest = logits.argmax(-1).tolist()
        for job, token, row in zip(jobs, likeliest, logits, strict=True):
            self._add_token(job, token if job.wishes.temperature == 0 else job.draw(row))
        batch = self._running
        for row, job in enumerate(batch.jobs):
            if job.is_cancelled:
                key = np.concatenate([job.prompt.key, job.written])[: batch.rows.lengths[row]]
                self._prefixes.add(batch.rows.prefix(row, key))
        batch.drop_cancelled()

    def _add_token(self, job: Job, token: int) -> None:
        """Add a token to an answer, pass its text on, and end it where it ends."""
        self.counts["tokens_written"] += 1
        window = self.model.config.text_config.max_position_embeddings
        reason = "stop" if token in self._ends else ""
        if not reason:
            job.written.append(token)
            is_full = len(job.prompt.ids) + len(job.written) >= window
            reason = "length" if is_full or len(job.written) >= job.wishes.max_new_tokens else ""
        text, is_stopped = job.text.add(self.processor.tokenizer, job.written, bool(reason))
        if is_stopped:
            reason = "stop"
        if text or reason:
            job.emit(Event(text, reason))
        if reason:
            job.is_cancelled = True  # nothing more is wanted of it
            self.counts["jobs"] += 1
            self.seconds_per_job += 0.1 * (time.monotonic() - job.start_s - self.seconds_per_job)

    def _fail_all(self, message: str) -> int:
        """End everything that is going on."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Job):
                self._waiting.append(item)
            elif item is not None:
                self._encodings.append(item)
        jobs = [*self._waiting, *self._joining.jobs, *self._running.jobs]
        jobs = [job for job in jobs if not job.is_cancelled]
        for job in jobs:
            job.emit(Event(reason="error", message=message))
        for encoding in self._encodings:
            if encoding.future.set_running_or_notify_cancel():
                encoding.future.set_exception(RuntimeError(message))
        self._waiting.clear()
        self._encodings.clear()
        self._joining, self._running = _Batch(), _Batch()
        self._prefixes.clear()
        self.counts["failed"] += len(jobs)
        return len(jobs)


class _Batch:
    """Jobs and the rows of their caches."""

    def __init__(self, jobs: list[Job] | None = None, rows: Rows | None = None) -> None:
        self.jobs, self.rows = jobs or [], Rows() if rows is None else rows

    def drop_cancelled(self) -> None:
        rows = list(range(len(self.jobs)))
        for row in reversed(range(len(self.jobs))):
            if self.jobs[row].is_cancelled:  # the last takes its place: that moves the fewest
                rows[row] = rows[-1]
                rows.pop()
        if len(rows) < len(self.jobs):
            self.jobs = [self.jobs[row] for row in rows]
            self.rows.keep(rows)

    def join(self, jobs: list[Job], rows: Rows) -> None:
        self.jobs = [*self.jobs, *jobs]
        self.rows.join(rows)


@dataclass
class _Encoding:
    """Clips of a video, or an image, that are being encoded."""

    pixels: list[Tensor]
    is_image: bool
    future: "Future[Tensor]"
    tokens: list[Tensor] = field(default_factory=list)

    @property
    def num_done(self) -> int:
        return sum(map(len, self.tokens))


def _padded(job: Job, num_known: int) -> int:
    """Tokens that are to be read of a prompt, rounded up."""
    return -(-(len(job.prompt.ids) - num_known) // LENGTH_MULTIPLE)
