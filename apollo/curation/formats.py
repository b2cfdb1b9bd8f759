"""The formats of predictions: rows of a file as entries of the table.

Here because every harness logs otherwise. `FORMATS` maps a format's name to what tells it from the
others and to its reader, a function from rows to entries. To add one, write it and one line there;
docs/curation.md shows an example of each. Next: `readers.py`, which opens the files.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from apollo.curation.records import COLUMNS, RIGHT, UNANSWERED, WRONG, Entry, MalformedError
from apollo.eval.benchmarks import answer_index, without_letters
from apollo.eval.data_folder import Row
from apollo.eval.parsing import parse_answer
from apollo.eval.scoring import Prediction, duration_group

CONDITION_NAMES = {"image": "frame", "blind": "text", "no_visual": "text", "single_frame": "frame"}
"""Other people's names of our conditions."""

Rows = Iterable[tuple[str, dict[str, Any]]]  # place in the file, values


class Source(NamedTuple):
    """A file and what the user says of it; "" is left to the file.

    Attributes:
        path: The file.
        model: Who answered.
        condition: What was shown.
        benchmark: What was asked.
        format: A key of `FORMATS`.
        metric: With several numbers for each answer: the one that says whether it is right.
    """

    path: Path
    model: str = ""
    condition: str = ""
    benchmark: str = ""
    format: str = ""
    metric: str = ""


class Format(NamedTuple):
    """How a format is known, and its reader.

    Attributes:
        about: One line.
        keys: What its first line has, at least.
        read: From the rows to predictions.
    """

    about: str
    keys: frozenset[str]
    read: Callable[[Rows, Source], Iterator[tuple[str, Entry]]]


def _ours(rows: Rows, source: Source) -> Iterator[tuple[str, Entry]]:
    """predictions.jsonl of `apollo eval`."""
    path = source.path
    model = source.model or (path.parent.name if path.name == "predictions.jsonl" else path.stem)
    for place, values in rows:
        try:
            prediction = Prediction.from_json(values)
        except ValueError as error:
            raise MalformedError(f"{place}: {error}") from None
        answered = prediction.prediction is not None
        yield (
            place,
            Entry(
                model,
                source.condition or prediction.condition,
                prediction.question_id,
                (RIGHT if prediction.correct else WRONG) if answered else UNANSWERED,
                prediction.prediction if prediction.prediction is not None else -1,
                (
                    source.benchmark or prediction.benchmark,
                    prediction.video,
                    prediction.question_class,
                    prediction.family,
                    prediction.needs,
                    duration_group(prediction),
                    prediction.source,
                ),
                prediction.num_options,
                prediction.answer,
                float("nan") if prediction.duration_s is None else float(prediction.duration_s),
            ),
        )


_PREDICTED = ("pred_answer", "parsed_pred", "pred_id", "video-llm-prediction", "pred")
_ANSWERS = ("answer", "answer_id", "gt-answer")
_GRADES = ("rating", "score", "correct", "hit")
_NO_METRICS = {"doc_id", "input", "target", "resps", "filtered_resps", "token_counts", "doc_hash"}


def _lmms_eval(rows: Rows, source: Source) -> Iterator[tuple[str, Entry]]:
    """<date>_samples_<task>.jsonl of lmms-eval, beside which the folder names the model."""
    task = source.path.stem.partition("_samples_")[2] or source.path.stem
    condition = source.condition or ("text" if task.endswith("_no_visual") else "video")
    benchmark = source.benchmark or task.removesuffix("_no_visual")
    model = source.model or source.path.parent.name
    counts: Counter[tuple[str, str]] = Counter()
    for place, values in rows:
        fields, state = _lmms_eval_metric(values, source.metric, place)
        video = str(_first(fields, "videoID", "video_name", "video_id") or "")
        aspect = str(fields.get("dim", ""))
        question = _first(fields, "question_id", "id")
        if "dim" in fields:  # TempCompass: as `apollo eval` names its questions
            counts[video, aspect] += 1
            question = f"{video}-{aspect}-{counts[video, aspect]}"
        elif "video_name" in fields and question is not None:  # the Perception Test: likewise
            question = f"{video}-{question}"
        elif question is None or " " in str(question).strip():  # MLVU has the question's text there
            question = values["doc_id"]
        answer = _option_number(_first(fields, *_ANSWERS))
        length = _length(fields)
        names = (
            benchmark,
            video,
            str(
                _first(fields, "task_category", "task_type", "question_category", "area") or aspect
            ),
            str(_first(fields, "sub_category", "reasoning") or ""),
            "",
            length[0],
            str(_first(fields, "category") or ""),
        )
        chosen = _option_number(_first(fields, *_PREDICTED))
        entry = Entry(model, condition, str(question), state, chosen, names, 0, answer, length[1])
        yield place, entry


def _lmms_eval_metric(
    values: dict[str, Any], metric: str, place: str
) -> tuple[dict[str, Any], int]:
    """The fields of the metric that says what was answered, and whether that is right."""
    if metric and metric not in values:
        raise MalformedError(f"{place}: no metric {metric!r} here, only {', '.join(values)}")
    metrics = {metric: values[metric]} if metric else values
    for fields in metrics.values():
        if isinstance(fields, dict) and _first(fields, *_ANSWERS) is not None:
            return fields, _state_of(fields, place)
    numbers = {
        name: value
        for name, value in metrics.items()
        if name not in _NO_METRICS and isinstance(value, int | float) and value in (0, 1)
    }
    if len(numbers) != 1:
        raise MalformedError(
            f"{place}: cannot tell whether the answer is right: it has the metrics "
            f"{', '.join(numbers) or 'none'}; name one as PATH,metric=NAME"
        )
    return {}, RIGHT if next(iter(numbers.values())) else WRONG


def _state_of(fields: Mapping[str, Any], place: str) -> int:
    """Right, wrong or unanswered, by the grade given, or by comparing answers."""
    grade = _first(fields, *_GRADES)
    if grade is not None:
        return _grade(grade, place)
    predicted = _first(fields, *_PREDICTED)
    predicted = "" if predicted is None else str(predicted).strip()
    if predicted in ("", "-1"):
        return UNANSWERED
    return RIGHT if predicted == str(_first(fields, *_ANSWERS)).strip() else WRONG


_GRADE_NAMES = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "right", "correct"), RIGHT),
    **dict.fromkeys(("0", "0.0", "false", "no", "wrong", "incorrect"), WRONG),
    **dict.fromkeys(("", "-1", "-1.0", "none", "nan", "null"), UNANSWERED),
}


def _grade(value: Any, place: str) -> int:
    name = str(value).strip().lower()
    if name not in _GRADE_NAMES:
        raise MalformedError(f"{place}: {value!r} does not say right (1), wrong (0) or neither")
    return _GRADE_NAMES[name]


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of these values that is there."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _length(fields: Mapping[str, Any]) -> tuple[str, float]:
    """The group of a video's length, and its seconds where they are given: nan if not."""
    group = str(_first(fields, "duration_group", "duration") or "").strip()
    seconds = _first(fields, "duration_s", "duration")
    try:
        length_s = float(seconds)
    except (TypeError, ValueError):
        return group, float("nan")
    if not 0 < length_s < float("inf"):
        return group, float("nan")
    if fields.get("duration_group") or (group and fields.get("duration_s")):
        return group, length_s
    asked = SimpleNamespace(duration_group="", duration_s=length_s)
    return duration_group(asked), length_s  # type: ignore[arg-type]


def _option_number(value: Any) -> int:
    """The index that a letter or number stands for; -1 for anything else."""
    match = (
        re.match(r"\(?([A-Z])(?:\W|$)|(\d+)$", str(value).strip()) if value is not None else None
    )
    if match is None:
        return -1
    number = ord(match[1]) - ord("A") if match[1] else int(match[2])
    return number if number < 100 else -1


def _vlmevalkit(rows: Rows, source: Source) -> Iterator[tuple[str, Entry]]:
    """{model}_{dataset}.xlsx, tsv or json of VLMEvalKit, in a folder of the model's name."""
    stem = source.path.stem.removesuffix("_score")
    parents = [folder.name for folder in source.path.parents if folder.name]
    model = source.model or next((name for name in parents if stem.startswith(f"{name}_")), "")
    if not model:
        raise MalformedError(
            f"{source.path}: no folder above it is named as the model is; say PATH,model=NAME"
        )
    benchmark = source.benchmark or stem.removeprefix(f"{model}_")
    for place, values in rows:
        row = Row({name: value for name, value in values.items() if value is not None})
        try:
            options, answer = _options_and_answer(row)
            state, chosen = _vlmevalkit_state(values, options, answer, place)
            length = _length(values)
            names = (
                benchmark,
                row.text_if_any("video"),
                row.text_if_any("task_type") or row.text_if_any("question_category"),
                row.text_if_any("sub_category"),
                "",
                length[0],
                row.text_if_any("domain"),
            )
            question = row.text("question_id" if "question_id" in row else "index")
        except ValueError as error:
            raise MalformedError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None
        condition = source.condition or "video"
        about = (names, len(options), answer, length[1])
        yield place, Entry(model, condition, question, state, chosen, *about)


def _options_and_answer(row: Row) -> tuple[list[str], int]:
    """Options without letters, none where they are not given, and the number of the right one."""
    if "candidates" in row:
        options = without_letters(row.texts("candidates"))
    else:
        options = [row.text(letter) for letter in "ABCDEFGH" if letter in row]
    answer = row.text("answer")
    return options, answer_index(answer, options) if options else _option_number(answer)


def _vlmevalkit_state(
    values: Mapping[str, Any], options: Sequence[str], answer: int, place: str
) -> tuple[int, int]:
    """By its own score where the file has one, else by our parser of written answers."""
    written = str(values["prediction"] if values["prediction"] is not None else "")
    chosen = _option_number(written)
    if options:
        parsed = parse_answer(written, options).prediction
        chosen = -1 if parsed is None else parsed
    if (grade := _first(values, "score", "hit")) is not None:
        return _grade(grade, place), chosen
    if answer < 0:
        raise MalformedError(
            f"{place}: without 'candidates' or A, B, ... the answer must be a letter, and without "
            "'score' so must the prediction"
        )
    return (UNANSWERED if chosen < 0 else RIGHT if chosen == answer else WRONG), chosen


def _plain(rows: Rows, source: Source) -> Iterator[tuple[str, Entry]]:
    """A row per model and question: model, question_id, and correct or prediction and answer."""
    for place, values in rows:
        row = Row({name: value for name, value in values.items() if value is not None})
        try:
            condition = source.condition or row.text_if_any("condition") or "video"
            answer = row.index("answer") if "answer" in row else -1
            chosen = row.index("prediction") if "prediction" in row else -1
            if "correct" in values:
                state = _grade(values["correct"] if values["correct"] is not None else "", place)
                if min(answer, chosen) >= 0 and (state == RIGHT) != (answer == chosen):
                    raise ValueError(
                        f"'correct' is {values['correct']}, but prediction is {chosen} and answer "
                        f"is {answer}"
                    )
            elif answer < 0:
                raise ValueError("neither 'correct' nor 'answer' has a value")
            else:
                state = UNANSWERED if chosen < 0 else RIGHT if chosen == answer else WRONG
            names = {name: row.text_if_any(name) for name in COLUMNS}
            names["duration"], duration_s = _length(values)
            names["benchmark"] = source.benchmark or names["benchmark"] or source.path.stem
            yield (
                place,
                Entry(
                    source.model or row.text("model"),
                    CONDITION_NAMES.get(condition, condition),
                    row.text("question_id"),
                    state,
                    chosen,
                    tuple(names.values()),
                    row.index("num_options") if "num_options" in row else 0,
                    answer,
                    duration_s,
                ),
            )
        except ValueError as error:
            raise MalformedError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None


FORMATS = {
    "ours": Format(
        "predictions.jsonl of apollo eval",
        frozenset({"benchmark", "question_id", "condition", "option_scores"}),
        _ours,
    ),
    "lmms-eval": Format(
        "sample logs of lmms-eval (--log_samples)", frozenset({"doc_id", "target"}), _lmms_eval
    ),
    "vlmevalkit": Format(
        "predictions of VLMEvalKit: xlsx, tsv or json",
        frozenset({"index", "question", "answer", "prediction"}),
        _vlmevalkit,
    ),
    "plain": Format(
        "a table with a row per model and question", frozenset({"model", "question_id"}), _plain
    ),
}
