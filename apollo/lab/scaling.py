"""Do choices made on small models hold for large ones? Agreement between sizes, with error bars.

Here because one R2 over a table of scores hides what it rests on: a factor that moves every variant
alike (such as the data), one variant that fails at every size, or luck. Every statistic below is a
function of weights of the variants, so that a bootstrap resample is a row of counts and a left out
variant a zero. Reads `tables.ScoreTable`; free of torch. Next: `consistency.py`, which tells it.

Shapes: V variants, S sizes in rising order, R rows of weights (resamples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apollo.lab.tables import ScoreTable

NUM_RESAMPLES = 2000
TOP = (1, 3, 5)
"""Of how many best variants the overlap is counted."""
RELIABLE = 0.9
"""R2 to the largest size from which a size counts as reliable (paper, Sec. 3: "R2 > 0.9")."""
MIN_VARIANTS = 4
LARGEST_GROUP = 0.25
"""Share of the variants that may be left out as one outlier; more is no outlier."""
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN ends where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __format__(self, spec: str) -> str:
        """Write it as "0.938 (0.86 to 0.97)"; the spec is that of the value, as ".3f"."""
        text = format(self.value, spec or ".3f")
        if math.isnan(self.low):
            return text
        return f"{text} ({self.low:.2f} to {self.high:.2f})"

    def squared(self) -> Estimate:
        """R2 from a correlation: an interval that holds 0 begins at 0."""
        ends = sorted((self.low**2, self.high**2))
        return Estimate(self.value**2, 0.0 if self.low < 0 < self.high else ends[0], ends[1])


@dataclass(frozen=True)
class Pair:
    """How two sizes agree.

    Attributes:
        small: Index of the smaller size.
        large: Index of the larger one.
        r2: Square of `pearson`.
        pearson: Linear correlation of the variants' scores.
        spearman: Rank correlation.
        kendall: Tau b: pairs of variants in the same order less those in the other.
        chosen: Best variant at the small size.
        best: Best variant at the large size.
        regret: Points lost at the large size by taking `chosen`; its interval is the range over
            resampled variants.
        overlap: k -> how many of the k best are the same.
    """

    small: int
    large: int
    r2: Estimate
    pearson: Estimate
    spearman: Estimate
    kendall: Estimate
    chosen: str
    best: str
    regret: Estimate
    overlap: dict[int, int]


@dataclass(frozen=True)
class Factor:
    """What is left of the agreement with the largest size without one factor.

    Attributes:
        name: Column of the table.
        num_levels: How many values it has.
        explained: Share of the scores' variance between its levels, for each size (S,).
        r2_within: For each smaller size: R2 to the largest after removing the levels' means.
    """

    name: str
    num_levels: int
    explained: list[float]
    r2_within: list[Estimate]


@dataclass(frozen=True)
class LeftOut:
    """R2 of each smaller size to the largest without some variants.

    Attributes:
        name: Which, as "config g".
        num_variants: How many.
        r2: For each smaller size.
        r2_within: The same within the levels of the main factor, whose means are those of all
            variants; empty where there is no factor.
    """

    name: str
    num_variants: int
    r2: list[float]
    r2_within: list[float]


@dataclass(frozen=True)
class Line:
    """R2 to the largest size = intercept + slope * ln(size), over the smaller sizes.

    Attributes:
        intercept: At size 1, in the table's unit.
        slope: For each factor of e in size.
        reaches: Size at which the line reaches `RELIABLE`, or None if it never does.
        beyond: Larger size that nobody has measured -> R2 to it from the largest one measured, by
            R2 = a + b ln(small) + c ln(large) over all pairs.
    """

    intercept: Estimate
    slope: Estimate
    reaches: Estimate | None
    beyond: dict[float, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Consistency:
    """All that is said of a table.

    Attributes:
        pairs: Every pair of sizes, those with the largest size first.
        factors: The main one first: the one within which least is left.
        left_out: Groups that were left out, the most influential first.
        reliable: Smallest size whose R2 to the largest is at least `RELIABLE`, and all sizes above
            it; None if there is none.
        surely_reliable: The same for the lower end of the interval.
        line: None with fewer than two smaller sizes.
        ceilings: For each smaller size: R2 to the largest that the noise of the scores would leave
            of a full agreement; empty where the noise is not known.
    """

    pairs: list[Pair]
    factors: list[Factor]
    left_out: list[LeftOut]
    reliable: int | None
    surely_reliable: int | None
    line: Line | None
    ceilings: list[float] = field(default_factory=list)

    def to_largest(self) -> list[Pair]:
        """The pairs of each smaller size with the largest, in rising order."""
        largest = max(pair.large for pair in self.pairs)
        return sorted((p for p in self.pairs if p.large == largest), key=lambda p: p.small)


def analyse(
    table: ScoreTable, targets: Sequence[float] = (), seed: int = 0, noise: float | None = None
) -> Consistency:
    """Measure how the sizes of a table agree.

    Args:
        table: Scores of V variants at S sizes.
        targets: Larger sizes to extrapolate to; at least four measured sizes are needed for that.
        seed: Of the bootstrap.
        noise: Standard deviation, in points, of a score over trainings that differ by their seed
            alone; None if it is not known.

    Raises:
        ValueError: Too few variants or sizes, or a size at which all scores are equal.
    """
    _check(table, targets)
    num_variants, num_sizes = table.scores.shape
    rng = np.random.default_rng(seed)
    shares = np.full(num_variants, 1 / num_variants)
    # The table itself first, then its resamples.
    weights = np.vstack(
        [np.ones(num_variants), rng.multinomial(num_variants, shares, size=NUM_RESAMPLES)]
    )
    pairs = [
        _pair(table, small, large, weights)
        for large in reversed(range(num_sizes))
        for small in reversed(range(large))
    ]
    to_largest = [p.r2 for p in sorted(pairs[: num_sizes - 1], key=lambda p: p.small)]
    factors = _factors(table, weights)
    return Consistency(
        pairs=pairs,
        factors=factors,
        left_out=_leave_out(table, factors[0].name if factors else None),
        reliable=_smallest([r2.value for r2 in to_largest]),
        surely_reliable=_smallest([r2.low for r2 in to_largest]),
        line=_line(table, weights, targets) if num_sizes > 2 else None,
        ceilings=[] if noise is None else _ceilings(table, noise),
    )


def _ceilings(table: ScoreTable, noise: float) -> list[float]:
    """Shares of truth in the variance of both sizes' scores: noise attenuates R2 by each."""
    truth = np.maximum(0.0, 1 - noise**2 / table.scores.var(axis=0, ddof=1))
    return [float(share * truth[-1]) for share in truth[:-1]]


def _check(table: ScoreTable, targets: Sequence[float]) -> None:
    num_variants, num_sizes = table.scores.shape
    if num_variants < MIN_VARIANTS or num_sizes < 2:
        raise ValueError(
            f"{num_variants} variants at {num_sizes} sizes: at least {MIN_VARIANTS} variants with "
            "scores at 2 sizes are needed"
        )
    for name, scores in zip(table.size_names, table.scores.T, strict=True):
        if np.ptp(scores) == 0:
            raise ValueError(f"all variants score {scores[0]:g} at size {name}: nothing to compare")
    if targets and num_sizes < 4:
        raise ValueError(f"extrapolating to other sizes takes four measured ones, not {num_sizes}")
    if targets and min(targets) <= table.sizes[-1]:
        raise ValueError(
            f"--to {min(targets):g} is not larger than the largest size, {table.sizes[-1]:g}"
        )


# ---- statistics as functions of weights


def pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation (R,) of x and y, (V,) or (R, V), for each row of weights (R, V)."""
    total = weights.sum(1, keepdims=True)
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    with np.errstate(all="ignore"):  # NaN where a resample has but one value
        return (weights * x * y).sum(1) / np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation (R,) of the ranks that x and y, both (V,), have in each resample."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return weights @ np.sign(values - values[:, None])  # who is below less who is above

    return pearson(ranks(x), ranks(y), weights)


def kendall(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Kendall's tau b (R,) of x and y, both (V,); a variant drawn twice is tied with itself."""
    order_x, order_y = np.sign(x - x[:, None]), np.sign(y - y[:, None])

    def summed(over_pairs: np.ndarray) -> np.ndarray:
        return ((weights @ over_pairs) * weights).sum(1)

    with np.errstate(all="ignore"):
        return summed(order_x * order_y) / np.sqrt(summed(order_x**2) * summed(order_y**2))


def within(values: np.ndarray, levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is left (R, V) of values (V,) after removing the mean of each level.

    Args:
        values: (V,).
        levels: int (V,), from 0.
        weights: (R, V).
    """
    one_hot = np.eye(levels.max() + 1)[levels]  # (V, levels)
    counts = weights @ one_hot
    means = (weights * values) @ one_hot / np.maximum(counts, 1e-12)
    return values - means[:, levels]


def regret(small: np.ndarray, large: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Points (R,) lost at the large size by choosing, of those drawn, the best at the small one."""
    drawn = weights > 0
    chosen = np.where(drawn, small, -np.inf).argmax(1)
    return np.where(drawn, large, -np.inf).max(1) - large[chosen]


# ---- intervals


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; above ten degrees by its expansion, good to 0.0002."""
    assert degrees >= 1
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def by_fisher(correlations: np.ndarray, degrees: int) -> Estimate:
    """Estimate from a correlation and its resamples, by their spread on Fisher's scale.

    Percentiles of the resamples hold the truth in 92 % of tables with 21 variants, this in 95 %
    (`tests/test_consistency.py`); R2 has no resamples below zero at all.

    Args:
        correlations: The value itself, then those of the resamples.
        degrees: Degrees of freedom: variants less 2, less one for each further mean removed.
    """
    z = np.arctanh(np.clip(correlations, -1 + 1e-9, 1 - 1e-9))
    reach = t_quantile(degrees) * np.nanstd(z[1:])
    ends = np.tanh([z[0] - reach, z[0] + reach])
    return Estimate(float(correlations[0]), *map(float, ends))


def by_percentiles(values: np.ndarray) -> Estimate:
    """Estimate from a value and the 2.5 and 97.5 % percentiles of its resamples."""
    # No interpolation: some may be infinite.
    low, high = np.nanpercentile(values[1:], [2.5, 97.5], method="inverted_cdf")
    return Estimate(float(values[0]), float(low), float(high))


# ---- what is said of a table


def _pair(table: ScoreTable, small: int, large: int, weights: np.ndarray) -> Pair:
    x, y = table.scores[:, small], table.scores[:, large]
    correlation = by_fisher(pearson(x, y, weights), len(x) - 2)
    order_x, order_y = np.argsort(-x, kind="stable"), np.argsort(-y, kind="stable")
    return Pair(
        small=small,
        large=large,
        r2=correlation.squared(),
        pearson=correlation,
        spearman=by_percentiles(spearman(x, y, weights)),
        kendall=by_percentiles(kendall(x, y, weights)),
        chosen=table.variants[order_x[0]],
        best=table.variants[order_y[0]],
        regret=by_percentiles(regret(x, y, weights)),
        overlap={k: len({*order_x[:k]} & {*order_y[:k]}) for k in TOP if k < len(x)},
    )


def _factors(table: ScoreTable, weights: np.ndarray) -> list[Factor]:
    """Each factor that leaves enough to compare, the one that leaves least first."""
    factors = []
    for name, labels in table.factors.items():
        names, levels = np.unique(labels, return_inverse=True)
        degrees = len(levels) - len(names) - 1
        if degrees < 2:
            continue
        left = [within(scores, levels, weights) for scores in table.scores.T]
        total = ((table.scores - table.scores.mean(0)) ** 2).sum(0)
        factors.append(
            Factor(
                name=name,
                num_levels=len(names),
                explained=[
                    float(1 - (kept[0] ** 2).sum() / all_of_it)
                    for kept, all_of_it in zip(left, total, strict=True)
                ],
                r2_within=[
                    by_fisher(pearson(kept, left[-1], weights), degrees).squared()
                    for kept in left[:-1]
                ],
            )
        )
    return sorted(factors, key=lambda f: np.nan_to_num([r2.value for r2 in f.r2_within]).mean())


def groups_to_leave_out(table: ScoreTable) -> dict[str, np.ndarray]:
    """Name -> which variants, bool (V,): single ones, and values of a variant's columns."""
    groups = {
        f"{column} {level}": np.asarray(labels) == level
        for column, labels in table.factors.items()
        if column in table.key_columns
        for level in dict.fromkeys(labels)
    }
    groups |= {name: np.asarray(table.variants) == name for name in table.variants}
    return {n: of for n, of in groups.items() if of.mean() <= LARGEST_GROUP}


def _leave_out(table: ScoreTable, factor: str | None) -> list[LeftOut]:
    """R2 to the largest size without each group, the one that moves it most first."""
    groups = groups_to_leave_out(table)
    if not groups:
        return []
    weights = np.vstack([np.ones(len(table.variants)), *(~of for of in groups.values())])

    def r2_of(scores: np.ndarray) -> np.ndarray:  # (1 + groups, S - 1)
        return np.stack([pearson(x, scores[:, -1], weights) ** 2 for x in scores.T[:-1]], axis=1)

    r2 = r2_of(table.scores)
    r2_within = np.zeros((len(weights), 0))
    if factor:
        levels = np.unique(table.factors[factor], return_inverse=True)[1]
        left = [within(scores, levels, weights[:1])[0] for scores in table.scores.T]
        r2_within = r2_of(np.stack(left, axis=1))
    moved = np.abs(np.hstack([r2, r2_within])[1:] - np.hstack([r2, r2_within])[0]).mean(1)
    found = [
        LeftOut(name, int(of.sum()), r2[row].tolist(), r2_within[row].tolist())
        for row, (name, of) in enumerate(groups.items(), start=1)
    ]
    return [found[place] for place in np.argsort(-moved, kind="stable")]


def _smallest(r2: Sequence[float]) -> int | None:
    """First size from which on all are reliable."""
    reliable = None
    for size in reversed(range(len(r2))):
        if not r2[size] >= RELIABLE:
            break
        reliable = size
    return reliable


def _line(table: ScoreTable, weights: np.ndarray, targets: Sequence[float]) -> Line:
    log_sizes = np.log(table.sizes)
    num_sizes = len(log_sizes)
    r2 = {
        (s, large): pearson(table.scores[:, s], table.scores[:, large], weights) ** 2
        for large in range(num_sizes)
        for s in range(large)
    }
    to_largest = np.stack([r2[s, num_sizes - 1] for s in range(num_sizes - 1)])  # (S - 1, 1 + R)
    slopes, intercepts = _least_squares(
        np.stack([log_sizes[:-1], np.ones(num_sizes - 1)], 1), to_largest
    )
    with np.errstate(all="ignore"):
        reaches = np.where(slopes > 0, np.exp((RELIABLE - intercepts) / slopes), np.inf)
    pairs = np.array([[log_sizes[s], log_sizes[large], 1.0] for s, large in r2])
    coefficients = _least_squares(pairs, np.stack(list(r2.values()))) if targets else pairs
    return Line(
        intercept=by_percentiles(intercepts),
        slope=by_percentiles(slopes),
        reaches=by_percentiles(reaches) if np.isfinite(reaches[0]) else None,
        beyond={
            target: by_percentiles(
                np.clip(np.array([log_sizes[-1], math.log(target), 1.0]) @ coefficients, 0, 1)
            )
            for target in targets
        },
    )


def _least_squares(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Coefficients (inputs, columns) of each column of outputs; NaN where a resample has none."""
    usable = np.isfinite(outputs).all(0)
    solution = np.full((inputs.shape[1], outputs.shape[1]), np.nan)
    solution[:, usable] = np.linalg.lstsq(inputs, outputs[:, usable], rcond=None)[0]
    return solution
