"""How alike two ways of scoring models are: correlations, and pairs put in another order.

Here because "ranks like the full benchmark" is said in many ways, and each has its trap: a
correlation over ten models is known to a wide interval only, and a rank correlation hides by how
much. Everything is of M models; what needs three of them is nan for fewer. Next: `redundancy.py`
(between benchmarks), `validate.py` (between a small benchmark and the full one).
"""

from dataclasses import dataclass

import numpy as np

MIN_MODELS = 3


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well scores agree; each value is a float or, of many at once, an array.

    Attributes:
        pearson: Correlation.
        r2: Its square: how much of one a straight line explains by the other.
        spearman: Correlation of the ranks.
        kendall: Tau-b: pairs in the same order less pairs in the other.
        swapped: Share of pairs of models that change their order; a tie in one alone is half.
    """

    pearson: np.ndarray
    r2: np.ndarray
    spearman: np.ndarray
    kendall: np.ndarray
    swapped: np.ndarray


def agreement(ours: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compare scores.

    Args:
        ours: (..., M models).
        reference: (M,) or (..., M).
    """
    from scipy import stats

    ours, reference = np.broadcast_arrays(np.asarray(ours, float), np.asarray(reference, float))
    if ours.shape[-1] < MIN_MODELS:
        nothing = np.full(ours.shape[:-1], np.nan)
        return Agreement(nothing, nothing, nothing, nothing, nothing)
    pearson = correlation(ours, reference)
    ranks = (stats.rankdata(ours, axis=-1), stats.rankdata(reference, axis=-1))
    first, second = np.triu_indices(ours.shape[-1], 1)
    a = np.sign(_tidy(ours[..., first] - ours[..., second]))
    b = np.sign(_tidy(reference[..., first] - reference[..., second]))
    untied = np.sqrt((a != 0).sum(-1) * (b != 0).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        kendall = (a * b).sum(-1) / untied
    swapped = (np.abs(a - b) / 2).mean(-1)
    return Agreement(pearson, pearson**2, correlation(*ranks), kendall, swapped)


def _tidy(difference: np.ndarray) -> np.ndarray:
    """Differences without what rounding leaves of equal shares."""
    return np.where(np.abs(difference) < 1e-12, 0, difference)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, along the last axis; nan where one of the two is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scale > 1e-15, np.clip((a * b).sum(-1) / scale, -1, 1), np.nan)


def correlation_interval(
    r: np.ndarray, num_models: np.ndarray | int, of_ranks: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a correlation over models, by Fisher's z; (-1, 1) for fewer than four.

    Args:
        r: Correlations.
        num_models: Over how many models each is.
        of_ranks: Whether they are Spearman's; then with the variance of Bonett and Wright
            (Psychometrika 2000, 65:23).
    """
    r = np.asarray(r, float)
    free = np.asarray(num_models, float) - 3
    variance = 1 + r**2 / 2 if of_ranks else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(free > 0, 1.96 * np.sqrt(variance / np.maximum(free, 1)), np.inf)
        middle = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return np.tanh(middle - reach), np.tanh(middle + reach)


def squared_interval(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of R2 from that of the correlation: from 0 where that holds 0."""
    ends = np.stack([low**2, high**2])
    return np.where(low * high > 0, ends.min(axis=0), 0.0), ends.max(axis=0)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over models, nan among them left out; no interval of one."""
    from scipy import stats

    values = values[~np.isnan(values)]
    if len(values) == 0:
        return (float("nan"),) * 3
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, float(mean - reach), float(mean + reach)
