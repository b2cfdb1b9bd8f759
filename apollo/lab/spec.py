"""What a study is: a recipe, axes of settings, seeds, and what the paper says of the outcome.

A study is a plain value. Its points are all combinations of one level of each axis with each seed;
a level is a set of settings by their dotted paths, as `apollo train --set` takes them. Nothing here
trains: `measure` names the module that turns a point into numbers. Free of torch. Read next:
`studies.py`, which has one for each table of the paper; `runner.py`, which runs them.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Settings = Mapping[str, Any]
"""Dotted path -> value, as "model.tokens_per_clip": 8. One is no setting of a recipe: "recipe",
another recipe to start from."""

Scale = Literal["micro", "paper"]
""""micro" runs on a laptop, "paper" is the paper's own size."""
PAPER_DIR = Path(__file__).parent / "paper"
"""Tables of the paper, as printed."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a trained model is asked.

    Attributes:
        condition: What it is shown, a key of `apollo.eval.answerers.CONDITIONS`.
        sampling: How videos are sampled; empty: as in training.
        max_clips: Most clips; None: as in training.
    """

    condition: str = "video"
    sampling: str = ""
    max_clips: int | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """Some points of a study, seen through one metric.

    Attributes:
        levels: Axis -> which of its levels; axes that are not named do not matter.
        metric: Which number; empty: the study's.
    """

    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metric: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something the paper says: one side scores more than the other, or as much.

    Attributes:
        finding: Number of the paper's finding, from 1 to 10; 0 for a claim that is none of them.
        says: The claim in words.
        more: The side that scores more.
        less: The other.
        same: The claim is that there is no difference that matters.
        paper: The paper's difference in points, where its levels are others than the study's.
    """

    finding: int
    says: str
    more: Side
    less: Side
    same: bool = False
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of trainings and what is asked of it.

    Attributes:
        name: Name on the command line.
        scale: How large its models are.
        about: What is varied, in a line.
        mirrors: Table or figure of the paper.
        recipe: Recipe that all points start from, a key of `apollo.train.recipes.RECIPES`.
        settings: What all points change in it.
        axes: Axis -> level -> settings.
        seeds: Each point is trained with each of them.
        questions: Folder that the models are asked about.
        asking: Metric -> how it is asked for; its value is the accuracy in per cent.
        metric: The main one.
        claims: What the paper says of it.
        paper: Metric -> levels, one of each axis in order -> the paper's score in per cent.
        size_axis: Axis whose levels are sizes of the LLM, for a study of scaling; else empty.
        gaps: What the paper has and this study has not, and why.
        measure: Module with `identity(study, point)` and `run(study, point, folder)`.
    """

    name: str
    scale: Scale = "micro"
    about: str
    mirrors: str = ""
    recipe: str = "micro"
    settings: Settings = field(default_factory=dict)
    axes: Mapping[str, Mapping[str, Settings]]
    seeds: Sequence[int] = (0, 1, 2)
    questions: str = ""
    asking: Mapping[str, Asking] = field(default_factory=lambda: {"video": Asking()})
    metric: str = "video"
    claims: Sequence[Claim] = ()
    paper: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    size_axis: str = ""
    gaps: str = ""
    measure: str = "apollo.lab.training"

    def __post_init__(self) -> None:
        if not self.seeds or not self.axes or not all(self.axes.values()):
            raise ValueError(f"study {self.name}: it needs seeds and axes with levels")
        if self.metric not in self.asking:
            raise ValueError(
                f"study {self.name}: metric {self.metric!r} is not in asking: "
                f"{', '.join(self.asking)}"
            )
        sides = [side for claim in self.claims for side in (claim.more, claim.less)]
        for side in sides:
            for axis, levels in side.levels.items():
                if unknown := [one for one in levels if one not in self.axes.get(axis, ())]:
                    raise ValueError(f"study {self.name}: a claim names {axis} {unknown}")
        if self.size_axis and self.size_axis not in self.axes:
            raise ValueError(f"study {self.name}: there is no axis {self.size_axis!r}")

    def points(self) -> Iterator[Point]:
        """All points, the first seed of each first: what is there early is a whole table."""
        for seed in self.seeds:
            for levels in itertools.product(*self.axes.values()):
                chosen = dict(zip(self.axes, levels, strict=True))
                settings = dict(self.settings)
                for axis, level in chosen.items():
                    settings |= self.axes[axis][level]
                yield Point(chosen, seed, settings)


@dataclass(frozen=True)
class Point:
    """One training of a study.

    Attributes:
        levels: Axis -> level.
        seed: Decides all that is random.
        settings: Of the study and its levels, the later ones over the earlier.
    """

    levels: Mapping[str, str]
    seed: int
    settings: Settings

    @property
    def label(self) -> str:
        """What it is called: "resampler=perceiver seed=0"."""
        named = [f"{axis}={level}" for axis, level in self.levels.items()]
        return " ".join([*named, f"seed={self.seed}"])

    def overrides(self) -> list[str]:
        """Its settings as `apollo.config.apply_overrides` takes them; JSON is YAML, too."""
        changed = [
            f"{path}={json.dumps(value)}"
            for path, value in self.settings.items()
            if path != "recipe"
        ]
        return [*changed, f"loop.seed={self.seed}"]


def paper_scores(table: str) -> dict[int, float]:
    """Row of a table of the paper, from 1, -> its overall score in per cent."""
    rows = enumerate(read_paper_table(table), start=1)
    return {number: float(row["overall"]) for number, row in rows}


def read_paper_table(name: str) -> list[dict[str, str]]:
    """The rows of a table of the paper, in order."""
    with (PAPER_DIR / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
