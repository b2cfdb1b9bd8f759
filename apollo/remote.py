"""A conversation with a model behind a server: `apollo ask` and `apollo chat` with `--server`.

Any OpenAI-compatible server will do. `apollo serve` takes the video as an upload, and knows it
again at the next question; a server without uploads (vLLM, SGLang) gets it in a data URL. The key
is read from the environment variable APOLLO_API_KEY. The same with a model of one's own: `chat.py`.
"""

import base64
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollo.messages import Message, question_prompt
from apollo.video import open_video


class RemoteChat:
    """A conversation with a model behind a server.

    Attributes:
        server: URL up to `/v1`.
        model: What the server calls the model.
        messages: The conversation so far, as it is sent.
    """

    def __init__(self, server: str, model: str | None = None) -> None:
        """Reach the server.

        Args:
            server: URL; without a path, `/v1` is added.
            model: Its name there; by default the first that the server lists.

        Raises:
            ValueError: It cannot be reached, has no model, or `openai` is not installed.
        """
        parts = urllib.parse.urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"server {server!r} is no URL; it begins with http:// or https://")
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                f"--server needs another package: pip install 'apollo-lmm[client]' ({error})"
            ) from error
        self.server = server.rstrip("/") if parts.path.strip("/") else f"{server.rstrip('/')}/v1"
        self.messages: list[Message] = []
        self._uploads: list[str] = []
        self._openai = openai
        key = os.environ.get("APOLLO_API_KEY") or "none"  # the client insists on one
        self._client = openai.OpenAI(base_url=self.server, api_key=key)
        with self._explained():
            self.model = model or self._first_model()

    def ask(
        self,
        video: str | Path | None,
        question: str,
        options: Sequence[str] = (),
        *,
        sampling: str | None = None,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Ask about a video, which begins a new conversation, or go on with the last one.

        Args:
            video: Path; None to go on.
            question: What to ask.
            options: Answers to choose from. The model writes its choice: likelihoods are not to be
                had from a server.
            sampling: How to sample the video; only `apollo serve` knows this.
            max_new_tokens: Most tokens of the answer.
            on_text: Gets the pieces of the answer as they come.

        Raises:
            MessageError: an empty question, or options that make no sense.
            VideoError: the video cannot be used.
            ValueError: the server refuses, or fails.
        """
        content = [{"type": "text", "text": question_prompt(question, options)}]
        history = self.messages
        if video is not None:
            open_video(video).close()  # a bad file is better told apart here than there
            content, history = [self._video_part(Path(video)), *content], []
        asked = [*history, {"role": "user", "content": content}]
        pieces = []
        with self._explained():
            stream: Any = self._client.chat.completions.create(
                model=self.model,
                messages=asked,  # type: ignore[arg-type]
                max_tokens=max_new_tokens,
                temperature=0,
                stream=True,
                extra_body={"sampling": sampling} if sampling else None,
            )
            with stream:
                for chunk in stream:
                    piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    pieces.append(piece)
                    if on_text:
                        on_text(piece)
        text = "".join(pieces).strip()
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def close(self) -> None:
        """Delete the uploads."""
        with self._explained():
            while self._uploads:
                self._client.files.delete(self._uploads.pop())

    def _first_model(self) -> str:
        models = self._client.models.list().data
        if not models:
            raise ValueError(f"{self.server} lists no model; name one with --model")
        return models[0].id

    def _video_part(self, path: Path) -> dict[str, Any]:
        """Upload a video, or put it into a data URL where there are no uploads."""
        try:
            with self._explained(self._openai.NotFoundError), path.open("rb") as file:
                url = self._client.files.create(file=file, purpose="user_data").id
            self._uploads.append(url)
        except self._openai.NotFoundError:
            kind = path.suffix[1:].lower() or "mp4"
            url = f"data:video/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return {"type": "video_url", "video_url": {"url": url}}

    @contextmanager
    def _explained(self, *but: type[Exception]) -> Iterator[None]:
        """Turn the client's errors, but for some, into one line each."""
        try:
            yield
        except but:
            raise
        except self._openai.AuthenticationError as error:
            raise ValueError(
                f"{self.server} does not let us in: {_reason(error)}; set the environment variable "
                "APOLLO_API_KEY"
            ) from None
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"cannot reach {self.server}: {cause}; is the server running?"
            ) from None
        except self._openai.APIError as error:
            raise ValueError(f"{self.server} answers: {_reason(error)}") from None


def _reason(error: Any) -> str:
    """What the server says is wrong, in one line."""
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or error.message).split())[:300]
