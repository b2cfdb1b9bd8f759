"""Classes of questions: from a mapping, from rules, or from an answerer that sorts them.

Here because a small benchmark should ask for every skill, and benchmarks call skills by a hundred
names. The paper sorts by hand into five classes (Section 2.3). A sorting by a model is a
multiple-choice question itself, so `apollo eval` does it: `labelling_questions` writes what to ask,
and the predictions.jsonl that comes of it is read here. Next: `curate.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from apollo.curation.audit import rows_by_id
from apollo.curation.readers import rows_of
from apollo.curation.records import COLUMNS, Labels, MalformedError, Pool
from apollo.eval.questions import Question
from apollo.eval.scoring import read_predictions

CLASSES = {
    "temporal_ocr": "reading text that appears in the video",
    "egocentric": "following what the person who holds the camera does or passes",
    "spatial": "where things are and which way they move",
    "perception": "recognising actions, things and what they look like",
    "reasoning": "order, counts, times and causes of what happens",
}
"""The paper's five (Section 2.3), in words of ours."""

LABELS = "labels"  # benchmark of the questions that ask for a class


def read_classes(path: str | Path, pool: Pool, questions: Sequence[Question] = ()) -> Labels:
    """Read the class of each question; "" where there is none.

    Args:
        path: YAML with `by` and `map`, or with `rules`; a table with question_id and class; or the
            folder of an evaluation of `labelling_questions`.
        pool: The questions.
        questions: Their texts, for rules.

    Raises:
        ValueError: It is none of these, or names what is not there.
    """
    path = Path(path)
    if path.is_dir() or path.name == "predictions.jsonl":
        return _labelled(path, pool)
    if path.suffix not in (".yaml", ".yml"):
        return _listed(path, pool)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MalformedError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    forms: dict[frozenset[str], Callable[..., Labels]] = {
        frozenset({"by", "map"}): _mapped,
        frozenset({"rules"}): _ruled,
    }
    for keys, read in forms.items():
        if isinstance(given, dict) and keys == given.keys() - {"else"}:
            return read(given, pool, questions, path)
    raise MalformedError(
        f"{path} must have the keys 'by' and 'map', or 'rules', and may have 'else'"
    )


def _mapped(given: dict[str, Any], pool: Pool, _: Sequence[Question], path: Path) -> Labels:
    """A class for each value of a column."""
    if given["by"] not in COLUMNS or not isinstance(given["map"], dict):
        raise MalformedError(f"{path}: 'by' is one of {', '.join(COLUMNS)}, 'map' from its values")
    column = pool.columns[given["by"]]
    left = [name for name in column.names if name not in given["map"] and "else" not in given]
    if left:
        raise MalformedError(
            f"{path}: no class for the {given['by']} {', '.join(map(repr, left[:8]))}; add them, "
            "or an 'else' ('' for no class)"
        )
    names = [str(given["map"].get(name, given.get("else", ""))) for name in column.names]
    return Labels.of([names[code] for code in column.codes])


def _ruled(given: dict[str, Any], pool: Pool, questions: Sequence[Question], path: Path) -> Labels:
    """The class of the first pattern that is found in the question and its options."""
    if not questions:
        raise ValueError(f"{path}: rules need the questions' texts; give --data")
    try:
        rules = [
            (re.compile(rule["match"], re.IGNORECASE), str(rule["class"]))
            for rule in given["rules"]
        ]
    except (KeyError, TypeError, re.error) as error:
        raise MalformedError(
            f"{path}: a rule is {{match: PATTERN, class: NAME}}: {error!r}"
        ) from None
    rows, classes = rows_by_id(pool), [""] * pool.num_questions
    for question in questions:
        row = rows.get((question.benchmark, question.question_id))
        if row is not None:
            text = "\n".join((question.question, *question.options))
            found = (name for pattern, name in rules if pattern.search(text))
            classes[row] = next(found, str(given.get("else", "")))
    return Labels.of(classes)


def _listed(path: Path, pool: Pool) -> Labels:
    """A table of question_id and class, and benchmark where there are several."""
    benchmarks = pool.columns["benchmark"].names
    given = {}
    for place, values in rows_of(path):
        benchmark = str(values.get("benchmark") or (benchmarks[0] if len(benchmarks) == 1 else ""))
        if not benchmark or "class" not in values or values.get("question_id") in (None, ""):
            raise MalformedError(
                f"{place}: a row has question_id and class, and benchmark if there are several"
            )
        given[benchmark, str(values["question_id"])] = str(values["class"] or "").strip()
    return _by_id(given, pool, path)


def _by_id(given: Mapping[tuple[str, str], str], pool: Pool, path: Path) -> Labels:
    rows, classes = rows_by_id(pool), [""] * pool.num_questions
    unknown = [key for key in given if key not in rows]
    if unknown:
        raise MalformedError(
            f"{path}: {len(unknown)} questions are not in the pool, such as "
            f"{' / '.join(unknown[0])}"
        )
    for key, name in given.items():
        classes[rows[key]] = name
    return Labels.of(classes)


def labelling_questions(pool: Pool, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Questions that ask for the class of each question, for `apollo eval --condition text`.

    Their right answers are not known: `answer` is 0 throughout and the score means nothing.
    """
    rows = rows_by_id(pool)
    options = [f"{name.replace('_', ' ')}: {about}" for name, about in CLASSES.items()]
    return [
        {
            "question_id": json.dumps([question.benchmark, question.question_id]),
            "video": "none",
            "question": "Which skill does this question about a video ask for most? "
            f'"{question.question} ({"; ".join(question.options)})"',
            "options": options,
            "answer": 0,
        }
        for question in questions
        if (question.benchmark, question.question_id) in rows
    ]


def _labelled(path: Path, pool: Pool) -> Labels:
    """The classes that an answerer chose."""
    file = path / "predictions.jsonl" if path.is_dir() else path
    given = {}
    names = list(CLASSES)
    for prediction in read_predictions(file):
        try:
            benchmark, question_id = json.loads(prediction.question_id)
        except ValueError:
            raise MalformedError(
                f"{file} are no answers to the questions that --ask-classes writes: "
                f"{prediction.question_id!r}"
            ) from None
        chosen = prediction.prediction
        given[benchmark, question_id] = "" if chosen is None else names[chosen]
    return _by_id(given, pool, file)


def classified(classes: Labels) -> np.ndarray:
    """Which questions have a class: bool (Q,)."""
    return np.array([name != "" for name in classes.names] or [False])[classes.codes]
