"""From predictions to accuracies with 95 % intervals, by class, family, duration and more.

Here because a score without an interval, or one that drops what was not answered, misleads: every
question asked is in the denominator, and why some have no answer is counted. Questions of one video
stand or fall together, so the bootstrap draws videos, not questions. Free of torch, and quick for a
million predictions. Next: `compare.py` (two runs), `report.py` (draws these tables), `runner.py`
(writes predictions).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from apollo.eval.questions import Question
from apollo.runtime import read_jsonl

NUM_RESAMPLES = 2000  # moves the ends of an interval by less than half a point from seed to seed
RESAMPLES_AT_ONCE = 100  # of them: keeps the draws of ten thousand videos at 8 MB


class Answered(Protocol):
    """What `Prediction.of` reads of an `answerers.Answer`, which this module must not import."""

    @property
    def prediction(self) -> int | None:
        """Index of the option chosen."""

    @property
    def status(self) -> str:
        """Why there is none, or "ok"."""

    @property
    def option_scores(self) -> list[float]:
        """One per option, or none."""

    @property
    def text(self) -> str:
        """What was written."""

    @property
    def frame_times_s(self) -> list[list[float]]:
        """Of the frames shown."""

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens read."""

    @property
    def num_answer_tokens(self) -> int | None:
        """Tokens written."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an answerer said to one question under one condition: a line of predictions.jsonl.

    Attributes:
        benchmark: The question's.
        question_id: The question's; unique within its benchmark.
        video: The video's id in its benchmark, never a path of one machine.
        condition: What the answerer was shown; a key of `answerers.CONDITIONS`.
        question_class: The question's ("class" in JSON), as are the next five.
        family: Finer kind within the class.
        needs: Least input that suffices, where known.
        duration_s: Length of the video in seconds.
        duration_group: The benchmark's own name for that length.
        source: Where the video comes from.
        num_options: How many there were to choose from.
        answer: Index of the right option.
        prediction: Index of the option chosen, None where there is no answer.
        correct: Whether it is the right one; no answer is wrong.
        status: "ok", or why there is no answer.
        option_scores: One score per option, higher is likelier; empty where none were computed.
        text: What was written, where something was.
        frame_times_s: Times of the frames shown, one list per clip.
        num_prompt_tokens: Tokens read, where known.
        num_answer_tokens: Tokens written, where known.
    """

    benchmark: str
    question_id: str
    video: str
    condition: str
    question_class: str
    family: str
    needs: str
    duration_s: float | None
    duration_group: str
    source: str
    num_options: int
    answer: int
    prediction: int | None
    correct: bool
    status: str
    option_scores: list[float]
    text: str
    frame_times_s: list[list[float]]
    num_prompt_tokens: int | None
    num_answer_tokens: int | None

    @property
    def key(self) -> tuple[str, str, str]:
        """Benchmark, question and condition: no run has two predictions with the same."""
        return self.benchmark, self.question_id, self.condition

    @classmethod
    def of(cls, question: Question, condition: str, answer: Answered) -> "Prediction":
        """Join a question and the answer to it."""
        chosen = answer.prediction
        assert chosen is None or 0 <= chosen < len(question.options), chosen
        return cls(
            benchmark=question.benchmark,
            question_id=question.question_id,
            video=question.video_id,
            condition=condition,
            question_class=question.question_class,
            family=question.family,
            needs=question.needs,
            duration_s=question.duration_s,
            duration_group=question.duration_group,
            source=question.source,
            num_options=len(question.options),
            answer=question.answer,
            prediction=chosen,
            correct=chosen == question.answer,
            status=answer.status,
            option_scores=answer.option_scores,
            text=answer.text,
            frame_times_s=answer.frame_times_s,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_answer_tokens=answer.num_answer_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record written to predictions.jsonl; "class" is its name for the class."""
        return {_JSON_NAMES.get(name, name): getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Prediction":
        """Undo `to_json`; what others have added to the record is left alone.

        Raises:
            ValueError: Fields are missing, or the record contradicts itself.
        """
        names = [_JSON_NAMES.get(name, name) for name in cls.__slots__]
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(f"not a prediction: fields are missing: {', '.join(missing)}")
        prediction = cls(*[record[name] for name in names])
        if prediction.correct is not (prediction.prediction == prediction.answer):
            raise ValueError(
                f"'correct' is {prediction.correct}, but prediction is {prediction.prediction} and "
                f"answer is {prediction.answer}"
            )
        return prediction


_JSON_NAMES = {"question_class": "class"}


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a predictions.jsonl; a last line that a kill cut short is skipped with a warning.

    Raises:
        ValueError: The file cannot be read, or a line is not a prediction; names file and line.
    """
    predictions = []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            predictions.append(Prediction.from_json(record))
        except ValueError as error:
            raise ValueError(f"{path}: record {number}: {error}") from None
    return predictions


# ---- scores


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy and how sure it is; all fractions in [0, 1].

    Attributes:
        num_questions: Questions asked, the unanswered among them.
        num_unanswered: Of these, without an answer (counted as wrong).
        accuracy: Right answers over questions asked.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        chance: Accuracy of blind guessing: the mean of one over the number of options.
        statuses: How many questions have each kind of status: the part before the colon, or
            "not asked".
        family_mean: Mean of the families' accuracies, each weighing the same (MLVU's M-Avg); None
            where there are not two families, or the scores are by something finer.
    """

    num_questions: int
    num_unanswered: int
    accuracy: float
    low: float
    high: float
    chance: float
    statuses: dict[str, int] = field(default_factory=dict)
    family_mean: float | None = None


Tables = dict[str, dict[str, dict[str, Score]]]  # grouping -> group -> condition -> score


def duration_group(asked: Question | Prediction) -> str:
    """The benchmark's own group, else Video-MME's three (arXiv 2405.21075, section 3.2)."""
    if asked.duration_group or asked.duration_s is None:
        return asked.duration_group
    if asked.duration_s < 2 * 60:
        return "< 2 min"
    return "2-15 min" if asked.duration_s <= 15 * 60 else "> 15 min"


GROUPINGS: dict[str, Callable[[Question | Prediction], str]] = {
    "overall": lambda asked: "all",
    "benchmark": lambda asked: asked.benchmark,
    "class": lambda asked: asked.question_class,
    "family": lambda asked: asked.family,
    "needs": lambda asked: asked.needs,
    "duration": duration_group,
    "source": lambda asked: asked.source,
}
NOT_GIVEN = "not given"  # group of those without a value, where others have one


def tabulate(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    conditions: Sequence[str],
    seed: int = 0,
) -> Tables:
    """Score each condition by each of `GROUPINGS`; "overall" has the one group "all".

    Groupings in which no question has a value are left out. Predictions of other questions or
    conditions do not count; questions without a prediction count as wrong.

    Args:
        questions: All that were to be asked.
        predictions: What came of it.
        conditions: Which to score.
        seed: Of the bootstrap.

    Raises:
        ValueError: No questions, the same question twice, or two predictions for one.
    """
    if not questions:
        raise ValueError("cannot score without questions")
    rows = {(q.benchmark, q.question_id): row for row, q in enumerate(questions)}
    if len(rows) < len(questions):
        raise ValueError(f"{len(questions) - len(rows)} questions have the id of another question")
    answers = {condition: _Answers(len(questions)) for condition in conditions}
    for prediction in predictions:
        row = rows.get((prediction.benchmark, prediction.question_id))
        if row is not None and prediction.condition in answers:
            answers[prediction.condition].put(row, prediction)
    sheet = _Sheet(questions)
    tables: Tables = {}
    for grouping, group_of in GROUPINGS.items():
        names = [group_of(question) for question in questions]
        if not any(names):
            continue
        with_family_mean = grouping in ("overall", "benchmark")
        tables[grouping] = {
            name: sheet.score(members, answers, with_family_mean, seed)
            for name, members in groups_of(names).items()
        }
    return tables


class _Sheet:
    """What scoring needs of N questions, as arrays (N,), so that no group reads them all again."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.videos, _ = numbers_of([(q.benchmark, q.video_id) for q in questions])
        self.families, names = numbers_of([q.family for q in questions])
        self.has_family = np.array([name != "" for name in names])[self.families]
        self.chances = np.array([1 / len(q.options) for q in questions])

    def score(
        self,
        members: np.ndarray,
        answers: Mapping[str, "_Answers"],
        with_family_mean: bool,
        seed: int,
    ) -> dict[str, Score]:
        """Score the questions at the places `members` under each condition."""
        _, videos = np.unique(self.videos[members], return_inverse=True)
        in_family = members[self.has_family[members]] if with_family_mean else members[:0]
        scores = {}
        for condition, given in answers.items():
            correct = given.correct[members]
            low, high = accuracy_interval(correct, videos, seed)
            scores[condition] = Score(
                num_questions=len(members),
                num_unanswered=int((~given.answered[members]).sum()),
                accuracy=float(correct.mean()),
                low=low,
                high=high,
                chance=float(self.chances[members].mean()),
                statuses=given.count_statuses(members),
                family_mean=_mean_of_groups(given.correct[in_family], self.families[in_family]),
            )
        return scores


class _Answers:
    """What is known of the answers to N questions under one condition, as arrays (N,)."""

    def __init__(self, num_questions: int) -> None:
        self.correct = np.zeros(num_questions, dtype=bool)
        self.answered = np.zeros(num_questions, dtype=bool)
        self.kinds = {"not asked": 0}  # kind of status -> its number in `status`
        self.status = np.zeros(num_questions, dtype=np.int64)

    def put(self, row: int, prediction: Prediction) -> None:
        """Enter a prediction; the details after a status's colon do not make another kind."""
        if self.status[row]:
            raise ValueError(f"two predictions for {' / '.join(prediction.key)}")
        kind = prediction.status.partition(":")[0]
        self.status[row] = self.kinds.setdefault(kind, len(self.kinds))
        self.correct[row] = prediction.correct
        self.answered[row] = prediction.prediction is not None

    def count_statuses(self, members: np.ndarray) -> dict[str, int]:
        """How many of the questions have each kind, the most frequent first."""
        counts = np.bincount(self.status[members], minlength=len(self.kinds)).tolist()
        present = [(kind, count) for kind, count in zip(self.kinds, counts, strict=True) if count]
        return dict(sorted(present, key=lambda pair: (-pair[1], pair[0])))


def _mean_of_groups(correct: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean over two or more groups of the mean within each."""
    asked = np.bincount(groups)
    right = np.bincount(groups, weights=correct)[asked > 0]
    return float((right / asked[asked > 0]).mean()) if len(right) > 1 else None


def groups_of(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Places of each name, names in natural order ("2-15 min" before "15 min"); "" comes last."""
    codes, distinct = numbers_of(names)
    places = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    order = sorted(range(len(distinct)), key=lambda code: _natural(distinct[code]))
    return {distinct[code] or NOT_GIVEN: places[code] for code in order}


_LENGTHS = ("< 2 min", "2-15 min", "> 15 min", "short", "medium", "long")


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort lengths from short to long, numbers by their value, and the empty name last."""
    length = _LENGTHS.index(name) if name in _LENGTHS else -1
    return not name, length, re.sub(r"\d+", lambda digits: digits.group().zfill(12), name)


def numbers_of(values: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
    """Number the distinct values as they come: int (N,) numbers, and the values by number."""
    numbers: dict[Any, int] = {}
    codes = np.fromiter((numbers.setdefault(v, len(numbers)) for v in values), dtype=np.int64)
    return codes, list(numbers)


# ---- intervals


def accuracy_interval(
    correct: np.ndarray, videos: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of an accuracy, resampling whole videos with replacement.

    Where all videos have the same share of right answers (or there is one video only), a bootstrap
    would claim certainty: there it is the Wilson interval over the number of videos.

    Args:
        correct: bool (N questions,).
        videos: int (N,), the number of each question's video, from 0 without gaps.
        seed: Of the resampling.
    """
    right = np.bincount(videos, weights=correct).astype(np.int64)
    asked = np.bincount(videos)
    if (right * asked[0] == right[0] * asked).all():
        return wilson_interval(right.sum() / asked.sum(), len(asked))
    low, high = np.percentile(resampled_ratios(right, asked, seed), [2.5, 97.5])
    return float(low), float(high)


def resampled_ratios(top: np.ndarray, bottom: np.ndarray, seed: int = 0) -> np.ndarray:
    """Ratios sum(top) / sum(bottom) over videos drawn with replacement, `NUM_RESAMPLES` of them.

    Videos with the same (top, bottom) are exchangeable, so what is drawn is how often each distinct
    pair comes: the same distribution, with some tens of numbers to draw in place of a hundred
    thousand, and nothing depends on the order of the videos.

    Args:
        top: int (V videos,), such as right answers.
        bottom: int (V videos,), at least 1: questions asked.
        seed: Of the resampling.
    """
    base = int(bottom.max()) + 1
    pairs, counts = np.unique(top * base + bottom, return_counts=True)
    tops, bottoms = np.divmod(pairs, base)
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(0, NUM_RESAMPLES, RESAMPLES_AT_ONCE):
        drawn = rng.multinomial(len(top), counts / len(top), size=RESAMPLES_AT_ONCE)
        ratios.append((drawn @ tops) / (drawn @ bottoms))
    return np.concatenate(ratios)


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share among `count` independent trials."""
    z2 = 1.96**2
    centre = (accuracy + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (accuracy * (1 - accuracy) / count + z2 / (4 * count**2))) ** 0.5 / (
        1 + z2 / count
    )
    return max(0.0, centre - half), min(1.0, centre + half)
