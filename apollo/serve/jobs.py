"""What is asked of the engine, and how its answers become text.

A `Prompt` is a conversation as the LLM reads it, `Wishes` say how to answer, a `Job` is both and
reports its `Event`s. `Text` turns tokens into pieces of text while they come. Read next:
`engine.py`, which answers jobs.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from apollo.model import ApolloForConditionalGeneration


class PromptError(ValueError):
    """The conversation does not fit into the model's window."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the LLM reads it.

    Attributes:
        ids: Tokens (P,), placeholders of clips among them.
        key: What they stand for, int64 (P,): the token's id, or for a placeholder a negative number
            made of the hash of its medium, so that equal keys mean equal caches.
        clip_tokens: What stands in for the placeholders, (number of placeholders, D).
    """

    ids: Tensor
    key: np.ndarray
    clip_tokens: Tensor

    @classmethod
    def of(
        cls,
        model: "ApolloForConditionalGeneration",
        ids: Tensor,
        media: Sequence[tuple[str, Tensor]],
    ) -> "Prompt":
        """Put a prompt together.

        Args:
            model: The model.
            ids: Tokens (P,).
            media: For each image or video in order what tells it from others, and its tokens (C, N,
                D) as `Engine.encode` makes them.

        Raises:
            PromptError: It is too long.
        """
        window = model.config.text_config.max_position_embeddings
        if len(ids) >= window:
            raise PromptError(
                f"the conversation has {len(ids)} tokens and the model's window is {window}; "
                "ask in a new conversation, or about a shorter video"
            )
        key = ids.numpy().copy()
        marks = []
        for name, tokens in media:
            digest = hashlib.sha256(name.encode()).digest()
            start = int.from_bytes(digest[:7]) << 6  # 62 bits; what is added stays far below 2**63
            marks.append(-1 - start - np.arange(tokens.shape[0] * tokens.shape[1]))
        key[model.model.placeholders(ids).numpy()] = np.concatenate([np.zeros(0, int), *marks])
        width = model.config.text_config.hidden_size
        clips = [tokens.flatten(0, 1) for _, tokens in media]
        return cls(ids, key, torch.cat(clips) if clips else torch.zeros(0, width))


@dataclass(frozen=True)
class Wishes:
    """How an answer is to be written.

    Attributes:
        max_new_tokens: Its most tokens.
        temperature: 0 always takes the likeliest token.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Of the drawing; None draws differently each time.
        stop: Texts before which the answer ends.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """What a job reports: a piece of its text, and at the end why it ended.

    Attributes:
        text: More of the answer.
        reason: "stop", "length", "error", or "" while it goes on.
        message: Of an error.
    """

    text: str = ""
    reason: str = ""
    message: str = ""


@dataclass(eq=False)
class Job:
    """One answer to be written.

    Attributes:
        prompt: What is asked.
        wishes: How to answer.
        emit: Called in the engine's thread with each `Event`.
        is_cancelled: Set by whoever no longer wants it.
        num_reused: Tokens of the prompt that were not read again.
        written: Tokens of the answer so far, the end of turn left out.
    """

    prompt: Prompt
    wishes: Wishes
    emit: Callable[[Event], None]
    is_cancelled: bool = False
    num_reused: int = 0
    written: list[int] = field(default_factory=list)
    start_s: float = field(default_factory=time.monotonic)
    text: "Text" = field(init=False, repr=False)
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False)

    def __post_init__(self) -> None:
        self.text = Text(self.wishes.stop)
        if self.wishes.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.wishes.seed)

    def draw(self, logits: Tensor) -> int:
        """Draw the next token by logits (V,) and the wishes."""
        # Less the largest and in double precision: a temperature may be as small as it likes.
        logits = (logits - logits.max()).double().cpu()
        shares = (logits / self.wishes.temperature).softmax(-1)
        if self.wishes.top_p < 1:
            ordered, ids = shares.sort(descending=True)
            shares[ids[ordered.cumsum(-1) - ordered > self.wishes.top_p]] = 0
        # In the order of the vocabulary: in that of the shares, two that are nearly equal would
        # change places by rounding, and the same draw give another token.
        drawn = torch.rand(1, generator=self._generator) * shares.sum()
        place = int(torch.searchsorted(shares.cumsum(-1), drawn))
        return min(place, len(shares) - 1)


class Text:
    """Turns tokens into text piece by piece; never passes on half a character or a stop text."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.held = ""  # text that may turn out to be trailing space or the start of a stop text
        self.has_begun = False
        self.start = self.end = 0  # tokens [start:end] are decoded again as context of the next

    def add(self, tokenizer: Any, ids: list[int], is_last: bool) -> tuple[str, bool]:
        """More of the text, and whether a stop text was found."""
        before = tokenizer.decode(ids[self.start : self.end], skip_special_tokens=True)
        text = tokenizer.decode(ids[self.start :], skip_special_tokens=True)
        if not text.endswith("\ufffd") or is_last:
            self.held += text[len(before) :]
            self.start, self.end = self.end, len(ids)
        if not self.has_begun:
            self.held = self.held.lstrip()
        found = min((i for i in map(self.held.find, self.stop) if i >= 0), default=-1)
        if found >= 0:
            return self.held[:found].rstrip(), True
        ready = self.held.rstrip()
        if not is_last:
            longest = max((_overlap(self.held, stop) for stop in self.stop), default=0)
            ready = self.held[: len(self.held) - longest].rstrip()
        self.held = self.held[len(ready) :]
        self.has_begun = self.has_begun or bool(ready)
        return ready, False


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text may be the beginning of a stop text."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
