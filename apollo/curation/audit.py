"""What a benchmark measures: how far its questions are answered without the video, and how sure.

Here because an accuracy on a video benchmark is understanding of video only as far as it is lost
when the video is taken away (paper, Section 2.1). Two intervals stand by each number: over videos
(would other questions say the same of these models?) and over models (would other models?). What is
printed and drawn comes from one `Audit`. Next: `redundancy.py`, `commands.py`, `report.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apollo.curation.agreement import agreement, mean_interval
from apollo.curation.discrimination import entropy, point_biserial
from apollo.curation.records import Labels, Pool
from apollo.curation.redundancy import Redundancy, redundancy
from apollo.curation.shortcuts import WITHOUT_VIDEO, answerable, kinds_of, majority
from apollo.eval.questions import Question
from apollo.eval.scoring import groups_of, wilson_interval

GAPS = (("video", "frame"), ("video", "text"), ("frame", "text"), ("video", "shuffled"))
GROUPINGS = ("benchmark", "class", "duration", "family", "needs", "source")
REDUNDANT = ("benchmark", "duration", "class")
"""Groupings between whose groups scores are correlated; lengths within each benchmark."""
CURVE_SIZES = (10, 20, 50, 100, 200, 400, 800, 1600, 3200, 6400)
NUM_DRAWS = 200  # random subsets of each size
MAX_GROUPS = 60  # of a grouping: more are no table
SURE = 0.5  # probability from which a question counts as answerable


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions and models, as shares; nan where an interval cannot be given.

    Attributes:
        value: The mean.
        low: Lower end of the 95 % interval over videos.
        high: Upper end.
        models_low: Lower end of the 95 % interval over models.
        models_high: Upper end.
    """

    value: float
    low: float
    high: float
    models_low: float
    models_high: float


@dataclass(frozen=True)
class Group:
    """Some questions of the pool.

    Attributes:
        name: Such as a benchmark's.
        num_questions: How many.
        num_videos: On how many videos.
        chance: Mean of one over the number of options; nan where that is not known.
        accuracy: Under each condition.
        gaps: Differences by "video - frame" and so on, over the models that ran under both.
        majority: Share of questions that more than half of the models answer, by condition.
        answerable: Share that are answerable, by condition (`shortcuts.answerable`).
    """

    name: str
    num_questions: int
    num_videos: int
    chance: float
    accuracy: dict[str, Estimate]
    gaps: dict[str, Estimate]
    majority: dict[str, float]
    answerable: dict[str, float]


@dataclass(frozen=True)
class CurvePoint:
    """How well random subsets of one size rank the models as all questions do.

    Attributes:
        size: Questions drawn.
        kendall: Mean, 2.5 and 97.5 per cent over draws.
        r2: The same.
    """

    size: int
    kendall: tuple[float, float, float]
    r2: tuple[float, float, float]


@dataclass(frozen=True)
class Audit:
    """Everything that is found of a pool.

    Attributes:
        models: Names.
        conditions: Names.
        groups: Grouping -> groups; "overall" has one.
        model_scores: Condition -> (M, benchmarks), nan where a model did not run.
        benchmarks: Names, for `model_scores`.
        missing: See `Pool.missing`.
        majority: Condition -> bool (Q,).
        answerable: Condition -> float (Q,), probabilities.
        kinds: What kinds of question there are.
        solved_kinds: Condition -> kinds most of whose questions are answerable.
        entropy: (Q,), bits.
        point_biserial: (Q,), nan where all agree.
        positions: See `position_bias`.
        lengths: See `length_bias`; empty where the options' texts are not known.
        redundancies: Grouping -> correlations between its groups, where there are two or more.
        curve: How many questions keep the ranking.
    """

    models: tuple[str, ...]
    conditions: tuple[str, ...]
    groups: dict[str, list[Group]]
    model_scores: dict[str, np.ndarray]
    benchmarks: tuple[str, ...]
    missing: list[tuple[str, str, str, int, int]]
    majority: dict[str, np.ndarray]
    answerable: dict[str, np.ndarray]
    kinds: Labels
    solved_kinds: dict[str, list[str]]
    entropy: np.ndarray
    point_biserial: np.ndarray
    positions: dict[str, object]
    lengths: dict[str, Estimate]
    redundancies: dict[str, Redundancy]
    curve: list[CurvePoint]


def audit(pool: Pool, questions: Sequence[Question] = (), seed: int = 0) -> Audit:
    """Audit a pool of predictions.

    Args:
        pool: The predictions.
        questions: The questions' texts, as far as they are known; for the bias of lengths.
        seed: Of the random subsets.
    """
    first = "video" if "video" in pool.conditions else pool.conditions[0]
    kinds = kinds_of(pool)
    blind = [condition for condition in WITHOUT_VIDEO if condition in pool.conditions]
    likely = {condition: answerable(pool, condition, kinds) for condition in blind}
    often = {condition: majority(pool, condition) for condition in blind}
    sizes = np.bincount(kinds.codes)
    solved = {
        condition: [
            name
            for name, share in zip(kinds.names, np.bincount(kinds.codes, p) / sizes, strict=True)
            if share > SURE
        ]
        for condition, p in likely.items()
    }
    benchmarks = pool.columns["benchmark"]
    return Audit(
        models=pool.models,
        conditions=pool.conditions,
        groups=tabulate(pool, often, likely),
        model_scores={c: pool.accuracies(c, benchmarks) for c in pool.conditions},
        benchmarks=benchmarks.names,
        missing=pool.missing(),
        majority=often,
        answerable=likely,
        kinds=kinds,
        solved_kinds=solved,
        entropy=entropy(pool, first),
        point_biserial=point_biserial(pool, first),
        positions=position_bias(pool),
        lengths=length_bias(pool, questions),
        redundancies=redundancies(pool, first),
        curve=ranking_curve(pool, first, seed),
    )


# ---- accuracies and gaps


def groupings(pool: Pool) -> dict[str, Labels]:
    """The groupings in which the questions have two groups or more, and a few at most."""
    everything = Labels(np.zeros(pool.num_questions, dtype=np.int32), ("all",))
    found = {"overall": everything}
    for name in GROUPINGS:
        if 2 <= len(pool.columns[name].names) <= MAX_GROUPS or name == "benchmark":
            found[name] = pool.columns[name]
    return found


def tabulate(
    pool: Pool, often: Mapping[str, np.ndarray], likely: Mapping[str, np.ndarray]
) -> dict[str, list[Group]]:
    """Accuracies, gaps and shares of shortcuts of every group.

    Args:
        pool: The predictions.
        often: Condition -> bool (Q,), answered by most models.
        likely: Condition -> float (Q,), probability of being answerable.
    """
    gaps = [pair for pair in GAPS if set(pair) <= set(pool.conditions)]
    counted = {c: _common(pool, (c,)) for c in pool.conditions}
    compared = {pair: _common(pool, pair) for pair in gaps}
    chances = 1 / np.where(pool.num_options > 0, pool.num_options, np.nan)
    tables: dict[str, list[Group]] = {}
    for grouping, labels in groupings(pool).items():
        cells = _Cells(pool, labels)
        scores = {c: pool.accuracies(c, labels) for c in pool.conditions}
        accuracy = {
            c: cells.estimates(right[0], ran, scores[c]) for c, (right, ran) in counted.items()
        }
        differences = {
            f"{a} - {b}": cells.estimates(
                right[0] - right[1], ran, scores[a] - scores[b], lowest=-1
            )
            for (a, b), (right, ran) in compared.items()
        }
        sizes = np.bincount(labels.codes, minlength=len(labels.names))
        means = {
            name: np.bincount(labels.codes, values, len(labels.names)) / sizes
            for name, values in [
                ("chance", chances),
                *((f"majority {c}", values) for c, values in often.items()),
                *((f"likely {c}", values > SURE) for c, values in likely.items()),
            ]
        }
        order = groups_of(labels.names)
        tables[grouping] = [
            Group(
                name=name,
                num_questions=int(sizes[code]),
                num_videos=int(cells.num_videos[code]),
                chance=float(means["chance"][code]),
                accuracy={c: values[code] for c, values in accuracy.items()},
                gaps={gap: values[code] for gap, values in differences.items()},
                majority={c: float(means[f"majority {c}"][code]) for c in often},
                answerable={c: float(means[f"likely {c}"][code]) for c in likely},
            )
            for name, places in order.items()
            for code in places
        ]
    return tables


def _common(pool: Pool, conditions: tuple[str, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """Right answers per question under each condition, of the models that ran under all of them.

    Returns:
        int (Q,) for each condition, and int (Q,), how many models these are.
    """
    ran = np.logical_and.reduce([pool.ran[pool.place(c)] for c in conditions])
    codes = pool.columns["benchmark"].codes
    right = []
    for condition in conditions:
        answers = pool.right(condition)
        if not ran.all():
            answers = answers & ran[:, codes]
        right.append(answers.sum(axis=0, dtype=np.int32))
    return right, ran.sum(axis=0)[codes].astype(np.int32)


class _Cells:
    """The questions of each group and video together: what intervals over videos are made of."""

    def __init__(self, pool: Pool, labels: Labels) -> None:
        video, benchmark = pool.columns["video"], pool.columns["benchmark"]
        named = video.codes.astype(np.int64)
        if "" in video.names:  # where no video is known each question stands alone
            unknown = named == video.names.index("")
            named[unknown] = len(video.names) + np.flatnonzero(unknown)
        key = (labels.codes.astype(np.int64) * len(benchmark.names) + benchmark.codes) * (
            len(video.names) + pool.num_questions
        ) + named
        cells, self._cell = np.unique(key, return_inverse=True)
        per_group = len(benchmark.names) * (len(video.names) + pool.num_questions)
        self._group = cells // per_group
        self._num_groups = len(labels.names)
        self.num_videos = np.bincount(self._group, minlength=self._num_groups)

    def estimates(
        self, top: np.ndarray, bottom: np.ndarray, scores: np.ndarray, lowest: int = 0
    ) -> list[Estimate]:
        """Ratios of sums in each group, with both intervals.

        Over videos it is that of a ratio estimator, linearised: what a bootstrap over videos tends
        to, without the drawing.

        Args:
            top: (Q,), such as right answers.
            bottom: (Q,), such as answers.
            scores: (M, groups), the same for each model; nan where it has none.
            lowest: 0 for shares, -1 for differences of shares.
        """
        from scipy import stats

        num_groups, videos = self._num_groups, self.num_videos
        a, b = np.bincount(self._cell, top), np.bincount(self._cell, bottom)
        total = np.bincount(self._group, b, num_groups)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.bincount(self._group, a, num_groups) / total
            squares = np.bincount(self._group, (a - ratio[self._group] * b) ** 2, num_groups)
            error = np.sqrt(squares * videos / (videos - 1)) / total
            reach = stats.t.ppf(0.975, np.maximum(videos - 1, 1)) * error
        found = []
        for code in range(num_groups):
            low, high = ratio[code] - reach[code], ratio[code] + reach[code]
            if videos[code] < 2 or squares[code] == 0:
                low, high = _all_alike(ratio[code], int(videos[code]), lowest)
            _, *over_models = mean_interval(scores[:, code])
            ends = np.clip([low, high, *over_models], lowest, 1).tolist()
            found.append(Estimate(float(ratio[code]), *ends))
        return found


def _all_alike(share: float, num_videos: int, lowest: int) -> tuple[float, float]:
    """95 % interval where all videos say the same and a spread would claim certainty.

    Of a share Wilson's; of a difference what Tango's interval gives (see `eval/compare.py`).
    """
    if np.isnan(share):
        return float("nan"), float("nan")
    if lowest == 0:
        return wilson_interval(share, num_videos)
    reach = (1 + abs(share)) * 1.96**2 / (num_videos + 1.96**2)
    return share - reach, share + reach


# ---- biases


def position_bias(pool: Pool) -> dict[str, object]:
    """Where right answers stand, and which places models choose, by place.

    Of the questions with the most frequent number of options.

    Returns:
        "num_options", "num_questions", "right" (shares of the right answer's places), "p" (chance
        of places so uneven if they were drawn), "chosen" and "accuracy" (condition -> shares by
        place), "taste" (model -> how far its choices under the first condition are from the right
        answers' places, in total variation); empty where places are not known.
    """
    from scipy import stats

    known = (pool.answer >= 0) & (pool.num_options > 1)
    if not known.any():
        return {}
    num_options = int(np.bincount(pool.num_options[known]).argmax())
    known &= pool.num_options == num_options
    answer = pool.answer[known]
    right = np.bincount(answer, minlength=num_options)
    found: dict[str, object] = {
        "num_options": num_options,
        "num_questions": int(known.sum()),
        "right": (right / right.sum()).tolist(),
        "p": float(stats.chisquare(right).pvalue),
    }
    chosen: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    for place, condition in enumerate(pool.conditions):
        options = pool.chosen[place]
        options = options if known.all() else options[:, known]
        counts = np.stack([(options == option).sum(axis=1) for option in range(num_options)], 1)
        hits, _ = _common(pool, (condition,))
        ran = pool.ran[place].sum(axis=0)[pool.columns["benchmark"].codes][known]
        asked = np.bincount(answer, ran, num_options)
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen[condition] = (counts.sum(axis=0) / counts.sum()).tolist()
            accuracy[condition] = (
                np.bincount(answer, hits[0][known], num_options) / asked
            ).tolist()
            shares = counts / counts.sum(axis=1, keepdims=True)
        if place == 0:
            taste = 0.5 * np.abs(shares - right / right.sum()).sum(axis=1)
            found["taste"] = dict(zip(pool.models, taste.tolist(), strict=True))
    return found | {"chosen": chosen, "accuracy": accuracy}


def length_bias(pool: Pool, questions: Sequence[Question]) -> dict[str, Estimate]:
    """How often the longest option is right, and the shortest, beside chance.

    Args:
        pool: Says which questions are meant.
        questions: Their texts; those of other questions are left alone.
    """
    if not questions:
        return {}
    rows = rows_by_id(pool)
    places: list[int] = []
    longest: list[float] = []
    shortest: list[float] = []
    chance: list[float] = []
    for question in questions:
        row = rows.get((question.benchmark, question.question_id))
        if row is not None:
            lengths = np.array([len(option) for option in question.options])
            for shares, extreme in ((longest, lengths.max()), (shortest, lengths.min())):
                tied = lengths == extreme
                shares.append(float(tied[question.answer] / tied.sum()))
            places.append(row)
            chance.append(1 / len(lengths))
    if not places:
        return {}
    asked = pool.take(np.array(places))
    cells = _Cells(asked, Labels(np.zeros(len(places), dtype=np.int32), ("all",)))
    nothing, ones = np.empty((0, 1)), np.ones(len(places))
    return {
        name: cells.estimates(np.array(values), ones, nothing)[0]
        for name, values in (("longest", longest), ("shortest", shortest), ("chance", chance))
    }


def rows_by_id(pool: Pool) -> dict[tuple[str, str], int]:
    """Row of each benchmark and question_id."""
    benchmarks = pool.columns["benchmark"].values()
    return dict(
        zip(zip(benchmarks, pool.question_ids, strict=True), range(len(benchmarks)), strict=True)
    )


# ---- redundancy and the number of questions


def redundancies(pool: Pool, condition: str) -> dict[str, Redundancy]:
    """Correlations between benchmarks, between lengths within them, and between classes."""
    found = {}
    for grouping in REDUNDANT:
        labels = pool.columns[grouping]
        if grouping != "benchmark" and len(pool.columns["benchmark"].names) > 1:
            labels = _within(pool.columns["benchmark"], labels)
        if 2 <= len(labels.names) <= MAX_GROUPS:
            names = [name for name, places in groups_of(labels.names).items() for _ in places]
            order = np.concatenate(list(groups_of(labels.names).values()))
            found[grouping] = redundancy(names, pool.accuracies(condition, labels)[:, order])
    return found


def _within(outer: Labels, inner: Labels) -> Labels:
    """The groups of one column within those of another."""
    codes = outer.codes.astype(np.int64) * len(inner.names) + inner.codes
    kept, numbers = np.unique(codes, return_inverse=True)
    names = [
        f"{outer.names[code // len(inner.names)]} {inner.names[code % len(inner.names)]}".strip()
        for code in kept
    ]
    return Labels(numbers.astype(np.int32), tuple(names))


def ranking_curve(pool: Pool, condition: str, seed: int = 0) -> list[CurvePoint]:
    """Draw random subsets of growing size and compare their ranking with that of all questions.

    Of the models that ran on every benchmark; empty for fewer than three.
    """
    ran = pool.ran[pool.place(condition)].all(axis=1)
    if ran.sum() < 3:
        return []
    right = np.ascontiguousarray(pool.right(condition)[ran].T)  # a question's answers side by side
    full = right.mean(axis=0)
    rng = np.random.default_rng(seed)
    points = []
    for size in CURVE_SIZES:
        if size > pool.num_questions // 2:
            break
        scores = np.stack(
            [
                right[rng.choice(pool.num_questions, size, replace=False)].mean(axis=0)
                for _ in range(NUM_DRAWS)
            ]
        )
        found = agreement(scores, full)
        points.append(CurvePoint(size, _spread(found.kendall), _spread(found.r2)))
    return points


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, 2.5 and 97.5 per cent; a subset in which all models are the same ranks as chance: 0."""
    values = np.nan_to_num(values)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
