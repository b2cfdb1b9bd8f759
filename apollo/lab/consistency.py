"""`apollo consistency TABLE.csv`: tell what `scaling.py` found, in words, tables and two figures.

Here because the reader should learn in one sentence each what an agreement between sizes rests on,
and see the points. The same sections are printed and written as Markdown and HTML; all numbers are
in consistency.json. Free of torch. Next: `docs/consistency.md`, how to read it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo.eval import report
from apollo.lab.scaling import (
    NUM_RESAMPLES,
    RELIABLE,
    Consistency,
    Estimate,
    analyse,
    groups_to_leave_out,
    within,
)
from apollo.lab.tables import Columns, ScoreTable, parse_size, read_table

NUM_LEFT_OUT = 5
"""Groups that are shown; the others are in the JSON."""
COLOURS = ("#3b7dd8", "#d1722b", "#2f8f5b", "#a04fb5", "#b3363e", "#7a6a2f", "#4a4a4a", "#1f9aa8")
PRECISION = ".3f"


@dataclass(frozen=True)
class Section:
    """A piece of a report, to be printed or drawn.

    Attributes:
        title: Its heading.
        sentences: What is said.
        columns: Heads of its table, if it has one.
        rows: Cells.
        figures: Alternative text -> PNG.
    """

    title: str
    sentences: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)


def main(args: argparse.Namespace) -> int:
    """Run `apollo consistency TABLE`.

    Args:
        args: table (CSV or Parquet), score, size, sizes, variant, factor (columns, or None), noise
            (points, or None), to (sizes to extrapolate to), out (folder to write to, or None).
    """
    columns = Columns(
        score=args.score or "",
        size=args.size or "",
        sizes=args.sizes or (),
        variant=args.variant or (),
        factors=args.factor or (),
    )
    table = read_table(args.table, columns)
    targets = sorted(parse_size(size, table) for size in args.to or ())
    found = analyse(table, targets, noise=args.noise)
    sections = sections_of(table, found)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    print_sections(sections, console)
    if args.out:
        write_report(Path(args.out), Path(args.table).name, table, found, sections)
        names = "consistency.html, .md, .json, points.png and sizes.png"
        console.print(f"{names} are in {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


# ---- what is said


def sections_of(table: ScoreTable, found: Consistency) -> list[Section]:
    """Lay out what was found, without figures."""
    num_variants, num_sizes = table.scores.shape
    return [
        Section(
            "What it rests on",
            [f"{num_variants} variants at {num_sizes} sizes.", *_findings(table, found)],
        ),
        _pairs(table, found),
        *_factors(table, found),
        *_left_out(table, found),
        Section("How the table was read", [*table.notes, _method(num_variants)]),
    ]


def _findings(table: ScoreTable, found: Consistency) -> list[str]:
    """The result in sentences, each with its numbers."""
    names, largest = table.size_names, table.size_names[-1]
    down = found.to_largest()[::-1]
    sizes = _and([names[pair.small] for pair in down])
    lines = [f"R2 of {sizes} to {largest}: {_and([f'{p.r2.value:.3f}' for p in down])}."]
    if found.ceilings:
        left = _three(found.ceilings)
        lines.append(f"Were they to agree fully, the noise of the scores would leave {left}.")
    factor = found.factors[0] if found.factors else None
    if factor:
        r2 = [f"{one.value:.3f}" for one in factor.r2_within[::-1]]
        explained = 100 * factor.explained[-1]
        lines.append(
            f"Within each {factor.name}, which explains {explained:.0f} % of the variance at "
            f"{largest}: {_and(r2)}."
        )
    if found.left_out:
        out = found.left_out[0]
        line = f"Without {out.name} ({_variants(out.num_variants)}): {_three(out.r2)}"
        if factor:
            line += f"; and within each {factor.name}: {_three(out.r2_within)}"
        lines.append(line + ".")
    lines.append(_reliable_sentence(table, found))
    losses = [
        f"{names[p.small]} {p.regret.value:.2f} ({p.regret.low:.2f} to {p.regret.high:.2f})"
        for p in down
    ]
    lines.append(
        f"Points lost at {largest} by taking the best variant of a smaller size: {_and(losses)}."
    )
    if found.line:
        lines += _line_sentences(table, found)
    if negative := [names[p.small] for p in down if p.pearson.value < 0]:
        lines.append(
            f"Beware: the correlation of {_and(negative)} with {largest} is negative; "
            "R2 hides that."
        )
    return lines


def _reliable_sentence(table: ScoreTable, found: Consistency) -> str:
    largest = table.size_names[-1]
    if found.reliable is None:
        return f"No smaller size is reliable (R2 of at least {RELIABLE:g} to {largest})."
    text = (
        f"The smallest reliable size is {table.size_names[found.reliable]} (R2 of at least "
        f"{RELIABLE:g} to {largest})"
    )
    if found.surely_reliable is None:
        return f"{text}, but the interval is sure of none."
    return f"{text}; the interval is sure of {table.size_names[found.surely_reliable]}."


def _line_sentences(table: ScoreTable, found: Consistency) -> list[str]:
    line = found.line
    assert line is not None
    unit = " (two points, so the line fits whatever they are)" if len(table.sizes) == 3 else ""
    first = (
        f"Log-linear fit: R2 to {table.size_names[-1]} = {line.slope.value:.2f} * ln(size) + "
        f"{line.intercept.value:.2f}, slope {line.slope.low:.2f} to {line.slope.high:.2f}{unit}"
    )
    if line.reaches:
        first += (
            f"; it reaches {RELIABLE:g} at {line.reaches.value:.3g} "
            f"({line.reaches.low:.3g} to {line.reaches.high:.3g})"
        )
    beyond = [
        f"Extrapolated from all pairs, R2 of {table.size_names[-1]} to {target:g} is {r2:.2f}."
        for target, r2 in line.beyond.items()
    ]
    return [f"{first}.", *beyond]


def _pairs(table: ScoreTable, found: Consistency) -> Section:
    ks = list(found.pairs[0].overlap)
    return Section(
        "Between sizes",
        [
            "Regret is what is lost at the larger size by choosing the best variant of the smaller "
            "one; top k counts the k best that both sizes share."
        ],
        ["sizes", "R2", "Pearson", "Spearman", "Kendall", "regret", *(f"top {k}" for k in ks)],
        [
            [
                f"{table.size_names[pair.small]} to {table.size_names[pair.large]}",
                *(
                    format(one, PRECISION)
                    for one in (pair.r2, pair.pearson, pair.spearman, pair.kendall)
                ),
                format(pair.regret, ".2f"),
                *(f"{pair.overlap[k]}/{k}" for k in ks),
            ]
            for pair in found.pairs
        ],
    )


def _factors(table: ScoreTable, found: Consistency) -> list[Section]:
    if not found.factors:
        return []
    columns = [f"{name} to {table.size_names[-1]}" for name in table.size_names[-2::-1]]
    all_r2 = [format(pair.r2, PRECISION) for pair in found.to_largest()[::-1]]
    rows = [
        [
            factor.name,
            str(factor.num_levels),
            f"{100 * factor.explained[-1]:.0f} %",
            *(format(one, PRECISION) for one in factor.r2_within[::-1]),
        ]
        for factor in found.factors
    ]
    return [
        Section(
            "Carried by a factor",
            [
                "R2 after removing the mean of each value of a factor: what is left when variants "
                "are only compared with those that share it."
            ],
            ["within each", "values", f"explains at {table.size_names[-1]}", *columns],
            [["(all variants)", "1", "0 %", *all_r2], *rows],
        )
    ]


def _left_out(table: ScoreTable, found: Consistency) -> list[Section]:
    if not found.left_out:
        return []
    factor = found.factors[0].name if found.factors else ""
    smaller = table.size_names[-2::-1]
    columns = [f"{name} to {table.size_names[-1]}" for name in smaller]
    if factor:
        columns += [f"{name}, within {factor}" for name in smaller]
    return [
        Section(
            "Carried by one variant",
            [
                f"The {NUM_LEFT_OUT} of {len(found.left_out)} groups whose leaving moves R2 most. "
                "A group is a variant or all variants that share a value of its name, up to a "
                "quarter of them; means within a factor stay those of all variants."
            ],
            ["without", "variants", *columns],
            [
                [
                    out.name,
                    str(out.num_variants),
                    *(f"{value:.3f}" for value in (*out.r2[::-1], *out.r2_within[::-1])),
                ]
                for out in found.left_out[:NUM_LEFT_OUT]
            ],
        )
    ]


def _method(num_variants: int) -> str:
    return (
        f"Intervals hold 95 %, from {NUM_RESAMPLES} bootstrap resamples of the {num_variants} "
        "variants, taken as independent draws of what might be tried: of Pearson and R2 by the "
        "spread on Fisher's scale, of all else by percentiles."
    )


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _three(values: Sequence[float]) -> str:
    return _and([f"{value:.3f}" for value in values[::-1]])


def _variants(number: int) -> str:
    return f"{number} variant" + "s" * (number != 1)


# ---- printing and writing


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print titles, sentences and tables."""
    for section in sections:
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        for sentence in section.sentences:
            console.print(escape(sentence), highlight=False, soft_wrap=not section.columns)
        if section.columns:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for column in section.columns:
                table.add_column(escape(column), overflow="fold")
            for row in section.rows:
                table.add_row(*map(escape, row))
            console.print(table)


def to_markdown(title: str, sections: Sequence[Section], figures: Sequence[str] = ()) -> str:
    """Write sections as Markdown; `figures` are file names, shown after the first section."""
    lines = [f"# {title}", ""]
    for number, section in enumerate(sections):
        lines += [f"## {section.title}", "", *(f"- {one}" for one in section.sentences), ""]
        if section.columns:
            rows = [section.columns, ["---"] * len(section.columns), *section.rows]
            lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows] + [""]
        if number == 0:
            lines += [f"![{Path(name).stem}]({name})" for name in figures] + [""] * bool(figures)
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Draw sections as one page."""
    parts: list[Markup] = []
    for section in sections:
        parts += [report.heading(section.title), *map(report.paragraph, section.sentences)]
        if section.columns:
            parts.append(report.table(section.columns, section.rows, section.title))
        parts += [
            Markup('<div class="plots">{}</div>').format(report.image(png, alternative))
            for alternative, png in section.figures.items()
        ]
    return report.page(title, *parts)


def write_report(
    folder: Path,
    name: str,
    table: ScoreTable,
    found: Consistency,
    sections: Sequence[Section],
) -> None:
    """Write consistency.json, .md and .html and the figures into a folder.

    Args:
        folder: Made if need be.
        name: What the table is called.
        table: What was read.
        found: What was found.
        sections: What is said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"points.png": draw_points(table, found), "sizes.png": draw_sizes(table, found)}
    for file, png in figures.items():
        (folder / file).write_bytes(png)
    title = f"Scaling consistency of {name}"
    text = json.dumps(to_json(table, found), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "consistency.json").write_text(text + "\n", encoding="utf-8")
    page = [Section(s.title, s.sentences, s.columns, s.rows) for s in sections]
    page[0].figures["Scores of each variant at each smaller size and the largest"] = figures[
        "points.png"
    ]
    page[0].figures["R2 to the largest size over size"] = figures["sizes.png"]
    (folder / "consistency.html").write_text(to_html(title, page), encoding="utf-8")
    markdown = to_markdown(title, sections, list(figures))
    (folder / "consistency.md").write_text(markdown, encoding="utf-8")


def to_json(table: ScoreTable, found: Consistency) -> dict[str, Any]:
    """Everything as JSON values: sizes by index into `sizes`, no number where there is none."""
    return _without_nan(
        {
            "sizes": table.sizes,
            "size_names": table.size_names,
            "variants": table.variants,
            "scores": table.scores.tolist(),
            "factor_values": table.factors,
            "notes": table.notes,
            "rules": {"reliable_r2": RELIABLE, "num_resamples": NUM_RESAMPLES},
            **asdict(found),
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- figures


def draw_points(table: ScoreTable, found: Consistency) -> bytes:
    """Scores at each smaller size against those at the largest: above as they are, below within
    the main factor; the most influential variants are ringed.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    factor = found.factors[0].name if found.factors else ""
    labels = table.factors.get(factor, [""] * len(table.variants))
    levels = np.unique(labels, return_inverse=True)[1]
    ringed = np.zeros(len(levels), bool)
    if found.left_out:
        ringed = groups_to_leave_out(table)[found.left_out[0].name]
    ones = np.ones((1, len(levels)))
    left = np.stack([within(scores, levels, ones)[0] for scores in table.scores.T], axis=1)
    num_smaller = len(table.sizes) - 1
    rows = [("score", table.scores)] + ([(f"within {factor}", left)] if factor else [])
    figure = Figure(figsize=(3.1 * num_smaller, 3.0 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), num_smaller, squeeze=False)
    for row, (what, scores) in enumerate(rows):
        for small, axes in enumerate(panels[row]):
            for level, name in enumerate(dict.fromkeys(sorted(labels))):
                at = levels == level
                colour = COLOURS[level % len(COLOURS)]
                axes.scatter(scores[at, small], scores[at, -1], s=18, color=colour, label=name)
            if ringed.any():
                axes.scatter(
                    scores[ringed, small],
                    scores[ringed, -1],
                    s=70,
                    facecolors="none",
                    edgecolors="#222222",
                    linewidths=0.8,
                    label=found.left_out[0].name,
                )
            r2 = (found.factors[0].r2_within if row else [p.r2 for p in found.to_largest()])[small]
            axes.set_title(f"{table.size_names[small]}: R2 {r2.value:.3f}", fontsize=9)
            axes.set_xlabel(f"{what} at {table.size_names[small]}", fontsize=8)
            axes.set_ylabel(f"{what} at {table.size_names[-1]}", fontsize=8)
            axes.tick_params(labelsize=7)
    handles, names = panels[0][0].get_legend_handles_labels()
    if len(handles) > 1 and len(handles) <= len(COLOURS) + 1:
        figure.legend(
            handles, names, loc="outside lower center", ncols=len(handles), fontsize=8, title=factor
        )
    return png_of(figure)


def draw_sizes(table: ScoreTable, found: Consistency) -> bytes:
    """R2 to the largest size over size: as it is, within the main factor, without the outlier.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.3), dpi=110, layout="constrained")
    axes = figure.subplots()
    sizes = np.array(table.sizes[:-1])
    _curve(axes, sizes, [pair.r2 for pair in found.to_largest()], COLOURS[0], "all variants")
    inside = ""
    if found.factors:
        inside = f"within each {found.factors[0].name}"
        _curve(axes, sizes * 1.04, found.factors[0].r2_within, COLOURS[1], inside)
    if found.left_out:
        out = found.left_out[0]
        values, label = out.r2_within or out.r2, f"{inside} without {out.name}".strip()
        axes.plot(sizes, values, "o--", color=COLOURS[4], markersize=4, linewidth=1, label=label)
    if found.line:
        ends = np.array(table.sizes)[[0, -1]]
        fit = found.line.intercept.value + found.line.slope.value * np.log(ends)
        axes.plot(ends, fit, color=COLOURS[0], linewidth=1, alpha=0.4, label="log-linear fit")
    axes.axhline(RELIABLE, color="#808894", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(table.sizes, table.size_names)
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("size", fontsize=9)
    axes.set_ylabel(f"R2 to {table.size_names[-1]}", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return png_of(figure)


def _curve(axes: Any, sizes: np.ndarray, r2: Sequence[Estimate], colour: str, label: str) -> None:
    values = np.array([one.value for one in r2])
    reach = np.abs(np.array([[one.low, one.high] for one in r2]).T - values)
    axes.errorbar(
        sizes, values, yerr=reach, color=colour, marker="o", capsize=3, linewidth=1.2, label=label
    )


def png_of(figure: Any) -> bytes:
    """Bytes of a matplotlib figure as PNG, the same in every run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
