"""Self-contained HTML pages: tables with bars and intervals, frames with their times, curves.

Here because a number is believed sooner when one sees what the model saw. A page is one file that
needs no network and reads on a phone, in light and dark. All text goes through `Markup.format`,
which escapes it, so a question that holds HTML is shown, not run. Used by `runner.py` and by
`apollo demo`.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from apollo.eval.scoring import Score, Tables

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fdfdfc; --faint: #6b7480;
  --line: #dfe3e8; --bar: #3b7dd8; --track: #e6eaf0; --good: #1a7f4b; --bad: #b3363e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --faint: #97a1ae;
  --line: #2b323c; --bar: #5a97ea; --track: #262e39; --good: #5cc98f; --bad: #ef7f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
.faint, figcaption, th { color: var(--faint); font-weight: normal; font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.number { white-space: nowrap; min-width: 9rem; }
.track { position: relative; height: .5rem; background: var(--track); border-radius: .25rem; }
.track * { position: absolute; top: 0; }
.track i { height: 100%; background: var(--bar); border-radius: .25rem; }
.track b { top: calc(50% - 1px); height: 2px; background: var(--ink); }
.track u { top: -3px; bottom: -3px; width: 2px; background: var(--bad); }
.good { color: var(--good); } .bad { color: var(--bad); }
.strip { display: flex; gap: .4rem; overflow-x: auto; padding-bottom: .4rem; }
.strip figure { margin: 0; flex: none; }
.strip img { display: block; width: 6.5rem; border-radius: .3rem; }
.clip { display: flex; gap: 2px; padding-right: .4rem; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.plots img { width: 100%; }
"""

LEGEND = "Per cent right, with 95 % interval over videos; the red tick is chance."
MAX_CLIPS_SHOWN = 8  # of a long video, so that a page with a few videos stays under a few MB


def page(title: str, *sections: Markup) -> str:
    """Join sections to a whole HTML document."""
    return Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{title}</title><style>{style}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    ).format(title=title, style=Markup(STYLE), body=Markup("\n").join(sections))


def heading(text: str) -> Markup:
    """A section's heading."""
    return Markup("<h2>{}</h2>").format(text)


def paragraph(text: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Markup]]) -> Markup:
    """A table that scrolls sideways on its own when the screen is narrow."""
    head = Markup("").join(Markup("<th>{}</th>").format(column) for column in columns)
    body = Markup("\n").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row)
        )
        for row in rows
    )
    return Markup(
        '<div class="wide"><table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>'
    ).format(head, body)


def score_bar(score: Score) -> Markup:
    """An accuracy in words and as a bar; the thin line is the interval, the red tick chance."""
    unanswered = f", {score.num_unanswered} unanswered" if score.num_unanswered else ""
    text = Markup('<strong>{:.1f}</strong> <span class="faint">{:.1f} to {:.1f}{}</span>').format(
        100 * score.accuracy, 100 * score.low, 100 * score.high, unanswered
    )
    bar = Markup(
        '<div class="track"><i style="width:{:.1f}%"></i>'
        '<b style="left:{:.1f}%;width:{:.1f}%"></b><u style="left:{:.1f}%"></u></div>'
    ).format(
        100 * score.accuracy, 100 * score.low, 100 * (score.high - score.low), 100 * score.chance
    )
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
    return table([name, "questions", *conditions], rows)


def score_sections(tables: Tables) -> list[Markup]:
    """A heading and a table for each grouping."""
    sections = [paragraph(LEGEND)]
    for grouping, groups in tables.items():
        sections += [heading(grouping.capitalize()), score_table(grouping, groups)]
    return sections


def mark(text: str, correct: bool) -> Markup:
    """Text in green with a tick, or in red with a cross."""
    if correct:
        return Markup('<span class="good">✓ {}</span>').format(text)
    return Markup('<span class="bad">✗ {}</span>').format(text)


def image(pixels: np.ndarray | bytes, alternative: str) -> Markup:
    """An `<img>` with its PNG inside.

    Args:
        pixels: uint8 (H, W, 3 RGB), or the bytes of a PNG file.
        alternative: Text for those who cannot see it.
    """
    if isinstance(pixels, np.ndarray):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        pixels = buffer.getvalue()
    data = base64.b64encode(pixels).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(alternative, data)


def frame_strip(frames: np.ndarray, times_s: np.ndarray) -> Markup:
    """The frames that a model was shown, clip by clip, each over its time.

    Of many clips, some are shown and the page says so.

    Args:
        frames: uint8 (C clips, T frames, H, W, 3 RGB).
        times_s: (C, T) true times in seconds.
    """
    clips = []
    num_shown = min(len(frames), MAX_CLIPS_SHOWN)
    shown = np.linspace(0, len(frames) - 1, num_shown).round().astype(int)
    for clip, clip_times in zip(frames[shown], times_s[shown], strict=True):
        figures = Markup("").join(
            Markup("<figure>{}<figcaption>{:.2f} s</figcaption></figure>").format(
                image(frame, f"frame at {time:.2f} s"), time
            )
            for frame, time in zip(clip, clip_times, strict=True)
        )
        clips.append(Markup('<div class="clip">{}</div>').format(figures))
    strip = Markup('<div class="strip">{}</div>').format(Markup("").join(clips))
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
