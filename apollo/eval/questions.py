"""What is asked: the `Question` record and our own JSON lines of it.

Here because every other part of the evaluation speaks in questions, and none should know how a
benchmark stores them. A `Question` that exists can be asked: it checks itself. Free of torch: a
questions file can be checked without a model. Next: `benchmarks.py`, the readers of public
benchmarks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

NEEDS = ("frames", "frame", "text")
"""Least that a question can be answered from, where that is known by construction."""


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question about one video.

    Attributes:
        question_id: Unique within its benchmark.
        video: Path of the video file.
        question: The question itself, without its options.
        options: The possible answers, in the order shown, without letters.
        answer: Index of the right option.
        question_class: One of the benchmark's classes ("class" in JSON).
        family: Finer kind within the class.
        needs: Least input that suffices, one of `NEEDS`; empty where nobody knows.
        duration_s: Length of the video in seconds, where the benchmark states it.
        benchmark: Key of `benchmarks.BENCHMARKS`, or a curated benchmark's own name.
        video_id: The benchmark's name of the video, the same on every machine. By default the path
            relative to the data folder, in POSIX form; an absolute path's file name.
        duration_group: Length as the benchmark groups it, such as "short".
        source: Where the video comes from: a domain or a data set.
        subtitles: SubRip file or LongVideoBench's JSON, if they are to be shown.
        subtitles_from_s: Time on the subtitles' clock at which the video starts, in seconds.
        caption_prompt: If not empty, the video is captioned with this prompt and the question is
            answered from the caption alone (TempCompass).

    Raises:
        ValueError: A value that makes no question.
    """

    question_id: str
    video: Path
    question: str
    options: tuple[str, ...]
    answer: int
    question_class: str = ""
    family: str = ""
    needs: str = ""
    duration_s: float | None = None
    benchmark: str = "questions"
    video_id: str = ""
    duration_group: str = ""
    source: str = ""
    subtitles: Path | None = None
    subtitles_from_s: float = 0.0
    caption_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("question_id", "question"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name!r} is empty")
        if len(self.options) < 2 or not all(option.strip() for option in self.options):
            raise ValueError(f"'options' must be two or more non-empty texts, not {self.options!r}")
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"two 'options' are the same: {self.options!r}")
        if not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"'answer' {self.answer} is not an index of {len(self.options)} options"
            )
        if self.needs and self.needs not in NEEDS:
            raise ValueError(f"'needs' is {self.needs!r}, allowed: {', '.join(NEEDS)}")
        if self.duration_s is not None and not 0 < self.duration_s < float("inf"):
            raise ValueError(f"'duration_s' is {self.duration_s}, not a positive number")
        if not isfinite(self.subtitles_from_s):
            raise ValueError(f"'subtitles_from_s' is {self.subtitles_from_s}, not a number")
        if not self.video_id:
            video = self.video
            name = video.name if video.is_absolute() else video.as_posix()
            object.__setattr__(self, "video_id", name)

    @classmethod
    def from_json(cls, record: object, folder: Path, benchmark: str = "questions") -> "Question":
        """Check one JSON record and make a question of it.

        Args:
            record: The decoded JSON value; fields beyond the question's own are left alone.
            folder: Where relative paths of videos and subtitles start.
            benchmark: What the question counts as.

        Raises:
            ValueError: A field is missing or has a value that makes no question.
        """
        if not isinstance(record, dict):
            raise ValueError(f"a question is a JSON object, not {type(record).__name__}")
        missing = [name for name in _REQUIRED if name not in record]
        if missing:
            raise ValueError(f"fields are missing: {', '.join(missing)}")
        fields: dict[str, Any] = {}
        for name, kind in (_REQUIRED | _OPTIONAL).items():
            value = record.get(name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name!r} has the wrong type: {value!r}")
            fields[_ATTRIBUTES.get(name, name)] = value
        if not all(isinstance(option, str) for option in fields["options"]):
            raise ValueError(f"'options' must be texts, not {fields['options']!r}")
        if not fields["video"].strip():
            raise ValueError("'video' is empty")
        fields["video_id"] = fields.get("video_id") or _name_of_video(fields["video"], folder)
        fields["video"] = folder / fields["video"]
        fields["options"] = tuple(fields["options"])
        if fields.get("subtitles"):
            fields["subtitles"] = folder / fields["subtitles"]
        else:
            fields["subtitles"] = None
        if fields.get("duration_s") is not None:
            fields["duration_s"] = float(fields["duration_s"])
        return cls(**fields, benchmark=benchmark)


_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "question_id": str,
    "video": str,
    "question": str,
    "options": list,
    "answer": int,
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "class": str,
    "family": str,
    "needs": str,
    "duration_s": (int, float),
    "video_id": str,
    "duration_group": str,
    "source": str,
    "subtitles": str,
    "subtitles_from_s": (int, float),
    "caption_prompt": str,
}
_ATTRIBUTES = {"class": "question_class"}  # a word of Python in JSON


def _name_of_video(video: str, folder: Path) -> str:
    """The video's path relative to the data folder, or its bare name if it lies elsewhere."""
    path = Path(video)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        return path.relative_to(folder.absolute()).as_posix()
    return path.name if path.is_absolute() else path.as_posix()


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a file's lines that are not blank.

    Raises:
        ValueError: The file cannot be read, or is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot read questions from {path}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), start=1):  # a text may hold U+2028
        if line.strip():
            yield number, line


def check_distinct(questions: list[Question], places: list[str]) -> None:
    """Check that no question_id is used twice and no video_id is the name of two videos.

    Args:
        questions: All questions of a benchmark.
        places: File and line (or row) of each, for messages.

    Raises:
        ValueError: Naming the later of the two places.
    """
    ids: dict[str, str] = {}
    videos: dict[str, Path] = {}
    for question, place in zip(questions, places, strict=True):
        if question.question_id in ids:
            raise ValueError(
                f"{place}: question_id {question.question_id!r} is also in "
                f"{ids[question.question_id]}"
            )
        ids[question.question_id] = place
        video = videos.setdefault(question.video_id, question.video)
        if video != question.video:
            raise ValueError(
                f"{place}: {video} and {question.video} are both named {question.video_id!r}; "
                "give every question a 'video_id'"
            )


def read_jsonl(path: Path, benchmark: str = "questions") -> list[Question]:
    """Read questions from a JSON-lines file; paths in it are relative to the file.

    Args:
        path: The file; or a folder that holds a `questions.jsonl`, such as a world.
        benchmark: What the questions count as.

    Raises:
        ValueError: With file and line: not JSON, not a question, or a question_id met before.
    """
    if path.is_dir():
        path = path / "questions.jsonl"
        if not path.is_file():
            raise ValueError(
                f"no questions.jsonl in {path.parent}; `apollo world make` makes a world with one"
            )
    questions: list[Question] = []
    places: list[str] = []
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            questions.append(Question.from_json(record, path.parent, benchmark))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        places.append(f"{path}:{number}")
    if not questions:
        raise ValueError(f"{path} holds no questions")
    check_distinct(questions, places)
    return questions


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a world's folder or from a JSON-lines file.

    Raises:
        ValueError: Nothing is there, or what is there holds no valid questions.
    """
    return read_jsonl(Path(path))
