"""Ask an answerer every question under every condition, keep what it said, and score it.

Here because long evaluations get killed, run on several GPUs, and meet videos that cannot be read:
none of that may change a score. Work is cut into units, all questions about one video under one
condition: the video is decoded once, in a thread, while the answerer is busy with the one before.
Each finished unit is on disk (`run_folder.py`) before the next begins, and only what is not there
is asked. Under torchrun process r of n takes every n-th unit. Handler of `apollo eval`. Next:
`answerers.py` (who answers), `scoring.py` (what the numbers mean).
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo.eval import report
from apollo.eval.answerers import (
    CONDITIONS,
    Answer,
    Answerer,
    kind_and_model,
    make_answerer,
    pick_scoring,
)
from apollo.eval.benchmarks import BENCHMARKS, read_benchmark
from apollo.eval.questions import Question
from apollo.eval.run_folder import UNREADABLE, Key, RunFolder
from apollo.eval.scoring import Prediction, Score, Tables, tabulate
from apollo.runtime import (
    environment,
    joined_processes,
    progress,
    rank_and_number,
    wait_for_all,
)

BLIND_QUESTIONS = 64
"""Questions of a unit under "text", where no video holds them together."""
LOOK_AHEAD = 2
"""Videos that are decoded before they are needed; each is in memory meanwhile."""
MARKERS = {"world.json": "world", "manifest.json": "curated"}
"""File in a data folder -> the benchmark that the folder then is."""
OPTIONS_OF = {
    "apollo": ("dtype", "feature_cache"),
    "huggingface": ("dtype", "num_frames"),
    "api": ("server", "num_frames", "send"),
}
"""Kind of answerer -> options of the command that are for it."""
NAMED_VIDEOS = 5
"""Unreadable videos named in print; summary.json names all."""


class Unit(NamedTuple):
    """Questions that are asked together: of one video, or any if the condition shows none."""

    condition: str
    questions: tuple[Question, ...]


def evaluate(
    answerer: Answerer,
    questions: Sequence[Question],
    conditions: Sequence[str],
    out_dir: str | Path,
    limit: int | None = None,
) -> Tables:
    """Ask what has not been asked yet, then score everything.

    A video that cannot be read costs its own questions only: they count as wrong, their status says
    why, and the next call with the same folder tries them again.

    Args:
        answerer: Who answers.
        questions: What is asked; their order does not matter.
        conditions: What the answerer is shown; keys of `CONDITIONS`.
        out_dir: Receives predictions.jsonl, summary.json and report.html; predictions that are
            there already are kept. Scores are of the questions and conditions of this call.
        limit: Ask only so many questions, the first by benchmark and question_id.

    Returns:
        The scores; empty in all processes but the first.

    Raises:
        ValueError: Unknown condition, or `out_dir` belongs to another answerer or other questions.
    """
    unknown = [condition for condition in conditions if condition not in CONDITIONS]
    if unknown or not conditions:
        raise ValueError(f"unknown conditions {unknown}; choose from {', '.join(CONDITIONS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    questions = sorted(questions, key=lambda q: (q.benchmark, q.question_id))
    conditions = [name for name in CONDITIONS if name in conditions]
    manifest = _manifest(answerer, questions, conditions)
    asked = questions[:limit]
    folder, (rank, num_processes) = RunFolder(out_dir), rank_and_number()
    if rank == 0:
        folder.begin(manifest)
    wait_for_all()
    started = time.monotonic()
    known = folder.read(questions)
    units = [_without_known(unit, known) for unit in units_of(asked, conditions)]
    if rank == 0 and any(unit.questions for unit in units):
        folder.note_versions(manifest["versions"])
    mine = [unit for unit in units[rank::num_processes] if unit.questions]
    with folder.part(rank) as append, _stopping_politely(folder.path, rank):
        answered = _ask(answerer, mine)
        shown = progress(answered, "videos", len(mine)) if rank == 0 else answered
        with contextlib.closing(shown):
            for unit, answers in shown:
                append(_predictions(unit, answers))
    wait_for_all()
    if rank:
        return {}
    predictions = folder.read(questions)
    call = {
        "num_answered": sum(known.get(key) != new for key, new in predictions.items()),
        "seconds": round(time.monotonic() - started, 3),
        "num_processes": num_processes,
    }
    return _finish(folder, asked, conditions, predictions, call)


def _finish(
    folder: RunFolder,
    asked: Sequence[Question],
    conditions: Sequence[str],
    predictions: Mapping[Key, Prediction],
    call: Mapping[str, Any],
) -> Tables:
    """Score what was asked, and write the files that a run is for."""
    try:
        scored = [predictions[_key(q, name)] for name in conditions for q in asked]
    except KeyError as error:
        raise ValueError(
            f"the answer to {error} has gone from {folder.path}: did another run end "
            "there? Run the same command again"
        ) from None
    tables = tabulate(asked, scored, conditions)
    before = folder.summary()
    assert before is not None, "the manifest is written first"
    manifest = {**before["manifest"], "conditions": list(conditions)}
    summary = {
        "manifest": manifest,
        "version_drift": before.get("version_drift", []),
        "num_questions": len(asked),
        "unreadable_videos": _unreadable(scored),
        "this_call": call,
        "scores": _scores_as_json(tables),
    }
    page = report.run_page(asked, scored, tables, manifest)
    folder.finish(predictions.values(), summary, page)
    return tables


def units_of(questions: Sequence[Question], conditions: Sequence[str]) -> list[Unit]:
    """Cut the work into units, in the order in which the processes share them out.

    One condition after the other: were they to alternate, two processes would get one each.
    """
    by_video: dict[tuple[str, str, Path], list[Question]] = {}
    for question in questions:
        video = (question.benchmark, question.video_id, question.video)
        by_video.setdefault(video, []).append(question)
    units = []
    for condition in conditions:
        if condition == "text":
            starts = range(0, len(questions), BLIND_QUESTIONS)
            groups = [questions[start : start + BLIND_QUESTIONS] for start in starts]
        else:
            groups = list(by_video.values())
        units += [Unit(condition, tuple(group)) for group in groups]
    return units


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked, in whatever order; the folder the videos lie in does not count."""
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda q: (q.benchmark, q.question_id)):
        fields = asdict(question)
        del fields["video"]  # a path of this machine; video_id stands for it
        if question.subtitles:
            fields["subtitles"] = question.subtitles.name
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _manifest(
    answerer: Answerer, questions: Sequence[Question], conditions: Sequence[str]
) -> dict[str, Any]:
    """What the predictions depend on."""
    return {
        "answerer": json.loads(json.dumps(answerer.identity)),  # tuples are lists from here on
        "benchmarks": sorted({question.benchmark for question in questions}),
        "questions_sha256": questions_hash(questions),
        "conditions": list(conditions),
        "versions": environment(),
    }


# ---- asking


class _NotSeen(NamedTuple):
    """Why a video could not be shown."""

    status: str


def _ask(
    answerer: Answerer, units: Sequence[Unit]
) -> Generator[tuple[Unit, list[Answer]], None, None]:
    """Answer the units in order, while a thread decodes the videos of the next ones."""
    to_watch = iter(units)
    waiting: deque[tuple[Unit, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(1, "watch")

    def look_ahead() -> None:
        for unit in itertools.islice(to_watch, LOOK_AHEAD - len(waiting)):
            waiting.append((unit, pool.submit(_watch, answerer, unit)))

    try:
        look_ahead()
        while waiting:
            unit, future = waiting.popleft()
            seen = future.result()
            del future  # or it would keep the video in memory
            look_ahead()
            if isinstance(seen, _NotSeen):
                yield unit, [Answer(None, seen.status) for _ in unit.questions]
            else:
                yield unit, answerer.answer(unit.questions, unit.condition, seen)
            del seen
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _watch(answerer: Answerer, unit: Unit) -> Any:
    """What the answerer is shown of a unit's video, or why that cannot be had."""
    question = unit.questions[0]
    try:
        return answerer.watch(question, unit.condition)
    except (OSError, ValueError) as error:  # a VideoError is a ValueError
        reason = " ".join(str(error).split())
        for path in filter(None, (question.video, question.subtitles)):
            # The same words on every machine.
            reason = reason.replace(str(path), path.name)
        return _NotSeen(UNREADABLE + reason)


def _predictions(unit: Unit, answers: Sequence[Answer]) -> list[Prediction]:
    for question, answer in zip(unit.questions, answers, strict=True):
        if not all(map(math.isfinite, answer.option_scores)):
            raise ValueError(
                f"question {question.question_id!r}: the options' scores are "
                f"{answer.option_scores}; are the model's weights damaged?"
            )
    return [
        Prediction.of(question, unit.condition, answer)
        for question, answer in zip(unit.questions, answers, strict=True)
    ]


def _key(question: Question, condition: str) -> Key:
    return question.benchmark, question.question_id, condition


def _without_known(unit: Unit, known: Mapping[Key, Prediction]) -> Unit:
    """Leave out what is answered; a video that could not be read is tried again."""

    def is_answered(question: Question) -> bool:
        prediction = known.get(_key(question, unit.condition))
        return prediction is not None and not prediction.status.startswith(UNREADABLE)

    return unit._replace(questions=tuple(q for q in unit.questions if not is_answered(q)))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it takes the machine away."""


@contextlib.contextmanager
def _stopping_politely(out_dir: Path, rank: int) -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, and say of whatever ends it how to go on."""

    def stop(*_: object) -> None:
        raise _Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except (KeyboardInterrupt, OSError, ValueError):
        if rank == 0:
            print(
                f"stopped; what was answered is kept in {out_dir}, and the same command goes on "
                "from there",
                file=sys.stderr,
            )
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


# ---- telling


def _unreadable(predictions: Sequence[Prediction]) -> list[dict[str, str]]:
    """Videos that could not be read, each once, with the reason."""
    found = {
        (p.benchmark, p.video): p.status.removeprefix(UNREADABLE)
        for p in predictions
        if p.status.startswith(UNREADABLE)
    }
    return [
        {"benchmark": benchmark, "video": video, "reason": reason}
        for (benchmark, video), reason in sorted(found.items())
    ]


def _scores_as_json(tables: Tables) -> dict[str, Any]:
    return {
        grouping: {
            group: {condition: asdict(score) for condition, score in scores.items()}
            for group, scores in groups.items()
        }
        for grouping, groups in tables.items()
    }


def print_table(name: str, groups: Mapping[str, Mapping[str, Score]], console: Console) -> None:
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


def _print_results(tables: Tables, out_dir: Path, console: Console) -> None:
    """Print what a run found, and what was wrong with it last, where it is seen."""
    overall = tables["overall"]["all"]
    for grouping in ("family", "duration"):
        if grouping in tables:
            print_table(grouping, tables[grouping], console)
    print_table("class", tables.get("class", {}) | tables["overall"], console)
    chance = next(iter(overall.values())).chance

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    say(f"Per cent right, 95 % interval over videos; chance is {100 * chance:.0f}.")
    for condition, score in overall.items():
        if score.num_unanswered:
            kinds = [f"{count} {kind}" for kind, count in score.statuses.items() if kind != "ok"]
            say(
                f"{condition}: {score.num_unanswered} of {score.num_questions} questions have no "
                f"answer and count as wrong ({', '.join(kinds)})."
            )
    summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    if drift := summary["version_drift"]:
        say(f"Some answers are of other versions ({'; '.join(drift)}).")
    if unreadable := summary["unreadable_videos"]:
        names = ", ".join(item["video"] for item in unreadable[:NAMED_VIDEOS])
        more = len(unreadable) - NAMED_VIDEOS
        say(
            f"{len(unreadable)} video{'s' * (len(unreadable) > 1)} could not be read: {names}"
            + (f" and {more} more" if more > 0 else "")
            + f"; the first: {unreadable[0]['reason']}"
        )
    call = summary["this_call"]
    rate = call["num_answered"] / call["seconds"] if call["seconds"] else 0.0
    say(f"{call['num_answered']} answers in {call['seconds']:.1f} s, {rate:.1f} a second.")
    say(f"predictions.jsonl, summary.json and report.html are in {out_dir}")


# ---- the command


def main(args: argparse.Namespace) -> int:
    """Run `apollo eval MODEL`.

    Args:
        args: model (see `answerers.kind_and_model`), benchmark, data, condition (list), scoring,
            limit, out, batch_size, and options of one kind of answerer, which are None elsewhere.
    """
    with joined_processes():
        rank, num_processes = rank_and_number()
        console = Console(quiet=rank > 0)
        benchmark, why = args.benchmark, ""
        if benchmark is None:
            benchmark, why = recognise(args.data)
        questions = read_benchmark(benchmark, args.data)
        scoring = pick_scoring(args.model, args.scoring, BENCHMARKS[benchmark].scoring)
        Path(args.out).mkdir(parents=True, exist_ok=True)  # if it cannot be, before the model loads
        answerer = make_answerer(
            args.model, scoring=scoring, batch_size=args.batch_size, **_options(args)
        )
        console.print(
            f"{escape(benchmark)}{why}: {len(questions)} questions, scored by {scoring}"
            + (f", {num_processes} processes" if num_processes > 1 else ""),
            highlight=False,
        )
        try:
            tables = evaluate(answerer, questions, args.condition, args.out, args.limit)
        except _Terminated:
            return 128 + signal.SIGTERM
        if rank == 0:
            _print_results(tables, Path(args.out), console)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the options that only some kinds of answerer have.

    Raises:
        ValueError: The answerer asked for has no such option.
    """
    kind, _ = kind_and_model(args.model)
    given = {name: getattr(args, name) for names in OPTIONS_OF.values() for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in OPTIONS_OF.get(kind, ()):
            kinds = [f"{other}:" for other, names in OPTIONS_OF.items() if name in names]
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing with {args.model!r}; "
                f"it is for {' and '.join(kinds)}"
            )
    return given


def recognise(data: str | None) -> tuple[str, str]:
    """Tell which benchmark a data folder is by the file that only such folders have.

    Returns:
        The benchmark's name, and how it was told, for the user.
    """
    if data is None:
        raise ValueError("what is to be asked? Give --data FOLDER or --benchmark NAME")
    for marker, benchmark in MARKERS.items():
        if (Path(data) / marker).is_file():
            return benchmark, f" (by its {marker})"
    return "questions", ""
