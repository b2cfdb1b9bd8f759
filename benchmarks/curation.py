"""How fast audits and curations are, and whether they find what is known to be there.

    python benchmarks/curation.py                # all of it, on simulated models
    python benchmarks/curation.py --part speed   # one part; the others stay as they were
    python benchmarks/curation.py --predictions runs/m* --second runs/other/m*   # of real models

Speed: a million questions x 30 models x 3 conditions, each step in a process of its own that is
held to two cores; seconds by the clock and of the processors (these do not depend on who else uses
the machine), and the most memory held. Planted: precision and recall of the questions that were
made to need no video, by the majority and luck aside, on two different pools, and how well a set 41
times smaller ranks models that did not choose it. With --predictions the same of runs of
`apollo eval` on a micro world, whose questions say what they need (`needs`), and with --second on
another pool. Writes benchmarks/results/curation.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apollo.curation import report
from apollo.curation.audit import audit
from apollo.curation.curate import Settings, choose
from apollo.curation.outputs import write_audit, write_decisions, write_json, write_review
from apollo.curation.readers import parse_sources, read_pool
from apollo.curation.records import Pool, load_pool, save_pool
from apollo.curation.shortcuts import answerable, kinds_of, majority
from apollo.curation.simulate import World, simulate
from apollo.curation.validate import cost_ratio, validate
from apollo.runtime import environment

RESULT = Path(__file__).parent / "results" / "curation.json"
NUM_QUESTIONS, NUM_MODELS, NUM_CORES = 1_000_000, 30, 2
NUM_LINES = 50_000  # of predictions.jsonl, to time the reading of them
NUM_POOLS = 8  # for which the gain over random sets is averaged
FACTOR = 41  # how much smaller the paper's benchmark is
SECOND = World(
    classes=("who", "when", "how often"),
    families=6,
    questions_per_video=3,
    num_options=3,
    shares=(0.7, 0.2, 0.1),
    ability_sd=0.8,
    shortcut_ease=2.5,
    lean=0.05,
)


# ---- speed: each step in a process of its own


def step_make(folder: Path) -> dict[str, Any]:
    """Simulate the pool and write it."""
    save_pool(simulate(NUM_QUESTIONS, NUM_MODELS), folder / "pool.parquet")
    return {"parquet_mb": round((folder / "pool.parquet").stat().st_size / 1e6, 1)}


def step_read(folder: Path) -> dict[str, Any]:
    """Read the pool."""
    load_pool(folder / "pool.parquet")
    return {}


def step_read_lines(folder: Path) -> dict[str, Any]:
    """Read predictions.jsonl of one model."""
    pool = simulate(NUM_LINES, 1)
    with (folder / "lines.jsonl").open("w") as file:
        for row in range(NUM_LINES):
            file.write(json.dumps(_line(pool, row)) + "\n")
    started, used = time.perf_counter(), time.process_time()
    read_pool(parse_sources([str(folder / "lines.jsonl")]))
    return {
        "lines": NUM_LINES,
        "lines_per_s": round(NUM_LINES / (time.perf_counter() - started)),
        "lines_per_cpu_s": round(NUM_LINES / (time.process_time() - used)),
    }


def _line(pool: Pool, row: int) -> dict[str, Any]:
    chosen, answer = int(pool.chosen[0, 0, row]), int(pool.answer[row])
    return {
        "benchmark": "world",
        "question_id": str(pool.question_ids[row]),
        "video": pool.columns["video"][row],
        "condition": "video",
        "class": pool.columns["class"][row],
        "family": pool.columns["family"][row],
        "needs": pool.columns["needs"][row],
        "duration_s": float(pool.duration_s[row]),
        "duration_group": "",
        "source": "",
        "num_options": 4,
        "answer": answer,
        "prediction": None if chosen < 0 else chosen,
        "correct": chosen == answer,
        "status": "ok" if chosen >= 0 else "unparsable",
        "option_scores": [-1.2345] * 4,
        "text": "",
        "frame_times_s": [[0.0, 0.48, 1.0, 1.48]] * 8,
        "num_prompt_tokens": 400,
        "num_answer_tokens": None,
    }


def step_audit(folder: Path) -> dict[str, Any]:
    """Audit, and write everything that `apollo audit --out` writes."""
    pool = load_pool(folder / "pool.parquet")

    def work() -> None:
        found = audit(pool)
        out = folder / "audit"
        out.mkdir(exist_ok=True)
        write_audit(found, pool, out)
        (out / "audit.html").write_text(report.audit_page(found, pool))

    return timed(work)


def step_curate(folder: Path) -> dict[str, Any]:
    """Choose, validate, and write everything that `apollo curate --out` writes."""
    pool = load_pool(folder / "pool.parquet")

    def work() -> None:
        settings = Settings(400)
        choice = choose(pool, settings)
        found, cost = validate(pool, settings), cost_ratio(pool, choice.rows)
        out = folder / "curate"
        out.mkdir(exist_ok=True)
        write_decisions(pool, choice, out)
        write_review(pool, choice.rows, [], {}, out / "review.csv")
        write_json(found, out / "curation.json")
        page = report.curation_page(pool, choice, found, cost, "class")
        (out / "curation.html").write_text(page)

    return timed(work)


def timed(work: Callable[[], None]) -> dict[str, float]:
    """Seconds by the clock and of the processors."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return {
        "s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - used, 2),
    }


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "make": step_make,
    "read": step_read,
    "read_lines": step_read_lines,
    "audit": step_audit,
    "curate": step_curate,
}


def run_step(name: str, folder: Path) -> None:
    """Run a step in this process and print what was measured."""
    cores = sorted(os.sched_getaffinity(0))[:NUM_CORES]
    os.sched_setaffinity(0, cores)
    found: dict[str, Any] = {}
    whole = timed(lambda: found.update(STEPS[name](folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(json.dumps({**whole, **found, "peak_gb": round(peak / 1e9, 2)}))


def speed() -> dict[str, Any]:
    """Run each step in a process of its own."""
    found: dict[str, Any] = {
        "questions": NUM_QUESTIONS,
        "models": NUM_MODELS,
        "conditions": 3,
        "cores": NUM_CORES,
        "load_average": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in STEPS:
            line = [sys.executable, __file__, "--step", name, folder]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(done.stdout)
            print(name, found[name], flush=True)
    return found


# ---- planted truths


def planted(pool: Pool) -> dict[str, Any]:
    """Precision and recall of the shortcuts that `needs` says are there."""
    needs = pool.columns["needs"].values()
    if not {"text", "frame"} & set(needs):
        raise SystemExit("these questions do not say what they need; use those of a micro world")
    found: dict[str, Any] = {}
    for condition, truth in (("text", needs == "text"), ("frame", needs != "frames")):
        kinds = kinds_of(pool)
        likely = answerable(pool, condition, kinds)
        by_kind = (np.bincount(kinds.codes, likely) / np.bincount(kinds.codes))[kinds.codes]
        ways = {
            "majority": majority(pool, condition),
            "luck aside": likely > 0.5,
            "whole kinds": by_kind > 0.5,
        }
        found[condition] = {
            name: {
                "found": int(flags.sum()),
                "precision": _share((flags & truth).sum(), flags.sum()),
                "recall": _share((flags & truth).sum(), truth.sum()),
            }
            for name, flags in ways.items()
        }
    return found


def _share(part: int, whole: int) -> float | None:
    return round(float(part / whole), 4) if whole else None


def measure(pool: Pool) -> dict[str, Any]:
    """What is planted, and how a set 41 times smaller than the pool ranks unseen models."""
    size = pool.num_questions // FACTOR
    found: dict[str, Any] = {}
    for rule in ("majority", "likely"):
        for balance in ("class", "answers"):
            each = validate(pool, Settings(size, rule=rule, balance=balance))
            found.setdefault(rule, {})[f"spread over {balance}"] = {
                "clean_questions": round(each.num_clean),
                "methods": each.methods,
                "gain_over_random_r2": each.gain,
                "random_sets_beaten": each.beaten,
            }
    return {
        "questions": pool.num_questions,
        "models": len(pool.models),
        "size": size,
        "planted": planted(pool),
        "validation": found,
    }


def gain(world: World) -> dict[str, Any]:
    """R2 of each choice on models not seen, over pools of this world: mean, and of each pool."""
    found: dict[str, list[float]] = {}
    for seed in range(NUM_POOLS):
        pool = simulate(8200, 12, 100 + seed, world)
        for balance in ("class", "answers"):
            settings = Settings(pool.num_questions // FACTOR, balance=balance)
            each = validate(pool, settings, num_splits=20)
            for name, measures in each.methods.items():
                way = name if name == "random" else f"{name}, spread over {balance}"
                found.setdefault(way, []).append(round(measures["r2"].mean, 4))
    return {name: {"mean": float(np.mean(r2)), "pools": r2} for name, r2 in found.items()}


def read(runs: Sequence[str]) -> Pool:
    """Read runs of `apollo eval`."""
    return read_pool(parse_sources(runs))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("speed", "simulated", "all"), default="all")
    parser.add_argument("--predictions", nargs="+", help="runs of real models, instead")
    parser.add_argument("--second", nargs="+", help="runs of them on another pool")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step[0], Path(options.step[1]))
        return
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if options.predictions:
        result["models"] = {"first pool": measure(read(options.predictions))}
        if options.second:
            result["models"]["second pool"] = measure(read(options.second))
    else:
        if options.part in ("simulated", "all"):
            worlds = {"first pool": World(), "second pool": SECOND}
            result["simulated"] = {
                name: measure(simulate(8200, 12, seed, world)) | {"r2_over_pools": gain(world)}
                for seed, (name, world) in enumerate(worlds.items())
            }
            kin = replace(World(), lean=0.6)
            result["simulated"]["models that guess alike"] = {
                "planted": planted(simulate(8200, 12, 0, kin))
            }
        if options.part in ("speed", "all"):
            result["speed"] = speed()
    result["environment"] = environment()
    RESULT.parent.mkdir(exist_ok=True)
    write_json(result, RESULT)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
