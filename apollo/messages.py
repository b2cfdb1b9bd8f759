"""The conversation type: OpenAI-style messages with text, image and video parts.

Everything that talks to a model (training records, evaluation, chat, serving) uses this one form,
checked and made uniform here, and `question_prompt` is the one way in which a multiple-choice
question becomes text. No torch here. Loading the media that the messages name is for apollo/video;
turning messages into tensors for apollo/model/processing.py.

    [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text":
    "What moves?"}]},
     {"role": "assistant", "content": [{"type": "text", "text": "The red ball."}]}]
"""

import base64
import binascii
import string
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Part = dict[str, Any]

ROLES = ("system", "user", "assistant")
MEDIA_TYPES = ("image", "video")


class MessageError(ValueError):
    """A conversation that is not in the documented form; the message says which part of it."""


def normalize(messages: Sequence[Message]) -> list[Message]:
    """Check a conversation and return it in the one form the rest of the code relies on.

    Args:
        messages: Dicts with `role` and `content`. `content` is a string or a list of parts: `text`,
            `image`, `video`, OpenAI's `image_url` and `video_url`, or transformers'
            `{"type": "video", "path" | "url": ...}`.

    Returns:
        New messages whose content is a list of `{"type": "text", "text": str}` and
        `{"type": kind, kind: source}` parts. `file:` URLs become paths and `data:` URLs become
        bytes; any other source is passed on as it is.

    Raises:
        MessageError: with the index of the message and of the part.
    """
    if isinstance(messages, (str, dict)) or not isinstance(messages, Sequence) or not messages:
        raise MessageError(f"messages must be a non-empty list of dicts, not {messages!r:.80}")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise MessageError(
                f'{where} must be a dict with "role" and "content", not {message!r:.80}'
            )
        role = message["role"]
        if role not in ROLES:
            raise MessageError(f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}")
        if role == "system" and index > 0:
            raise MessageError(f"{where}: a system message can only come first")
        parts = _parts(message["content"], where)
        if role != "user" and any(part["type"] in MEDIA_TYPES for part in parts):
            raise MessageError(
                f"{where}: only the user can show an image or a video, not the {role}"
            )
        result.append({"role": role, "content": parts})
    return result


def _parts(content: Any, where: str) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise MessageError(
            f"{where}: content must be a string or a non-empty list of parts, not {content!r:.80}"
        )
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> Part:
    if not isinstance(part, dict) or "type" not in part:
        raise MessageError(f'{where} must be a dict with "type", not {part!r:.80}')
    kind = str(part["type"]).removesuffix("_url")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "text":
        raise MessageError(f'{where}: a text part needs "text" with a string')
    if kind not in MEDIA_TYPES:
        raise MessageError(f"{where}: type must be text, image or video, not {part['type']!r}")
    names = [name for name in (kind, f"{kind}_url", "path", "url") if part.get(name) is not None]
    if len(names) != 1:
        raise MessageError(
            f'{where}: {kind} part needs exactly one source, as {{"{kind}": "a/path"}}'
        )
    source = part[names[0]]
    if isinstance(source, dict) and "url" in source:  # OpenAI: {"image_url": {"url": ...}}
        source = source["url"]
    return {"type": kind, kind: _resolve_url(source, where)}


def _resolve_url(source: Any, where: str) -> Any:
    """Turn `file:` URLs into paths and `data:` URLs into bytes."""
    if isinstance(source, str) and source.startswith("file:"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    if isinstance(source, str) and source.startswith("data:"):
        header, comma, payload = source.partition(",")
        if not comma or not header.endswith(";base64"):
            raise MessageError(f"{where}: a data URL must look like data:video/mp4;base64,...")
        try:
            return base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise MessageError(f"{where}: the data URL is not valid base64 ({error})") from error
    return source


def media_parts(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """All media of a normalized conversation in order, as ("image" | "video", source)."""
    return [
        (part["type"], part[part["type"]])
        for message in messages
        for part in message["content"]
        if part["type"] in MEDIA_TYPES
    ]


def map_media(messages: Sequence[Message], load: Callable[[str, Any], Any]) -> list[Message]:
    """Copy a normalized conversation, each media source replaced by `load(kind, source)`."""
    return [
        {
            **message,
            "content": [
                {**part, part["type"]: load(part["type"], part[part["type"]])}
                if part["type"] in MEDIA_TYPES
                else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def question_prompt(question: str, options: Sequence[str] = ()) -> str:
    """Write a question, and its options if it has any, as the text that a model is asked.

        What moves left?
        A. the ball
        B. the cube

    The answer to it is the text of an option, not its letter.

    Raises:
        MessageError: an empty question or option, a single option, equal options, or more of them
            than there are letters.
    """
    if not question.strip():
        raise MessageError("the question is empty; ask something about the video")
    if not options:
        return question
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise MessageError(
            f"a question needs 2 to {len(string.ascii_uppercase)} options, not {len(options)}"
        )
    if not all(option.strip() for option in options) or len(set(options)) < len(options):
        raise MessageError(f"options must be different and not empty, not {list(options)}")
    lines = [
        f"{letter}. {option}"
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
    ]
    return "\n".join([question, *lines])
