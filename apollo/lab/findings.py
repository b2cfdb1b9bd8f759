"""`docs/findings.md`: the paper's ten findings, each with its number, ours, and a verdict.

Written by `apollo study report` from ledgers alone, so that whoever has the ledgers has the page,
byte for byte; nothing in it is typed by hand, and what was not reproduced stays. Free of torch.
Next: `report.py`, which makes the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apollo.lab.consistency import COLOURS, draw_points, png_of, sections_of
from apollo.lab.ledger import Line
from apollo.lab.report import (
    NOT_RUN,
    RULE,
    Effect,
    effects,
    finding_verdicts,
    level_estimates,
    scaling_of,
    seed_spread,
    values_of,
)
from apollo.lab.scaling import Estimate
from apollo.lab.spec import Study
from apollo.lab.tables import ScoreTable

FINDINGS = {
    1: "Scaling Consistency: choices made on models of moderate size hold for larger ones.",
    2: "Sampling at a constant rate beats uniform sampling, in training and in test.",
    3: "Tokens per second and frames per second trade off; 8 to 32 tokens per frame are best.",
    4: "SigLIP is the best single encoder.",
    5: "SigLIP with InternVideo2 is the best pair.",
    6: "The Perceiver resampler reduces tokens best.",
    7: "Any tokens between the clips of a video suffice.",
    8: "Unfreezing the parts one stage after another is best.",
    9: "Training the encoders on video data alone helps.",
    10: "Some 10 to 14 % of text and slightly more video than images are best.",
}
"""Number -> the paper's finding."""
HEAD = """# What the lab found

Written by `apollo study report` from the ledgers; do not edit. Scores are per cent right on
held-out questions. How to run, resume and add studies: [studies.md](studies.md)."""


def write_findings(
    path: Path, studies: Sequence[Study], ledgers: Mapping[str, Sequence[Line]]
) -> None:
    """Write the page, and its figures into the folder `figures` beside it.

    Args:
        path: The Markdown file.
        studies: All studies, of one scale.
        ledgers: Name of a study -> lines of its ledger.
    """
    figures: dict[str, bytes] = {}
    text = findings_text(studies, ledgers, figures)
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in figures.items():
        (folder / name).write_bytes(png)
    path.write_text(text, encoding="utf-8")


def findings_text(
    studies: Sequence[Study], ledgers: Mapping[str, Sequence[Line]], figures: dict[str, bytes]
) -> str:
    """The page; figures are added to `figures` by file name."""
    verdicts = finding_verdicts(studies, ledgers)
    parts = [
        HEAD,
        RULE,
        _table(
            ["", "the paper's finding", "verdict"],
            [[f"{n}", says, f"**{verdicts.get(n, NOT_RUN)}**"] for n, says in FINDINGS.items()],
        ),
    ]
    noise = seed_spread(studies, ledgers)
    for study in studies:
        parts.append(_study(study, ledgers.get(study.name, []), noise, figures))
    parts.append(_conditions(studies, ledgers))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _study(
    study: Study, lines: Sequence[Line], noise: float | None, figures: dict[str, bytes]
) -> str:
    """A study's section: its claims, its scores, its figure, and what it lacks."""
    about = f"{study.about.strip()} The paper: {study.mirrors}." if study.mirrors else study.about
    parts = [f"## {study.name}", about, *([study.gaps] if study.gaps else [])]
    values = values_of(study, lines, study.metric)
    if not values:
        return "\n\n".join([*parts, "Not run yet."])
    if found := effects(study, lines):
        parts.append(_claims(found))
    scaling = scaling_of(study, lines, noise) if study.size_axis else None
    if scaling:
        parts.append(f"That the sizes agree: **{scaling.verdict}**.")
        if noise is not None:
            parts.append(f"Noise: {noise:.1f} points, the spread over seeds in all studies.")
        for whose, file, table, result in (
            ("ours", "ours", scaling.table, scaling.found),
            ("the paper's", "paper", scaling.paper, scaling.paper_found),
        ):
            name = f"{study.name}-{file}.png"
            figures[name] = draw_points(table, result)
            sentences = sections_of(table, result)[0].sentences
            parts.append(f"{whose.capitalize()}:")
            parts.append("\n".join(f"- {one}" for one in sentences))
            parts.append(f"![{whose}](figures/{name})")
        parts.append(_sizes_table(scaling.table))
    else:
        figures[f"{study.name}.png"] = draw_levels(study, lines)
        parts += [f"![{study.name}](figures/{study.name}.png)", scores_table(study, lines)]
    return "\n\n".join(part.strip() for part in parts)


def _sizes_table(table: ScoreTable) -> str:
    rows = [
        [name, *(f"{score:.1f}" for score in scores)]
        for name, scores in zip(table.variants, table.scores, strict=True)
    ]
    return _table([" ".join(table.key_columns), *table.size_names], rows)


def _claims(found: Sequence[Effect]) -> str:
    rows = [
        [
            effect.claim.says,
            "" if effect.paper is None else f"{effect.paper:+.1f}",
            points(effect.estimate) if effect.estimate else "",
            str(effect.num_runs),
            f"**{effect.verdict}**",
        ]
        for effect in found
    ]
    return _table(["claim", "paper", "ours (95 %)", "trainings", "verdict"], rows)


def points(difference: Estimate) -> str:
    """A difference in points with its interval, as "+5.2 (+1.0 to +9.4)"."""
    if np.isnan(difference.low):
        return f"{difference.value:+.1f} (one seed: no interval)"
    return f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"


def scores_table(study: Study, lines: Sequence[Line]) -> str:
    """Mean of every metric at each combination of levels, beside the paper's score."""
    of_metric = {name: values_of(study, lines, name) for name in study.asking}
    main = level_estimates(of_metric[study.metric])
    printed = study.paper.get(study.metric, {})
    others = [name for name in study.asking if name != study.metric]
    rows = []
    for levels, estimate in main.items():
        seeds = of_metric[study.metric][levels]
        rows.append(
            [
                *levels,
                f"{printed[levels]:.1f}" if levels in printed else "",
                f"{estimate.value:.1f}"
                + ("" if np.isnan(estimate.low) else f" ± {estimate.high - estimate.value:.1f}"),
                *(f"{np.mean([*of_metric[name][levels].values()]):.1f}" for name in others),
                str(len(seeds)),
            ]
        )
    return _table([*study.axes, "paper", study.metric, *others, "seeds"], rows)


def _conditions(studies: Sequence[Study], ledgers: Mapping[str, Sequence[Line]]) -> str:
    """What was run on, how long it took, how much of each study is there."""
    rows = []
    for study in studies:
        lines = ledgers.get(study.name, [])
        machines = {
            (e.get("gpu") or e.get("cpu") or "unknown") + f", torch {e.get('torch')}"
            for e in (line.get("environment", {}) for line in lines)
        }
        hours = sum(line["seconds"] for line in lines) / 3600
        num_points = sum(1 for _ in study.points())
        rows.append(
            [
                study.name,
                f"{len(lines)} of {num_points}",
                f"{hours:.2f}",
                "; ".join(sorted(machines)),
            ]
        )
    return "## Conditions\n\n" + _table(["study", "points run", "hours", "on"], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def draw_levels(study: Study, lines: Sequence[Line]) -> bytes:
    """Our score at each combination of levels, seeds as dots, beside the paper's.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    values = values_of(study, lines, study.metric)
    estimates = level_estimates(values)
    printed = study.paper.get(study.metric, {})
    names = [", ".join(levels) for levels in estimates]
    num_panels = 2 if printed else 1
    height = 1.2 + 0.28 * len(names)
    figure = Figure(figsize=(4.6 * num_panels, height), dpi=110, layout="constrained")
    panels = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    _draw_ours(panels[0], estimates, values)
    if printed:
        scores = [printed.get(levels, np.nan) for levels in estimates]
        panels[1].plot(scores, range(len(names)), "D", color=COLOURS[1], markersize=5)
        panels[1].set_title("the paper's", fontsize=9)
        panels[1].grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # downwards, with room around the outermost
    figure.supxlabel(f"{study.metric}: per cent right", fontsize=8)
    return png_of(figure)


def _draw_ours(axes: Any, estimates: Mapping[Any, Estimate], values: Mapping[Any, Any]) -> None:
    for row, (levels, estimate) in enumerate(estimates.items()):
        seeds = list(values[levels].values())
        axes.plot(seeds, [row] * len(seeds), ".", color="#9aa4b1", markersize=5)
        if not np.isnan(estimate.low):
            axes.plot([estimate.low, estimate.high], [row, row], color=COLOURS[0], linewidth=1.4)
        axes.plot(estimate.value, row, "o", color=COLOURS[0], markersize=5)
    axes.set_title("ours, 95 % interval, seeds", fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
