"""Public benchmarks: what their columns mean, and the table of all that can be asked.

Here so that the rest of the evaluation sees questions only. A benchmark is one function, from a
folder to questions, and one entry of `BENCHMARKS`; docs/benchmarks.md shows how to add one, how to
get each, and where the scoring differs from lmms-eval, whose column names these are. Next:
`data_folder.py` (tables and videos), then `answerers.py` (who answers).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apollo.eval.data_folder import DataFolder, Row, fetch
from apollo.eval.questions import Question, read_jsonl


@dataclass(frozen=True)
class Benchmark:
    """A set of questions that can be asked by name.

    Attributes:
        read: From a local folder or file to its questions.
        about: One line.
        hub_id: Data set repository from which it comes if no data is given.
        scoring: Default scoring, a key of `answerers.SCORINGS`.
    """

    read: Callable[[Path], list[Question]]
    about: str
    hub_id: str = ""
    scoring: str = "letter"


def read_benchmark(name: str, data: str | Path | None = None) -> list[Question]:
    """Read the questions of a benchmark.

    Args:
        name: A key of `BENCHMARKS`.
        data: Its folder or file; or a data set of the hub, as owner/name. By default the
            benchmark's own data set of the hub.

    Raises:
        ValueError: No such benchmark or data, or a row that makes no question, with its place.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    data = data or benchmark.hub_id
    if not data:
        raise ValueError(f"benchmark {name!r} needs --data: its folder or file")
    path = Path(data)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)) or str(data).startswith("."):
            raise ValueError(f"no folder or file {data}")
        path = fetch(str(data))
    questions = benchmark.read(path)
    return [q if q.benchmark != "questions" else replace(q, benchmark=name) for q in questions]


# ---- our own formats


def read_curated(path: Path) -> list[Question]:
    """Read a benchmark made by `apollo curate`: questions.jsonl, and manifest.json that seals it.

    Raises:
        ValueError: The manifest is missing or says something else than the questions.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise ValueError(f"no manifest.json in {path}: not a folder made by `apollo curate`")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        name, num_questions = manifest["name"], manifest["num_questions"]
        expected = manifest["questions_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manifest_path} must hold name, num_questions and questions_sha256: {error!r}"
        ) from None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{manifest_path}: 'name' must be a text, not {name!r}")
    questions = read_jsonl(path, name)
    found = hashlib.sha256((path / "questions.jsonl").read_bytes()).hexdigest()
    if found != expected or len(questions) != num_questions:
        raise ValueError(
            f"{path / 'questions.jsonl'} is not what {manifest_path} was written for: "
            f"{len(questions)} questions with sha256 {found[:12]}, "
            f"not {num_questions} with {str(expected)[:12]}"
        )
    return questions


# ---- public benchmarks


def read_videomme(path: Path, with_subtitles: bool = False) -> list[Question]:
    """Read Video-MME: 2,700 questions, three on each of 900 videos of three lengths.

    Raises:
        ValueError: See `DataFolder.questions`; or subtitles are wanted and there are none at all.
    """
    folder = DataFolder(path)

    def make(row: Row) -> Question:
        video = row.text("videoID")
        options = without_letters(row.texts("options"))
        subtitles = folder.subtitles(video, "subtitle") if with_subtitles else None
        return _question(
            options,
            letter_index(row.text("answer"), options),
            question_id=row.text("question_id"),
            video=folder.video(video, "data", "videos"),
            video_id=video,
            question=row.text("question"),
            question_class=row.text("task_type"),
            family=row.text_if_any("sub_category"),
            duration_group=row.text("duration"),
            source=row.text_if_any("domain"),
            subtitles=subtitles,
        )

    questions = folder.questions(make, "videomme/test*", "data/test*", "test*")
    if with_subtitles and not any(question.subtitles for question in questions):
        raise ValueError(f"no subtitles below {folder.root}: unpack subtitle.zip there")
    return questions


def read_videomme_subtitles(path: Path) -> list[Question]:
    """Read Video-MME with subtitles; the videos that have none are asked without."""
    return read_videomme(path, with_subtitles=True)


def read_mlvu(path: Path) -> list[Question]:
    """Read MLVU: videos of minutes to hours, seven task types (nine in its test part)."""
    folder = DataFolder(path)
    counts: Counter[str] = Counter()

    def make(row: Row) -> Question:
        video, task = row.text("video_name"), row.text("task_type")
        text, in_question = split_options(row.text("question"))
        options = without_letters(row.texts("candidates")) if "candidates" in row else in_question
        if in_question and list(map(_plain, in_question)) != list(map(_plain, options)):
            raise ValueError(f"'question' has the options {in_question}, 'candidates' {options}")
        counts[video] += 1
        return _question(
            options,
            answer_index(row.text("answer"), options),
            question_id=f"{video}-{counts[video]}",
            video=folder.video(video, "", "video", f"**/*_{task}", "videos"),
            video_id=video,
            question=text.removeprefix("Question:").strip(),
            question_class=task,
            duration_s=row.number("duration") if "duration" in row else None,
        )

    return folder.questions(make, "data/test*", "test*", "*/test*")


def read_longvideobench(path: Path, with_subtitles: bool = False) -> list[Question]:
    """Read LongVideoBench: questions that refer to a moment of a video of up to an hour.

    Raises:
        ValueError: See `DataFolder.questions`; or subtitles are wanted and there are none at all.
    """
    folder = DataFolder(path)

    def make(row: Row) -> Question:
        video = row.text("video_path")
        options = row.texts("candidates") if "candidates" in row else _padded_options(row)
        subtitles, from_s = None, 0.0
        if with_subtitles and "subtitle_path" in row:
            subtitles = folder.subtitles(row.text("subtitle_path"), "subtitles")
            from_s = row.number("starting_timestamp_for_subtitles")
        return _question(
            options,
            row.index("correct_choice"),
            question_id=row.text("id"),
            video=folder.video(video, "videos"),
            video_id=Path(video).stem,
            question=row.text("question"),
            question_class=row.text("question_category"),
            duration_s=row.number("duration"),
            duration_group=row.text("duration_group"),
            source=row.text_if_any("topic_category"),
            subtitles=subtitles,
            subtitles_from_s=from_s,
        )

    questions = folder.questions(make, "validation*", "data/validation*", "lvb_val")
    if with_subtitles and not any(question.subtitles for question in questions):
        raise ValueError(f"no subtitles below {folder.root}: unpack subtitles.tar there")
    return questions


def read_longvideobench_subtitles(path: Path) -> list[Question]:
    """Read LongVideoBench with the subtitles of the frames that are shown."""
    return read_longvideobench(path, with_subtitles=True)


def read_tempcompass(path: Path, task: str) -> list[Question]:
    """Read one of TempCompass' four formats; the videos of a pair differ in time alone.

    Args:
        path: Folder or table.
        task: "multi-choice", "yes_no", "caption_matching" or "captioning".
    """
    folder = DataFolder(path)
    counts: Counter[tuple[str, str]] = Counter()

    def make(row: Row) -> Question:
        video, aspect = row.text("video_id"), row.text("dim")
        is_captioning = task == "captioning"
        asked, answer = ("mc_question", "mc_answer") if is_captioning else ("question", "answer")
        text, options = row.text(asked), ["yes", "no"]
        if task != "yes_no":
            text, options = split_options(text)
            if not options:
                raise ValueError(f"{asked!r} ends in no options: {row.text(asked)!r}")
        counts[video, aspect] += 1
        return _question(
            options,
            answer_index(row.text(answer), options),
            question_id=f"{video}-{aspect}-{counts[video, aspect]}",
            video=folder.video(video, "videos", "video"),
            video_id=video,
            question=text,
            question_class=aspect,
            caption_prompt=row.text("question") if is_captioning else "",
        )

    return folder.questions(make, f"{task}/test*", task, "test*")


def read_tempcompass_multi_choice(path: Path) -> list[Question]:
    """Read TempCompass' questions of several options."""
    return read_tempcompass(path, "multi-choice")


def read_tempcompass_yes_no(path: Path) -> list[Question]:
    """Read TempCompass' questions of yes or no."""
    return read_tempcompass(path, "yes_no")


def read_tempcompass_caption_matching(path: Path) -> list[Question]:
    """Read TempCompass' choices between two captions."""
    return read_tempcompass(path, "caption_matching")


def read_tempcompass_captioning(path: Path) -> list[Question]:
    """Read TempCompass' captions, each judged by whether a question can be answered from it."""
    return read_tempcompass(path, "captioning")


NEXTQA_CLASSES = {"C": "causal", "T": "temporal", "D": "descriptive"}
"""First letter of NExT-QA's types: CW and CH; TN, TC and TP; DL, DC, DO and DB."""


def read_nextqa(path: Path) -> list[Question]:
    """Read NExT-QA's multiple choice: why and how, before and after, in everyday videos."""
    folder = DataFolder(path)
    counts: Counter[str] = Counter()

    def make(row: Row) -> Question:
        video, type_ = row.text("video"), row.text_if_any("type")
        if type_ and type_[0] not in NEXTQA_CLASSES:
            raise ValueError(f"'type' must begin with one of C, T, D, not {type_!r}")
        counts[video] += 1
        number = row.text_if_any("qid") or f"row{counts[video]}"
        return _question(
            [row.text(f"a{option}") for option in range(5)],
            row.index("answer"),
            question_id=f"{video}-{number}",
            video=folder.video(video, "NExTVideo", "videos"),
            video_id=video,
            question=row.text("question"),
            question_class=NEXTQA_CLASSES[type_[0]] if type_ else "",
            family=type_,
        )

    return folder.questions(make, "MC/test*", "data/test*", "test*")


def read_perception_test(path: Path) -> list[Question]:
    """Read the Perception Test's validation part: three options, four areas of skill."""
    folder = DataFolder(path)

    def make(row: Row) -> Question:
        video = row.text("video_name")
        return _question(
            row.texts("options"),
            row.index("answer_id"),
            question_id=f"{video}-{row.text('question_id')}",
            video=folder.video(video, "videos"),
            video_id=video,
            question=row.text("question"),
            question_class=row.text("area"),
            family=row.text_if_any("reasoning"),
        )

    return folder.questions(
        make, "mc_question_val/validation*", "data/validation*", "validation*", "mc_question_val"
    )


BENCHMARKS: dict[str, Benchmark] = {
    "questions": Benchmark(read_jsonl, "questions of one's own: JSON lines"),
    "world": Benchmark(read_jsonl, "a world of `apollo world make`", scoring="option"),
    "curated": Benchmark(read_curated, "a benchmark of `apollo curate`"),
    "videomme": Benchmark(
        read_videomme,
        "Video-MME: 2,700 questions on 900 videos, short, medium and long",
        "lmms-eval/Video-MME",
    ),
    "videomme_subtitles": Benchmark(
        read_videomme_subtitles,
        "Video-MME with the subtitles of the frames that are shown",
        "lmms-eval/Video-MME",
    ),
    "mlvu_dev": Benchmark(
        read_mlvu, "MLVU's development part: long videos, seven tasks", "sy1998/MLVU_dev"
    ),
    "mlvu_test": Benchmark(
        read_mlvu, "MLVU's test part: long videos, nine tasks", "sy1998/MLVU_Test"
    ),
    "longvideobench": Benchmark(
        read_longvideobench,
        "LongVideoBench's validation part: 1,337 questions on moments of long videos",
        "longvideobench/LongVideoBench",
    ),
    "longvideobench_subtitles": Benchmark(
        read_longvideobench_subtitles,
        "LongVideoBench with the subtitles of the frames that are shown",
        "longvideobench/LongVideoBench",
    ),
    "tempcompass_multi_choice": Benchmark(
        read_tempcompass_multi_choice,
        "TempCompass: 1,580 questions on speed, direction, action, order and change",
        "lmms-eval/TempCompass",
    ),
    "tempcompass_yes_no": Benchmark(
        read_tempcompass_yes_no,
        "TempCompass: 2,453 questions of yes or no",
        "lmms-eval/TempCompass",
    ),
    "tempcompass_caption_matching": Benchmark(
        read_tempcompass_caption_matching,
        "TempCompass: which of two captions fits",
        "lmms-eval/TempCompass",
    ),
    "tempcompass_captioning": Benchmark(
        read_tempcompass_captioning,
        "TempCompass: questions answered from the model's own caption",
        "lmms-eval/TempCompass",
    ),
    "nextqa": Benchmark(
        read_nextqa,
        "NExT-QA, multiple choice: causal, temporal and descriptive questions",
        "lmms-eval/NExTQA",
    ),
    "perception_test": Benchmark(
        read_perception_test,
        "Perception Test, validation part: 19,140 questions",
        "lmms-eval/PerceptionTest_Val",
    ),
}


# ---- how options and answers are written


_LABEL = re.compile(r"\(?(?:(?:Option|Caption|Sentence) +([A-Z]|\d)|([A-Z])) *[.):] *(.*)")
"""`A. text`, `(A) text`, `A) text`, `A: text`; `Caption A: text`, `Option 1: text`."""


def _label(text: str) -> tuple[int, str]:
    """Number that an option's label stands for, from 0, and the text after it; -1 without one."""
    match = _LABEL.fullmatch(text.strip())
    if match is None:
        return -1, text.strip()
    letter = match[1] or match[2]
    return (int(letter) - 1 if letter.isdigit() else ord(letter) - ord("A")), match[3].strip()


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without `A.`, `B.` and so on, if each of them has its own letter."""
    labels = [_label(option) for option in options]
    if [number for number, _ in labels] != list(range(len(labels))):
        return [option.strip() for option in options]
    return [text for _, text in labels]


def split_options(text: str) -> tuple[str, list[str]]:
    """Part a question from the lines of options that it ends in; none if it ends in none."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    numbers = [_label(line)[0] for line in lines]
    for first in range(len(lines) - 2, 0, -1):
        if numbers[first:] == list(range(len(lines) - first)):
            stem = "\n".join(lines[:first]).strip().removesuffix("Options:").strip()
            return stem, [_label(line)[1] for line in lines[first:]]
    return text.strip(), []


def letter_index(answer: str, options: Sequence[str]) -> int:
    """Find the option that a letter names, as `B`, `(B)` or `B.`.

    Raises:
        ValueError: It is no letter, or one after the last option's.
    """
    alone = re.fullmatch(r"\(?([A-Z])\)?\.?", answer.strip())
    if alone is None or ord(alone[1]) - ord("A") >= len(options):
        raise ValueError(f"the answer {answer!r} is not a letter of the options {list(options)!r}")
    return ord(alone[1]) - ord("A")


def answer_index(answer: str, options: Sequence[str]) -> int:
    """Find the option that an answer names, by its letter, its text or both.

    Raises:
        ValueError: It names none of the options, or one by the letter and another by the text.
    """
    exact = [index for index, option in enumerate(options) if option == answer.strip()]
    alike = [index for index, option in enumerate(options) if _plain(option) == _plain(answer)]
    found = set((exact or alike)[:1])  # of an option that is given twice, the first
    number, text = _label(answer)
    if text and 0 <= number < len(options) and _plain(options[number]) == _plain(text):
        found.add(number)
    elif re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()):
        found.add(letter_index(answer, options))
    if len(found) != 1:
        problem = "names two of" if found else "is none of"
        raise ValueError(f"the answer {answer!r} {problem} the options {list(options)!r}")
    return found.pop()


def _plain(text: str) -> str:
    """A text without what people write differently: case, space and the final full stop."""
    return " ".join(text.split()).rstrip(".").casefold()


def _padded_options(row: Row) -> list[str]:
    """Columns option0 to option4, of which "N/A" fills the last."""
    options = [row.text_if_any(f"option{number}") for number in range(5)]
    while options and options[-1] in ("", "N/A"):
        options.pop()
    if "N/A" in options:
        raise ValueError(f"'N/A' stands before other options: {options}")
    return options


def _question(options: Sequence[str], answer: int, **fields: object) -> Question:
    """Make a question; an option that is given twice counts once.

    Some benchmarks draw wrong options at random and repeat one: choosing either copy is the same.
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"the answer {answer} is not an index of {len(options)} options")
    distinct = tuple(dict.fromkeys(options))
    return Question(options=distinct, answer=distinct.index(options[answer]), **fields)  # type: ignore[arg-type]
