"""Points of studies are real trainings: they resolve, build, train, go on, and are measured."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import PAIR
from tiny_recipes import make_data, make_parts

from apollo import cli
from apollo.lab import training
from apollo.lab.runner import Work, find_study, ledger_of, work_through
from apollo.lab.spec import Asking, Point, Study
from apollo.lab.studies import SCALES, STUDIES
from apollo.train.joining import empty_model
from apollo.train.plan import make_plan

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
CASES = [(name, scale) for name in STUDIES for scale in SCALES]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Parts, records and questions as small as they can be."""
    folder = tmp_path_factory.mktemp("lab")
    make_parts(folder / "parts")
    (folder / "data").mkdir()
    make_data(folder / "data")
    questions = [
        {
            "question_id": str(number),
            "video": "0.mp4",
            "question": f"What is {number}?",
            "options": ["one", "two"],
            "answer": number % 2,
            "class": "Numbers",
        }
        for number in range(4)
    ]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "data" / "questions.jsonl").write_text(lines)
    return folder


def settings(lab: Path, **changes) -> dict:
    parts = lab / "parts"
    stage = {
        "name": "sft",
        "steps": 2,
        "learning_rates": {"encoders": 0, "connector": 1e-3, "llm": 1e-3},
        "sources": [{"path": "text.jsonl"}, {"path": "video.jsonl"}],
        "batch_size": 2,
        "max_clips": 1,
    }
    return {
        "model.encoders": [str(parts / kind) for kind in PAIR],
        "model.llm": str(parts / "llm"),
        "model.connector": {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "model.tokens_per_clip": 2,
        "stages": [stage],
        "data_dir": str(lab / "data"),
        "feature_cache_dir": str(lab / "features"),
        "loop.gradient_accumulation": 1,
        "loop.num_workers": 0,
        **changes,
    }


def tiny(lab: Path, **fields) -> Study:
    return Study(
        **{
            "name": "tiny",
            "about": "Tokens of a clip.",
            "settings": settings(lab),
            "axes": {"tokens": {"2": {}, "4": {"model.tokens_per_clip": 4}}},
            "seeds": (0,),
            "questions": str(lab / "data"),
            **fields,
        }
    )


def point_of(study: Study, number: int = 0) -> Point:
    return list(study.points())[number]


# ---- every study of the paper ----


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_every_point_resolves_and_no_two_are_the_same(name, scale):
    study = STUDIES[name](scale)
    identities = {}
    for point in study.points():
        if point.seed != study.seeds[0]:
            continue
        config = training.resolve(study, point)
        assert config.loop.seed == point.seed
        total = sum(stage.steps * stage.batch_size for stage in config.stages)
        if scale == "paper" and name != "data-size":
            assert total == pytest.approx(750_000, rel=1e-3)
        identities.setdefault(training.identity(study, point), []).append(point.label)
    assert all(len(labels) == 1 for labels in identities.values()), identities


def distinct_models(scale):
    """One point for each shape of model that the studies have, the LLM's size and all."""
    found = {}
    for make in STUDIES.values():
        study = make(scale)
        for point in study.points():
            config = training.resolve(study, point)
            found.setdefault(repr(config.model), (study, point))
    return list(found.values())


def test_a_point_at_the_papers_scale_builds_without_weights():
    """SigLIP and V-JEPA 2 with the largest LLM."""
    study = STUDIES["scaling"]("paper")
    config = training.resolve(study, point_of(study, -1))
    assert config.model.encoders[1].startswith("facebook/vjepa2")
    assert all(parameter.is_meta for parameter in empty_model(config.model).parameters())
    plan = make_plan(config, "h100", 8)
    assert plan.gpu_hours > 0 and len(plan.stages) == len(config.stages)


@pytest.mark.slow
def test_every_model_at_the_papers_scale_builds_without_weights():
    models = distinct_models("paper")
    assert len(models) > 60
    for study, point in models:
        config = training.resolve(study, point)
        model = empty_model(config.model)
        assert all(parameter.is_meta for parameter in model.parameters()), point.label


def test_llms_of_the_84_models_have_their_sizes():
    study = STUDIES["scaling"]("paper")
    sizes = []
    for point in list(study.points())[:4]:
        llm = empty_model(training.resolve(study, point).model).parts()["llm"]
        sizes.append(sum(parameter.numel() for parameter in llm.parameters()) / 1e9)
    # Published sizes; the paper calls them 0.5, 1.5, 4 and 7.
    assert sizes == pytest.approx([0.494, 1.544, 3.95, 7.616], rel=0.005)


# ---- identity ----


def test_identity_is_of_what_decides_the_outcome(lab):
    study = tiny(lab)
    first = training.identity(study, point_of(study))
    same = [
        {"out_dir": "elsewhere"},
        {"feature_cache_dir": None},
        {"loop.num_workers": 3, "loop.save_every": 7, "loop.sharding": "no"},
        {"model.frames_per_clip": 4},  # its default
    ]
    for changes in same:
        other = tiny(lab, settings=settings(lab, **changes))
        assert training.identity(other, point_of(other)) == first, changes
    others = [
        tiny(lab, settings=settings(lab, **{"model.frames_per_clip": 2})),
        tiny(lab, settings=settings(lab, **{"loop.mixed_precision": "no"})),
        tiny(lab, settings=settings(lab, **{"model.sampling": "uniform"})),
        tiny(lab, seeds=(1,)),
        tiny(lab, questions="others"),
        tiny(lab, asking={"video": Asking(condition="text")}),
        tiny(lab, axes={"tokens": {"2": {"model.tokens_per_clip": 3}}}),
    ]
    found = [training.identity(other, point_of(other)) for other in others]
    assert len({first, *found}) == 1 + len(others)


def test_wrong_settings_and_recipes_are_named(lab):
    for changes, message in (
        ({"model.tokens": 3}, "model.tokens is not a setting"),
        ({"recipe": "macro"}, "no recipe 'macro'"),
    ):
        study = tiny(lab, settings=settings(lab, **changes))
        with pytest.raises(ValueError, match=message):
            training.identity(study, point_of(study))


# ---- real trainings ----


def test_a_study_is_trained_asked_and_shares_its_features(lab, tmp_path):
    study = tiny(
        lab,
        axes={"training": {"2 fps": {}, "4 frames": {"model.sampling": "uniform"}}},
        asking={
            "as trained": Asking(),
            "uniform": Asking(sampling="uniform", max_clips=1),
            "text": Asking(condition="text"),
        },
        metric="as trained",
    )
    found = [
        training.run(study, point, tmp_path / str(number))
        for number, point in enumerate(study.points())
    ]
    for number, one in enumerate(found):
        metrics = one["metrics"]
        assert metrics.keys() >= {"as trained", "uniform", "text", "text/Numbers"}
        assert all(0 <= value <= 100 for value in metrics.values())
        assert one["timing"]["stages"]["sft"]["steps"] == 2 and one["timing"]["eval_s"] > 0
        assert one["config"]["stages"][0]["batch_size"] == 2 and "lora" not in one["config"]
        assert sum(name.endswith("model.safetensors") for name in one["inputs"]) == 3
        sampled = [
            json.loads((tmp_path / str(number) / path).read_text())["sampling"]
            for path in ("train/model/processor_config.json", "model-uniform/processor_config.json")
        ]
        assert sampled == [["fps", "uniform"][number], "uniform"]
        asked = json.loads((tmp_path / str(number) / "eval-uniform" / "summary.json").read_text())
        assert asked["manifest"]["answerer"]["sampling"]["mode"] == "uniform"
    cached = set((lab / "features").rglob("*.safetensors"))
    # One video, sampled in two ways: by all trainings together, and by all that are asked.
    asked = {path for path in cached if path.is_relative_to(lab / "features" / "asked")}
    assert len(cached) == 4 and len(asked) == 2
    again = training.run(study, point_of(study), tmp_path / "again")
    assert again["metrics"] == found[0]["metrics"]  # the same seed, the same numbers
    log = tmp_path / "again" / "train" / "log.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text().splitlines()[-1]), "elapsed_s": 500}))
    resumed = training.run(study, point_of(study), tmp_path / "again")  # what an earlier try took
    assert resumed["timing"]["train_s"] == 500 and resumed["seconds"] > 500
    assert set((lab / "features").rglob("*.safetensors")) == cached


def user_study(lab: Path, path: Path) -> Path:
    """The example of docs/studies.md, with tiny parts in the places of the named ones."""
    text = (ROOT / "docs" / "studies.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code.splitlines()) < 40
    named = 'settings={"feature_cache_dir": "runs/lab/features", "data_dir": "runs/lab/world"}'
    assert named in code and '"runs/lab/held_out"' in code and "seeds=(0, 1, 2)" in code
    code = code.replace(named, f"settings={settings(lab)!r}".replace("\n", " "))
    code = code.replace('"runs/lab/held_out"', repr(str(lab / "data")))
    path.write_text(code.replace("seeds=(0, 1, 2)", "seeds=(0, 1)"))
    return path


def test_a_users_study_runs_and_is_reported(lab, tmp_path, capsys):
    source = f"{user_study(lab, tmp_path / 'my_study.py')}:mine"
    out = str(tmp_path / "lab")
    assert cli.main(["study", "run", source, "--out", out]) == 0
    assert capsys.readouterr().out.count("(") == 4
    assert cli.main(["study", "run", source, "--out", out]) == 0
    assert capsys.readouterr().out == ""  # nothing was left to do
    assert cli.main(["study", "report", source, "--ledgers", f"{out}/ledgers"]) == 0
    assert "| Three layers beat one. |  |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_killed_midway_goes_on_and_ends_the_same(lab, tmp_path):
    path = user_study(lab, tmp_path / "my_study.py")
    path.write_text(path.read_text().replace("'steps': 2", "'steps': 60"))
    source = f"{path}:mine"
    whole = Work(source, "micro", tmp_path / "whole")
    assert work_through(whole) == 0
    command = ["study", "run", source, "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "apollo", *command], env=environment, cwd=tmp_path
        )
        deadline = time.monotonic() + 300
        while not list((tmp_path / "killed").rglob("log.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert work_through(replace(whole, out_dir=tmp_path / "killed")) == 0
    study = find_study(source, "micro")
    lines, others = (
        {line["hash"]: line["metrics"] for line in ledger_of(study, tmp_path / name).read()}
        for name in ("whole", "killed")
    )
    assert lines == others and len(lines) == 4


@pytest.mark.slow
def test_training_on_two_processes_is_started_by_torchrun(lab, tmp_path):
    study = tiny(lab)
    config = replace(training.resolve(study, point_of(study)), out_dir=tmp_path / "point" / "train")
    assert training._train(config, num_gpus=2) == config.out_dir / "model"
    assert (config.out_dir / "model" / "config.json").is_file()
    assert training.stage_times(config)["sft"]["steps"] == 2


@pytest.mark.slow
def test_a_calibration_tells_of_all_that_takes_time(lab, tmp_path):
    stages = settings(lab)["stages"]
    long = [{**stages[0], "steps": 1000}]
    study = tiny(lab, settings=settings(lab, stages=long, feature_cache_dir=str(tmp_path / "f")))
    found = training.calibrate(study, point_of(study), tmp_path / "point")
    assert found.keys() == {"start", "train", "eval", "features"} and min(found.values()) >= 0
    steps = training.stage_times(
        replace(training.resolve(study, point_of(study)), out_dir=tmp_path / "point" / "train")
    )
    assert steps["sft"]["steps"] == training.CALIBRATION_STEPS
    rate = found["train"] / 1000
    assert rate == pytest.approx(steps["sft"]["seconds"] / training.CALIBRATION_STEPS, rel=2)
