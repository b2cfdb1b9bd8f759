"""The page of an audit and of a curation: tables, heat maps with dendrograms, curves, examples.

Here because a number is believed sooner when one sees what it is of. A page is one file that needs
no network; what it is made of comes from the evaluation's page. Next: `commands.py`.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from apollo.curation.audit import Audit, CurvePoint, Estimate, Group, rows_by_id
from apollo.curation.curate import FRAME, TEXT, Choice, counts_by_reason, describe
from apollo.curation.records import COLUMNS, Pool
from apollo.curation.redundancy import Accuracies, Disagreement, Redundancy
from apollo.curation.validate import MEASURES, Cost, Validation
from apollo.eval import report
from apollo.eval.questions import Question
from apollo.video import open_video

GREY = "#808894"  # readable on a light page and on a dark one
BLUE, GREEN = "#3b7dd8", "#2b9a66"
MAX_ROWS = 12  # of a table that is open from the start
NUM_EXAMPLES = 3  # of each kind
NUM_FRAMES = 6
THUMBNAIL = (160, 120)  # pixels, width and height, that a frame must fit into
INTERVALS = (
    "Per cent right, mean over models. First range: 95 % over videos (would other questions say "
    "the same?); second: over models (would other models?), which is wide where there are few."
)


def per_cent(value: float, digits: int = 1) -> str:
    """A share in hundredths; a dash where there is none."""
    return "-" if value != value else f"{100 * value:.{digits}f}"


def range_of(low: float, high: float, digits: int = 1) -> str:
    """A range in hundredths."""
    return "-" if low != low else f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def audit_page(found: Audit, pool: Pool, questions: Sequence[Question] = ()) -> str:
    """Draw an audit.

    Args:
        found: What was found.
        pool: Of what.
        questions: Texts and videos, as far as they are known; for the examples.
    """
    overall = found.groups["overall"][0]
    return report.page(
        "Audit",
        report.paragraph(
            f"{', '.join(found.benchmarks)}: {pool.num_questions} questions, "
            f"{overall.num_videos} videos, {len(found.models)} models, conditions: "
            f"{', '.join(found.conditions)}."
        ),
        report.paragraph(INTERVALS),
        *_groups(found.groups),
        *_models(found),
        *_missing(found),
        *_shortcuts(found),
        *_discrimination(found),
        *_positions(found),
        *redundancy_sections(found.redundancies),
        *_curve(found.curve, overall.num_questions),
        *_examples(
            pool,
            questions,
            {
                f"Most models answer it from {what}": np.flatnonzero(found.majority[condition])
                for condition, what in (("text", "the text alone"), ("frame", "the centre frame"))
                if condition in found.majority
            },
        ),
    )


def accuracies_page(
    table: Accuracies,
    redundancies: Mapping[str, Redundancy],
    differ: Sequence[Disagreement] | None = None,
) -> str:
    """Draw an audit of a table of accuracies.

    Args:
        table: The accuracies.
        redundancies: Between benchmarks, by condition.
        differ: Correlations that the paper prints otherwise; None for another table.
    """
    sections = [
        report.paragraph(
            f"{len(table.models)} models on {len(table.benchmarks)} benchmarks: per cent right "
            "with the video, with the centre frame, with the text alone."
        ),
        report.table(["model", *table.benchmarks], accuracy_rows(table), "Accuracies"),
        report.heading("Gaps"),
        report.table(["benchmark", *GAP_COLUMNS], gap_rows(table), "Mean over models"),
        *redundancy_sections(redundancies),
    ]
    if differ is not None:
        rows = [[d.a, d.b, f"{d.printed:.1f}", f"{d.computed:.3f}"] for d in differ]
        sections += [
            report.heading("Where the paper's Figure 2 prints another digit"),
            report.table(["benchmark", "benchmark", "printed", "from the table"], rows),
        ]
    return report.page("Audit of a table of accuracies", *sections)


def accuracy_rows(table: Accuracies) -> list[list[str]]:
    """Model, and video / image / text for each benchmark."""
    return [
        [
            model,
            *(
                # spaces that do not break, so that three numbers stay on one line
                "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}".join(map(per_cent, table.values[:, m, b]))
                for b in range(len(table.benchmarks))
            ),
        ]
        for m, model in enumerate(table.models)
    ]


GAP_COLUMNS = ("video", "image", "text", "video - image", "video - text", "image - text")


def gap_rows(table: Accuracies) -> list[list[str]]:
    """Benchmark, mean accuracies and gaps, with 95 % intervals of the gaps over models."""
    from apollo.curation.agreement import mean_interval

    rows = []
    for b, benchmark in enumerate(table.benchmarks):
        video, image, text = table.values[:, :, b]
        means = [per_cent(mean_interval(values)[0]) for values in (video, image, text)]
        gaps = [mean_interval(d) for d in (video - image, video - text, image - text)]
        rows.append(
            [
                benchmark,
                *means,
                *(f"{per_cent(mean)} ({range_of(low, high)})" for mean, low, high in gaps),
            ]
        )
    return rows


# ---- parts of the audit


def _estimate(estimate: Estimate) -> Markup:
    return Markup(
        '<strong>{}</strong><br><span class="faint" style="white-space: nowrap">{}<br>{}</span>'
    ).format(
        per_cent(estimate.value),
        range_of(estimate.low, estimate.high, 0),
        range_of(estimate.models_low, estimate.models_high, 0),
    )


def _groups(groups: Mapping[str, Sequence[Group]]) -> Iterator[Markup]:
    for grouping, rows in groups.items():
        if grouping == "benchmark" and len(rows) == 1:
            continue
        first = rows[0]
        table = report.table(
            [grouping, "questions", *first.accuracy, "chance", *first.gaps],
            [
                [
                    group.name,
                    str(group.num_questions),
                    *map(_estimate, group.accuracy.values()),
                    per_cent(group.chance),
                    *map(_estimate, group.gaps.values()),
                ]
                for group in rows
            ],
            f"Accuracy by {grouping}",
        )
        if len(rows) <= MAX_ROWS:
            yield report.heading(grouping.capitalize()) + table
        else:
            yield _folded(f"Each of {len(rows)} by {grouping}", table)


def _folded(title: str, what: Markup) -> Markup:
    """Something that is shown when its title is opened."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, what)


def _models(found: Audit) -> Iterator[Markup]:
    yield report.heading("Models")
    columns = [f"{b}: {c}" for b in found.benchmarks for c in found.conditions]
    rows = [
        [
            model,
            *(
                per_cent(found.model_scores[c][m, b])
                for b in range(len(found.benchmarks))
                for c in found.conditions
            ),
        ]
        for m, model in enumerate(found.models)
    ]
    yield report.table(["model", *columns], rows, "Accuracy of each model")


def _missing(found: Audit) -> Iterator[Markup]:
    if not found.missing:
        yield report.paragraph("No answer is missing.")
        return
    yield report.paragraph("Missing answers are in the denominator: they count as wrong.")
    lines = [
        f"{model}, {condition}, {benchmark}: {unanswered} without a usable answer, "
        f"{not_asked} never asked"
        for model, condition, benchmark, unanswered, not_asked in found.missing
    ]
    total = sum(row[3] + row[4] for row in found.missing)
    yield report.details(f"{total} answers are missing in {len(lines)} runs", "\n".join(lines))


def _shortcuts(found: Audit) -> Iterator[Markup]:
    if not found.majority:
        yield report.paragraph(
            "There are no predictions under text or frame, so nothing can be said of shortcuts."
        )
        return
    yield report.heading("Answered without the video")
    yield report.paragraph(
        "Most models right: more than half of these models are right, luck included. Answerable: "
        "more than half of all such models know the answer, by how often questions of the same "
        "kind are answered, so that lucky guesses do not count."
    )
    rows = []
    for grouping, groups in found.groups.items():
        if (grouping == "benchmark" and len(groups) == 1) or len(groups) > MAX_ROWS:
            continue
        for group in groups:
            shares = [
                per_cent(s)
                for c in found.majority
                for s in (group.majority[c], group.answerable[c])
            ]
            rows.append([f"{grouping}: {group.name}", str(group.num_questions), *shares])
    columns = [
        f"{c}: {what}" for c in found.majority for what in ("most models right", "answerable")
    ]
    yield report.table(["group", "questions", *columns], rows, "Per cent of questions")
    for condition, kinds in found.solved_kinds.items():
        text = "\n".join(kinds) or "none"
        yield report.details(
            f"Kinds of question mostly answerable from {condition}: {len(kinds)}", text
        )


def _discrimination(found: Audit) -> Iterator[Markup]:
    yield report.heading("How well questions tell models apart")
    correlation = found.point_biserial[~np.isnan(found.point_biserial)]
    agree = np.isnan(found.point_biserial).mean()
    yield report.paragraph(
        f"All models agree on {per_cent(agree)} per cent of the questions; of the others "
        f"{per_cent((correlation < 0).mean() if len(correlation) else np.nan)} per cent favour the "
        "weaker models. questions.csv has the numbers of each."
    )
    if not len(correlation):
        return
    figure, axes = _figure(2)
    for each, values, name in zip(
        axes,
        (found.entropy, correlation),
        ("entropy, bits", "point-biserial correlation"),
        strict=True,
    ):
        each.hist(values, bins=30, color=BLUE)
        each.set_xlabel(name, color=GREY, fontsize=8)
    axes[0].set_ylabel("questions", color=GREY, fontsize=8)
    yield _drawn(figure, "histograms of entropy and point-biserial correlation")


def _positions(found: Audit) -> Iterator[Markup]:
    if found.positions:
        given: Any = found.positions
        yield report.heading("Where the right option stands")
        letters = [chr(ord("A") + place) for place in range(given["num_options"])]
        rows = [["right answers", *map(per_cent, given["right"])]]
        for condition in given["chosen"]:
            rows.append([f"chosen, {condition}", *map(per_cent, given["chosen"][condition])])
            rows.append(
                [f"accuracy there, {condition}", *map(per_cent, given["accuracy"][condition])]
            )
        yield report.table(["per cent", *letters], rows, "By place")
        yield report.paragraph(
            f"Of {given['num_questions']} questions with {given['num_options']} options. Were the "
            f"places drawn evenly, right answers would be so uneven with p = {given['p']:.3f}."
        )
    if found.lengths:
        chance = found.lengths["chance"].value
        sentences = [
            f"the {name} option is right in {per_cent(each.value)} per cent "
            f"({range_of(each.low, each.high)})"
            for name, each in found.lengths.items()
            if name != "chance"
        ]
        yield report.paragraph(
            f"Always to take one: {'; '.join(sentences)}; chance is {per_cent(chance)}."
        )


def redundancy_sections(found: Mapping[str, Redundancy]) -> Iterator[Markup]:
    """Heat maps with dendrograms, and the numbers."""
    for name, each in found.items():
        yield report.heading(f"Redundancy: {name}")
        yield report.paragraph(
            f"Correlations over {int(each.num_models.max())} models between scores. Groups that "
            "rank models alike stand together; the tree joins them at one minus the correlation."
        )
        if each.links.size:
            yield _drawn(_heat_map(each), f"correlations between {len(each.names)} groups")
        rows = [
            [
                f"{pair['a']} ~ {pair['b']}",
                *(
                    f"{pair[m]:.2f} ({pair[f'{m}_low']:.2f} to {pair[f'{m}_high']:.2f})"
                    for m in ("pearson", "spearman", "r2")
                ),
            ]
            for pair in each.pairs()
        ]
        table = report.table(["pair", "Pearson", "Spearman", "R2"], rows, "Correlations")
        yield _folded("All pairs, with 95 % intervals over models", table)


def _curve(curve: Sequence[CurvePoint], num_questions: int) -> Iterator[Markup]:
    if not curve:
        return
    yield report.heading("How many questions keep the ranking")
    yield report.paragraph(
        f"Random questions of the {num_questions}, compared with all of them; the bands hold 95 % "
        "of the draws. The questions drawn are part of the whole, which flatters large sets."
    )
    figure, axes = _figure(1)
    for name, colour in (("kendall", BLUE), ("r2", GREEN)):
        sizes = [point.size for point in curve]
        means, low, high = zip(*(getattr(point, name) for point in curve), strict=True)
        axes[0].plot(
            sizes, means, color=colour, label={"kendall": "Kendall's tau", "r2": "R2"}[name]
        )
        axes[0].fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    axes[0].set_xscale("log")
    axes[0].set_ylim(min(0, min(point.kendall[1] for point in curve)), 1.02)
    axes[0].set_xlabel("questions", color=GREY, fontsize=8)
    axes[0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    yield _drawn(figure, "agreement with the full ranking by number of questions")


# ---- the page of a curation


def curation_page(
    pool: Pool,
    choice: Choice,
    validation: Validation | None,
    cost: Cost,
    balance: str,
    questions: Sequence[Question] = (),
) -> str:
    """Draw a curation: what was dropped and why, what was kept, and whether it ranks like the pool.

    Args:
        pool: The predictions.
        choice: What became of each question.
        validation: None where there are too few models.
        cost: What the small benchmark saves.
        balance: `Settings.balance`: its table comes first, if it is a column.
        questions: Texts and videos, as far as they are known.
    """
    columns = [name for name in dict.fromkeys((balance, "class", "benchmark")) if name in COLUMNS]
    tables = [
        report.table(
            [column, "in the pool", "kept"],
            [
                [name or "not given", str(before), str(after)]
                for name, before, after in describe(pool, choice, column)
            ],
            f"Questions by {column}",
        )
        for column in columns
        if len(pool.columns[column].names) > 1
    ]
    reasons = [[reason, str(count)] for reason, count in counts_by_reason(choice).items()]
    kept = {
        "Kept": choice.rows,
        "Dropped: most models answer it from the text": np.flatnonzero(choice.reasons == TEXT),
        "Dropped: most models answer it from the centre frame": np.flatnonzero(
            choice.reasons == FRAME
        ),
    }
    return report.page(
        "A curated benchmark",
        report.paragraph(
            f"{len(choice.rows)} of {pool.num_questions} questions. {cost_text(cost)}"
        ),
        report.table(["what became of the questions", "number"], reasons, "Reasons"),
        *tables,
        *_validation(validation),
        *_examples(pool, questions, kept),
    )


def cost_text(cost: Cost) -> str:
    """What a small benchmark saves, in a sentence."""
    text = f"The pool has {cost.questions:.1f} times as many questions"
    if cost.videos == cost.videos:
        text += f", {cost.videos:.1f} times as many videos"
    if cost.video_s == cost.video_s:
        text += f" and {cost.video_s:.1f} times as many seconds of video"
    return text + "."


def _validation(found: Validation | None) -> Iterator[Markup]:
    yield report.heading("Does it rank models like the full clean pool?")
    if found is None:
        yield report.paragraph("Too few models to say: it takes six.")
        return
    yield report.paragraph(
        f"{found.num_choosing} of {found.num_models} models, drawn at random, choose {found.size} "
        f"questions of a pool of {found.num_questions}; the others are ranked by these and by the "
        f"clean pool (about {found.num_clean:.0f} questions). {found.num_splits} times; ranges "
        "hold 95 % of the splits, which share models and so are no independent trials."
    )
    rows = [
        [method, *(f"{s.mean:.3f} ({s.low:.2f} to {s.high:.2f})" for s in measures.values())]
        for method, measures in found.methods.items()
    ]
    names = {"r2": "R2", "swapped": "pairs swapped"}
    yield report.table(
        ["choice", *(names.get(m, m.capitalize()) for m in MEASURES)], rows, "Models not seen"
    )
    for method, share in found.beaten.items():
        gain = found.gain[method]
        yield report.paragraph(
            f"{method}: R2 higher than that of {per_cent(share, 0)} per cent of random sets of the "
            f"same size and split, by {gain.mean:+.3f} on average ({gain.low:+.2f} to "
            f"{gain.high:+.2f})."
        )
    figure, axes = _figure(len(found.scatter))
    for each, (method, points) in zip(axes, found.scatter.items(), strict=True):
        _, full, small = zip(*points, strict=True)
        each.scatter(full, small, s=8, color=BLUE, alpha=0.5, linewidth=0)
        each.set_title(method, color=GREY, fontsize=9)
        each.set_xlabel("full clean pool", color=GREY, fontsize=8)
    axes[0].set_ylabel("small benchmark", color=GREY, fontsize=8)
    yield _drawn(
        figure, "accuracy of unseen models on the small benchmark over the full clean pool"
    )


# ---- examples and pictures


def _examples(
    pool: Pool, questions: Sequence[Question], groups: Mapping[str, np.ndarray]
) -> Iterator[Markup]:
    """Some questions of each group with frames of their videos, spread evenly, not picked."""
    rows = rows_by_id(pool) if questions else {}
    by_row = {
        rows[key]: question
        for question in questions
        if (key := (question.benchmark, question.question_id)) in rows
    }
    for title, group in groups.items():
        members = [int(row) for row in group if row in by_row]
        if members:
            yield report.heading(title)
            for place in np.unique(np.linspace(0, len(members) - 1, NUM_EXAMPLES).astype(int)):
                yield _example(pool, members[place], by_row[members[place]])


def _example(pool: Pool, row: int, question: Question) -> Markup:
    counts = []
    for condition in pool.conditions:
        right, ran = pool.counts(condition)
        counts.append(f"{condition} {right[row]} of {ran[row]}")
    options = Markup("").join(
        Markup("<li><strong>{}</strong> <span class=faint>right answer</span></li>").format(option)
        if index == question.answer
        else Markup("<li>{}</li>").format(option)
        for index, option in enumerate(question.options)
    )
    return Markup(
        '<article class="asked"><h3>{}</h3><p class="faint">{}</p><ol>{}</ol>'
        "<p>Models right: {}</p>{}</article>"
    ).format(
        question.question,
        " · ".join(filter(None, (question.question_class, question.family, question.video_id))),
        options,
        ", ".join(counts),
        _frames(question),
    )


def _frames(question: Question) -> Markup:
    """Frames spread over the video, or why there are none."""
    try:
        with open_video(question.video, num_threads=1) as video:
            times_s = (np.arange(NUM_FRAMES) + 0.5) * video.info.duration_s / NUM_FRAMES
            scale = min(THUMBNAIL[0] / video.info.width, THUMBNAIL[1] / video.info.height, 1)
            size = (
                max(1, round(scale * video.info.height)),
                max(1, round(scale * video.info.width)),
            )
            frames = video.frames_at(times_s, size)
    except (OSError, ValueError) as error:  # a VideoError is a ValueError
        reason = str(error).replace(str(question.video), question.video_id)
        return Markup('<p class="faint">The video cannot be read here: {}</p>').format(reason)
    return report.frame_strip(frames.pixels[None], times_s[None], "jpeg")


def _figure(num_plots: int) -> tuple[Any, Any]:
    """Plots side by side for light and dark pages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * num_plots + 0.6, 2.9), dpi=130, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, num_plots))
    for each in axes:
        each.tick_params(colors=GREY, labelsize=8)
        each.set_facecolor("none")
        for side, spine in each.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, axes


def _heat_map(found: Redundancy) -> Any:
    """Correlations, alike groups side by side, with the tree above."""
    from matplotlib.figure import Figure
    from scipy.cluster import hierarchy

    size = len(found.names)
    side = max(3.2, 0.5 * size + 2)
    figure = Figure(figsize=(side + 1, side + 0.8), dpi=110, layout="constrained")
    top, axes = figure.subplots(2, 1, height_ratios=(1, 4))
    tree = hierarchy.dendrogram(
        found.links, ax=top, no_labels=True, color_threshold=0, above_threshold_color=GREY
    )
    assert tree["leaves"] == found.order
    top.set_axis_off()
    values = found.pearson[np.ix_(found.order, found.order)]
    axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    names = [found.names[place] for place in found.order]
    axes.set_xticks(range(size), names, rotation=60, ha="right", color=GREY, fontsize=8)
    axes.set_yticks(range(size), names, color=GREY, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if size <= 20:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return figure


def _drawn(figure: Any, alternative: str) -> Markup:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return Markup('<p class="drawn">{}</p><style>.drawn img {{ max-width: 100%; }}</style>').format(
        report.image(buffer.getvalue(), alternative)
    )
