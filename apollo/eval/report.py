"""Self-contained HTML pages: tables with bars and intervals, frames with their times, curves.

Here because a number is believed sooner when one sees what the model saw. A page is one file that
needs no network and reads on a phone, in light and dark, by keyboard and aloud. All text goes
through `Markup.format`, which escapes it, so a question that holds HTML is shown, not run. Used by
`runner.py` (`run_page`), `compare.py` and `apollo demo`.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from markupsafe import Markup

from apollo.eval.questions import Question
from apollo.eval.run_folder import UNREADABLE
from apollo.eval.scoring import Prediction, Score, Tables
from apollo.video import open_video

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fdfdfc; --faint: #6b7480;
  --line: #dfe3e8; --bar: #3b7dd8; --track: #e6eaf0; --good: #1a7f4b; --bad: #b3363e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --faint: #97a1ae;
  --line: #2b323c; --bar: #5a97ea; --track: #262e39; --good: #5cc98f; --bad: #ef7f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } p, li, td, h3, figcaption { overflow-wrap: anywhere; }
.faint, figcaption, thead th { color: var(--faint); font-weight: normal;
  font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; } tbody th { min-width: 6rem; }
td:has(.track) { min-width: 9rem; }
.track { position: relative; height: .5rem; background: var(--track); border-radius: .25rem; }
.track * { position: absolute; top: 0; }
.track i { height: 100%; background: var(--bar); border-radius: .25rem; }
.track b { top: calc(50% - 1px); height: 2px; background: var(--ink); }
.track u { top: -3px; bottom: -3px; width: 2px; background: var(--bad); }
.good { color: var(--good); } .bad { color: var(--bad); }
.asked { border-top: 1px solid var(--line); padding: 1rem 0 .4rem; }
.asked ol { margin: .4rem 0; padding-left: 1.6rem; list-style: upper-alpha; }
.asked .track { max-width: 16rem; } .asked p { margin: .3rem 0; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
summary { cursor: pointer; } details { margin: .6rem 0; }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
.strip { display: flex; gap: .4rem; overflow-x: auto; padding-bottom: .4rem; }
.strip figure { margin: 0; flex: none; }
.strip img { display: block; height: 6.5rem; border-radius: .3rem; }
.clip { display: flex; gap: 2px; padding-right: .4rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.plots img { width: 100%; }
"""

LEGEND = "Per cent right, with 95 % interval over videos; the red tick is chance."
MAX_CLIPS_SHOWN = 8  # of a long video, so that a page with a few videos stays under a few MB


def page(title: str, *sections: Markup) -> str:
    """Join sections to a whole HTML document."""
    whole = Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{title}</title><style>{style}</style></head>\n"
        "<body><main><h1>{title}</h1>\n{body}\n</main></body></html>\n"
    ).format(title=title, style=Markup(STYLE), body=Markup("\n").join(sections))
    return str(whole)


def heading(text: str) -> Markup:
    """A section's heading."""
    return Markup("<h2>{}</h2>").format(text)


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(text)


def details(title: str, text: str) -> Markup:
    """Text that is shown when its title is opened, its lines as they are."""
    return Markup("<details><summary>{}</summary><pre>{}</pre></details>").format(title, text)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Markup]], caption: str = ""
) -> Markup:
    """A table that scrolls sideways on its own when the screen is narrow.

    Args:
        columns: Heads of the columns.
        rows: Cells, the first of a row being its head.
        caption: What the table shows.
    """
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(column) for column in columns)
    body = Markup("\n").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in rows
    )
    named = Markup("<caption>{}</caption>").format(caption) if caption else Markup("")
    return Markup(
        '<div class="wide" role="region" aria-label="{}" tabindex="0"><table>{}<thead><tr>{}</tr>'
        "</thead>\n<tbody>{}</tbody></table></div>"
    ).format(caption or columns[0], named, head, body)


def score_bar(score: Score) -> Markup:
    """An accuracy in words and as a bar; the thin line is the interval, the red tick chance."""
    unanswered = f", {score.num_unanswered} unanswered" if score.num_unanswered else ""
    text = Markup('<strong>{:.1f}</strong> <span class="faint">{:.1f} to {:.1f}{}</span>').format(
        100 * score.accuracy, 100 * score.low, 100 * score.high, unanswered
    )
    bar = Markup(
        '<div class="track" aria-hidden="true"><i style="width:{:.1f}%"></i>'
        '<b style="left:{:.1f}%;width:{:.1f}%"></b><u style="left:{:.1f}%"></u></div>'
    ).format(
        100 * score.accuracy, 100 * score.low, 100 * (score.high - score.low), 100 * score.chance
    )
    return text + bar


def difference_bar(difference: float, low: float, high: float) -> Markup:
    """A difference in words and on a line from -100 to 100 points; the tick is no difference."""
    text = Markup('<strong>{:+.1f}</strong> <span class="faint">{:+.1f} to {:+.1f}</span>').format(
        100 * difference, 100 * low, 100 * high
    )
    bar = Markup(
        '<div class="track" aria-hidden="true"><i style="left:{:.1f}%;width:{:.1f}%"></i>'
        '<u style="left:50%"></u></div>'
    ).format(50 + 50 * low, 50 * (high - low))
    return text + bar


def score_table(name: str, groups: Mapping[str, Mapping[str, Score]]) -> Markup:
    """A row per group, a column per condition.

    Args:
        name: Heading of the first column, such as "class".
        groups: group -> condition -> score.
    """
    conditions = list(next(iter(groups.values())))
    rows = [
        [group, str(next(iter(scores.values())).num_questions)]
        + [score_bar(scores[condition]) for condition in conditions]
        for group, scores in groups.items()
    ]
    return table([name, "questions", *conditions], rows, f"Accuracy by {name}")


def score_sections(tables: Tables) -> list[Markup]:
    """A heading and a table for each grouping; one group alone would repeat the overall score."""
    sections = []
    for grouping, groups in tables.items():
        if grouping == "overall" or len(groups) > 1:
            sections += [heading(grouping.capitalize()), score_table(grouping, groups)]
    return sections


def mark(text: str, correct: bool) -> Markup:
    """Text in green with a tick, or in red with a cross."""
    if correct:
        return Markup('<span class="good">✓ {}</span>').format(text)
    return Markup('<span class="bad">✗ {}</span>').format(text)


def image(pixels: np.ndarray | bytes, alternative: str, kind: str = "png") -> Markup:
    """An `<img>` with its picture inside.

    Args:
        pixels: uint8 (H, W, 3 RGB), or the bytes of a file of that kind.
        alternative: Text for those who cannot see it.
        kind: "png", or "jpeg" for photographs that must be small.
    """
    if isinstance(pixels, np.ndarray):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=kind, **_SMALL.get(kind, {}))
        pixels = buffer.getvalue()
    data = base64.b64encode(pixels).decode()
    return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(alternative, kind, data)


_SMALL = {"jpeg": {"quality": 70}}  # of a frame 160 pixels wide: about 5 KB


def frame_strip(frames: np.ndarray, times_s: np.ndarray, kind: str = "png") -> Markup:
    """The frames that a model was shown, clip by clip, each over its time.

    Of many clips, some are shown and the page says so.

    Args:
        frames: uint8 (C clips, T frames, H, W, 3 RGB).
        times_s: (C, T) true times in seconds.
        kind: Of the pictures, as in `image`.
    """
    clips = []
    num_shown = min(len(frames), MAX_CLIPS_SHOWN)
    shown = np.linspace(0, len(frames) - 1, num_shown).round().astype(int)
    for clip, clip_times in zip(frames[shown], times_s[shown], strict=True):
        figures = Markup("").join(
            Markup("<figure>{}<figcaption>{:.2f} s</figcaption></figure>").format(
                image(frame, f"frame at {time:.2f} s", kind), time
            )
            for frame, time in zip(clip, clip_times, strict=True)
        )
        clips.append(Markup('<div class="clip">{}</div>').format(figures))
    strip = Markup(
        '<div class="strip" role="region" aria-label="frames shown" tabindex="0">{}</div>'
    ).format(Markup("").join(clips))
    if num_shown < len(frames):
        left_out = f"{num_shown} of {len(frames)} clips, evenly chosen"
        strip += Markup('<p class="faint">{}</p>').format(left_out)
    return strip


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str) -> Markup:
    """One small plot per series, side by side where there is room, for light and dark pages.

    Args:
        series: name -> (steps, values).
        unit: Label of the vertical axis.
    """
    plots = [_curve(name, steps, values, unit) for name, (steps, values) in series.items()]
    return Markup('<div class="plots">{}</div>').format(Markup("").join(plots))


def _curve(name: str, steps: Sequence[float], values: Sequence[float], unit: str) -> Markup:
    """Draw one series with matplotlib."""
    from matplotlib.figure import Figure

    grey = "#808894"  # contrast of 3.6 on the light page and 4.9 on the dark one
    figure = Figure(figsize=(3.6, 2.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="#3b7dd8", linewidth=1.5)
    axes.set_title(name, color=grey, fontsize=10)
    axes.set_xlabel("step", color=grey, fontsize=8)
    axes.set_ylabel(unit, color=grey, fontsize=8)
    axes.tick_params(colors=grey, labelsize=8)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grey)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return image(buffer.getvalue(), f"{name}: {unit} over steps")


# ---- the page of a run

NUM_EXAMPLES = 24
MAX_FRAMES_SHOWN = 8  # of a question
THUMBNAIL = (160, 120)  # pixels, width and height, that a frame must fit into
MAX_PICTURE_BYTES = 2_000_000  # of all frames together, so that a page stays below 3 MB
MAX_TEXT_SHOWN = 600  # characters of what a model wrote


def run_page(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    tables: Tables,
    manifest: Mapping[str, Any],
) -> str:
    """Draw an evaluation: scores, what went wrong, and some questions with the frames shown.

    The frames are decoded again from the questions' videos; where that fails the page says so.

    Args:
        questions: All that were to be asked.
        predictions: The answers; those of other questions are left alone.
        tables: Their scores; the first condition's frames are shown.
        manifest: What the answers depend on, as JSON values.
    """
    overall = tables["overall"]["all"]
    others = {name: groups for name, groups in tables.items() if name != "overall"}
    by_id: dict[tuple[str, str], dict[str, Prediction]] = {}
    for condition in overall:
        for prediction in predictions:
            if prediction.condition == condition:
                answers = by_id.setdefault((prediction.benchmark, prediction.question_id), {})
                answers[condition] = prediction
    benchmarks = sorted({question.benchmark for question in questions})
    num_videos = len({(question.benchmark, question.video_id) for question in questions})
    return page(
        "Evaluation",
        paragraph(f"{', '.join(benchmarks)}: {len(questions)} questions on {num_videos} videos."),
        paragraph(LEGEND),
        *score_sections({"overall": tables["overall"]}),
        *_family_means(overall),
        *_missing_answers(overall, predictions),
        *score_sections(others),
        *_examples(questions, by_id, next(iter(overall))),
        heading("What the answers depend on"),
        details("Manifest", json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)),
    )


def _family_means(overall: Mapping[str, Score]) -> Iterator[Markup]:
    means = [
        f"{condition} {100 * score.family_mean:.1f}"
        for condition, score in overall.items()
        if score.family_mean is not None
    ]
    if means:
        yield paragraph(f"Mean over families, each weighing the same: {', '.join(means)}.")


def _missing_answers(
    overall: Mapping[str, Score], predictions: Sequence[Prediction]
) -> Iterator[Markup]:
    """How many answers are of which status, and which videos could not be read."""
    kinds = sorted({kind for score in overall.values() for kind in score.statuses} - {"ok"})
    if not kinds:
        yield paragraph("Every question was answered.")
        return
    yield paragraph("Questions without an answer are in the denominator: they count as wrong.")
    rows = [
        [condition, *(str(score.statuses.get(kind, 0)) for kind in ("ok", *kinds))]
        for condition, score in overall.items()
    ]
    yield table(["condition", "answered", *kinds], rows, "Answers by status")
    unreadable = {
        f"{p.benchmark} / {p.video}: {p.status.removeprefix(UNREADABLE)}"
        for p in predictions
        if p.status.startswith(UNREADABLE)
    }
    if unreadable:
        videos = "1 video" if len(unreadable) == 1 else f"{len(unreadable)} videos"
        yield details(f"{videos} could not be read", "\n".join(sorted(unreadable)))


def pick_examples(
    questions: Sequence[Question],
    answers: Mapping[tuple[str, str], Mapping[str, Prediction]],
    condition: str,
) -> list[Question]:
    """Choose questions to show: of each class in turn, wrong and right ones by turns.

    Within a class the order is that of a hash of the id: neither the benchmark's nor picked by eye.
    """
    groups: dict[tuple[str, bool], list[tuple[str, Question]]] = {}
    for question in questions:
        prediction = answers.get((question.benchmark, question.question_id), {}).get(condition)
        if prediction is not None:
            name = f"{question.benchmark} {question.question_id}".encode()
            place = hashlib.sha256(name).hexdigest()
            group = (question.question_class, prediction.correct)
            groups.setdefault(group, []).append((place, question))
    classes = sorted({question_class for question_class, _ in groups})
    # Every other class shows a right answer first: there may be more classes than room.
    ordered = sorted(groups, key=lambda g: ((classes.index(g[0]) + g[1]) % 2, g[0]))
    columns = [sorted(groups[group], key=lambda placed: placed[0]) for group in ordered]
    turns = [placed[1] for turn in zip_longest(*columns) for placed in turn if placed]
    return sorted(turns[:NUM_EXAMPLES], key=lambda question: question.question_class)


def _examples(
    questions: Sequence[Question],
    answers: Mapping[tuple[str, str], Mapping[str, Prediction]],
    condition: str,
) -> Iterator[Markup]:
    """A heading and the examples, with frames until there are too many bytes of them."""
    examples = pick_examples(questions, answers, condition)
    if not examples:
        return
    yield heading("Some of the questions, and what was seen")
    yield paragraph(
        f"{len(examples)} of {len(questions)} questions, wrong and right from every class, not "
        f"picked by hand. Options, shares and frames are those under the condition {condition!r}."
    )
    num_bytes = 0
    for question in examples:
        given = answers[question.benchmark, question.question_id]
        if num_bytes < MAX_PICTURE_BYTES:
            seen = _frames_seen(question, given[condition])
        else:
            seen = Markup('<p class="faint">Frames are left out to keep this page small.</p>')
        num_bytes += len(seen)
        yield Markup('<article class="asked">{}{}</article>').format(
            _question(question, given, condition), seen
        )


def _question(question: Question, given: Mapping[str, Prediction], condition: str) -> Markup:
    """A question, its options with their shares, and what was chosen under each condition."""
    shown = given[condition]
    shares = shares_of(shown.option_scores)
    options = Markup("").join(
        _option(option, index, shown, shares[index] if shares else None)
        for index, option in enumerate(question.options)
    )
    place = " · ".join(filter(None, (question.question_class, question.family, question.video_id)))
    outcomes = Markup(", ").join(
        mark(name if one.status == "ok" else f"{name} ({one.status})", one.correct)
        for name, one in given.items()
    )
    body = Markup('<h3>{}</h3><p class="faint">{}</p><ol>{}</ol><p>{}</p>').format(
        question.question, place, options, outcomes
    )
    if shown.text:
        cut = "..." if len(shown.text) > MAX_TEXT_SHOWN else ""
        wrote = shown.text[:MAX_TEXT_SHOWN] + cut
        body += Markup('<p class="faint">It wrote:</p><pre>{}</pre>').format(wrote)
    return body


def _option(option: str, index: int, shown: Prediction, share: float | None) -> Markup:
    """An option: right or not, chosen or not, and the share of likelihood it was given."""
    notes = ["right answer"] if index == shown.answer else []
    if index == shown.prediction:
        notes.append(mark("chosen", shown.correct))
    if share is not None:
        notes.append(f"{100 * share:.0f} %")
    note = Markup(' <span class="faint">{}</span>').format(Markup(", ").join(notes))
    bar = Markup('<div class="track" aria-hidden="true"><i style="width:{:.1f}%"></i></div>')
    text = Markup("<strong>{}</strong>").format(option) if index == shown.answer else option
    return Markup("<li>{}{}{}</li>").format(
        text, note, "" if share is None else bar.format(100 * share)
    )


def shares_of(option_scores: Sequence[float]) -> list[float]:
    """Scores as shares of one: log-probabilities (none above 0) by softmax, others as they are."""
    scores = np.asarray(option_scores, dtype=float)
    if len(scores) == 0:
        return []
    if scores.max() <= 0:
        scores = np.exp(scores - scores.max())
    return (scores.clip(0) / scores.clip(0).sum()).tolist()


def _frames_seen(question: Question, prediction: Prediction) -> Markup:
    """The frames of a prediction, as small pictures; of many, some evenly chosen."""
    times_s = [time_s for clip in prediction.frame_times_s for time_s in dict.fromkeys(clip)]
    if not times_s:
        return Markup('<p class="faint">No frames were shown.</p>')
    places = np.linspace(0, len(times_s) - 1, min(len(times_s), MAX_FRAMES_SHOWN)).round()
    shown_s = np.asarray(times_s)[places.astype(int)]
    try:
        with open_video(question.video, num_threads=1) as video:  # a few small frames
            scale = min(THUMBNAIL[0] / video.info.width, THUMBNAIL[1] / video.info.height, 1)
            size = (
                max(1, round(scale * video.info.height)),
                max(1, round(scale * video.info.width)),
            )
            pixels = video.frames_at(shown_s, size).pixels
    except (OSError, ValueError) as error:  # a VideoError is a ValueError
        reason = str(error).replace(str(question.video), question.video_id)
        return Markup('<p class="bad">The video cannot be read now: {}</p>').format(reason)
    note = ""
    if len(shown_s) < len(times_s):
        note = f"{len(shown_s)} of {len(times_s)} frames, evenly chosen. "
    if prediction.condition == "shuffled":
        note += "The model saw them in another order."
    strip = frame_strip(pixels[None], shown_s[None], "jpeg")
    return strip + Markup('<p class="faint">{}</p>').format(note) if note else strip
