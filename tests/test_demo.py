"""The demo from end to end with tiny untrained parts, and what it says of its results."""

from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console

from apollo import demo
from apollo.cli import main
from apollo.eval.questions import read_questions
from apollo.eval.scoring import Score
from apollo.train import run
from apollo.train.recipes import RECIPES, TrainConfig


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The micro recipe with parts of a few thousand random weights."""
    import torch
    from tiny_models import ENCODERS, TOKENIZER, make_llm_config
    from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    TOKENIZER.save_pretrained(folder / "llm")
    llm = make_llm_config(max_position_embeddings=8192)
    Qwen2ForCausalLM(llm).save_pretrained(folder / "llm")
    eyes = SiglipVisionConfig(**ENCODERS["siglip_vision_model"])
    SiglipVisionModel(eyes).save_pretrained(folder / "siglip")
    recipe = RECIPES["micro"]()
    connector = replace(recipe.model.connector, num_heads=2, num_key_value_heads=1, head_dim=8)
    return replace(
        recipe,
        model=replace(
            recipe.model,
            encoders=[folder / "siglip"],
            llm=folder / "llm",
            connector=connector,
            tokens_per_clip=2,
        ),
        stages=[replace(stage, max_clips=2) for stage in recipe.stages],
    )


def test_demo_end_to_end(tiny_recipe, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "shipped"
    model, processor = run.join_parts(tiny_recipe.model, max_clips=4)
    model.save_pretrained(shipped)
    processor.save_pretrained(shipped)
    monkeypatch.setattr(demo, "DEFAULT_MODEL", str(shipped))
    monkeypatch.setattr(demo, "RECIPES", {"micro": lambda: tiny_recipe})
    monkeypatch.setattr(demo, "BATCH_SIZE", 2)
    monkeypatch.setattr(demo, "NUM_TEST_VIDEOS", 4)
    monkeypatch.setattr(demo, "NUM_TRAIN_VIDEOS", 8)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0

    printed = capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    questions = read_questions(out / "test_world")
    shown = demo.first_of_each_class(questions)
    assert shown
    for question in shown:
        truth = question.options[question.answer]
        assert question.question in printed and f"the truth is {truth}" in printed
        assert f"The truth: {truth}" in page
    for stage in ("align", "vision", "sft"):
        assert f"{stage}" in printed
    assert str(out / "report.html") in printed.replace("\n", "")
    assert page.count("data:image/png") > len(shown) + 3  # frames, and a curve for each stage
    assert (out / "train" / "model" / "config.json").is_file()
    assert main(["demo", "--out", str(out), "--minutes", "-1"]) == 2


def test_an_earlier_demo_is_left_alone(tmp_path):
    assert demo.free_dir(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo.free_dir(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "report.html").touch()
    (tmp_path / "demo-2").touch()
    assert demo.free_dir(tmp_path / "demo") == tmp_path / "demo-3"


def test_short_recipe_keeps_all_but_its_length_and_one_rate(tmp_path):
    recipe = RECIPES["micro"]()
    recipe.stages[1].learning_rates["connector"] = 1e-3
    short = demo.short_recipe(tmp_path, minutes=3)
    assert short.model == recipe.model
    for stage, whole in zip(short.stages, recipe.stages, strict=True):
        assert replace(stage, steps=whole.steps, batch_size=whole.batch_size) == whole
        assert 2 <= stage.steps
    longer = demo.short_recipe(tmp_path, minutes=6)
    for stage, twice in zip(short.stages, longer.stages, strict=True):
        assert twice.steps == pytest.approx(2 * stage.steps, abs=1)


@pytest.mark.parametrize(
    ("low", "words"), [(0.26, ": above chance"), (0.25, "not above chance yet")]
)
def test_verdict_follows_the_interval(low, words):
    score = Score(num_questions=300, num_unanswered=0, accuracy=0.4, low=low, high=0.5, chance=0.25)
    assert words in demo.verdict(score)


def test_shown_questions_are_of_different_classes_and_videos(tmp_path):
    from test_eval import make_questions

    questions = make_questions(40)
    shown = demo.first_of_each_class(questions)
    assert max(Counter(q.question_class for q in shown).values()) == 1
    assert max(Counter(q.video for q in shown).values()) == 1
    assert all(q.needs == "frames" for q in shown)
    assert len(shown) == 2


def test_markup_in_an_answer_is_printed_as_it_is(capsys):
    import numpy as np
    from test_eval import make_questions

    from apollo.video import VideoClips

    clips = VideoClips(
        frames=np.zeros((1, 4, 2, 2, 3), dtype=np.uint8),
        times_s=np.zeros((1, 4)),
        spans_s=np.zeros((1, 2)),
        duration_s=1.0,
        source_fps=4.0,
        sampled_fps=4.0,
    )
    item = demo.Shown(make_questions(1)[0], clips, said="[bold]<b>a</b>[/x]")
    demo.print_shown(item, Console(width=200))
    assert "[bold]<b>a</b>[/x]" in capsys.readouterr().out
    assert "<b>a</b>" not in demo.shown_section(item)
    assert not item.correct
    assert demo.Shown(item.question, clips, said="a").correct
