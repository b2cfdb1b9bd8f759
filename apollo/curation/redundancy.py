"""Which benchmarks, lengths and formats rank models alike, and so tell one thing twice.

Here because the paper found Video-MME's short and long videos to rank models almost the same (R2 of
0.94, Section 2.1): where two scores agree, one of them is enough. Intervals are over models and are
wide for ten. Next: `audit.py`, which prints them, and `report.py`, which draws them.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from apollo.curation.agreement import MIN_MODELS, agreement, correlation_interval, squared_interval

PAPER = Path(__file__).parent / "paper"
"""Tables 5 and 6 of the paper, and the correlations that its Figure 2 prints."""


@dataclass(frozen=True)
class Redundancy:
    """Correlations over models between the scores of G groups.

    Attributes:
        names: Of the groups.
        num_models: int (G, G), models with both scores.
        pearson: (G, G), nan for fewer than three models.
        spearman: (G, G).
        order: The groups so that alike ones stand together.
        links: (G - 1, 4), scipy's linkage by average distance 1 - r; empty for one group, or where
            a correlation is nan.
    """

    names: tuple[str, ...]
    num_models: np.ndarray
    pearson: np.ndarray
    spearman: np.ndarray
    order: list[int]
    links: np.ndarray

    def pairs(self) -> Iterator[dict[str, float | str]]:
        """Each pair of groups with its correlations and their 95 % intervals over models."""
        for a, b in combinations(range(len(self.names)), 2):
            num_models = int(self.num_models[a, b])
            r, rank = self.pearson[a, b], self.spearman[a, b]
            low, high = correlation_interval(r, num_models)
            rank_low, rank_high = correlation_interval(rank, num_models, of_ranks=True)
            r2_low, r2_high = squared_interval(low, high)
            yield {
                "a": self.names[a],
                "b": self.names[b],
                "num_models": num_models,
                "pearson": float(r),
                "pearson_low": float(low),
                "pearson_high": float(high),
                "spearman": float(rank),
                "spearman_low": float(rank_low),
                "spearman_high": float(rank_high),
                "r2": float(r**2),
                "r2_low": float(r2_low),
                "r2_high": float(r2_high),
            }


def redundancy(names: Sequence[str], scores: np.ndarray) -> Redundancy:
    """Correlate the groups' scores.

    Args:
        names: Of the G groups.
        scores: (M models, G), nan where a model has none.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    size = len(names)
    num_models = np.zeros((size, size), dtype=int)
    pearson, spearman = np.full((size, size), np.nan), np.full((size, size), np.nan)
    for a in range(size):
        for b in range(size):
            both = ~np.isnan(scores[:, a]) & ~np.isnan(scores[:, b])
            num_models[a, b] = both.sum()
            if num_models[a, b] >= MIN_MODELS:
                found = agreement(scores[both, a], scores[both, b])
                pearson[a, b], spearman[a, b] = found.pearson, found.spearman
    order, links = list(range(size)), np.empty((0, 4))
    if size > 1 and not np.isnan(pearson).any():
        distance = squareform(np.clip(1 - pearson, 0, 2), checks=False)
        links = hierarchy.linkage(distance, "average", optimal_ordering=size <= 100)
        order = hierarchy.leaves_list(links).tolist()
    return Redundancy(tuple(names), num_models, pearson, spearman, order, links)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A printed correlation that the table does not give.

    Attributes:
        a: A benchmark.
        b: Another.
        printed: As the paper's Figure 2 has it, to one digit.
        computed: From its Tables 5 and 6.
    """

    a: str
    b: str
    printed: float
    computed: float


def against_figure_2(found: Redundancy) -> tuple[int, list[Disagreement]]:
    """Compare correlations with those that the paper's Figure 2 prints.

    Returns:
        How many pairs the figure has of these benchmarks, and those that differ in the digit.
    """
    with (PAPER / "figure_2.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    printed = {
        (row[0], name): float(value)
        for row in rows
        for name, value in zip(header[1:], row[1:], strict=True)
    }
    num_pairs, differ = 0, []
    for pair in found.pairs():
        a, b = str(pair["a"]), str(pair["b"])
        if (a, b) in printed:
            num_pairs += 1
            # Printed to one digit: right if it may be a rounding of what is computed.
            if abs(printed[a, b] - float(pair["pearson"])) > 0.05 + 1e-9:
                differ.append(Disagreement(a, b, printed[a, b], float(pair["pearson"])))
    return num_pairs, differ


# ---- tables of accuracies


@dataclass(frozen=True)
class Accuracies:
    """A table of aggregate accuracies: models x benchmarks x video, image, text.

    Attributes:
        models: Names.
        benchmarks: Names.
        values: (3, M, B) in [0, 1], nan where the table has no value.
    """

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    values: np.ndarray

    @property
    def is_papers(self) -> bool:
        """Whether it has the benchmarks and models of the paper's Tables 5 and 6."""
        papers = read_accuracies([PAPER / "benchmark_modalities.csv"])
        return set(self.models) == set(papers.models) and set(self.benchmarks) <= set(
            papers.benchmarks
        )


def read_accuracies(paths: Sequence[Path]) -> Accuracies:
    """Read tables with the columns model, benchmark, video, image, text; in per cent or shares.

    Raises:
        PredictionsError: A cell is no number, or the same model and benchmark come twice.
    """
    from apollo.curation.readers import rows_of
    from apollo.curation.records import DuplicateError, MalformedError

    cells: dict[tuple[str, str], list[float]] = {}
    for path in paths:
        for place, row in rows_of(path):
            key = (str(row.get("model") or ""), str(row.get("benchmark") or ""))
            if not all(key):
                raise MalformedError(f"{place}: no model or no benchmark")
            if key in cells:
                raise DuplicateError(f"{place}: {key[0]} on {key[1]} is there twice")
            try:
                cells[key] = [
                    float(row[name]) if row[name] not in (None, "") else float("nan")
                    for name in ("video", "image", "text")
                ]
            except (KeyError, ValueError) as error:
                raise MalformedError(f"{place}: not an accuracy: {error}") from None
            if any(value < 0 or value > 100 for value in cells[key]):
                raise MalformedError(f"{place}: an accuracy is between 0 and 100: {cells[key]}")
    models = tuple(dict.fromkeys(model for model, _ in cells))
    benchmarks = tuple(dict.fromkeys(benchmark for _, benchmark in cells))
    values = np.full((3, len(models), len(benchmarks)), np.nan)
    for (model, benchmark), numbers in cells.items():
        values[:, models.index(model), benchmarks.index(benchmark)] = numbers
    if np.nanmax(values) > 1:
        values /= 100
    return Accuracies(models, benchmarks, values)
