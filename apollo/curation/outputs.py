"""What `apollo audit` and `apollo curate` write, and the review sheet that is read back.

    audit.json, questions.csv                    the audit, and what was found of each question
    questions.jsonl, manifest.json               the small benchmark, as `apollo eval` asks it
    decisions.csv                                why each question of the pool was kept or dropped
    review.csv                                   the questions kept, for a person to check

Here because a choice that cannot be checked is worth nothing: every question of the pool is in
decisions.csv. Next: `commands.py`.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apollo.curation.audit import Audit, rows_by_id
from apollo.curation.curate import REASONS, Choice
from apollo.curation.readers import rows_of
from apollo.curation.records import Labels, MalformedError, Pool
from apollo.eval.questions import Question

VERDICTS = {"": "not looked at", "keep": "right", "drop": "wrong, unclear or of no use"}
REVIEW_COLUMNS = (
    "benchmark",
    "question_id",
    "verdict",
    "class",
    "note",
    "question",
    "options",
    "answer",
    "video",
)


def write_json(value: Any, path: Path) -> None:
    """Write JSON, nan as null."""
    path.write_text(
        json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )


def _plain(value: Any) -> Any:
    """Records, arrays and numbers as JSON values; floats with six digits."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_audit(found: Audit, pool: Pool, folder: Path) -> None:
    """Write audit.json and questions.csv."""
    write_json(
        {
            "models": found.models,
            "conditions": found.conditions,
            "num_questions": pool.num_questions,
            "groups": found.groups,
            "model_scores": {
                condition: {
                    model: dict(zip(found.benchmarks, row.tolist(), strict=True))
                    for model, row in zip(found.models, scores, strict=True)
                }
                for condition, scores in found.model_scores.items()
            },
            "missing": [
                dict(
                    zip(
                        ("model", "condition", "benchmark", "unanswered", "not_asked"),
                        row,
                        strict=True,
                    )
                )
                for row in found.missing
            ],
            "solved_kinds": found.solved_kinds,
            "positions": found.positions,
            "lengths": found.lengths,
            "redundancies": {name: list(each.pairs()) for name, each in found.redundancies.items()},
            "curve": found.curve,
        },
        folder / "audit.json",
    )
    columns: dict[str, Iterable[Any]] = dict(_about(pool))
    for condition in pool.conditions:
        right, ran = pool.counts(condition)
        columns[f"right_{condition}"] = right.tolist()
        columns[f"models_{condition}"] = ran.tolist()
    columns["entropy"] = _rounded(found.entropy)
    columns["point_biserial"] = _rounded(found.point_biserial)
    for condition in found.answerable:
        columns[f"majority_{condition}"] = found.majority[condition].astype(int).tolist()
        columns[f"answerable_{condition}"] = _rounded(found.answerable[condition])
    _write_columns(folder / "questions.csv", columns)


def _about(pool: Pool) -> dict[str, list[Any]]:
    """Which question each row is."""
    named = ("benchmark", "video", "class", "family", "needs")
    columns = {name: pool.columns[name].values().tolist() for name in named}
    return {
        "benchmark": columns.pop("benchmark"),
        "question_id": pool.question_ids.tolist(),
        **columns,
    }


def _rounded(values: np.ndarray) -> list[Any]:
    """Four decimals; nan as an empty cell."""
    rounded = np.round(values.astype(float), 4)
    if not np.isnan(rounded).any():
        return rounded.tolist()
    return ["" if value != value else value for value in rounded.tolist()]


def _write_columns(path: Path, columns: Mapping[str, Iterable[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_decisions(pool: Pool, choice: Choice, folder: Path) -> None:
    """Write decisions.csv: each question of the pool, and why it was kept or dropped."""
    names = np.array([REASONS[reason] for reason in sorted(REASONS)], dtype=object)
    columns: dict[str, Iterable[Any]] = dict(_about(pool))
    columns["reason"] = names[choice.reasons].tolist()
    columns["value"] = _rounded(choice.values)
    for condition in pool.conditions:
        right, ran = pool.counts(condition)
        columns[f"right_{condition}"] = right.tolist()
        columns[f"models_{condition}"] = ran.tolist()
    _write_columns(folder / "decisions.csv", columns)


def write_curation(
    how: Mapping[str, Any],
    pool: Pool,
    choice: Choice,
    questions: Sequence[Question],
    reviewed: Mapping[tuple[str, str], Mapping[str, str]],
    folder: Path,
) -> None:
    """Write everything of a curation but its page.

    Args:
        how: What was chosen how, as in curation.json; "name" and some more go into the manifest.
        pool: The predictions.
        choice: What became of each question.
        questions: Their texts, as far as they are known; without any there is no benchmark.
        reviewed: What `read_review` gave.
        folder: Where.
    """
    write_json(how, folder / "curation.json")
    write_decisions(pool, choice, folder)
    write_review(pool, choice.rows, questions, reviewed, folder / "review.csv")
    if questions:
        sealed = {name: how[name] for name in ("settings", "models", "num_pool", "num_reviewed")}
        write_benchmark(how["name"], pool, choice, questions, sealed, folder)


# ---- the small benchmark


def write_benchmark(
    name: str,
    pool: Pool,
    choice: Choice,
    questions: Sequence[Question],
    how: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write questions.jsonl and the manifest.json that seals it.

    Args:
        name: What it is called.
        pool: The predictions.
        choice: Which questions.
        questions: Their texts and videos; each kept question has to be among them.
        how: What the choice depends on, as JSON values, kept in the manifest.
        folder: Where; paths of videos are written relative to it.

    Raises:
        ValueError: A question that was kept is not among `questions`, or another one by now.
    """
    by_id = {(q.benchmark, q.question_id): q for q in questions}
    benchmarks, classes = pool.columns["benchmark"], pool.columns["class"]
    records = []
    for row in sorted(choice.rows, key=lambda row: (benchmarks[row], pool.question_ids[row])):
        key = (benchmarks[row], str(pool.question_ids[row]))
        question = by_id.get(key)
        if question is None:
            raise ValueError(
                f"the question {' / '.join(key)} is not in --data; give the folder of every "
                "benchmark, as BENCHMARK=FOLDER, or --by-row if ids are numbers of rows"
            )
        if pool.answer[row] >= 0 and pool.answer[row] != question.answer:
            raise ValueError(
                f"the right option of {' / '.join(key)} is {pool.answer[row]} in the predictions "
                f"and {question.answer} in --data: these are not the same version"
            )
        records.append(_record(question, classes[row], folder))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    manifest = {
        "name": name,
        "num_questions": len(records),
        "questions_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **how,
    }
    write_json(manifest, folder / "manifest.json")


def _record(question: Question, name: str, folder: Path) -> dict[str, Any]:
    """A question as JSON, its paths relative to the folder."""

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()

    record = {
        "question_id": f"{question.benchmark}/{question.question_id}",
        "video": relative(question.video),
        "video_id": f"{question.benchmark}/{question.video_id}",
        "question": question.question,
        "options": list(question.options),
        "answer": question.answer,
        "class": name or question.question_class,
        "family": question.family,
        "needs": question.needs,
        "duration_s": question.duration_s,
        "duration_group": question.duration_group,
        "source": question.source or question.benchmark,
        "subtitles": relative(question.subtitles) if question.subtitles else None,
        "subtitles_from_s": question.subtitles_from_s,
        "caption_prompt": question.caption_prompt,
    }
    return {
        key: value
        for key, value in record.items()
        if value not in ("", None, 0.0) or key == "answer"
    }


# ---- the review


def write_review(
    pool: Pool,
    rows: np.ndarray,
    questions: Sequence[Question],
    reviewed: Mapping[tuple[str, str], Mapping[str, str]],
    path: Path,
) -> None:
    """Write a sheet of the questions kept; what was filled in before stays.

    Args:
        pool: The predictions.
        rows: Of the questions kept.
        questions: Their texts, as far as they are known.
        reviewed: What `read_review` gave; questions that were dropped stay on the sheet.
        path: Of the sheet.
    """
    by_id = {(q.benchmark, q.question_id): q for q in questions}
    benchmarks = pool.columns["benchmark"]
    keys = [(benchmarks[row], str(pool.question_ids[row])) for row in rows]
    dropped = [key for key, row in reviewed.items() if row["verdict"] == "drop"]
    places = rows_by_id(pool)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, REVIEW_COLUMNS)
        writer.writeheader()
        for key in sorted({*keys, *dropped}):
            question, before = by_id.get(key), reviewed.get(key, {})
            row = places[key]
            writer.writerow(
                {
                    "benchmark": key[0],
                    "question_id": key[1],
                    "verdict": before.get("verdict", ""),
                    "class": before.get("class") or pool.columns["class"][row],
                    "note": before.get("note", ""),
                    "question": question.question if question else "",
                    "options": " | ".join(question.options) if question else "",
                    "answer": question.options[question.answer] if question else "",
                    "video": pool.columns["video"][row],
                }
            )


def read_review(path: str | Path, pool: Pool) -> dict[tuple[str, str], dict[str, str]]:
    """Read a sheet that was filled in: (benchmark, question_id) -> verdict, class, note.

    Raises:
        MalformedError: A verdict that is none, a question that is not in the pool or comes twice.
    """
    path = Path(path)
    rows, found = rows_by_id(pool), {}
    for place, values in rows_of(path):
        try:
            row = {name: str(values[name] or "").strip() for name in REVIEW_COLUMNS[:5]}
        except KeyError as error:
            raise MalformedError(f"{place}: no column {error}") from None
        key = (row["benchmark"], row["question_id"])
        row["verdict"] = row["verdict"].lower()
        if row["verdict"] not in VERDICTS:
            raise MalformedError(
                f"{place}: the verdict {row['verdict']!r} is not keep, drop or empty"
            )
        if key not in rows or key in found:
            what = "comes twice" if key in found else "is not in the pool"
            raise MalformedError(f"{place}: the question {' / '.join(key)} {what}")
        found[key] = row
    return found


def apply_review(
    reviewed: Mapping[tuple[str, str], Mapping[str, str]], pool: Pool
) -> tuple[np.ndarray, Labels]:
    """What a review says: which questions are refused, bool (Q,), and the classes it corrects."""
    rows = rows_by_id(pool)
    refused = np.zeros(pool.num_questions, dtype=bool)
    classes = pool.columns["class"].values()
    for key, row in reviewed.items():
        refused[rows[key]] = row["verdict"] == "drop"
        if row["class"]:
            classes[rows[key]] = row["class"]
    return refused, Labels.of(classes.tolist())
