"""From ledgers to tables, effects and verdicts: what was found beside what the paper printed.

Here because a difference between two trainings means nothing without what the seed alone does.
The spread over seeds is pooled over all points of a study, for three seeds of two points alone say
little of it; what it makes of a claim follows a rule that stands in `judge`. Everything is a
function of the ledgers' lines: the same lines give the same report. Free of torch. Next:
`findings.py`, the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apollo.lab.ledger import Line
from apollo.lab.scaling import RELIABLE, Consistency, Estimate, analyse, t_quantile
from apollo.lab.spec import PAPER_DIR, Claim, Side, Study
from apollo.lab.tables import Columns, ScoreTable, make_table, read_table

MATTERS = 2.0
"""Points below which a difference would change nobody's choice."""
REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_RUN = "not run"
RULE = (
    f"A claim that one side scores more is *{REPRODUCED}* if the whole 95 % interval of the "
    f"difference is above zero, *{NOT_REPRODUCED}* if all of it is below {MATTERS:g} points (a "
    f"smaller gain would change nobody's choice), else *{UNDECIDED}*. A claim that there is no "
    f"difference is reproduced if the interval lies within {MATTERS:g} points of zero, not "
    "reproduced if all of it lies outside. Intervals are Student's t of the spread over seeds, "
    "pooled over all points of a study. R2 between sizes is reproduced if its interval is all "
    f"above {RELIABLE:g}, not reproduced if all below, unless the spread over seeds, as in the "
    "other studies, would alone keep it there."
)

Levels = tuple[str, ...]
Values = dict[Levels, dict[int, float]]
"""Levels, one of each axis -> seed -> value of a metric."""


@dataclass(frozen=True)
class Effect:
    """What became of a claim.

    Attributes:
        claim: The claim.
        estimate: Difference in points with its interval; None if a side has no finished point.
        num_runs: Trainings on both sides.
        paper: The paper's difference, if it has one.
        verdict: By `RULE`.
    """

    claim: Claim
    estimate: Estimate | None
    num_runs: int
    paper: float | None
    verdict: str


def values_of(study: Study, lines: Sequence[Line], metric: str) -> Values:
    """The finished values of a metric, in the order of the study's points.

    Lines of levels or seeds that the study has no more do not count.
    """
    by_levels: Values = {
        tuple(point.levels.values()): {} for point in study.points()
    }  # all, so that the order is the study's
    for line in lines:
        levels = tuple(line["levels"].get(axis, "") for axis in study.axes)
        if levels in by_levels and line["seed"] in study.seeds and metric in line["metrics"]:
            by_levels[levels][line["seed"]] = line["metrics"][metric]
    return {levels: dict(sorted(seeds.items())) for levels, seeds in by_levels.items() if seeds}


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled, and its degrees of freedom."""
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum(((np.asarray(group) - np.mean(group)) ** 2).sum() for group in groups)
    return (math.sqrt(squares / degrees) if degrees else math.nan), degrees


def level_estimates(values: Values) -> dict[Levels, Estimate]:
    """Mean of each level over its seeds, its interval from the spread pooled over all."""
    spread, degrees = pooled_spread([list(seeds.values()) for seeds in values.values()])
    found = {}
    for levels, seeds in values.items():
        mean = float(np.mean(list(seeds.values())))
        reach = t_quantile(degrees) * spread / math.sqrt(len(seeds)) if degrees else math.nan
        found[levels] = Estimate(mean, mean - reach, mean + reach)
    return found


def effects(study: Study, lines: Sequence[Line]) -> list[Effect]:
    """What became of each claim of a study."""
    return [_effect(study, lines, claim) for claim in study.claims]


def _effect(study: Study, lines: Sequence[Line], claim: Claim) -> Effect:
    more, less = (
        values_of(study, lines, side.metric or study.metric) for side in (claim.more, claim.less)
    )
    if claim.more.levels == claim.less.levels:  # the same models, asked in two ways
        both = {
            levels: {seed: value - less[levels][seed] for seed, value in seeds.items()}
            for levels, seeds in more.items()
            if levels in less and seeds.keys() <= less[levels].keys()
        }
        signed = [(1.0, both, claim.more)]
        spread, degrees = pooled_spread([list(seeds.values()) for seeds in both.values()])
    else:
        signed = [(1.0, more, claim.more), (-1.0, less, claim.less)]
        # Groups of both metrics; where they are one, each group counts once.
        metrics = [more] if claim.more.metric == claim.less.metric else [more, less]
        groups = [list(seeds.values()) for values in metrics for seeds in values.values()]
        spread, degrees = pooled_spread(groups)
    difference, variance, num_runs = 0.0, 0.0, 0
    paper = _paper_difference(study, claim)
    for sign, values, side in signed:
        chosen = [seeds for levels, seeds in values.items() if is_of(side, study, levels)]
        if not chosen:
            return Effect(claim, None, 0, paper, NOT_RUN)
        difference += sign * float(np.mean([np.mean(list(seeds.values())) for seeds in chosen]))
        variance += sum(1 / len(seeds) for seeds in chosen) / len(chosen) ** 2
        num_runs += sum(map(len, chosen))
    reach = t_quantile(degrees) * spread * math.sqrt(variance) if degrees else math.nan
    estimate = Estimate(difference, difference - reach, difference + reach)
    return Effect(claim, estimate, num_runs, paper, judge(estimate, claim.same))


def is_of(side: Side, study: Study, levels: Levels) -> bool:
    """Whether a combination of levels belongs to a side."""
    by_axis = dict(zip(study.axes, levels, strict=True))
    return all(by_axis[axis] in chosen for axis, chosen in side.levels.items())


def _paper_difference(study: Study, claim: Claim) -> float | None:
    if claim.paper is not None:
        return claim.paper
    means = []
    for side in (claim.more, claim.less):
        printed = study.paper.get(side.metric or study.metric, {})
        scores = [score for levels, score in printed.items() if is_of(side, study, levels)]
        num_wanted = math.prod(len(side.levels.get(axis, of)) for axis, of in study.axes.items())
        if len(scores) < num_wanted:
            return None
        means.append(sum(scores) / len(scores))
    return means[0] - means[1]


def judge(difference: Estimate, same: bool) -> str:
    """Say what an interval makes of a claim; see `RULE`."""
    low, high = difference.low, difference.high
    if math.isnan(low):
        return UNDECIDED
    if same:
        if -MATTERS < low and high < MATTERS:
            return REPRODUCED
        return NOT_REPRODUCED if low > MATTERS or high < -MATTERS else UNDECIDED
    if low > 0:
        return REPRODUCED
    return NOT_REPRODUCED if high < MATTERS else UNDECIDED


def judge_all(verdicts: Sequence[str]) -> str:
    """The verdict on a finding from those on its claims: the weakest that was run."""
    run = [verdict for verdict in verdicts if verdict != NOT_RUN]
    for verdict in (NOT_REPRODUCED, UNDECIDED):
        if verdict in run:
            return verdict
    return REPRODUCED if run else NOT_RUN


# ---- scaling


@dataclass(frozen=True)
class Scaling:
    """Consistency between sizes as the lab found it and as the paper printed it.

    Attributes:
        table: Our scores.
        found: What `scaling.analyse` says of them.
        paper: The paper's 84 rows.
        paper_found: The same of them.
        verdict: On R2 of the last but one size to the largest.
    """

    table: ScoreTable
    found: Consistency
    paper: ScoreTable
    paper_found: Consistency
    verdict: str


def seed_spread(studies: Sequence[Study], ledgers: Mapping[str, Sequence[Line]]) -> float | None:
    """Standard deviation over seeds of the studies' main metric, pooled over all, in points.

    None where no point has two seeds.
    """
    values = [values_of(study, ledgers.get(study.name, []), study.metric) for study in studies]
    groups = [list(seeds.values()) for each in values for seeds in each.values()]
    spread, degrees = pooled_spread(groups)
    return spread if degrees else None


def scaling_of(study: Study, lines: Sequence[Line], noise: float | None = None) -> Scaling | None:
    """Analyse a study of sizes; None while too few of its variants have all sizes.

    Args:
        study: Which.
        lines: Of its ledger.
        noise: See `seed_spread`.
    """
    rows = [
        dict(zip(study.axes, levels, strict=True)) | {"seed": seed, "score": value}
        for levels, seeds in values_of(study, lines, study.metric).items()
        for seed, value in seeds.items()
    ]
    others = [axis for axis in study.axes if axis != study.size_axis]
    columns = Columns(score="score", size=study.size_axis, variant=others)
    try:
        table = make_table(rows, columns)
        found = analyse(table, noise=noise)
    except ValueError:
        return None
    paper = read_table(PAPER_DIR / "scaling_consistency.csv")
    r2 = found.to_largest()[-1].r2
    verdict = UNDECIDED
    if r2.low >= RELIABLE:
        verdict = REPRODUCED
    elif r2.high < RELIABLE <= (found.ceilings or [1.0])[-1]:
        verdict = NOT_REPRODUCED
    return Scaling(table, found, paper, analyse(paper), verdict)


def finding_verdicts(
    studies: Sequence[Study], ledgers: Mapping[str, Sequence[Line]]
) -> dict[int, str]:
    """Number of a finding -> its verdict, from the claims of all studies."""
    verdicts: dict[int, list[str]] = {}
    noise = seed_spread(studies, ledgers)
    for study in studies:
        lines = ledgers.get(study.name, [])
        for effect in effects(study, lines):
            verdicts.setdefault(effect.claim.finding, []).append(effect.verdict)
        if study.size_axis:
            scaling = scaling_of(study, lines, noise)
            verdicts.setdefault(1, []).append(scaling.verdict if scaling else NOT_RUN)
    return {finding: judge_all(each) for finding, each in sorted(verdicts.items())}
