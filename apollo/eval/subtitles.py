"""Subtitles of a video: SubRip files, and the JSON of LongVideoBench in both of its shapes.

Here because two benchmarks are also asked with subtitles, and what is shown must be what was said
while the frames that are shown were on the screen. Next: `prompts.py`, which puts the text into
the prompt.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")  # coordinates may follow the times
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|\{\\[^{}]*\}")  # <i>, <font ...>, {\an8}; not "a < b > c"


@dataclass(frozen=True, slots=True)
class Subtitle:
    """What is written on the screen from `start_s` until just before `end_s`.

    Attributes:
        start_s: First moment, in seconds of the video.
        end_s: Moment at which it is gone; infinity if the file does not say.
        text: One line, without marks of its style.
    """

    start_s: float
    end_s: float
    text: str


def read_subtitles(path: Path, from_s: float = 0.0) -> list[Subtitle]:
    """Read the subtitles of a file, by the time at which they start.

    Args:
        path: A `.srt` file; or a `.json` list of `{"start", "end", "line"}` with times as
            HH:MM:SS.mmm, or of `{"timestamp": [start, end], "text"}` with times in seconds.
        from_s: Time in the file at which the video starts.

    Raises:
        ValueError: With file and line (of JSON: number of the item, from 0) of what is no subtitle.
    """
    readers = {".srt": _read_srt, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise ValueError(f"subtitles are read from .srt or .json files, not from {path}")
    found = readers[path.suffix.lower()](path, _read_text(path))
    shifted = [Subtitle(s.start_s - from_s, s.end_s - from_s, s.text) for s in found if s.text]
    return sorted(shifted, key=lambda subtitle: (subtitle.start_s, subtitle.end_s))


def subtitles_at(subtitles: Iterable[Subtitle], spans_s: Sequence[tuple[float, float]]) -> str:
    """The text seen at some time, a line for each subtitle, in order and each once.

    Automatic captions repeat the line before; a text that follows itself is given once.

    Args:
        subtitles: In the order of their times.
        spans_s: From and to, in seconds, both included; equal for a single frame.
    """
    lines: list[str] = []
    for subtitle in subtitles:
        seen = any(subtitle.start_s <= end and start < subtitle.end_s for start, end in spans_s)
        if seen and (not lines or lines[-1] != subtitle.text):
            lines.append(subtitle.text)
    return "\n".join(lines)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read subtitles from {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: subtitles must be UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _clean(lines: Iterable[str]) -> str:
    """One line without marks of style and without needless space."""
    return " ".join(_TAG.sub("", " ".join(lines)).split())


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return whole + float(f"0.{fraction or 0}")


def _check_times(start_s: float, end_s: float) -> None:
    if not isfinite(start_s) or not end_s >= start_s:
        raise ValueError(f"a subtitle cannot last from {start_s} to {end_s} s")


# ---- SubRip


def _read_srt(path: Path, text: str) -> list[Subtitle]:
    """Read by the lines with times alone: the numbers before them are often wrong."""
    found: list[Subtitle] = []
    times: tuple[float, float] | None = None
    pending: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if "-->" not in line:
            if times is None and line.strip() and not line.strip().isdigit():
                raise ValueError(f"{path}:{number}: text before the first time: {line.strip()!r}")
            pending.append(line)
            continue
        span = _SPAN.fullmatch(line)
        if span is None:
            raise ValueError(f"{path}:{number}: not two times: {line.strip()!r}")
        if times is not None:
            found.append(Subtitle(*times, _clean(_without_number(pending))))
        parts = span.groups()
        times, pending = (_seconds(*parts[:4]), _seconds(*parts[4:])), []
        try:
            _check_times(*times)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if times is not None:
        found.append(Subtitle(*times, _clean(pending)))
    return found


def _without_number(lines: list[str]) -> list[str]:
    """The lines of a subtitle, less the number of the next one that ends them."""
    return lines[:-1] if lines and lines[-1].strip().isdigit() else lines


# ---- LongVideoBench


def _read_json(path: Path, text: str) -> list[Subtitle]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}:1: subtitles are a list, not {type(items).__name__}")
    found = []
    for index, item in enumerate(items):
        try:
            found.append(_from_json(item))
        except ValueError as error:
            raise ValueError(f"{path}[{index}]: {error}") from None
    return found


def _from_json(item: object) -> Subtitle:
    match item:
        case {
            "timestamp": [int() | float() as start, int() | float() | None as end],
            "text": str(text),
        }:
            # The last end is null in files cut from longer ones.
            start_s, end_s = float(start), inf if end is None else float(end)
        case {"start": str(start), "end": str(end), "line": str(text)}:
            start_s, end_s = _from_clock(start), _from_clock(end)
        case _:
            raise ValueError(
                "neither {'start', 'end', 'line'} nor {'timestamp': [start, end], 'text'}: "
                f"{str(item)[:80]}"
            )
    _check_times(start_s, end_s)
    return Subtitle(start_s, end_s, _clean([text]))


def _from_clock(time: str) -> float:
    parts = re.fullmatch(_TIME, time.strip())
    if parts is None:
        raise ValueError(f"not a time: {time!r}")
    return _seconds(*parts.groups())
