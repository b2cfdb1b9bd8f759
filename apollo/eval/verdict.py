"""From what was measured at each link to a verdict: the rules, the tables, the page.

Here because a verdict should not depend on who reads the table: what a link must let through of
what came to it stands in five numbers, with their reasons. Knows nothing of models. Used by
`diagnose.py`, which measures. Next: `report.py` (the HTML), `docs/diagnose.md` (how to read it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from apollo.eval import report
from apollo.eval.questions import Question

NAMED = 0.5
"""The encoders name a kind of fact if a probe wins three duels of four (2 x 0.75 - 1)."""
GAINED = 1 / 3
"""Over all kinds, they must also close a third of what the same probe on plain pixels leaves to 1.
It reads much off untrained encoders, too (0.46 at the micro scale), but no more than off the pixels
(0.47); those of the shipped micro model reach 0.75, half of what was left. Where they do not, the
same is asked of each kind."""
KEPT = 2 / 3
"""The connector keeps what the encoders name if two thirds of it are left: the same probe on other
tokens is good to some ten per cent, so a third is more than the probe's own doing."""
READ = 0.5
"""The LLM reads the tokens if its sentences win half of what the probe wins. Less is asked than of
the connector: the LLM was not trained to win duels, the probe was."""
ANSWERED = 0.5
"""The LLM answers a family from words if it is right half as often above chance as a perfect one:
62.5 % with four options."""
USED = 2 / 3
"""The video is used if two thirds of what the LLM answers from words (above chance) are left."""
MIN_VIDEOS = 5
"""Kinds and families found in fewer videos are shown, but not judged."""
NUM_RESAMPLES = 1000

LINKS = {
    "encoders": "the encoders do not name {}",
    "connector": "the connector loses {}",
    "words": "the LLM cannot answer {} even from words",
    "reading": "the LLM does not read {} off the connector's tokens",
    "whole": "the LLM does not answer {} from the video as it does from words",
}
"""Link -> what is said of it when it is broken, in the order in which they are looked at."""
WEAKEST = {
    "encoders": "what the encoders name",
    "connector": "the connector",
    "words": "what the LLM answers from words",
    "reading": "the LLM's reading of the connector's tokens",
    "whole": "what the LLM answers from the video rather than from words",
}
"""Link -> what it is called where none is broken."""
STAGE = tuple("moves turns hits blinks grows shrinks spins splits appears leaves".split())
FACTS_OF = {
    **dict.fromkeys(("sign_ordinal", "sign_after", "sign_before", "sign_count"), ("sign",)),
    "sign_when": ("sign",),
    "sign_with_event": ("sign", *STAGE),
    **dict.fromkeys(("camera_ordinal", "camera_count"), ("camera",)),
    "camera_after_pass": ("camera", "passes"),
    **dict.fromkeys(("pass_ordinal", "pass_after", "pass_count"), ("passes",)),
    **dict.fromkeys(("place_start", "place_end", "relation_end"), ("looks",)),
    "leave_side": ("leaves",),
    "move_direction": ("moves",),
    "colour_after": ("turns",),
    "colour_before": ("turns", "looks"),
    "action_count": ("blinks", "spins"),
    "cause": ("hits",),
    "stay_duration": ("appears", "leaves"),
    "faster": ("moves",),
    "ground_colour": ("ground",),
    **dict.fromkeys(("still_colour", "still_texture"), ("looks",)),
    **dict.fromkeys(("fact_opposite", "fact_digit"), ()),
}
"""Question family -> kinds of fact that it takes; those not named here ask of any stage event."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over videos."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Estimate:
        """Read it off what `Resamples` gives: the value itself, then resampled ones."""
        low, high = np.nanpercentile(samples[1:], [2.5, 97.5])
        return cls(*(round(float(number), 4) for number in (samples[0], low, high)))

    def __str__(self) -> str:
        value, low, high = (round(100 * number) for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """A kind of fact, a family, or all: what came through each link, and where it breaks.

    Attributes:
        name: Kind or family; "all".
        number: Facts or questions measured.
        estimates: By link.
        broken: A key of `LINKS`, or None.
        sure: Whether the interval says so too.
        verdict: In words.
    """

    name: str
    number: int
    estimates: dict[str, Estimate]
    broken: str | None
    sure: bool
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; see `Row`."""

    num_videos: int
    kinds: list[Row]
    families: list[Row]
    overall: Row

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, with the rules it was made by."""
        rules = {
            name: globals()[name]
            for name in ("NAMED", "GAINED", "KEPT", "READ", "ANSWERED", "USED")
        }
        return {"rules": rules, **asdict(self)}


@dataclass(frozen=True)
class Duels:
    """How facts of one kind fared, each against its rivals.

    Attributes:
        videos: int (n,), the video of each fact.
        values: (n,), twice the share of duels won (a draw is half) less one.
    """

    videos: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Answered:
    """Questions and whether they were answered right, from words and from the video."""

    question: Question
    video: int
    words: bool
    whole: bool


class Resamples:
    """Bootstrap over videos: the same draws for every number, so that they can be compared.

    Args:
        num_videos: V.
        seed: Of the draws.
    """

    def __init__(self, num_videos: int, seed: int = 0) -> None:
        draws = np.random.default_rng(seed).multinomial(
            num_videos, np.full(num_videos, 1 / num_videos), size=NUM_RESAMPLES
        )
        self.counts = np.concatenate([np.ones((1, num_videos)), draws])

    def mean(self, videos: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Mean of the values: first as it is, then as in each resample (nan if none is drawn)."""
        size = self.counts.shape[1]
        total = self.counts @ np.bincount(videos, weights=values, minlength=size)
        number = self.counts @ np.bincount(videos, minlength=size)
        return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


# ---- the rules

Check = tuple[str, np.ndarray, np.ndarray | float]  # link, what comes through, the least it should


def judge(
    duels: Mapping[str, Mapping[str, Duels]], answered: Sequence[Answered], num_videos: int
) -> Diagnosis:
    """Say of each kind of fact, each family and all together which link is the first broken.

    A later link that delivers clears those before it, whatever their probes found: what the LLM
    says of a clip must have come through encoders and connector.

    Args:
        duels: "pixels" or a link ("encoders", "connector", "reading") -> kind -> duels.
        answered: The questions.
        num_videos: How many videos all of it is about.
    """
    resamples = Resamples(num_videos)
    samples = {
        kind: {
            link: resamples.mean(of[kind].videos, of[kind].values)
            for link, of in duels.items()
            if kind in of
        }
        for kind in sorted(duels["encoders"])
    }
    few = {kind for kind in samples if _num_videos(duels["encoders"][kind].videos) < MIN_VIDEOS}
    whole = [of for kind, of in samples.items() if kind not in few and len(of) == len(duels)]
    means = {link: np.nanmean([of[link] for of in whole], axis=0) for link in duels if whole}
    # Encoders that gain nothing over the pixels name nothing, though some kinds are easily read.
    untrained = bool(whole) and _first_broken(_fact_checks(means, True))[0] == "encoders"
    kinds = []
    for kind, of in samples.items():
        number = len(duels["encoders"][kind].values)
        kinds.append(_row(kind, number, of, _fact_checks(of, untrained), kind in few))
    families, skills = _judge_families(answered, resamples, {row.name: row for row in kinds})
    if skills:
        for link in ("words", "whole"):
            means[link] = np.nanmean([skill[link] for skill in skills.values()], axis=0)
    return Diagnosis(num_videos, kinds, families, _overall(means, kinds))


def _num_videos(videos: np.ndarray) -> int:
    return len(np.unique(videos))


def _fact_checks(samples: Mapping[str, np.ndarray], beyond_pixels: bool) -> list[Check]:
    """What each link must let through of what came to it."""
    said = samples.get("reading")
    kept = samples.get("connector")
    reached = [s for s in (kept, said) if s is not None]
    at_llm = np.max(reached, axis=0) if reached else None
    at_connector = np.max([samples["encoders"], *reached], axis=0)
    gained = 1 - (1 - GAINED) * (1 - samples["pixels"]) if beyond_pixels else 0.0
    checks: list[Check] = [("encoders", at_connector, np.maximum(NAMED, gained))]
    if at_llm is not None:
        checks.append(("connector", at_llm, KEPT * at_connector))
        if said is not None:
            checks.append(("reading", said, READ * at_llm))
    return checks


def _judge_families(
    answered: Sequence[Answered], resamples: Resamples, kinds: Mapping[str, Row]
) -> tuple[list[Row], dict[str, dict[str, np.ndarray]]]:
    """A row for each family, and how far above chance (0) towards all right (1) it is answered.

    The second is of the families that take a video, and of enough of them.
    """
    by_family: dict[str, list[Answered]] = {}
    for answer in answered:
        by_family.setdefault(answer.question.family, []).append(answer)
    rows, skills = [], {}
    for family, group in sorted(by_family.items()):
        videos = np.array([answer.video for answer in group])
        shares = {
            "words": resamples.mean(videos, np.array([a.words for a in group], dtype=float)),
            "whole": resamples.mean(videos, np.array([a.whole for a in group], dtype=float)),
        }
        chance = float(np.mean([1 / len(answer.question.options) for answer in group]))
        skill = {link: (share - chance) / (1 - chance) for link, share in shares.items()}
        few = _num_videos(videos) < MIN_VIDEOS
        row = _row(family, len(group), shares, _question_checks(skill), few)
        if row.broken == "whole":
            row = _blame(row, [kinds[k] for k in FACTS_OF.get(family, STAGE) if k in kinds])
        rows.append(row)
        if not few and group[0].question.needs != "text":
            skills[family] = skill
    return rows, skills


def _question_checks(skill: Mapping[str, np.ndarray]) -> list[Check]:
    able = np.max([skill["words"], skill["whole"]], axis=0)
    return [("words", able, ANSWERED), ("whole", skill["whole"], USED * able)]


def _blame(row: Row, needed: Sequence[Row]) -> Row:
    """Lead a family that fails on the video alone back to a kind of fact that does not arrive."""
    order = list(LINKS)
    broken = [kind for kind in needed if kind.broken]
    if not broken:
        return row
    first = min(broken, key=lambda kind: (not kind.sure, order.index(kind.broken or "")))
    verdict = f"{first.verdict}, which {row.name} needs"
    return replace(row, broken=first.broken, sure=row.sure and first.sure, verdict=verdict)


def _overall(means: Mapping[str, np.ndarray], kinds: Sequence[Row]) -> Row:
    """The row of all kinds and families together."""
    number = sum(row.number for row in kinds)
    if "encoders" not in means:
        return Row("all", number, {}, None, False, "too few facts to judge: use more videos")
    checks = _fact_checks(means, True)
    if "words" in means:
        of_words, of_whole = _question_checks(means)
        # An LLM that cannot answer from words is no reader either: that is said first.
        checks = [*checks[:2], of_words, *checks[2:], of_whole]
    estimates = {link: Estimate.of(values) for link, values in means.items()}
    broken, sure = _first_broken(checks)
    if broken is not None:
        what = "the questions" if broken in ("words", "whole") else "the facts"
        verdict = _say(broken, sure, what)
    elif len(means) == 2:
        missing = ", ".join(kind.name for kind in kinds if kind.broken)
        verdict = f"the encoders name every kind of fact{' except ' * bool(missing)}{missing}"
    else:
        left = _left(estimates)
        weakest = min(left, key=left.__getitem__)
        verdict = f"no link is broken; the weakest is {WEAKEST[weakest]} ({left[weakest]:.0%} left)"
    return Row("all", number, estimates, broken, sure, verdict)


def _left(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """The share that each link leaves of what came to it."""
    value = {link: max(estimates[link].value, 1e-6) for link in LINKS if link in estimates}
    before = {"connector": "encoders", "reading": "connector", "whole": "words"}
    return {
        link: min(1.0, number / value[before[link]] if link in before else number)
        for link, number in value.items()
    }


def _row(
    name: str, number: int, samples: Mapping[str, np.ndarray], checks: Sequence[Check], few: bool
) -> Row:
    """Join what was measured of a kind or family and what follows from it."""
    estimates = {link: Estimate.of(values) for link, values in samples.items()}
    if few:
        return Row(name, number, estimates, None, False, "too few to judge")
    broken, sure = _first_broken(checks)
    verdict = "intact" if broken is None else _say(broken, sure, name)
    return Row(name, number, estimates, broken, sure, verdict)


def _first_broken(checks: Sequence[Check]) -> tuple[str | None, bool]:
    """The first link that lets too little through, and whether that is sure.

    One whose interval lies below the least that it should let through goes before one that only
    seems to.
    """
    gaps = {link: came - least for link, came, least in checks}
    surely = [link for link, gap in gaps.items() if np.nanpercentile(gap[1:], 97.5) < 0]
    seemingly = [link for link, gap in gaps.items() if gap[0] < 0]
    return next(iter(surely or seemingly), None), bool(surely or not seemingly)


def _say(broken: str, sure: bool, what: str) -> str:
    return ("" if sure else "perhaps ") + LINKS[broken].format(what)


# ---- showing it

COLUMNS = {
    "pixels": "pixels",
    "encoders": "encoders",
    "connector": "connector",
    "reading": "said",
    "words": "transcript",
    "whole": "video",
}
"""What was measured -> heading of its column."""
LEGENDS = {
    "kind of fact": "Facts: 100 is to tell every clip of which a fact is true from those of which "
    "it is not, 0 is not to look. Of what happens, the clips are of one video.",
    "family": "Questions: per cent right, from the transcript in words and from the video. Chance "
    "is 25 with four options.",
    "overall": "Means over the kinds that have all links, and over the families that take a video, "
    "where 0 is chance and 100 is all right.",
}
"""Table -> what its numbers mean. The intervals are of 95 %, over videos."""


def _tables(diagnosis: Diagnosis) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns and rows of each table."""
    for heading, rows in (("kind of fact", diagnosis.kinds), ("family", diagnosis.families)):
        links = [link for link in COLUMNS if any(link in row.estimates for row in rows)]
        if rows:
            columns = [heading, "number", *(COLUMNS[link] for link in links), "verdict"]
            yield heading, columns, [_cells(row, links) for row in rows]
    overall = diagnosis.overall.estimates
    rows_of_all = [[COLUMNS[link], str(overall[link])] for link in COLUMNS if link in overall]
    if rows_of_all:
        yield "overall", ["overall", "all"], rows_of_all


def _cells(row: Row, links: Iterable[str]) -> list[str]:
    numbers = [str(row.estimates[link]) if link in row.estimates else "-" for link in links]
    return [row.name, str(row.number), *numbers, row.verdict]


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the tables and the verdict."""
    for heading, columns, rows in _tables(diagnosis):
        table = Table(box=box.SIMPLE_HEAD)
        for column in columns:
            named = column in (heading, "verdict")
            table.add_column(column, justify="left" if named else "right")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        console.print(LEGENDS[heading], highlight=False)
    console.print(f"\nVerdict: {diagnosis.overall.verdict}.", highlight=False)


def page_of(diagnosis: Diagnosis, title: str) -> str:
    """The same as a self-contained HTML page."""
    sections = [report.paragraph(f"Verdict: {diagnosis.overall.verdict}.")]
    for heading, columns, rows in _tables(diagnosis):
        sections += [
            report.heading(heading.capitalize()),
            report.paragraph(LEGENDS[heading]),
            report.table(columns, rows),
        ]
    rules = ", ".join(f"{k} {v:.2f}" for k, v in diagnosis.to_json()["rules"].items())
    sections.append(report.paragraph(f"Rules: {rules}; see docs/diagnose.md."))
    return report.page(title, *sections)
