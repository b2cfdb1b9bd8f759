"""`apollo compare RUN_A RUN_B`: is one run better than another on the same questions?

Here because two accuracies with overlapping intervals may still differ for certain: most questions
are as hard for both runs, and only those answered differently tell them apart. Two answers are
given: the interval of the difference from a bootstrap over videos, in which questions of one video
stand together, and McNemar's exact test, which takes questions as independent and is thus too sure
where videos have many. All differences are B minus A. Free of torch. Next: `scoring.py`.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo.eval import report
from apollo.eval.scoring import (
    GROUPINGS,
    Prediction,
    groups_of,
    numbers_of,
    read_predictions,
    resampled_ratios,
)

MAX_NAMED = 5  # questions named in an error
MAX_LISTED = 50  # questions of each kind listed on the page
Z2 = 1.96**2  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Difference:
    """How two runs compare on some questions; all fractions in [0, 1] or [-1, 1].

    Attributes:
        both_right: Questions that both answered right.
        only_a: Only A did.
        only_b: Only B did.
        both_wrong: Neither did.
        low: Lower end of the 95 % interval of B's accuracy minus A's.
        high: Upper end.
        p: Two-sided exact McNemar test of "only A" against "only B".
    """

    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    low: float
    high: float
    p: float

    @property
    def num_questions(self) -> int:
        """How many were compared."""
        return self.both_right + self.only_a + self.only_b + self.both_wrong

    @property
    def accuracy_a(self) -> float:
        """Right answers of A over all."""
        return (self.both_right + self.only_a) / self.num_questions

    @property
    def accuracy_b(self) -> float:
        """Right answers of B over all."""
        return (self.both_right + self.only_b) / self.num_questions

    @property
    def difference(self) -> float:
        """B's accuracy minus A's."""
        return (self.only_b - self.only_a) / self.num_questions


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same questions under one condition.

    Attributes:
        condition: The condition.
        groups: grouping -> group -> difference, as in `scoring.Tables`.
        only_in_a: Questions left out since B was not asked them, as "benchmark / question_id".
        only_in_b: The same for A.
        won: Questions that only B answered right.
        lost: Questions that only A answered right.
    """

    condition: str
    groups: dict[str, dict[str, Difference]]
    only_in_a: list[str]
    only_in_b: list[str]
    won: list[str]
    lost: list[str]


def compare(
    predictions_a: Sequence[Prediction],
    predictions_b: Sequence[Prediction],
    condition: str = "video",
    common: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compare two runs question by question; no answer is wrong.

    Args:
        predictions_a: Of run A; those of other conditions do not count.
        predictions_b: Of run B.
        condition: What the models were shown.
        common: Leave out questions that one run alone was asked, instead of refusing.
        seed: Of the bootstrap.

    Raises:
        ValueError: A run has nothing under the condition, or the questions are not the same.
    """
    by_name_a = _by_name(predictions_a, condition, "A")
    by_name_b = _by_name(predictions_b, condition, "B")
    only_in_a, only_in_b = (
        sorted(by_name_a.keys() - by_name_b),
        sorted(by_name_b.keys() - by_name_a),
    )
    if (only_in_a or only_in_b) and not common:
        parts = [
            f"{len(names)} in {run} alone ({_first(names)})"
            for run, names in (("A", only_in_a), ("B", only_in_b))
            if names
        ]
        raise ValueError(
            f"the runs were not asked the same: {'; '.join(parts)}; compare what both have with "
            "--common"
        )
    names = sorted(by_name_a.keys() & by_name_b)
    if not names:
        raise ValueError("the runs have no question in common")
    asked, others = [by_name_a[name] for name in names], [by_name_b[name] for name in names]
    changed = [
        name
        for name, a, b in zip(names, asked, others, strict=True)
        if (a.video, a.num_options, a.answer) != (b.video, b.num_options, b.answer)
    ]
    if changed:
        raise ValueError(
            f"{len(changed)} questions have another video or right answer in B "
            f"({_first(changed)}); the benchmark was changed between the runs"
        )
    right_a = np.array([prediction.correct for prediction in asked])
    right_b = np.array([prediction.correct for prediction in others])
    videos, _ = numbers_of([(prediction.benchmark, prediction.video) for prediction in asked])
    groups = {}
    for grouping, group_of in GROUPINGS.items():
        values = [group_of(prediction) for prediction in asked]
        if any(values):
            groups[grouping] = {
                group: difference_of(right_a[rows], right_b[rows], videos[rows], seed)
                for group, rows in groups_of(values).items()
            }
    return Comparison(
        condition=condition,
        groups=groups,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        won=[names[row] for row in np.flatnonzero(right_b & ~right_a)],
        lost=[names[row] for row in np.flatnonzero(right_a & ~right_b)],
    )


def _by_name(predictions: Sequence[Prediction], condition: str, run: str) -> dict[str, Prediction]:
    """The predictions under a condition by "benchmark / question_id"."""
    by_name: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.condition == condition:
            name = f"{prediction.benchmark} / {prediction.question_id}"
            if name in by_name:
                raise ValueError(f"run {run} has two predictions for {name}")
            by_name[name] = prediction
    if not by_name:
        there = ", ".join(sorted({prediction.condition for prediction in predictions}))
        raise ValueError(
            f"run {run} has no predictions under {condition!r}, only under: {there or 'nothing'}"
        )
    return by_name


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


# ---- statistics


def difference_of(
    right_a: np.ndarray, right_b: np.ndarray, videos: np.ndarray, seed: int = 0
) -> Difference:
    """Compare right and wrong answers to the same questions.

    Args:
        right_a: bool (N questions,).
        right_b: bool (N,).
        videos: int (N,), which questions are about the same video.
        seed: Of the bootstrap.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    low, high = difference_interval(right_a, right_b, videos, seed)
    return Difference(
        both_right=int((right_a & right_b).sum()),
        only_a=only_a,
        only_b=only_b,
        both_wrong=int((~right_a & ~right_b).sum()),
        low=low,
        high=high,
        p=mcnemar(only_a, only_b),
    )


def difference_interval(
    right_a: np.ndarray, right_b: np.ndarray, videos: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the accuracy of B minus that of A, resampling whole videos.

    Where the difference is the same in all videos (or there is one only), a bootstrap would claim
    certainty. There the interval reaches (1 + |d|) z^2 / (V + z^2) to either side of the difference
    d: what Tango's score interval (Statistics in Medicine 1998, 17:891) gives for V pairs that are
    all alike, d being -1, 0 or 1.
    """
    _, numbers = np.unique(videos, return_inverse=True)
    gained = np.bincount(numbers, weights=right_b.astype(float) - right_a).astype(np.int64)
    asked = np.bincount(numbers)
    if (gained * asked[0] == gained[0] * asked).all():
        middle = gained.sum() / asked.sum()
        reach = (1 + abs(middle)) * Z2 / (len(asked) + Z2)
        return max(-1.0, float(middle - reach)), min(1.0, float(middle + reach))
    sign = -1 if gained.sum() < 0 else 1  # the same draws if the runs are swapped
    ratios = sign * resampled_ratios(sign * gained, asked, seed)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test: a fair coin's chance of so uneven a split, or worse.

    Sums the binomial terms from the largest down, each from the one before, so that a million
    questions cost no more than a thousand.
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    log_term = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1)
    ratio, series = 1.0, 0.0  # of a term to the largest, and their sum
    for k in range(fewer, -1, -1):
        series += ratio
        ratio *= k / (total - k + 1)
        if ratio < 1e-17 * series:
            break
    return min(1.0, 2 * series * math.exp(log_term - total * math.log(2)))


# ---- telling


def verdict(difference: Difference) -> str:
    """What the overall numbers say, in a sentence."""
    points, low, high = (f"{value:+.1f}" for value in points_of(difference))
    if difference.low > 0:
        judgement = "B is better than A"
    elif difference.high < 0:
        judgement = "A is better than B"
    else:
        judgement = "no difference is shown"
    return (
        f"B minus A: {points} points (95 % interval {low} to {high}), exact McNemar "
        f"{format_p(difference.p)}: {judgement}."
    )


def format_p(p: float) -> str:
    """A p-value with three digits after the point, or its bound."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def points_of(difference: Difference) -> tuple[float, float, float]:
    """The difference and the ends of its interval in points, hundredths."""
    return 100 * difference.difference, 100 * difference.low, 100 * difference.high


def counts_of(difference: Difference) -> tuple[int, int, int, int]:
    """Questions that both, A alone, B alone, or neither answered right."""
    return difference.both_right, difference.only_a, difference.only_b, difference.both_wrong


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the differences by class and overall, and what they say; 80 columns suffice."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    for column in ("asked", "A", "B", "B - A (95 %)", "p", "both/A/B/0"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = comparison.groups.get("class", {}) | comparison.groups["overall"]
    for group, difference in groups.items():
        points, low, high = points_of(difference)
        table.add_row(
            escape(group),
            str(difference.num_questions),
            f"{100 * difference.accuracy_a:.1f}",
            f"{100 * difference.accuracy_b:.1f}",
            f"{points:+.1f} ({low:+.1f} to {high:+.1f})",
            format_p(difference.p).lstrip("p =").replace(" ", ""),
            "/".join(map(str, counts_of(difference))),
        )
    console.print(table)
    for sentence in notes_on(comparison):
        console.print(escape(sentence), highlight=False, soft_wrap=True)


def notes_on(comparison: Comparison) -> list[str]:
    """The verdict, and what was left out."""
    notes = [verdict(comparison.groups["overall"]["all"])]
    for run, names in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if names:
            notes.append(f"Left out: {len(names)} questions of run {run} alone ({_first(names)}).")
    return notes


def comparison_page(comparison: Comparison, run_a: str, run_b: str) -> str:
    """Draw a comparison as one HTML page.

    Args:
        comparison: The result.
        run_a: What A is called.
        run_b: What B is called.
    """
    sections = [
        report.paragraph(f"A: {run_a}. B: {run_b}. Condition: {comparison.condition}."),
        *map(report.paragraph, notes_on(comparison)),
        report.paragraph(
            "Bars show B minus A with its 95 % interval over videos; the tick is no difference. "
            "McNemar's test takes questions as independent. Of twenty groups, one has p < 0.05 by "
            "chance alone."
        ),
    ]
    for grouping, groups in comparison.groups.items():
        if grouping == "overall" or len(groups) > 1:
            sections += [report.heading(grouping.capitalize()), difference_table(grouping, groups)]
    for title, names in (
        ("Right in B only", comparison.won),
        ("Right in A only", comparison.lost),
    ):
        more = f"\n... and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        listed = "\n".join(names[:MAX_LISTED]) + more
        sections.append(report.details(f"{title}: {len(names)} questions", listed or "none"))
    return report.page("Two runs compared", *sections)


def difference_table(name: str, groups: Mapping[str, Difference]) -> Markup:
    """A row per group.

    Args:
        name: Heading of the first column, such as "class".
        groups: group -> difference.
    """
    columns = (
        "questions",
        "A",
        "B",
        "B - A",
        "McNemar",
        "both right",
        "only A",
        "only B",
        "neither",
    )
    rows = [
        [
            group,
            str(difference.num_questions),
            f"{100 * difference.accuracy_a:.1f}",
            f"{100 * difference.accuracy_b:.1f}",
            report.difference_bar(difference.difference, difference.low, difference.high),
            format_p(difference.p),
            *map(str, counts_of(difference)),
        ]
        for group, difference in groups.items()
    ]
    return report.table([name, *columns], rows, f"A and B by {name}")


def main(args: argparse.Namespace) -> int:
    """Run `apollo compare RUN_A RUN_B`.

    Args:
        args: run_a, run_b (folders of evaluations, or their predictions.jsonl), condition, common
            (whether questions of one run alone are left out), out (HTML file to write, or None).
    """
    path_a, path_b = predictions_path(args.run_a), predictions_path(args.run_b)
    comparison = compare(
        read_predictions(path_a), read_predictions(path_b), args.condition, args.common
    )
    console = Console()
    print_comparison(comparison, console)
    if args.out:
        page = comparison_page(comparison, str(args.run_a), str(args.run_b))
        try:
            Path(args.out).write_text(page, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {args.out}: {error.strerror}") from None
        console.print(f"Page: {args.out}", soft_wrap=True, highlight=False, markup=False)
    return 0


def predictions_path(run: str | Path) -> Path:
    """The predictions.jsonl of a run's folder, or the file itself.

    Raises:
        ValueError: The folder has none; a run that was stopped has them when it is finished.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "predictions.jsonl"
        if not path.is_file():
            raise ValueError(
                f"no predictions.jsonl in {run}; if that evaluation was stopped, finish it by the "
                "command that began it"
            )
    return path
