"""What `/v1/chat/completions` understands: OpenAI's request, and its answers.

A setting that this server does not know is refused by name rather than ignored, unless it is at the
value that changes nothing. Media in the messages become `Address`es; `sources.py` finds them. Read
next: `api.py`.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apollo.messages import Message, MessageError, normalize
from apollo.serve.jobs import Wishes
from apollo.serve.sources import RefusedError
from apollo.video import SAMPLERS

MAX_MESSAGES = 1000
MAX_STOP_LENGTH = 256  # characters; each word of an answer is compared with them
MAX_VALUES = 1_000_000
"""Values of a request's JSON, counted by its marks, also those in texts: one of three bytes takes
some 70 bytes of memory."""


@dataclass(frozen=True)
class Address:
    """Where a medium is said to be: a data URL, a file's id, an https URL, or a path."""

    url: str


Stop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatRequest(BaseModel):
    """A request for an answer; what OpenAI's has and this has not can only be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    sampling: str | None = Field(
        None, description="How to sample the videos; by default as the model was trained."
    )
    # What changes nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def wishes(self, longest_answer: int) -> Wishes:
        """How the answer is to be written."""
        wanted = self.max_completion_tokens or self.max_tokens or longest_answer
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Wishes(
            max_new_tokens=min(wanted, longest_answer),
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(text for text in stop if text),
        )


def parse(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        RefusedError: It is malformed; says where.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RefusedError(400, "invalid_json", f"the JSON has more than {MAX_VALUES} values")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "invalid_json", "the body is not valid JSON") from None
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the body"
        reason = first["msg"]
        if first["type"] == "extra_forbidden":
            reason = "this server has no such setting"
        raise RefusedError(400, "invalid_request", f"{where}: {reason}") from None
    except RecursionError:
        raise RefusedError(400, "invalid_request", "the body is nested too deeply") from None
    if request.sampling is not None and request.sampling not in SAMPLERS:
        choices = ", ".join(SAMPLERS)
        raise RefusedError(400, "invalid_request", f"sampling: choose from {choices}")
    return request


def conversation(messages: list[dict[str, Any]]) -> list[Message]:
    """Bring messages into the form of apollo/messages.py, media as `Address`.

    Raises:
        RefusedError: They are malformed; says where.
    """
    try:
        return normalize([_message(message) for message in messages])
    except MessageError as error:
        raise RefusedError(400, "invalid_request", str(error)[:300]) from None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") == "developer":  # as OpenAI calls it now
        message = {**message, "role": "system"}
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" or not isinstance(kind, str):
        return part
    value = part.get(kind)
    if kind == "file" and isinstance(value, dict) and isinstance(value.get("file_id"), str):
        return {"type": "video", "video": Address(value["file_id"])}
    url = value.get("url") if isinstance(value, dict) else value
    if kind in ("video_url", "image_url") and isinstance(url, str):
        kind = kind.removesuffix("_url")
        return {"type": kind, kind: Address(url)}
    raise MessageError(
        "a part must be a text, a video_url or an image_url as "
        '{"type": "video_url", "video_url": {"url": "..."}}, or a file with its file_id'
    )


# ---- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer."""

    num_prompt: int
    num_reused: int
    num_written: int

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_written,
            "total_tokens": self.num_prompt + self.num_written,
            "prompt_tokens_details": {"cached_tokens": self.num_reused},
        }


class Reply:
    """The answers to one request in OpenAI's forms, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self.model, self.id, self.created = model, f"chatcmpl-{secrets.token_hex(12)}", time.time()

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": int(self.created),
            "model": self.model,
            "choices": choices,
        }

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        """The answer that was not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**self._body("chat.completion", [choice]), "usage": usage.body()}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._body("chat.completion.chunk", [choice])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, if it was asked for."""
        return {**self._body("chat.completion.chunk", []), "usage": usage.body()}
