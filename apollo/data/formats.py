"""The training record, and the layouts in which the world writes it.

    {"id": "a1", "type": "video", "messages": [{"role": "user", "content": [...]}, ...]}

is our own; `FORMATS` also knows the layouts of LLaVA / ShareGPT, LLaMA-Factory and Hugging Face
chat. Whatever the layout, a record is checked in one place, and a mistake is named by file and line
instead of showing up hours later in a batch. No torch here. Read next: `readers.py` for the files
that hold records, `stores.py` for where their media lie.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apollo.data.stores import Medium, locate
from apollo.messages import MEDIA_TYPES, Message, Part, map_media, media_parts, normalize

RECORD_TYPES = ("text", "image", "multi_image", "video")
"""The paper's four kinds of data (Fig. 7)."""


class RecordError(ValueError):
    """A training record that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Record:
    """One conversation to learn from, in normal form and with located media.

    Attributes:
        id: Name of the record; unique in a file of our own layout.
        type: One of `RECORD_TYPES`; agrees with the media in the messages.
        messages: The conversation (see `apollo/messages.py`), with at least one assistant turn.
        where: File and line, for messages to the user.
    """

    id: str
    type: str
    messages: list[Message]
    where: str

    @property
    def media(self) -> list[tuple[str, Medium]]:
        """The media in order, as ("image" | "video", where it lies; see `stores.fetch`)."""
        return media_parts(self.messages)


CHAT_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **CHAT_ROLES}


@dataclass(frozen=True)
class Layout:
    """Under which keys a format keeps its conversation and media.

    Attributes:
        messages: Key of the list of turns.
        role: Key of the speaker in a turn.
        content: Key of what is said in a turn.
        roles: The speakers' names -> ours.
        images: Keys that may hold images: a source or a list of them.
        videos: Keys that may hold videos.
        system: Key of a system prompt outside the turns, if the format has one.
        ids: Keys that may hold the record's name.
        only: The keys that a record may have; None if others are let pass.
    """

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=CHAT_ROLES.copy)
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    system: str | None = None
    ids: tuple[str, ...] = ("id",)
    only: tuple[str, ...] | None = None


FORMATS: dict[str, Layout] = {
    "apollo": Layout(only=("id", "type", "messages")),
    "chat": Layout(images=("images",), videos=("videos",)),
    "llava": Layout(
        messages="conversations",
        role="from",
        content="value",
        roles=SHAREGPT_ROLES,
        images=("image", "images"),
        videos=("video", "videos"),
        ids=("id", "sample_id"),
    ),
    "llama_factory": Layout(images=("images",), videos=("videos",), system="system"),
}
"""Name of a format -> its layout: our own, Hugging Face chat, LLaVA / ShareGPT, LLaMA-Factory."""


def detect_format(raw: Any) -> str:
    """Tell the format of a file by the keys of its first record.

    Raises:
        ValueError: It has neither `messages` nor `conversations`.
    """
    keys = set(raw) if isinstance(raw, dict) else set()
    if "conversations" in keys:
        return "llava"
    if "messages" not in keys:
        found = ", ".join(sorted(map(str, keys))) if keys else f"a {type(raw).__name__}"
        raise ValueError(
            f"a record needs messages or conversations, found {found}; "
            f"formats: {', '.join(FORMATS)}"
        )
    if "type" in keys or keys <= {"id", "messages"}:
        return "apollo"
    return "llama_factory" if keys & {"images", "videos"} else "chat"


def make_record(
    raw: Any, layout: Layout, media_dir: str, number: int, where: str, is_text: bool = False
) -> Record:
    """Check one record of a file and bring it into normal form.

    Args:
        raw: The record as the file has it.
        layout: The layout of the file.
        media_dir: See `stores.locate`.
        number: Its number in the file, from 1: its id if it has none.
        where: File and line.
        is_text: The source is declared to be text: `<image>` and `<video>` stand for themselves.

    Raises:
        RecordError: What is wrong with it.
    """
    try:
        if not isinstance(raw, dict):
            raise ValueError(f"a record must be an object with keys, not {raw!r:.60}")
        for key in raw:
            if layout.only is not None and key not in layout.only:
                near = difflib.get_close_matches(str(key), layout.only, 1)
                raise ValueError(
                    f"a record has no key {key!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"keys: {', '.join(layout.only)}")
                )
        messages = _turns(raw, layout)
        if not is_text:
            messages = place_media(
                messages, _sources(raw, layout.images), _sources(raw, layout.videos)
            )
        messages = map_media(normalize(messages), lambda _, source: locate(source, media_dir))
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("nothing to learn: there is no assistant message")
        media = Counter(kind for kind, _ in media_parts(messages))
        type_ = type_of(media) if layout.only is None else raw.get("type", type_of(media))
        _check_type(type_, media)
        return Record(_id_of(raw, layout, number), type_, messages, where)
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from error


def type_of(media: Counter[str]) -> str:
    """Tell the type of a record by how many images and videos it has."""
    if media["video"]:
        return "video"
    return ("text", "image")[media["image"]] if media["image"] < 2 else "multi_image"


def _id_of(raw: dict[str, Any], layout: Layout, number: int) -> str:
    ids = [raw[key] for key in layout.ids if raw.get(key) is not None]
    id_ = ids[0] if ids else str(number)
    if layout.only is not None and not isinstance(id_, str):
        raise ValueError(f"id must be a string, not {id_!r}")
    return str(id_)


def _turns(raw: dict[str, Any], layout: Layout) -> list[Message]:
    """Give the turns as role and content, in our words."""
    turns = raw.get(layout.messages)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"{layout.messages} must be a non-empty list of dicts, not {turns!r:.60}")
    messages = []
    if layout.system and raw.get(layout.system):
        messages.append({"role": "system", "content": raw[layout.system]})
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {layout.role, layout.content} <= turn.keys():
            raise ValueError(
                f'{layout.messages}[{index}] must be a dict with "{layout.role}" and '
                f'"{layout.content}", not {turn!r:.60}'
            )
        role = layout.roles.get(turn[layout.role]) if isinstance(turn[layout.role], str) else None
        if role is None:
            raise ValueError(
                f"{layout.messages}[{index}]: {layout.role} must be one of "
                f"{', '.join(layout.roles)}, not {turn[layout.role]!r}"
            )
        messages.append({"role": role, "content": turn[layout.content]})
    return messages


def _sources(raw: dict[str, Any], keys: Sequence[str]) -> list[Any]:
    found = [raw[key] for key in keys if raw.get(key) is not None]
    return [s for one in found for s in (one if isinstance(one, (list, tuple)) else [one])]


# ---- placeholders

_PLACEHOLDER = re.compile(r"<(image|video)>")


def place_media(
    messages: Sequence[Message], images: Sequence[Any], videos: Sequence[Any]
) -> list[Message]:
    """Put media, which many formats list beside the text, where the text has their placeholders.

    `<image>` or `<video>` in what the user says, or a part such as `{"type": "image"}` without a
    source, stands for the next medium. As in LLaVA's data, `<image>` also stands for a video where
    there are no images, and a single medium without a placeholder comes first.

    Raises:
        ValueError: There are more or fewer placeholders than media.
    """
    waiting = {"image": list(images), "video": list(videos)}
    is_listed = bool(images or videos)
    found: Counter[str] = Counter()

    def take(name: str) -> list[Part]:
        kind = "video" if not images and videos else name
        found[kind] += 1
        return [{"type": kind, kind: waiting[kind].pop(0)}] if waiting[kind] else []

    placed = []
    for message in messages:
        content = message["content"]
        if message["role"] == "user" and isinstance(content, str):
            content = _split(content, take) if _PLACEHOLDER.search(content) else content
        elif message["role"] == "user" and isinstance(content, (list, tuple)):
            content = [
                new
                for part in content
                for new in (take(part["type"]) if is_listed and _lacks_source(part) else [part])
            ]
        placed.append({**message, "content": content})
    listed = Counter(image=len(images), video=len(videos))
    if not found and sum(listed.values()) == 1:
        return _put_first(placed, images, videos)
    if any(found[kind] != listed[kind] for kind in MEDIA_TYPES):
        hint = "" if is_listed else "; if this is text alone, give its source `type: text`"
        raise ValueError(
            f"{found['image']} placeholders of images and {found['video']} of videos for "
            f"{listed['image']} images and {listed['video']} videos{hint}"
        )
    return placed


def _split(text: str, take: Any) -> list[Part]:
    """Cut a text at its placeholders; the newline that LLaVA writes after each goes with it."""
    parts: list[Part] = []
    for position, piece in enumerate(_PLACEHOLDER.split(text)):  # text, kind, text, kind, text
        if position % 2:
            parts += take(piece)
        elif piece := (piece.removeprefix("\n") if position else piece):
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": text}]


def _lacks_source(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in MEDIA_TYPES
        and all(value is None for key, value in part.items() if key != "type")
    )


def _put_first(
    messages: list[Message], images: Sequence[Any], videos: Sequence[Any]
) -> list[Message]:
    kind, source = ("image", images[0]) if images else ("video", videos[0])
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}] if content else []
            message["content"] = [{"type": kind, kind: source}, *content]
            return messages
    raise ValueError(f"there is a {kind} but no user message to show it")


def _check_type(type_: Any, media: Counter[str]) -> None:
    """Check that the type says what the media are."""
    if type_ not in RECORD_TYPES:
        raise ValueError(f"type must be one of {', '.join(RECORD_TYPES)}, not {type_!r}")
    if type_ != type_of(media):
        raise ValueError(
            f"type is {type_!r} but there are {media['image']} images and {media['video']} videos"
        )
