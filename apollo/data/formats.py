"""The training record: one conversation per line of a JSON lines file.

    {"id": "a1", "type": "video", "messages": [{"role": "user", "content": [...]}, ...]}

Here so that every file is checked once, on reading, and a mistake is named by file and line instead
of showing up hours later in a batch. No torch here. Read next: `mixture.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo.messages import MEDIA_TYPES, Message, map_media, media_parts, normalize

RECORD_TYPES = ("text", "image", "multi_image", "video")
"""The paper's four kinds of data (Fig. 7)."""


class RecordError(ValueError):
    """A training record that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Record:
    """One conversation to learn from, in normal form and with absolute media paths.

    Attributes:
        id: Name of the record, unique in its file.
        type: One of `RECORD_TYPES`; agrees with the media in the messages.
        messages: The conversation (see `apollo/messages.py`), with at least one assistant turn.
        where: File and line, for messages to the user.
    """

    id: str
    type: str
    messages: list[Message]
    where: str

    @property
    def media(self) -> list[tuple[str, Any]]:
        """The media in order, as ("image" | "video", path)."""
        return media_parts(self.messages)


def read_records(path: Path) -> list[Record]:
    """Read and check every record of a JSON lines file; relative media lie beside the file.

    Raises:
        RecordError: The file is absent or empty, or a line is no valid record.
    """
    if not path.is_file():
        raise RecordError(f"no training file {path}")
    records: list[Record] = []
    lines_of_ids: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                record = _parse(json.loads(line.decode("utf-8")), path.parent, where)
            except ValueError as error:  # also JSON, Unicode and message errors
                raise RecordError(f"{where}: {error}") from error
            if record.id in lines_of_ids:
                raise RecordError(
                    f"{where}: id {record.id!r} was used in line {lines_of_ids[record.id]}"
                )
            lines_of_ids[record.id] = number
            records.append(record)
    if not records:
        raise RecordError(f"{path} holds no record")
    return records


def _parse(data: Any, folder: Path, where: str) -> Record:
    """Check one record.

    Raises:
        ValueError: What is wrong with it.
    """
    keys = {"id", "type", "messages"}
    if not isinstance(data, dict) or set(data) != keys:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"a record has exactly the keys {sorted(keys)}, found {found}")
    if not isinstance(data["id"], str):
        raise ValueError(f"id must be a string, not {data['id']!r}")
    messages = map_media(
        normalize(data["messages"]), lambda kind, source: _resolve(kind, source, folder)
    )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("nothing to learn: there is no assistant message")
    _check_type(data["type"], Counter(kind for kind, _ in media_parts(messages)))
    return Record(data["id"], data["type"], messages, where)


def _resolve(kind: str, source: Any, folder: Path) -> Path:
    if not isinstance(source, str) or "://" in source:
        raise ValueError(f"the {kind} of a record must be the path of a file, not {source!r:.80}")
    return folder / source


def _check_type(type_: Any, media: Counter[str]) -> None:
    """Check that the type says what the media are."""
    images, videos = (media[kind] for kind in MEDIA_TYPES)
    fits = {
        "text": images == 0 and videos == 0,
        "image": images == 1 and videos == 0,
        "multi_image": images >= 2 and videos == 0,
        "video": videos >= 1,
    }
    if type_ not in fits:
        raise ValueError(f"type must be one of {', '.join(RECORD_TYPES)}, not {type_!r}")
    if not fits[type_]:
        raise ValueError(f"type is {type_!r} but there are {images} images and {videos} videos")
