"""Measure a point of a study: train what it says, ask the model, hand back numbers and times.

Here because a study knows settings and nothing of torch. The identity of a point is the hash of its
whole configuration as far as it decides the outcome: where files lie, how often something is saved
and how many processes load data are not in it, and neither are settings at their defaults, so that
a setting that is added one day changes no identity. Read next: `apollo/train/run.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from apollo.config import apply_overrides, save_config, to_dict
from apollo.data.features import FeatureCache
from apollo.eval.answerers import make_answerer, pick_scoring
from apollo.eval.benchmarks import BENCHMARKS, read_benchmark
from apollo.eval.runner import evaluate, recognise
from apollo.lab.spec import Asking, Point, Study
from apollo.model import ApolloProcessor
from apollo.runtime import read_jsonl
from apollo.train.recipes import RECIPES, TrainConfig
from apollo.train.run import train

NOT_OUTCOME = ("out_dir", "feature_cache_dir", "video_time_limit_s")
"""Settings that do not decide the outcome; of `loop` only `OUTCOME_OF_LOOP` do."""
OUTCOME_OF_LOOP = ("seed", "mixed_precision")
CALIBRATION_STEPS = 12
CALIBRATION_QUESTIONS = 60
START_S = 5.0
"""Seconds that loading parts and data takes (measured), where making features hides them."""


def resolve(study: Study, point: Point) -> TrainConfig:
    """The whole configuration of a point's training.

    Raises:
        ValueError: A recipe or a setting that there is not.
    """
    recipe = point.settings.get("recipe", study.recipe)
    if recipe not in RECIPES:
        raise ValueError(f"study {study.name}: no recipe {recipe!r}; see `apollo list recipes`")
    return apply_overrides(RECIPES[recipe](), point.overrides())


def identity(study: Study, point: Point) -> str:
    """Hash of all that the numbers depend on; see the module."""
    config = resolve(study, point)
    outcome = {k: v for k, v in _changed(config).items() if k not in NOT_OUTCOME}
    outcome["loop"] = {name: getattr(config.loop, name) for name in OUTCOME_OF_LOOP}
    asked = {name: _changed(asking) for name, asking in sorted(study.asking.items())}
    whole = {
        "config": outcome,
        "questions": study.questions,
        "asking": asked,
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _changed(value: Any) -> Any:
    """A dataclass tree as plain values, without what is at its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for field in dataclasses.fields(value):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if getattr(value, field.name) != default:
                found[field.name] = _changed(getattr(value, field.name))
        return found
    if isinstance(value, list | tuple):
        return [_changed(item) for item in value]
    return to_dict(value)


def run(study: Study, point: Point, folder: Path) -> Mapping[str, Any]:
    """Train, ask, and give metrics in per cent; goes on where an earlier try was stopped.

    Args:
        study: What it belongs to.
        point: Which.
        folder: Receives the run of the training and of each evaluation.

    Raises:
        ValueError: A part, a record or a question that cannot be used.
    """
    started = time.monotonic()
    config = replace(resolve(study, point), out_dir=folder / "train")
    learned, asked = config.feature_cache_dir, _features_of(config)
    had = _num_features(learned), _num_features(asked)
    model_dir = _train(config, torch.cuda.device_count())
    train_s = time.monotonic() - started
    stages = stage_times(config)
    steps_s = sum(each["seconds"] for each in stages.values())  # those of earlier tries as well
    metrics: dict[str, float] = {}
    for name, asking in study.asking.items():
        metrics |= _ask(study, name, asking, model_dir, folder, asked)
    eval_s = time.monotonic() - started - train_s
    new = _num_features(learned) - had[0], _num_features(asked) - had[1]
    features_s = 0.0
    if new[0] > 0:  # those of the questions' videos take as long each as those learnt from
        features_s = max(0.0, train_s - steps_s - START_S)
        features_s *= 1 + new[1] / new[0]
    train_s = max(train_s, steps_s)
    return {
        "metrics": metrics,
        "seconds": round(train_s + eval_s, 2),
        "timing": {
            "train_s": round(train_s, 2),
            "eval_s": round(eval_s, 2),
            "features_s": round(features_s, 2),
            "stages": stages,
        },
        "config": _changed(replace(config, out_dir=Path())),
        "inputs": inputs_of(study, config),
    }


def _train(config: TrainConfig, num_gpus: int) -> Path:
    """Train, or go on, on all GPUs that this worker sees: here on one or none, else by torchrun."""
    resume = (config.out_dir / "config.yaml").is_file()
    if num_gpus < 2:
        return train(replace(config, loop=replace(config.loop, sharding="no")), resume)
    path = config.out_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["-m", "apollo", "train", "--out", str(config.out_dir)]
    command += ["--resume"] if resume else ["--config", str(path)]
    done = subprocess.run([*launcher, "--nproc-per-node", str(num_gpus), *command])
    if done.returncode:
        raise RuntimeError(f"training on {num_gpus} GPUs ended with code {done.returncode}")
    return config.out_dir / "model"


def _features_of(config: TrainConfig) -> Path | None:
    """Where what the encoders make of the questions' videos is kept for other points.

    None where no other point has the same: if they are trained.
    """
    if not config.feature_cache_dir or any(s.learning_rates["encoders"] for s in config.stages):
        return None
    return config.feature_cache_dir / "asked"  # apart: what lies above is counted to tell times


def _ask(
    study: Study,
    name: str,
    asking: Asking,
    model_dir: Path,
    folder: Path,
    feature_cache: Path | None,
) -> dict[str, float]:
    """Per cent right: of all, of each class and the mean over families."""
    model = _sampled_as(asking, model_dir, folder / f"model-{name.replace(' ', '-')}")
    benchmark, _ = recognise(study.questions)
    questions = read_benchmark(benchmark, study.questions)
    scoring = pick_scoring(str(model), None, BENCHMARKS[benchmark].scoring)
    answerer = make_answerer(str(model), scoring=scoring, feature_cache=feature_cache)
    out_dir = folder / f"eval-{name.replace(' ', '-')}"
    tables = evaluate(answerer, questions, [asking.condition], out_dir)
    overall = tables["overall"]["all"][asking.condition]
    found = {name: overall.accuracy}
    if overall.family_mean is not None:
        found[f"{name}/family mean"] = overall.family_mean
    for group, scores in tables.get("class", {}).items():
        found[f"{name}/{group}"] = scores[asking.condition].accuracy
    return {metric: round(100 * share, 3) for metric, share in found.items()}


def _sampled_as(asking: Asking, model_dir: Path, folder: Path) -> Path:
    """The model, or a folder with links to its weights and a processor that samples otherwise."""
    if not asking.sampling and asking.max_clips is None:
        return model_dir
    processor = ApolloProcessor.from_pretrained(model_dir)
    processor.sampling = asking.sampling or processor.sampling
    processor.max_clips = asking.max_clips or processor.max_clips
    processor.save_pretrained(folder)
    for path in model_dir.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def stage_times(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Stage -> steps and seconds, from the log of its run."""
    lines = list(read_jsonl(config.out_dir / "log.jsonl"))
    last = {line["stage"]: line for line in lines}
    return {
        name: {"steps": line["step"], "seconds": line["elapsed_s"]} for name, line in last.items()
    }


def inputs_of(study: Study, config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the files that settings only name: weights of local parts, worlds."""
    files = [
        Path(part) / "model.safetensors" for part in (*config.model.encoders, config.model.llm)
    ]
    files += [Path(folder) / "world.json" for folder in (config.data_dir, study.questions)]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }


# ---- how long a point will take


def calibrate(study: Study, point: Point, folder: Path) -> dict[str, float]:
    """Seconds that a point will take, from a few steps of each stage and a few questions.

    Returns:
        "start", "train" and "eval" of the point; "features" is what encoding all media of the data
        would take that are not in the cache yet, once for all points with these encoders.
    """
    whole = resolve(study, point)
    stages = [replace(s, steps=min(s.steps, CALIBRATION_STEPS)) for s in whole.stages]
    config = replace(
        whole, stages=stages, out_dir=folder / "train", loop=replace(whole.loop, log_every=2)
    )
    cached = _num_features(config.feature_cache_dir)
    started = time.monotonic()
    model_dir = _train(config, torch.cuda.device_count())
    train_s = time.monotonic() - started
    rates, steps_s = _step_times(config, whole.stages)
    new, rest_s = _num_features(config.feature_cache_dir) - cached, train_s - steps_s
    left = max(0, _num_media(config.data_dir) - cached - new)
    asked = [_eval_times(study, each, model_dir, whole) for each in study.asking.values()]
    return {
        "start": min(rest_s, START_S) if new else rest_s,
        "train": rates,
        "eval": sum(always for always, _ in asked),
        "features": (rest_s / new * left if new else 0.0) + sum(once for _, once in asked),
    }


def _step_times(config: TrainConfig, whole: Sequence[Any]) -> tuple[float, float]:
    """Seconds of all steps of the whole stages, and of those that were taken."""
    lines = list(read_jsonl(config.out_dir / "log.jsonl"))
    total, taken = 0.0, 0.0
    for stage in whole:
        of_stage = [line for line in lines if line["stage"] == stage.name]
        first, last = of_stage[0], of_stage[-1]
        steps = max(1, last["step"] - first["step"])  # the first lines hold what happens once
        total += stage.steps * (last["elapsed_s"] - first["elapsed_s"]) / steps
        taken += last["elapsed_s"]
    return total, taken


def _eval_times(
    study: Study, asking: Asking, model_dir: Path, config: TrainConfig
) -> tuple[float, float]:
    """Seconds of asking all questions, and more of it the first time, when features are made."""
    benchmark, _ = recognise(study.questions)
    questions = read_benchmark(benchmark, study.questions)
    scoring = pick_scoring(str(model_dir), None, BENCHMARKS[benchmark].scoring)
    features = _features_of(config)
    answerer = make_answerer(str(model_dir), scoring=scoring, feature_cache=features)
    some = questions[:CALIBRATION_QUESTIONS]

    def seconds(folder: str) -> float:
        started = time.monotonic()
        evaluate(answerer, some, [asking.condition], model_dir.parent / folder)
        return (time.monotonic() - started) * len(questions) / len(some)

    name = asdict(asking)
    first = seconds(f"calibration-{name}")
    if not features:
        return first, 0.0
    again = seconds(f"calibration-{name}-again")
    return again, max(0.0, first - again)


def _num_features(folder: Path | None) -> int:
    return FeatureCache(folder, {}).size().num_files if folder else 0


def _num_media(folder: Path) -> int:
    return sum(1 for name in ("videos", "images") for _ in (folder / name).glob("*"))
