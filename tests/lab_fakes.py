"""Points that cost nothing, for the tests of the lab: a `measure` module and studies of it.

Each start and end of a point is a line in the file LAB_FAKES_LOG.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from apollo.lab.spec import Asking, Study


def identity(study, point):
    return hashlib.sha256(f"{point.seed} {point.settings}".encode()).hexdigest()


def _note(word, point):
    with open(os.environ["LAB_FAKES_LOG"], "a") as file:
        file.write(f"{word} {point.label}\n")


def run(study, point, folder):
    _note("start", point)
    if point.settings.get("fails") and not Path(os.environ["LAB_FAKES_LOG"] + ".mended").exists():
        raise ValueError("as it was told to")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("large")
    time.sleep(point.settings.get("seconds", 0.0))
    _note("end", point)
    return {"metrics": {"video": 50.0 + 10 * point.settings["a"] + point.seed}}


def make(seconds=0.0, fails=False, **fields):
    levels = {str(a): {"a": a, "seconds": seconds} for a in range(3)}
    if fails:
        levels["1"]["fails"] = True
    return Study(
        **{
            "name": "fake",
            "about": "Nothing.",
            "axes": {"a": levels, "b": {"x": {}, "y": {"b": 1}}},
            "asking": {"video": Asking()},
            "measure": "lab_fakes",
            **fields,
        }
    )


def quick():
    return make()


def slow():
    return make(seconds=0.05)


def failing():
    return make(fails=True)


def other():
    """Shares the points of a = 1, b = x with the quick one, under other names."""
    return make(name="other", axes={"c": {"same": {"a": 1, "seconds": 0.0}, "new": {"a": 5}}})


def events(log):
    return Path(log).read_text().splitlines() if Path(log).exists() else []


def ledger_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
