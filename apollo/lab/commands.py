"""`apollo study list | plan | run | report`: the lab on the command line.

Here because each command only joins what the other modules do. A study is a name of
`studies.STUDIES` or, for one's own, FILE.py:FUNCTION. Free of torch until a ledger is read.
Next: docs/studies.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo.lab.findings import findings_text, write_findings
from apollo.lab.ledger import Line
from apollo.lab.runner import EXECUTORS, Work, find_study, finished_lines, measure_of
from apollo.lab.spec import Point, Study
from apollo.lab.studies import STUDIES


@dataclass(frozen=True)
class Forecast:
    """How long a point took, or will take.

    Attributes:
        point: Its label.
        seconds: Of one worker; None where nothing is known.
        how: Where the number comes from.
    """

    point: str
    seconds: float | None
    how: str


FINISHED, BY_SEEDS, BY_STUDY, CALIBRATED = (
    "finished",
    "as its other seeds took",
    "as the study's points took on average",
    "calibrated",
)


def list_main(args: argparse.Namespace) -> int:
    """Run `apollo study list`.

    Args:
        args: scale, out (folder of the lab).
    """
    print(f"{'study':14}{'finished':11}{'the paper':27}what is varied")
    for name, make in STUDIES.items():
        study = make(args.scale)
        num_finished = len(finished_lines(study, Path(args.out) / "ledgers"))
        finished = f"{num_finished} of {sum(1 for _ in study.points())}"
        print(f"{name:14}{finished:11}{study.mirrors:27}{study.about.strip()}")
    return 0


# ---- plan


def plan_main(args: argparse.Namespace) -> int:
    """Run `apollo study plan STUDY`.

    Args:
        args: study, scale, out, calibrate (measure a few steps of each kind of point), workers,
            gpu and gpus (of the paper's scale), json.
    """
    study = find_study(args.study, args.scale)
    if study.scale == "paper":
        return _plan_on_gpus(study, args.gpu, args.gpus)
    lines = finished_lines(study, Path(args.out) / "ledgers")
    known, features_s = _calibrated(study, lines) if args.calibrate else ({}, 0.0)
    forecasts = forecast(study, lines, known)
    left = [one for one in forecasts if one.how != FINISHED]
    unknown = sum(one.seconds is None for one in left)
    hours = (sum(one.seconds or 0.0 for one in left) + features_s) / 3600
    if args.json:
        whole = {"hours_left": hours, "unknown": unknown, "features_s": features_s}
        print(json.dumps({**whole, "points": [asdict(one) for one in forecasts]}, indent=1))
        return 0
    table = Table("point", "seconds", "how that is known", box=box.SIMPLE_HEAD)
    for one in forecasts:
        seconds = "?" if one.seconds is None else f"{one.seconds:.0f}"
        table.add_row(escape(one.point), seconds, one.how)
    console = Console()
    console.print(table)
    text = f"{len(left)} of {len(forecasts)} points are left: {hours:.2f} hours of one worker"
    if args.workers > 1:
        text += f", {hours / args.workers:.2f} of {args.workers}"
    if features_s:
        text += f" (with {features_s:.0f} s for the features that all share)"
    if unknown:
        text += f", and {unknown} of which nothing is known yet: run one seed, or --calibrate"
    console.print(text, highlight=False, soft_wrap=True)
    return 0


def forecast(
    study: Study, lines: Sequence[Line], calibrated: Mapping[tuple[str, ...], float]
) -> list[Forecast]:
    """How long each point took or will take: by its own line, its other seeds, a calibration, or
    the mean of the study, whichever is there first. Features are made once.
    """
    by_levels: dict[tuple[str, ...], dict[int, Line]] = {}
    for line in lines:
        levels = tuple(line["levels"].get(axis, "") for axis in study.axes)
        by_levels.setdefault(levels, {})[line["seed"]] = line
    forecasts = []
    for point in study.points():
        levels = tuple(point.levels.values())
        seeds = by_levels.get(levels, {})
        if point.seed in seeds:
            seconds, how = seeds[point.seed]["seconds"], FINISHED
        elif seeds:
            seconds, how = fmean(map(_seconds_again, seeds.values())), BY_SEEDS
        elif levels in calibrated:
            seconds, how = calibrated[levels], CALIBRATED
        elif lines:
            seconds, how = fmean(map(_seconds_again, lines)), BY_STUDY
        else:
            forecasts.append(Forecast(point.label, None, "not known"))
            continue
        forecasts.append(Forecast(point.label, seconds, how))
    return forecasts


def _seconds_again(line: Line) -> float:
    """What a point takes where its features are there."""
    return line["seconds"] - line.get("timing", {}).get("features_s", 0.0)


def _calibrated(study: Study, lines: Sequence[Line]) -> tuple[dict[tuple[str, ...], float], float]:
    """Measure a few steps of each combination of levels that no line tells of.

    Returns:
        Levels -> seconds of a point, and seconds for the features that all points share.
    """
    from apollo.lab.training import calibrate

    if study.measure != "apollo.lab.training":
        raise ValueError(f"study {study.name} is measured by {study.measure}: run one seed instead")
    known = {tuple(line["levels"].values()) for line in lines}
    seconds, features_s = {}, 0.0
    for point in _one_of_each(study):
        levels = tuple(point.levels.values())
        if levels in known:
            continue
        print(f"measuring a few steps of {point.label}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, Path(folder, "log.txt").open("w") as log:
            with redirect_stdout(log), redirect_stderr(log):
                found = calibrate(study, point, Path(folder))
        seconds[levels] = found["start"] + found["train"] + found["eval"]
        features_s = max(features_s, found["features"])
    return seconds, features_s


def _one_of_each(study: Study) -> list[Point]:
    return [point for point in study.points() if point.seed == study.seeds[0]]


def _plan_on_gpus(study: Study, gpu: str, num_gpus: int) -> int:
    """Estimate each combination of levels as `apollo plan` does; evaluations are not in it."""
    from apollo.lab.training import resolve
    from apollo.train.plan import make_plan

    table = Table("levels", f"hours of {num_gpus} {gpu}", "GPU hours", box=box.SIMPLE_HEAD)
    total = 0.0
    for point in _one_of_each(study):
        plan = make_plan(resolve(study, point), gpu, num_gpus)
        total += plan.gpu_hours
        levels = ", ".join(point.levels.values())
        table.add_row(escape(levels), f"{plan.hours:.1f}", f"{plan.gpu_hours:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"{total:.0f} GPU hours for each of {len(study.seeds)} seeds; `apollo plan` says what is "
        "assumed.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


# ---- run


def run_main(args: argparse.Namespace) -> int:
    """Run `apollo study run STUDY`.

    Args:
        args: study, scale, out, executor (a key of `EXECUTORS`), workers, keep.
    """
    study = find_study(args.study, args.scale)
    measure_of(study)  # before anything is started
    if args.executor == "here" and args.workers > 1:
        raise ValueError("--executor here is one worker; take processes, ray or slurm for several")
    work = Work(args.study, args.scale, Path(args.out), args.workers, args.keep)
    return int(EXECUTORS[args.executor](work) > 0)


# ---- report


def report_main(args: argparse.Namespace) -> int:
    """Run `apollo study report`.

    Args:
        args: study (one alone, printed; or None for the page of all), scale, ledgers (folder), out
            (Markdown file of the page).
    """
    folder = Path(args.ledgers)
    if args.study:
        study = find_study(args.study, args.scale)
        print(findings_text([study], {study.name: finished_lines(study, folder)}, {}), end="")
        return 0
    studies = [make(args.scale) for make in STUDIES.values()]
    ledgers = {study.name: finished_lines(study, folder) for study in studies}
    if not any(ledgers.values()):
        raise ValueError(f"no ledger of a study is in {folder}; `apollo study run` writes them")
    write_findings(Path(args.out), studies, ledgers)
    print(f"{args.out}, figures beside it")
    return 0
