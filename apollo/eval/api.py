"""A model behind an OpenAI-compatible server as answerer: vLLM, SGLang, or a vendor's own.

Here because the strongest models are reached no other way. A video is sent as frames with their
times, or whole; questions about it are sent at once, `batch_size` of them at a time, and their
answers are parsed, since likelihoods of servers cannot be compared. The protocol of the chat
completions is a POST of JSON, so that the standard library suffices. The key is read from the
environment variable OPENAI_API_KEY, goes into the request's header and nowhere else. Neither server
nor key is part of the identity: the model's name must say what it is. Read next: `prompts.py`.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from PIL import Image

from apollo.eval import prompts
from apollo.eval.answerers import Answer
from apollo.eval.parsing import parse_answer
from apollo.eval.questions import Question
from apollo.eval.watching import Watcher
from apollo.messages import Part
from apollo.video import ClipSampling, VideoClips, open_video

DEFAULT_SERVER = "https://api.openai.com/v1"
MAX_TOKENS = 1024  # room for models that think before they answer; others stop after the letter
LONGEST_SIDE = 768  # pixels of a frame that is sent; vendors scale larger ones down themselves
TIMEOUT_S = 300.0
NUM_TRIES = 6
LONGEST_WAIT_S = 60.0
SENDS = ("frames", "file")


class ApiError(ValueError):
    """The server cannot be used; one line says why."""


class _RequestRefusedError(Exception):
    """The server refuses this one request; another may well succeed."""


@dataclass(frozen=True)
class _Seen:
    """What was decoded: the clips for their times, and the parts of the message that show them."""

    clips: VideoClips | None
    parts: list[Part] = field(default_factory=list)


class ApiAnswerer:
    """Answers by writing, at temperature 0 and with seed 0 as far as the server heeds them.

    Args:
        model: The model's name on the server.
        scoring: "generate".
        batch_size: Requests at once; changes the speed, not what is asked.
        server: URL up to `/chat/completions`, such as http://localhost:8000/v1.
        num_frames: Frames of a video, evenly spread.
        send: "frames", or "file" for the whole file as a `video_url` part under the condition
            "video", for servers that sample by themselves (vLLM, SGLang).

    Raises:
        ValueError: An option makes no sense.
    """

    def __init__(
        self,
        model: str,
        scoring: str = "generate",
        batch_size: int = 4,
        server: str = DEFAULT_SERVER,
        num_frames: int = 32,
        send: str = "frames",
    ) -> None:
        if not server.startswith(("http://", "https://")):
            raise ValueError(f"server {server!r} is no URL; it begins with http:// or https://")
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; it must be at least 1")
        if send not in SENDS:
            raise ValueError(f"send {send!r}: choose from {', '.join(SENDS)}")
        self.model, self.batch_size, self.send = model, batch_size, send
        self.url = server.rstrip("/") + "/chat/completions"
        self._watcher = Watcher(ClipSampling("uniform", frames_per_clip=1, max_clips=num_frames))
        self.identity: dict[str, Any] = {
            "kind": "api",
            "model": model,
            "prompt": prompts.prompt_hash(),
            "sampling": {"send": send, "mode": "uniform", "num_frames": num_frames},
            "scoring": scoring,
        }

    def watch(self, question: Question, condition: str) -> _Seen:
        """Decode what the condition shows and prepare it for sending."""
        if condition == "video" and self.send == "file":
            open_video(question.video).close()  # a broken file costs its own questions only
            data = base64.b64encode(question.video.read_bytes()).decode()
            url = f"data:video/{question.video.suffix[1:].lower() or 'mp4'};base64,{data}"
            return _Seen(None, [{"type": "video_url", "video_url": {"url": url}}])
        clips = self._watcher(question, condition)
        if clips is None:
            return _Seen(None)
        if condition == "frame":
            return _Seen(clips, [_image_part(clips, 0)])
        times_s = sorted(clips.times_s[:, 0])  # as if in their own order, also of shuffled frames
        parts: list[Part] = []
        for index, time_s in enumerate(times_s):
            parts.append({"type": "text", "text": f"Frame at {time_s:.1f} s:"})
            parts.append(_image_part(clips, index))
        return _Seen(clips, parts)

    def answer(
        self, questions: Sequence[Question], condition: str, seen: _Seen | None
    ) -> list[Answer]:
        """Ask all questions, several at once; see `answerers.Answerer`.

        Raises:
            ApiError: The server cannot be used.
        """
        seen = seen or _Seen(None)
        pool = ThreadPoolExecutor(self.batch_size)
        try:
            return list(pool.map(lambda question: self._answer(question, seen), questions))
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, question: Question, seen: _Seen) -> Answer:
        times_s = [] if seen.clips is None else seen.clips.times_s.round(3).tolist()
        before = prompts.subtitles_text(question, prompts.shown_spans(seen.clips))
        asked = prompts.question_text(question, "generate")
        media, replies = seen.parts, []
        try:
            if question.caption_prompt:
                replies.append(self._ask(media, before + question.caption_prompt))
                media, before = [], prompts.caption_text(replies[0][0])
            replies.append(self._ask(media, before + asked))
        except _RequestRefusedError as error:
            return Answer(None, f"error: {error}", frame_times_s=times_s)
        texts, num_read, num_written = zip(*replies, strict=True)
        parsed = parse_answer(texts[-1], question.options)
        return Answer(
            parsed.prediction,
            parsed.status,
            text="\n".join(texts),
            frame_times_s=times_s,
            num_prompt_tokens=None if None in num_read else sum(num_read),
            num_answer_tokens=None if None in num_written else sum(num_written),
        )

    def _ask(self, media: list[Part], text: str) -> tuple[str, int | None, int | None]:
        """Send one request; return what was written and the tokens read and written."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*media, {"type": "text", "text": text}]}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": MAX_TOKENS,
        }
        reply = post(self.url, body)
        try:
            written = reply["choices"][0]["message"]["content"] or ""
            usage = reply.get("usage") or {}
            return written, usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ApiError(f"{self.url} answers, but not with a chat completion") from None


def _image_part(clips: VideoClips, index: int) -> Part:
    """Make a frame a JPEG in a data URL."""
    image = Image.fromarray(clips.frames[index, 0])
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


# ---- the connection ------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is refused: it would carry the key to another place."""

    def redirect_request(self, *args: Any) -> None:
        """Follow nothing."""


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON and return the JSON that comes back; try again when that may help.

    Tried again, after the time that the server asks for or ever longer: too many requests (429),
    the server's own errors (408, 5xx), and connections that time out or break.

    Raises:
        ApiError: It cannot be reached, does not let us in, has no such model, or keeps failing.
        _RequestRefusedError: It refuses this request for what is in it (400, 413, 422).
    """
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY", "")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data, opener = json.dumps(body).encode(), urllib.request.build_opener(_NoRedirect)
    for number in range(NUM_TRIES):
        request = urllib.request.Request(url, data, headers)
        wait_s = 2.0**number
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = f"{url} answers {error.code}: {_reason(error, key)}"
            if error.code in (400, 413, 422):
                raise _RequestRefusedError(reason) from None
            if error.code not in (408, 429) and error.code < 500:
                raise ApiError(reason + _advice(error.code, key)) from None
            wait_s = _retry_after_s(error.headers.get("Retry-After"), wait_s)
        except json.JSONDecodeError:
            raise ApiError(f"{url} answers with something that is not JSON") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            reason = f"cannot reach {url}: {cause}"
            if isinstance(cause, ConnectionRefusedError):
                raise ApiError(f"{reason}; is the server running?") from None
        if number + 1 < NUM_TRIES:
            time.sleep(min(wait_s, LONGEST_WAIT_S))
    raise ApiError(f"{reason} (tried {NUM_TRIES} times; what is answered so far is kept)")


def _reason(error: urllib.error.HTTPError, key: str) -> str:
    """Read what the server says is wrong, in one line and without the key."""
    text = error.read(10_000).decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = found.get("message", text) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        pass
    text = " ".join(str(text or error.reason).split())
    return (text.replace(key, "***") if key else text)[:300]


def _advice(code: int, key: str) -> str:
    if code == 401:
        return "" if key else "; set the environment variable OPENAI_API_KEY"
    if code == 404:
        return "; check --server (up to /v1) and the model's name"
    return "; give the server's final address" if 300 <= code < 400 else ""


def _retry_after_s(value: str | None, otherwise: float) -> float:
    """Read a Retry-After header: seconds, or a date."""
    if not value:
        return otherwise
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return otherwise
