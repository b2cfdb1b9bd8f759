"""Whether a small benchmark ranks models that had no part in choosing it.

Here because a set of questions chosen on some models always fits those; the paper validates on the
models that chose. So the models are split in halves again and again: one half chooses, as the whole
would, and the other is ranked by the small set and by the full clean pool. Random sets of the same
size and a choice by item-response theory go through the same. The splits share models, so what is
given over them is their spread, not an interval of independent trials. Next: `outputs.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from apollo.curation.agreement import MIN_MODELS, Agreement, agreement
from apollo.curation.curate import KEPT, Settings, choose, shortcut_reasons
from apollo.curation.records import Pool

NUM_SPLITS = 40
NUM_RANDOM = 20  # random sets for each split
MEASURES = ("r2", "pearson", "spearman", "kendall", "swapped")
MAX_QUESTIONS = 20_000  # validated on: of a larger pool a random part, at least 10 times the size
COMPARED = ("entropy", "point-biserial", "irt")  # rankings that each choice is compared with
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over splits: its mean, and the range that holds 95 % of the splits."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Over splits; nan (all models the same) counts as 0."""
        values = np.nan_to_num(np.asarray(values, float))
        low, high = np.percentile(values, [2.5, 97.5])
        return cls(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Validation:
    """How well small sets rank models that did not choose them.

    Attributes:
        num_models: In all.
        num_choosing: Models of them that choose, in each split; the others are ranked.
        num_splits: How many.
        size: Questions of each small set.
        num_clean: Mean size of the clean pool that they are compared with.
        num_questions: Of the pool that was validated on, shortcuts included.
        methods: Method ("entropy", "irt", "random", ...) -> measure -> spread; `MEASURES`.
        beaten: Method -> share of random sets, of the same splits, whose R2 is lower.
        gain: Method -> its R2 less the mean of the random sets of its split.
        scatter: Method -> list of (split, full, small) for each model ranked.
    """

    num_models: int
    num_choosing: int
    num_splits: int
    size: int
    num_clean: float
    num_questions: int
    methods: dict[str, dict[str, Spread]]
    beaten: dict[str, float]
    gain: dict[str, Spread]
    scatter: dict[str, list[tuple[int, float, float]]]


def validate(
    pool: Pool,
    settings: Settings,
    num_splits: int = NUM_SPLITS,
    seed: int = 0,
    rankings: Sequence[str] = COMPARED,
) -> Validation:
    """Choose with half of the models, rank the other half; again and again.

    Args:
        pool: The predictions. Of models that ran on everything; the others are left out.
        settings: How to choose.
        num_splits: How many splits into halves.
        seed: Of the splits and the random sets.
        rankings: Of `discrimination.RANKINGS`, to compare the settings' own with.

    Raises:
        ValueError: Fewer than six models, or the set is not smaller than the clean pool.
    """
    everywhere = np.flatnonzero(pool.ran.all(axis=(0, 2)))
    if len(everywhere) < 2 * MIN_MODELS:
        raise ValueError(
            f"validation needs {2 * MIN_MODELS} models that ran on all benchmarks under all "
            f"conditions, there are {len(everywhere)}: {MIN_MODELS} choose and {MIN_MODELS} are "
            "ranked"
        )
    rng = np.random.default_rng(seed)
    most = max(MAX_QUESTIONS, 10 * settings.size)
    if pool.num_questions > most:
        pool = pool.take(np.sort(rng.choice(pool.num_questions, most, replace=False)))
    methods = tuple(dict.fromkeys((settings.ranking, *rankings)))
    splits = []
    for _ in range(num_splits):
        choosing, ranked = np.split(rng.permutation(everywhere), [len(everywhere) // 2])
        splits.append(_one_split(pool, settings, methods, choosing, ranked, rng))
    found = {name: [split.found[name] for split in splits] for name in (*methods, RANDOM)}
    # Where all models are the same nothing is ranked: that is worth 0, not left out.
    by_chance = np.nan_to_num(np.stack([each.r2 for each in found[RANDOM]]))  # (splits, sets)
    r2 = {name: np.nan_to_num(np.stack([each.r2 for each in found[name]])) for name in methods}
    return Validation(
        num_models=len(everywhere),
        num_choosing=len(everywhere) // 2,
        num_splits=num_splits,
        size=settings.size,
        num_clean=float(np.mean([split.num_clean for split in splits])),
        num_questions=pool.num_questions,
        methods={
            name: {
                measure: Spread.of(np.concatenate([np.ravel(getattr(a, measure)) for a in each]))
                for measure in MEASURES
            }
            for name, each in found.items()
        },
        beaten={name: float((by_chance < r2[name][:, None]).mean()) for name in methods},
        gain={name: Spread.of(r2[name] - by_chance.mean(axis=1)) for name in methods},
        scatter={
            name: [
                (number, float(full), float(small))
                for number, split in enumerate(splits)
                for full, small in zip(split.full, split.small[name], strict=True)
            ]
            for name in methods
        },
    )


class _Split(NamedTuple):
    """One split: size of the clean pool, agreements by method, and scores of the models ranked."""

    num_clean: int
    found: dict[str, Agreement]
    full: np.ndarray
    small: dict[str, np.ndarray]


def _one_split(
    pool: Pool,
    settings: Settings,
    methods: Sequence[str],
    choosing: np.ndarray,
    ranked: np.ndarray,
    rng: np.random.Generator,
) -> _Split:
    """Choose with some models, rank the others; nothing of these is known to the choice."""
    half = pool.of_models(choosing)
    clean = np.flatnonzero(shortcut_reasons(half, settings.rule) == KEPT)
    if len(clean) <= settings.size:
        raise ValueError(
            f"only {len(clean)} questions need the video, by the answers of half of the "
            f"models: {settings.size} cannot be chosen among them; choose a smaller --size"
        )
    right = np.ascontiguousarray(pool.right("video")[ranked].T)
    full = right[clean].mean(axis=0)
    small = {
        name: right[choose(half, replace(settings, ranking=name)).rows].mean(axis=0)
        for name in methods
    }
    found = {name: agreement(scores, full) for name, scores in small.items()}
    sets = (rng.choice(clean, settings.size, replace=False) for _ in range(NUM_RANDOM))
    found[RANDOM] = agreement(np.stack([right[rows].mean(axis=0) for rows in sets]), full)
    return _Split(len(clean), found, full, small)


# ---- cost


@dataclass(frozen=True, slots=True)
class Cost:
    """How many times as much the pool costs as the questions kept.

    Attributes:
        questions: Ratio of questions.
        videos: Ratio of videos to decode and encode.
        video_s: Ratio of the seconds of these videos; nan where lengths are not known.
    """

    questions: float
    videos: float
    video_s: float


def cost_ratio(pool: Pool, rows: np.ndarray) -> Cost:
    """Compare the whole pool with some of its questions.

    A model that encodes each video once, as `apollo eval` does, takes between the ratio of videos
    (if all its time goes into watching) and that of questions (if it goes into answering).
    """
    video = pool.columns["video"]
    ids = video.codes + len(video.names) * pool.columns["benchmark"].codes.astype(np.int64)

    def of(places: np.ndarray) -> tuple[int, float]:
        _, first = np.unique(ids[places], return_index=True)
        return len(first), float(pool.duration_s[places][first].sum(dtype=float))

    everything, some = of(np.arange(pool.num_questions)), of(rows)
    known = video.names != ("",)
    return Cost(
        questions=pool.num_questions / len(rows),
        videos=everything[0] / some[0] if known else float("nan"),
        video_s=everything[1] / some[1] if some[1] > 0 else float("nan"),
    )
