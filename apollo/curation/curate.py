"""Which questions to keep: the paper's steps, in order, and a reason for every question.

Here because a small benchmark is only as good as the rule that made it, and the rule must be one
that can be read, repeated and argued with. First what is answered without the video goes (paper,
Section 2.2), then the questions are ranked by how well they tell models apart (2.3), and the best
are kept, balanced over classes and videos as asked. Next: `validate.py`, which says whether that
worked; `outputs.py`, which writes it.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from apollo.curation.discrimination import RANKINGS, point_biserial
from apollo.curation.records import COLUMNS, Labels, Pool
from apollo.curation.shortcuts import WITHOUT_VIDEO, answerable, kinds_of, majority

KEPT, TEXT, FRAME, REVIEW, NO_CLASS, VIDEO, RANK = range(7)
REASONS = {
    KEPT: "kept",
    TEXT: "most models answer it from the text alone",
    FRAME: "most models answer it from the centre frame",
    REVIEW: "refused in the review",
    NO_CLASS: "has no class",
    VIDEO: "its video has as many questions as are allowed",
    RANK: "others tell models apart better",
}
RULES = ("majority", "likely")
SHARES = ("pool", "equal")
ANSWERS = "answers"


@dataclass(frozen=True)
class Settings:
    """How questions are chosen.

    Attributes:
        size: How many to keep.
        ranking: A key of `discrimination.RANKINGS`; ties go to the higher point-biserial
            correlation: with ten models, entropy has six values.
        rule: "majority", what more than half of the models answer is dropped (the paper's); or
            "likely", what more than half of all such models know (`shortcuts.answerable`).
        balance: A column over whose values the questions are spread; "answers", spread over which
            of the models are right, so that each model scores as in the pool; or "none".
        shares: "pool", as frequent as in the pool; or "equal".
        per_video: Most questions of one video; 0 for any number.

    Raises:
        ValueError: A value that is none of these.
    """

    size: int = 400
    ranking: str = "entropy"
    rule: str = "majority"
    balance: str = "class"
    shares: str = "pool"
    per_video: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "ranking": tuple(RANKINGS),
            "rule": RULES,
            "balance": (*COLUMNS, ANSWERS, "none"),
            "shares": SHARES,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed: {', '.join(values)}")
        if self.size < 1 or self.per_video < 0:
            raise ValueError("size must be at least 1, and questions per video not negative")


@dataclass(frozen=True)
class Choice:
    """What became of each question.

    Attributes:
        reasons: uint8 (Q,), keys of `REASONS`.
        values: float (Q,), by which they were ranked; nan where dropped before.
        rows: The questions kept, best first within each class.
    """

    reasons: np.ndarray
    values: np.ndarray
    rows: np.ndarray


def choose(
    pool: Pool,
    settings: Settings,
    refused: np.ndarray | None = None,
    classified: np.ndarray | None = None,
) -> Choice:
    """Choose questions by the answers of the pool's models.

    Args:
        pool: The predictions; those under "video" rank the questions.
        settings: How.
        refused: bool (Q,), which questions a reviewer refused.
        classified: bool (Q,), which have a class; by default all may be kept.
    """
    reasons = shortcut_reasons(pool, settings.rule)
    for mask, reason in (
        (refused, REVIEW),
        (None if classified is None else ~classified, NO_CLASS),
    ):
        if mask is not None:
            reasons[mask & (reasons == KEPT)] = reason
    rows = np.flatnonzero(reasons == KEPT)
    clean = pool if len(rows) == pool.num_questions else pool.take(rows)
    values, order = rank(clean, settings.ranking)
    kept, full = _spread(clean, order, settings)
    reasons[rows] = RANK
    reasons[rows[full]] = VIDEO
    reasons[rows[kept]] = KEPT
    all_values = np.full(pool.num_questions, np.nan)
    all_values[rows] = values
    return Choice(reasons, all_values, rows[kept])


def shortcut_reasons(pool: Pool, rule: str) -> np.ndarray:
    """KEPT, TEXT or FRAME for each question: uint8 (Q,); only for conditions that were run."""
    reasons = np.full(pool.num_questions, KEPT, dtype=np.uint8)
    for condition, reason in zip(WITHOUT_VIDEO, (TEXT, FRAME), strict=True):
        if condition in pool.conditions:
            if rule == "majority":
                solved = majority(pool, condition)
            else:
                solved = answerable(pool, condition, kinds_of(pool)) > 0.5
            reasons[solved & (reasons == KEPT)] = reason
    return reasons


def rank(pool: Pool, ranking: str) -> tuple[np.ndarray, np.ndarray]:
    """Rank questions by how well they tell models apart.

    Returns:
        The values (Q,), and the questions' places from best to worst (Q,). Ties go to the higher
        point-biserial correlation, then to lot: an order of the file would favour its first videos.
    """
    values = RANKINGS[ranking](pool, "video")
    lot = np.random.default_rng(0).random(pool.num_questions)
    second = np.nan_to_num(point_biserial(pool), nan=-1)
    return values, np.lexsort((lot, -second, -np.nan_to_num(values, nan=-1)))


def _spread(pool: Pool, order: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Take the best of each group in turns.

    Returns:
        Places of the questions taken, and of those passed over since their video was full.
    """
    if settings.balance == ANSWERS:
        groups = _who_is_right(pool, settings.size)
    elif settings.balance == "none":
        groups = np.zeros(pool.num_questions, np.int32)
    else:
        groups = pool.columns[settings.balance].codes
    sizes = np.bincount(groups)
    weights = sizes if settings.shares == "pool" else np.ones(len(sizes))
    by_group = order[np.argsort(groups[order], kind="stable")]
    queues = [iter(part) for part in np.split(by_group, np.cumsum(sizes)[:-1])]
    video = pool.columns["video"]
    videos = video.codes + len(video.names) * pool.columns["benchmark"].codes.astype(np.int64)
    known = np.array([name != "" for name in video.names] or [False])[video.codes]
    taken: dict[int, int] = {}
    kept: list[int] = []
    full: list[int] = []
    # The group that is furthest behind its share comes next, shares being rounded (Sainte-Lague).
    turns = [(0.5 / weight, group) for group, weight in enumerate(weights) if weight]
    heapq.heapify(turns)
    while turns and len(kept) < settings.size:
        behind, group = heapq.heappop(turns)
        for place in queues[group]:
            if settings.per_video and known[place]:
                if taken.get(videos[place], 0) >= settings.per_video:
                    full.append(place)
                    continue
                taken[videos[place]] = taken.get(videos[place], 0) + 1
            kept.append(place)
            heapq.heappush(turns, (behind + 1 / weights[group], group))
            break
    return np.array(kept, dtype=np.int64), np.array(full, dtype=np.int64)


def _who_is_right(pool: Pool, size: int) -> np.ndarray:
    """Number questions by which models are right on the video: int (Q,), at most `size` numbers.

    So only of log2(size) models, from the weakest to the strongest, if there are more.
    """
    right = pool.right("video")
    by_score = np.argsort(right.mean(axis=1))
    most = max(1, min(len(right), int(np.log2(size))))
    number = np.zeros(pool.num_questions, np.int64)
    for place in np.linspace(0, len(right) - 1, most).round().astype(int):
        number = 2 * number + right[by_score[place]]
    return np.unique(number, return_inverse=True)[1]


def counts_by_reason(choice: Choice) -> dict[str, int]:
    """How many questions have each reason, in the order of the steps."""
    counts = np.bincount(choice.reasons, minlength=len(REASONS))
    return {REASONS[reason]: int(counts[reason]) for reason in REASONS if counts[reason]}


def describe(pool: Pool, choice: Choice, column: str) -> list[tuple[str, int, int]]:
    """Name, questions in the pool and questions kept of each value of a column."""
    labels: Labels = pool.columns[column]
    before = np.bincount(labels.codes, minlength=len(labels.names))
    after = np.bincount(labels.codes[choice.rows], minlength=len(labels.names))
    return list(zip(labels.names, before.tolist(), after.tolist(), strict=True))
