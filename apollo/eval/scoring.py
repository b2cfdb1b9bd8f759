"""From predictions to accuracies with 95 % intervals, by class, family and need.

Here because a score without an interval, or one that drops what was not answered, misleads.
Questions of one video stand or fall together, so the bootstrap draws videos, not questions. Free of
torch. Next: `runner.py`, which writes predictions, and `report.py`, which draws these tables.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from apollo.eval.benchmarks import Question

NUM_RESAMPLES = 2000  # moves the ends of an interval by less than half a point from seed to seed


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an answerer said to one question under one condition, as kept in predictions.jsonl.

    Attributes:
        question_id: The question's.
        video: The video's path.
        condition: What the answerer was shown; a key of `answerers.CONDITIONS`.
        option_scores: One score per option, higher is likelier; empty where unanswered.
        prediction: Index of the best option, None where unanswered.
        correct: Whether that is the right one; unanswered is wrong.
        frame_times_s: Times of the frames shown, one list per clip.
        question_class: The question's class.
        family: The question's family.
        needs: The question's need.
        status: "ok", or why there is no answer.
    """

    question_id: str
    video: str
    condition: str
    option_scores: list[float]
    prediction: int | None
    correct: bool
    frame_times_s: list[list[float]]
    question_class: str
    family: str
    needs: str
    status: str

    def to_json(self) -> dict:
        """Return the record written to predictions.jsonl; "class" is its name for the class."""
        record = asdict(self)
        record["class"] = record.pop("question_class")
        return record

    @classmethod
    def from_json(cls, record: dict) -> "Prediction":
        """Undo `to_json`."""
        rest = {name: value for name, value in record.items() if name != "class"}
        return cls(question_class=record["class"], **rest)


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
    """

    num_questions: int
    num_unanswered: int
    accuracy: float
    low: float
    high: float
    chance: float


Tables = dict[str, dict[str, dict[str, Score]]]  # grouping -> group -> condition -> score

GROUPINGS: dict[str, Callable[[Question], str]] = {
    "overall": lambda question: "all",
    "class": lambda question: question.question_class,
    "family": lambda question: question.family,
    "needs": lambda question: question.needs,
}


def bootstrap_interval(
    correct: Sequence[bool], videos: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the accuracy, resampling whole videos with replacement.

    With a single video, or all answers alike, a bootstrap would claim certainty: there it is the
    Wilson interval over the number of videos.

    Args:
        correct: One per question.
        videos: The video of each question.
        seed: Of the resampling.
    """
    _, index = np.unique(np.asarray(videos), return_inverse=True)
    right = np.bincount(index, weights=np.asarray(correct, dtype=float))
    asked = np.bincount(index).astype(float)
    accuracy = right.sum() / asked.sum()
    if len(asked) == 1 or accuracy in (0.0, 1.0):
        return wilson_interval(accuracy, len(asked))
    draws = np.random.default_rng(seed).multinomial(
        len(asked), np.full(len(asked), 1 / len(asked)), size=NUM_RESAMPLES
    )
    means = (draws @ right) / (draws @ asked)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share among `count` independent trials."""
    z2 = 1.96**2
    centre = (accuracy + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (accuracy * (1 - accuracy) / count + z2 / (4 * count**2))) ** 0.5 / (
        1 + z2 / count
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def score(
    questions: Sequence[Question], predictions: Iterable[Prediction], condition: str, seed: int = 0
) -> Score:
    """Score one condition over all of `questions`; those without a prediction count as wrong.

    Raises:
        ValueError: There are no questions.
    """
    if not questions:
        raise ValueError("cannot score without questions")
    given = {p.question_id: p for p in predictions if p.condition == condition}
    answers = [given.get(question.question_id) for question in questions]
    correct = [answer is not None and answer.correct for answer in answers]
    low, high = bootstrap_interval(correct, [str(question.video) for question in questions], seed)
    return Score(
        num_questions=len(questions),
        num_unanswered=sum(answer is None or answer.prediction is None for answer in answers),
        accuracy=sum(correct) / len(correct),
        low=low,
        high=high,
        chance=sum(1 / len(question.options) for question in questions) / len(questions),
    )


def tabulate(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    conditions: Sequence[str],
    seed: int = 0,
) -> Tables:
    """Score each condition by each of `GROUPINGS`; "overall" has the one group "all"."""
    tables: Tables = {}
    for grouping, key in GROUPINGS.items():
        tables[grouping] = {}
        for group in sorted({key(question) for question in questions}):
            members = [question for question in questions if key(question) == group]
            tables[grouping][group] = {
                condition: score(members, predictions, condition, seed) for condition in conditions
            }
    return tables
