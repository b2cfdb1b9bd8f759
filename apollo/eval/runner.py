"""Ask an answerer every question under every condition, keep what it said, and score it.

Here because long evaluations get killed: predictions are on disk before the next video is opened,
and a second call goes on where the first stopped. `summary.json` is valid at every moment, since
unanswered counts as wrong. Handler of `apollo eval`. Next: `answerers.py` (who answers),
`scoring.py` (what the numbers mean).
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from apollo.eval import report
from apollo.eval.answerers import ANSWERERS, CONDITIONS, Answer, Answerer, ModelAnswerer
from apollo.eval.benchmarks import Question, read_questions
from apollo.eval.scoring import Prediction, Score, Tables, tabulate
from apollo.runtime import append_jsonl, environment, progress, read_jsonl
from apollo.video import VideoError


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    conditions: Sequence[str],
    out_dir: str | Path,
    limit: int | None = None,
) -> Tables:
    """Ask what has not been asked yet, then score everything.

    A video that cannot be read costs its own questions only: they count as wrong and their status
    says why.

    Args:
        answerer: Who answers.
        questions: What is asked.
        conditions: What the answerer is shown; keys of `CONDITIONS`.
        out_dir: Receives predictions.jsonl, summary.json and report.html; predictions that are
            there already are kept.
        limit: Ask only the first so many questions.

    Raises:
        ValueError: Unknown condition, or `out_dir` belongs to another answerer or other questions.
    """
    unknown = [condition for condition in conditions if condition not in CONDITIONS]
    if unknown or not conditions:
        raise ValueError(f"unknown conditions {unknown}; choose from {', '.join(CONDITIONS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    out_dir = Path(out_dir)
    manifest = _manifest(answerer, questions)
    _check_same_run(out_dir, manifest)
    out_dir.mkdir(parents=True, exist_ok=True)
    asked = list(questions)[:limit]
    predictions_path = out_dir / "predictions.jsonl"
    predictions = read_predictions(predictions_path)
    known = {(p.question_id, p.condition) for p in predictions}
    _write_summary(out_dir, manifest, asked, predictions, conditions)
    try:
        for prediction in _ask(answerer, asked, conditions, known):
            append_jsonl(predictions_path, prediction.to_json())
            predictions.append(prediction)
    finally:
        tables = _write_summary(out_dir, manifest, asked, predictions, conditions)
    return tables


def _ask(
    answerer: Answerer,
    questions: Sequence[Question],
    conditions: Sequence[str],
    known: set[tuple[str, str]],
) -> Iterator[Prediction]:
    """Yield the predictions that are not `known`, all of a video together: it is decoded once."""
    by_video: dict[Path, list[Question]] = {}
    for question in questions:
        by_video.setdefault(question.video, []).append(question)
    turns = [(group, condition) for group in by_video.values() for condition in conditions]
    for group, condition in progress(turns, "videos x conditions"):
        new = [q for q in group if (q.question_id, condition) not in known]
        if new:
            yield from _ask_video(answerer, new, condition)


def _ask_video(
    answerer: Answerer, questions: Sequence[Question], condition: str
) -> Iterator[Prediction]:
    """Ask all questions of one video; if it cannot be read, yield predictions without answers."""
    try:
        answers = answerer.answer(questions, condition)
        status = "ok"
    except VideoError as error:
        answers = [Answer(option_scores=[], frame_times_s=[]) for _ in questions]
        status = f"unreadable: {error}"
    for question, answer in zip(questions, answers, strict=True):
        best = int(np.argmax(answer.option_scores)) if answer.option_scores else None
        yield Prediction(
            question_id=question.question_id,
            video=str(question.video),
            condition=condition,
            option_scores=answer.option_scores,
            prediction=best,
            correct=best == question.answer,
            frame_times_s=answer.frame_times_s,
            question_class=question.question_class,
            family=question.family,
            needs=question.needs,
            status=status,
        )


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions.jsonl; no file is no predictions, and a last line cut short is skipped.

    Raises:
        ValueError: Another line is not a prediction; names file and line.
    """
    if not path.exists():
        return []
    predictions = []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            predictions.append(Prediction.from_json(record))
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: not a prediction; delete or mend the line"
            ) from None
    return predictions


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of the questions' content; the folder they lie in does not count."""
    digest = hashlib.sha256()
    for question in questions:
        fields = asdict(question) | {"video": question.video.name}
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def _manifest(answerer: Answerer, questions: Sequence[Question]) -> dict[str, Any]:
    """What the predictions depend on."""
    return {
        "answerer": answerer.identity,
        "questions_sha256": questions_hash(questions),
        "environment": environment(),
    }


def _check_same_run(out_dir: Path, manifest: dict[str, Any]) -> None:
    """Refuse to mix the predictions of two answerers or of two sets of questions."""
    path = out_dir / "summary.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["manifest"]
    for key in ("answerer", "questions_sha256"):
        if before[key] != manifest[key]:
            raise ValueError(
                f"{out_dir} holds predictions with {key} {before[key]}, now it is {manifest[key]}; "
                "choose another --out"
            )


def _write_summary(
    out_dir: Path,
    manifest: dict[str, Any],
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    conditions: Sequence[str],
) -> Tables:
    """Score and write summary.json and report.html."""
    tables = tabulate(questions, predictions, conditions)
    unreadable = sorted({p.video for p in predictions if p.status != "ok"})
    summary = {
        "manifest": manifest,
        "unreadable_videos": unreadable,
        "scores": {
            grouping: {
                group: {condition: asdict(score) for condition, score in scores.items()}
                for group, scores in groups.items()
            }
            for grouping, groups in tables.items()
        },
    }
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    page = report.page(
        "Evaluation",
        report.paragraph(f"{manifest['answerer']}, {len(questions)} questions."),
        *[report.paragraph(f"Could not be read: {video}") for video in unreadable],
        *report.score_sections(tables),
    )
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    return tables


def print_table(name: str, groups: dict[str, dict[str, Score]], console: Console) -> None:
    """Print a row per group and a column per condition.

    Args:
        name: Heading of the first column.
        groups: group -> condition -> score.
        console: Where to.
    """
    conditions = list(next(iter(groups.values())))
    table = Table(name, box=box.SIMPLE_HEAD)
    for column in ("questions", *conditions):
        table.add_column(column, justify="right")
    for group, scores in groups.items():
        cells = [format_score(scores[condition]) for condition in conditions]
        table.add_row(escape(group), str(scores[conditions[0]].num_questions), *cells)
    console.print(table)


def format_score(score: Score) -> str:
    """Accuracy in per cent with its interval, and how many questions got no answer."""
    text = f"{100 * score.accuracy:.1f} ({100 * score.low:.0f}-{100 * score.high:.0f})"
    return f"{text} {score.num_unanswered} unanswered" if score.num_unanswered else text


def main(args: argparse.Namespace) -> int:
    """Run `apollo eval MODEL`.

    Args:
        args: model (a name in `ANSWERERS`, a folder or a hub id), questions, condition (list),
            limit, out, batch_size.
    """
    logging.disable_progress_bar()
    questions = read_questions(args.questions)
    if args.model in ANSWERERS and args.model != "model":
        answerer = ANSWERERS[args.model]()
    else:
        answerer = ModelAnswerer(args.model, batch_size=args.batch_size)
    conditions = args.condition or list(CONDITIONS)
    tables = evaluate(answerer, questions, conditions, args.out, args.limit)
    console = Console()
    print_table("family", tables["family"], console)
    print_table("class", tables["class"] | tables["overall"], console)
    chance = next(iter(tables["overall"]["all"].values())).chance
    console.print(f"Per cent right, 95 % interval over videos; chance is {100 * chance:.0f}.")
    console.print(f"Predictions, summary.json and report.html: {args.out}", soft_wrap=True)
    return 0
