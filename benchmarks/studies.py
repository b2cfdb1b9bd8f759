"""Do finished studies come out again, and did they take as long as `apollo study plan` said?

    python benchmarks/studies.py [NAME ...]      # of the ledgers in docs/ledgers; by default all

Of each study whose points are all there, its first point is trained and asked anew from nothing:
its features are made again, too. It should lie within the interval of its level, which the spread
over seeds gives, or come out the same where there is one seed. And the seconds that the plan would
have given after the first seed (of one: after the first level of the first axis), for the others,
are set beside what these took, by the clock of a machine that did other work as well.
Writes benchmarks/results/studies.json; what it holds of other studies stays.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from apollo.lab import training
from apollo.lab.commands import FINISHED, forecast
from apollo.lab.ledger import Line
from apollo.lab.report import level_estimates, values_of
from apollo.lab.runner import finished_lines
from apollo.lab.spec import Study
from apollo.lab.studies import STUDIES
from apollo.runtime import environment

RESULT = Path(__file__).parent / "results" / "studies.json"
LEDGERS = Path(__file__).parents[1] / "docs" / "ledgers"


def plan(study: Study, lines: list[Line]) -> dict[str, float]:
    """Seconds of what is run later, as what is run first foretells them and as they were."""
    axis, levels = next(iter(study.axes.items()))
    of_axis = {"seed": study.seeds[0]} if len(study.seeds) > 1 else {axis: next(iter(levels))}
    first = [line for line in lines if of_axis.items() <= {**line, **line["levels"]}.items()]
    planned = sum(one.seconds or 0 for one in forecast(study, first, {}) if one.how != FINISHED)
    took = sum(line["seconds"] for line in lines if line not in first)
    return {
        "planned_s": round(planned, 1),
        "took_s": round(took, 1),
        "ratio": round(planned / took, 3),
    }


def again(study: Study, lines: list[Line]) -> dict[str, Any]:
    """Train and ask the first point anew."""
    point = next(iter(study.points()))
    with tempfile.TemporaryDirectory() as name:
        settings = {**point.settings, "feature_cache_dir": f"{name}/features"}
        started = time.monotonic()
        metrics = training.run(study, replace(point, settings=settings), Path(name))["metrics"]
        seconds = time.monotonic() - started
    values = values_of(study, lines, study.metric)
    levels = tuple(point.levels.values())
    estimate, value = level_estimates(values)[levels], metrics[study.metric]
    interval = [round(estimate.low, 2), round(estimate.high, 2)]
    return {
        "point": point.label,
        "metric": study.metric,
        "in_the_ledger": values[levels][point.seed],
        "again": value,
        "interval": interval if len(study.seeds) > 1 else None,
        "within": value == estimate.value or estimate.low <= value <= estimate.high,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(STUDIES))
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in args.names:
        study = STUDIES[name]("micro")
        lines = finished_lines(study, LEDGERS)
        if len(lines) < len(list(study.points())):
            print(f"{name}: {len(lines)} points in {LEDGERS}, not finished: left out")
            continue
        result[name] = {"plan": plan(study, lines), "again": again(study, lines)}
        print(name, result[name], flush=True)
        result["environment"] = environment()
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
