"""How well each question tells models apart.

Here because the paper keeps the questions with the highest entropy over models' answers (Section
2.3) and gives no formula. `RANKINGS` has the readings of it, and others. Each is a function from a
pool and a condition to a number per question, larger is better. Next: `curate.py`.
"""

from collections.abc import Callable

import numpy as np

from apollo.curation.irt import fit_pool, mean_information
from apollo.curation.records import Pool


def entropy(pool: Pool, condition: str = "video") -> np.ndarray:
    """Of right against wrong, in bits: 1 where half of the models are right, 0 where all agree."""
    right, ran = pool.counts(condition)
    most = int(ran.max(initial=0))
    share = np.arange(most + 1) / np.maximum(np.arange(most + 1)[:, None], 1)  # [ran, right]
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    return np.nan_to_num(bits)[ran, right]


def option_entropy(pool: Pool, condition: str = "video") -> np.ndarray:
    """Of the options chosen, in bits: highest where models guess, so it finds hard questions."""
    chosen = pool.chosen[pool.place(condition)]
    counts = np.stack([(chosen == option).sum(axis=0) for option in range(int(chosen.max()) + 1)])
    share = counts / np.maximum(counts.sum(axis=0), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.nansum(share * np.log2(share), axis=0)


def point_biserial(pool: Pool, condition: str = "video") -> np.ndarray:
    """Correlation over models of being right here with the accuracy on all other questions.

    nan where all models agree, or fewer than three ran.
    """
    found = np.full(pool.num_questions, np.nan, dtype=np.float32)
    ran = pool.ran[pool.place(condition)]
    right, benchmark = pool.right(condition), pool.columns["benchmark"].codes
    for code in range(ran.shape[1]):
        here = slice(None) if ran.shape[1] == 1 else np.flatnonzero(benchmark == code)
        answers = right[ran[:, code]][:, here]
        if len(answers) > 2:
            found[here] = _item_rest(answers)
    return found


def _item_rest(right: np.ndarray) -> np.ndarray:
    """Correlation of each column of bool (M, Q) with the sum of the other columns: (Q,)."""
    total = right.sum(axis=1).astype(np.float64)
    total -= total.mean()
    share = right.mean(axis=0)
    covariance = np.zeros(right.shape[1])
    for answers, each in zip(right, total / len(right), strict=True):
        covariance += each * answers
    variance = share * (1 - share)
    rest = np.maximum((total**2).mean() + variance - 2 * covariance, 0)
    spread = np.sqrt(variance * rest)
    known = spread > 1e-9  # neither all models agree here, nor on all the rest together
    found = np.full(right.shape[1], np.nan)
    found[known] = ((covariance - variance)[known] / spread[known]).clip(-1, 1)
    return found


def information(pool: Pool, condition: str = "video") -> np.ndarray:
    """Mean Fisher information over the models' abilities in a two-parameter logistic model."""
    abilities, slope, ease = fit_pool(pool, condition)
    return mean_information(abilities, slope, ease)


RANKINGS: dict[str, Callable[[Pool, str], np.ndarray]] = {
    "entropy": entropy,
    "option-entropy": option_entropy,
    "point-biserial": point_biserial,
    "irt": information,
}
