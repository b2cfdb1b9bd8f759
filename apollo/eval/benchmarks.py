"""What is asked: the `Question` record and the readers that make questions from files.

Here because every other part of the evaluation speaks in questions, and none should know how a
benchmark stores them. Free of torch: a questions file can be checked without a model. Next:
`answerers.py` (who answers).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDS = (
    "frames",
    "frame",
    "text",
)  # least that a question can be answered from, known by construction


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question about one video.

    Attributes:
        question_id: Unique within its benchmark.
        video: Path of the video file.
        question: The question itself, without its options.
        options: The possible answers, in the order shown.
        answer: Index of the right option.
        question_class: One of the benchmark's classes ("class" in JSON).
        family: Finer kind within the class.
        needs: Least input that suffices: several "frames", one "frame", or "text" alone.
        duration_s: Length of the video in seconds.
    """

    question_id: str
    video: Path
    question: str
    options: tuple[str, ...]
    answer: int
    question_class: str
    family: str
    needs: str
    duration_s: float

    @classmethod
    def from_json(cls, record: object, folder: Path) -> "Question":
        """Check one JSON record and make a question of it.

        Args:
            record: The decoded JSON value; fields beyond the question's own are left alone.
            folder: Where a relative video path starts.

        Raises:
            ValueError: A field is missing or has a value that makes no question.
        """
        if not isinstance(record, dict):
            raise ValueError(f"a question is a JSON object, not {type(record).__name__}")
        missing = [name for name in _FIELDS if name not in record]
        if missing:
            raise ValueError(f"fields are missing: {', '.join(missing)}")
        for name, kind in _FIELDS.items():
            if not isinstance(record[name], kind) or isinstance(record[name], bool):
                raise ValueError(f"{name!r} has the wrong type: {record[name]!r}")
            if kind is str and not record[name].strip():
                raise ValueError(f"{name!r} is empty")
        options = record["options"]
        if len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
            raise ValueError(f"'options' must be two or more non-empty texts, not {options!r}")
        if len(set(options)) < len(options):
            raise ValueError(f"two 'options' are the same: {options!r}")
        if not 0 <= record["answer"] < len(options):
            raise ValueError(
                f"'answer' {record['answer']} is not an index of {len(options)} options"
            )
        if not 0 < record["duration_s"] < float("inf"):
            raise ValueError(f"'duration_s' is {record['duration_s']}, not a positive number")
        if record["needs"] not in NEEDS:
            raise ValueError(f"'needs' is {record['needs']!r}, allowed: {', '.join(NEEDS)}")
        rest = {
            name: record[name] for name in ("question_id", "question", "answer", "family", "needs")
        }
        return cls(
            video=folder / record["video"],
            options=tuple(options),
            question_class=record["class"],
            duration_s=float(record["duration_s"]),
            **rest,
        )


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "question_id": str,
    "video": str,
    "question": str,
    "options": list,
    "answer": int,
    "class": str,
    "family": str,
    "needs": str,
    "duration_s": (int, float),
}


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: questions are JSON lines") from None
    except OSError as error:
        raise ValueError(f"cannot read questions from {path}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def read_jsonl(path: Path) -> list[Question]:
    """Read questions from a JSON-lines file; video paths are relative to the file.

    Raises:
        ValueError: With file and line: not JSON, not a question, or a question_id met before.
    """
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for number, line in _read_lines(path):
        try:
            question = Question.from_json(json.loads(line), path.parent)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        first = seen.setdefault(question.question_id, number)
        if first != number:
            raise ValueError(
                f"{path}:{number}: question_id {question.question_id!r} is also on line {first}"
            )
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def read_world(path: Path) -> list[Question]:
    """Read the questions of a folder made by `apollo world make`.

    Raises:
        ValueError: The folder holds no questions.jsonl, or that file has a bad line.
    """
    file = path / "questions.jsonl"
    if not file.is_file():
        raise ValueError(f"no questions.jsonl in {path}; make a world with `apollo world make`")
    return read_jsonl(file)


BENCHMARKS: dict[str, Callable[[Path], list[Question]]] = {
    "world": read_world,
    "jsonl": read_jsonl,
}


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a world's folder or from a JSON-lines file.

    Raises:
        ValueError: Nothing is there, or what is there holds no valid questions.
    """
    path = Path(path)
    return BENCHMARKS["world" if path.is_dir() else "jsonl"](path)
