"""The fine-tuning page works as printed: the tuned model answers what the base did not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from apollo.chat import VideoChat
from apollo.cli import build_parser
from apollo.cli import main as apollo

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:apollo|python) .*)$", PAGE, flags=re.MULTILINE)


def num_right(model: Path | None, data_dir: Path) -> int:
    """How many of the held-out videos the model answers right, in its own words."""
    chat = VideoChat.load(model)
    questions = [json.loads(line) for line in (data_dir / "questions.jsonl").open()]
    answers = [chat.ask(data_dir / q["video"], q["question"], max_new_tokens=8) for q in questions]
    pairs = zip(answers, questions, strict=True)
    return sum(answer.text == q["options"][q["answer"]] for answer, q in pairs)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("apollo")])
def test_commands_parse(command):
    build_parser().parse_args(shlex.split(command)[1:])


def test_every_setting_on_the_page_exists():
    from apollo.config import apply_overrides
    from apollo.train.recipes import RECIPES

    named = re.findall(r"((?:stages|lora|loop|model)\.[\w.]+=[\w.-]+|lora=null)", PAGE)
    assert len(named) >= 6
    for setting in named:
        apply_overrides(RECIPES["finetune"](), [setting])


def test_a_short_training_learns_the_teams(tmp_path):
    script = ROOT / "scripts" / "make_my_videos.py"
    spec = importlib.util.spec_from_file_location("make_my_videos", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_videos(tmp_path / "data", num_train=8, num_test=4, seed=0)
    settings = (
        f"data_dir={tmp_path}/data stages.0.steps=20 stages.0.batch_size=8 loop.num_workers=0 "
        f"stages.0.learning_rates.llm=4e-3 feature_cache_dir={tmp_path}/features"
    )
    line = ["train", "finetune", "--out", str(tmp_path / "run"), "--set", *settings.split()]
    assert apollo(line) == 0
    assert num_right(None, tmp_path / "data") == 0
    assert num_right(tmp_path / "run" / "model", tmp_path / "data") >= 3


@pytest.mark.slow
def test_the_page_works_as_printed(tmp_path):
    for name in ("scripts", "apollo"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = {}
    for command in COMMANDS:
        program, *rest = shlex.split(command)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "apollo"]
        done = subprocess.run(
            [*start, *rest], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        output[command] = done.stdout
    before, after = (text.strip() for line, text in output.items() if " ask " in line)
    assert "fox" not in before and "fox" in after
    assert num_right(None, tmp_path / "runs/my_videos") == 0
    for name in ("finetune/model", "team_model"):
        assert num_right(tmp_path / "runs" / name, tmp_path / "runs/my_videos") >= 7
        AutoModelForImageTextToText.from_pretrained(tmp_path / "runs" / name)
        AutoProcessor.from_pretrained(tmp_path / "runs" / name)
