"""The loop: accumulation, exact resume, freezing, checkpoints, clear failures; then recipes."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_numbered_video
from PIL import Image
from tiny_recipes import write_records
from tiny_training import (
    VOCABULARY,
    StopError,
    TwoPartModel,
    interrupted,
    rows,
    same,
    train,
    weights,
    without_dropout,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from apollo.config import ConfigError, config_hash, from_yaml, load_config, to_yaml
from apollo.data.collate import BatchMaker, MediaError, fill_cache
from apollo.data.features import FeatureCache, fingerprint
from apollo.data.formats import RECORD_TYPES
from apollo.data.mixture import Mixture, Source
from apollo.data.readers import read_records
from apollo.model import (
    ApolloForConditionalGeneration,
    ApolloProcessor,
    InternVideo2Config,
    InternVideo2Model,
)
from apollo.model.configuration import ConnectorSettings
from apollo.train import checkpoint as checkpoint_module
from apollo.train.checkpoint import TrainState, latest_checkpoint, list_checkpoints, save_checkpoint
from apollo.train.curves import read_log
from apollo.train.optim import build_optimizer, parts_of, schedule_factor, set_learning_rates
from apollo.train.recipes import RECIPES, ModelSettings, Stage, TrainConfig
from apollo.train.run import join_parts, main
from apollo.train.run import train as train_recipe
from apollo.train.short_attention import short_attention
from apollo.train.trainer import DivergedError, LoopSettings, count_items
from apollo.video import ClipSampling, open_video


def test_one_batch_of_eight_equals_eight_batches_of_one(tmp_path):
    whole = train(tmp_path / "whole", batch=8, steps=3, model=without_dropout())
    pieces = train(
        tmp_path / "pieces", batch=1, steps=3, gradient_accumulation=8, model=without_dropout()
    )
    for one, other in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "pieces"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
        assert one["items"] == other["items"]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(pieces)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_workers", "optimizer"), [(0, "adamw"), (1, "adamw"), (0, "muon")])
def test_stop_and_resume_equals_straight_run(tmp_path, num_workers, optimizer):
    settings = {"gradient_accumulation": 2, "optimizer": optimizer}
    straight = train(tmp_path / "straight", **settings)
    interrupted(tmp_path / "stopped", at_batch=9, save_every=3, **settings)
    assert latest_checkpoint(tmp_path / "stopped").state.step == 3
    resumed = train(tmp_path / "stopped", resume=True, num_workers=num_workers, **settings)
    assert same(weights(straight), weights(resumed))
    losses = [
        [(line["step"], line["loss"]) for line in read_log(tmp_path / name)]
        for name in ("straight", "stopped")
    ]
    assert losses[0] == losses[1]


def test_steps_depend_on_the_seed(tmp_path):
    one = train(tmp_path / "one", seed=1)
    two = train(tmp_path / "two", seed=2)
    assert not same(weights(one), weights(two))  # the dropout differs


def test_frozen_part_is_unchanged_and_restored(tmp_path):
    model = TwoPartModel()
    model.embedding[1].weight.requires_grad_(False)
    before = weights(model)
    seen = []

    def on_eval(model: nn.Module, step: int) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"accuracy": 0.5}

    train(
        tmp_path,
        model=model,
        rates={"embedding": 0.0, "llm": 3e-3},
        on_eval=on_eval,
        eval_every=2,
    )
    after = weights(model)
    for name in before:
        is_frozen = name.startswith("embedding")
        assert torch.equal(before[name], after[name]) == is_frozen, name
    assert not model.embedding[1].weight.requires_grad
    assert model.embedding[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == [(False, False)] * 3
    assert [line["step"] for line in read_log(tmp_path) if "accuracy" in line] == [2, 4, 6]


def test_loss_falls_and_the_run_directory_is_complete(tmp_path):
    model = train(tmp_path, steps=40, batch_at=lambda i: rows(0, 4), mixed_precision="bf16")
    log = read_log(tmp_path)
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_nan_is_caught_before_it_reaches_the_weights(tmp_path):
    class Broken(TwoPartModel):
        def forward(self, **batch):
            output = super().forward(**batch)
            if batch["input_ids"][0, 0] == rows(8, 1)["input_ids"][0, 0]:
                output.loss = output.loss * float("nan")
            return output

    model = Broken()
    with pytest.raises(DivergedError, match="stage tiny, step 2: loss nan.*stage0-step000002"):
        train(tmp_path, model=model, save_every=1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": {"llm": 1e-3}}, "parts are"),
        ({"rates": {"llm": 1e-3, "embedding": 0, "encoder": 0}}, "parts are"),
        ({"rates": {"llm": 0, "embedding": 0}}, "nothing to train"),
        ({"rates": {"llm": -1, "embedding": 1}}, "not negative"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1"),
        ({"mixed_precision": "fp8"}, "choose one of"),
        ({"model": TwoPartModel().to(torch.bfloat16)}, "load it as float32"),
        (
            {"batch_at": lambda i: rows(0, 2) | {"labels": torch.full((2, 12), -100)}},
            "no supervised",
        ),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **change)


def test_a_stray_parameter_is_refused():
    model = TwoPartModel()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight"):
        parts_of(model)


def test_a_finished_run_is_not_overwritten(tmp_path):
    train(tmp_path, steps=2)
    with pytest.raises(ValueError, match="already holds stage0-step000002"):
        train(tmp_path, steps=2)
    before = (tmp_path / "log.jsonl").read_text()
    train(tmp_path, steps=2, resume=True)  # nothing left to do
    assert (tmp_path / "log.jsonl").read_text() == before


def test_killed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = TwoPartModel()
    optimizer = build_optimizer(parts_of(model), {"embedding": 1e-3, "llm": 1e-3}, 0.0)
    save_checkpoint(tmp_path, TrainState(0, 1), model, optimizer.state_dict(), keep=2)
    good = weights(model)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.torch, "save", killed)
        with torch.no_grad():
            model.embedding[1].weight.add_(1)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, TrainState(0, 2), model, optimizer.state_dict(), keep=2)
    newest = latest_checkpoint(tmp_path)
    assert newest.state == TrainState(0, 1)
    newest.load_weights(model)
    assert same(weights(model), good)

    for step in (2, 3, 10):  # the next writes clear the rubble and rotate
        save_checkpoint(tmp_path, TrainState(0, step), model, optimizer.state_dict(), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["stage0-step000003", "stage0-step000010"]
    assert [found.state.step for found in list_checkpoints(tmp_path)] == [3, 10]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, steps=1)
    other = TwoPartModel()
    other.embedding = nn.Sequential(nn.Embedding(VOCABULARY, 16))
    with pytest.raises(ValueError, match="does not fit this model"):
        train(tmp_path, steps=2, model=other, resume=True)


def test_schedule_warms_up_and_ends_near_zero():
    factors = [schedule_factor(step, 100, 0.03) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[3] == 1.0 and factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert schedule_factor(0, 1, 0.0) == 1.0


def test_decay_spares_norms_and_biases():
    model = TwoPartModel()
    optimizer = build_optimizer(parts_of(model), {"embedding": 1e-3, "llm": 2e-3}, 0.1)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert {(g["part"], g["lr"]) for g in optimizer.param_groups} == {
        ("embedding", 1e-3),
        ("llm", 2e-3),
    }


def test_short_attention_agrees_with_the_fused_one():
    inputs = [torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(3)]
    mask = torch.rand(2, 1, 20, 20) > 0.3
    mask |= torch.eye(20, dtype=torch.bool)
    added = torch.randn(20, 20)
    attend = torch.nn.functional.scaled_dot_product_attention
    for options in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": added}, {"scale": 0.3}):
        expected = attend(*inputs, **options)
        gradients = torch.autograd.grad(expected.sum(), inputs)
        with short_attention():
            found = attend(*inputs, **options)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            for mine, theirs in zip(
                torch.autograd.grad(found.sum(), inputs), gradients, strict=True
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
            with torch.autocast("cpu", torch.bfloat16):
                half = attend(*inputs, **options)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0)


def test_muon_takes_hidden_matrices_alone():
    model = TwoPartModel()
    rates = {"embedding": 1e-3, "llm": 2e-3}
    optimizer = build_optimizer(parts_of(model), rates, 0.1, "muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for group in optimizer.muon.param_groups for p in group["params"]}
    assert by_muon == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    }
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(names)
    assert set_learning_rates(optimizer, 0.5) == {"embedding": 5e-4, "llm": 1e-3}


def test_items_are_predicted_tokens_or_rows():
    labels = torch.tensor([[5, 6, -100], [-100, -100, 7]])
    assert count_items({"labels": labels}) == 2  # the first token of a row is never predicted
    assert count_items({"pixel_values": torch.zeros(3, 2), "input_ids": labels}) == 3


def test_log_lines_are_json_with_the_promised_keys(tmp_path):
    train(tmp_path, steps=1)
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    promised = "stage step loss learning_rates grad_norm tokens_per_s data_wait elapsed_s".split()
    assert set(promised) <= set(line)


# ---- Apollo itself: tiny parts, a tiny world, whole recipes


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def parts_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    siglip = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    SiglipVisionModel(siglip).save_pretrained(folder / "siglip")
    internvideo2 = InternVideo2Config(
        d_model=32, num_heads=2, depth=2, img_size=16, patch_size=8, init_values=0.1
    )
    InternVideo2Model(internvideo2).save_pretrained(folder / "internvideo2")
    tokenizer = make_tokenizer()
    llm = Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(llm).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number in range(2):
        write_numbered_video(folder / f"{number}.mp4", range(0, 60 + 60 * number))
        Image.new("RGB", (20, 16), (90 * number, 50, 200)).save(folder / f"{number}.png")
    media = {
        "text": [],
        "image": [("image", "0.png")],
        "multi_image": [("image", "0.png"), ("image", "1.png")],
        "video": [("video", "1.mp4")],
    }
    write_records(folder, media, num_records=3)
    return folder


def tiny_config(parts_dir: Path, world_dir: Path, out_dir: Path) -> TrainConfig:
    """The micro recipe's three stages, with tiny parts and few steps."""
    rates = {
        "align": {"encoders": 0.0, "connector": 1e-2, "llm": 0.0},
        "vision": {"encoders": 1e-3, "connector": 1e-2, "llm": 0.0},
        "sft": {"encoders": 0.0, "connector": 1e-2, "llm": 1e-2},
    }
    types = {"align": ("image", "video"), "vision": ("video",), "sft": RECORD_TYPES}
    return TrainConfig(
        model=ModelSettings(
            encoders=[parts_dir / "siglip", parts_dir / "internvideo2"],
            llm=parts_dir / "llm",
            connector=ConnectorSettings(num_heads=2, num_key_value_heads=1, head_dim=8),
            tokens_per_clip=2,
        ),
        stages=[
            Stage(
                name=name,
                steps=2,
                learning_rates=rates[name],
                sources=[Source(path=Path(f"{type_}.jsonl")) for type_ in types[name]],
                batch_size=4,
                max_clips=2,
            )
            for name in rates
        ],
        data_dir=world_dir,
        out_dir=out_dir,
        loop=LoopSettings(log_every=1, save_every=1, gradient_accumulation=2),
    )


@pytest.fixture(scope="module")
def finished(parts_dir, world_dir, tmp_path_factory) -> TrainConfig:
    """A straight run of all three stages, with a snapshot of the weights that a frozen part has."""
    config = tiny_config(parts_dir, world_dir, tmp_path_factory.mktemp("straight"))
    train_recipe(config)
    return config


def saved_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return weights(ApolloForConditionalGeneration.from_pretrained(config.out_dir / "model"))


def test_three_stages_leave_a_model_with_its_processor(finished):
    log = read_log(finished.out_dir)
    assert [(line["stage"], line["step"]) for line in log] == [
        (stage, step) for stage in ("align", "vision", "sft") for step in (1, 2)
    ]
    assert set(log[0]["learning_rates"]) == {"connector"}
    assert set(log[-1]["learning_rates"]) == {"connector", "llm"}
    processor = ApolloProcessor.from_pretrained(finished.out_dir / "model")
    assert processor.max_clips == 2 and processor.tokens_per_clip == 2
    assert (finished.out_dir / "curves.png").exists()


def test_each_stage_changes_only_what_it_trains(finished, tmp_path):
    config = replace(finished, loop=replace(finished.loop, keep_checkpoints=9), out_dir=tmp_path)
    before = weights(join_parts(config.model, 2)[0])
    train_recipe(config)
    model, _ = join_parts(config.model, 2)
    last_of_stage = [c for c in list_checkpoints(tmp_path) if c.state.step == 2]
    for stage, checkpoint in zip(config.stages, last_of_stage, strict=True):
        checkpoint.load_weights(model)
        after = weights(model)
        for part, prefix in (("encoders", "model.encoders"), ("llm", "model.llm")):
            names = [name for name in before if name.startswith(prefix)]
            changed = any(not torch.equal(before[name], after[name]) for name in names)
            assert changed == (stage.learning_rates[part] > 0), (stage.name, part)
        before = after


@pytest.mark.parametrize("stop_at", [(0, 1), (2, 1)])
def test_a_stopped_recipe_resumes_to_the_same_weights(finished, tmp_path, monkeypatch, stop_at):
    stage_index, step = stop_at
    config = replace(finished, out_dir=tmp_path)
    original = BatchMaker.__call__

    def stopping(self: BatchMaker, number: int):
        stage = config.stages[stage_index]
        is_stage = len(self.sources) == len(stage.sources)
        if is_stage and number == step * config.loop.gradient_accumulation:
            raise StopError
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(BatchMaker, "__call__", stopping)
        with pytest.raises(StopError):
            train_recipe(config)
    state = latest_checkpoint(tmp_path).state
    assert (state.stage_index, state.step) == stop_at
    train_recipe(config, resume=True)
    assert same(saved_weights(finished), saved_weights(config))
    assert [line["loss"] for line in read_log(tmp_path)] == [
        line["loss"] for line in read_log(finished.out_dir)
    ]


def test_text_alone_trains(finished, tmp_path):
    stage = replace(finished.stages[2], sources=[Source(path=Path("text.jsonl"))], steps=4)
    train_recipe(replace(finished, stages=[stage], out_dir=tmp_path))
    assert read_log(tmp_path)[-1]["loss"] < read_log(tmp_path)[0]["loss"]


def test_cached_features_give_the_loss_of_pixels(finished, tmp_path):
    model, processor = join_parts(finished.model, 2)
    sources = [read_records(finished.data_dir / f"{type_}.jsonl") for type_ in RECORD_TYPES]
    mixture = Mixture([3] * 4, [1] * 4, 8, seed=0)
    sampling = ClipSampling(max_clips=2)
    cache = FeatureCache(tmp_path, {"encoders": fingerprint(model.parts()["encoders"])})
    records = [record for source in sources for record in source]
    with torch.no_grad():
        # Two videos and two pictures exist; one video is never shown.
        assert fill_cache(cache, records, sampling, processor, model.encode) == 3
        assert fill_cache(cache, records, sampling, processor, model.encode) == 0
    pixels = BatchMaker(sources, mixture, processor, 4, sampling, max_tokens=512)
    features = BatchMaker(sources, mixture, processor, 4, sampling, max_tokens=512, cache=cache)
    for number in range(2):
        one, other = pixels(number), features(number)
        assert "clip_features" not in one and "pixel_values" not in other
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(one[name], other[name])
        with torch.no_grad():
            loss, cached = model(**one).loss, model(**other).loss
        assert cached.item() == pytest.approx(loss.item(), abs=2e-3) and cached != 0


def test_a_step_in_pieces_has_the_same_records_and_less_padding(finished):
    _, processor = join_parts(finished.model, 2)
    sources = [read_records(finished.data_dir / f"{type_}.jsonl") for type_ in RECORD_TYPES]
    mixture = Mixture([3] * 4, [1] * 4, 16, seed=0)
    make = functools.partial(
        BatchMaker, sources, mixture, processor, sampling=ClipSampling(max_clips=2), max_tokens=512
    )
    whole, pieces = make(8), make(2, batches_per_step=4)
    for step in range(2):
        numbers = range(4 * step, 4 * step + 4)
        dealt = [record.where for i in numbers for record in pieces.records(i)]
        assert sorted(dealt) == sorted(record.where for record in whole.records(step))
        size = sum(pieces(i)["input_ids"].numel() for i in numbers)
        assert size < whole(step)["input_ids"].numel()


def test_cache_knows_changed_files_and_encoders(parts_dir, world_dir, tmp_path):
    first, second = FeatureCache(tmp_path, {"a": 1}), FeatureCache(tmp_path, {"a": 2})
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(path)
    features = torch.randn(1, 4, 2, 2, 8)
    first.save(path, features, None)
    assert path in first and path not in second
    torch.testing.assert_close(first.load(path).features.float(), features, atol=2e-3, rtol=1e-3)
    Image.new("RGB", (4, 5)).save(path)
    assert path not in first
    first.save(path, features * 1e6, None)  # too large for float16
    assert first.load(path).features.isfinite().all()

    module = nn.Linear(2, 2)
    before = fingerprint(module)
    with torch.no_grad():
        module.bias[0] += 1
    assert fingerprint(module) != before


def test_a_run_with_the_cache_learns_the_same(finished, tmp_path, monkeypatch):
    filled = []

    def fill(cache, *args):
        filled.append((cache.folder, fill_cache(cache, *args), list(cache.folder.glob("??/*"))))
        return filled[-1][1]

    monkeypatch.setattr("apollo.train.run.fill_cache", fill)
    config = replace(finished, feature_cache_dir=tmp_path / "cache", out_dir=tmp_path / "run")
    train_recipe(config)
    losses = [[line["loss"] for line in read_log(c.out_dir)] for c in (finished, config)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
    (first, *_), (last, number, files) = filled  # the encoders are trained in between
    assert first == tmp_path / "cache" and last.parent == first / "runs"
    assert number == len(files) > 0 and not last.exists()


def test_workers_survive_a_decoder_left_as_garbage(finished, tmp_path):
    """A worker that collects a decoder of this process hangs: its threads are not there."""

    def batch_at(number: int):
        gc.collect()
        return rows(number, 2)

    def too_late(*_):
        raise TimeoutError("the worker hangs")

    cycle = [open_video(finished.data_dir / "1.mp4").__enter__()]
    cycle[0].frames_at([0.5])
    cycle.append(cycle)
    gc.disable()
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(60)
    try:
        del cycle
        train(tmp_path, steps=2, batch_at=batch_at, num_workers=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert len(read_log(tmp_path)) == 2


def test_a_bad_video_stops_the_run_and_is_named(finished, tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    (world / "bad.mp4").write_text("no video")
    record = json.loads((finished.data_dir / "video.jsonl").read_text().splitlines()[0])
    record["messages"][0]["content"][0]["video"] = "bad.mp4"
    (world / "video.jsonl").write_text(json.dumps(record))
    config = replace(
        finished, stages=finished.stages[1:2], data_dir=world, out_dir=tmp_path / "run"
    )
    with pytest.raises(MediaError, match=r"video\.jsonl:1: video .*bad\.mp4 cannot be read"):
        train_recipe(config)


def test_a_run_in_bounded_rows_learns_the_same(finished, tmp_path):
    stage = replace(finished.stages[-1], packing=True)
    for name, most in (("free", None), ("bounded", 400)):
        stages = [replace(stage, tokens_per_row=most)]
        train_recipe(replace(finished, stages=stages, out_dir=tmp_path / name))
    logs = [read_log(tmp_path / name) for name in ("free", "bounded")]
    assert [line["items"] for line in logs[0]] == [line["items"] for line in logs[1]]
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_video_that_takes_too_long_stops_the_run_and_is_named(finished, tmp_path):
    config = replace(
        finished,
        stages=finished.stages[1:2],
        out_dir=tmp_path / "run",
        video_time_limit_s=1e-4,
        loop=replace(finished.loop, num_workers=1),
    )
    with pytest.raises(
        MediaError, match=r"video\.jsonl:\d: video .*\.mp4 .* took longer than 0.0001"
    ):
        train_recipe(config)


def test_a_row_too_long_for_the_llm_is_named(finished):
    _, processor = join_parts(finished.model, 2)
    records = read_records(finished.data_dir / "video.jsonl")
    batches = BatchMaker(
        [records], Mixture([3], [1], 3, 0), processor, 3, ClipSampling(), max_tokens=20
    )
    with pytest.raises(ValueError, match=r"video\.jsonl:\d: record .* tokens, the LLM reads 20"):
        batches(0)


# ---- recipes and the command


def arguments(**given) -> argparse.Namespace:
    defaults = dict(recipe=None, config=None, set=[], out=None, print_config=False, resume=False)
    return argparse.Namespace(**defaults | given)


def test_the_micro_recipe_survives_yaml_and_its_stages_are_the_papers():
    config = RECIPES["micro"]()
    assert from_yaml(TrainConfig, to_yaml(config)) == config
    trained = [{p for p, rate in s.learning_rates.items() if rate} for s in config.stages]
    assert trained == [{"connector"}, {"encoders", "connector"}, {"connector", "llm"}]
    shares = {source.type: source.weight for source in config.stages[-1].sources}
    assert 10 <= shares["text"] <= 14 and shares["video"] == max(shares.values())  # finding 10


def test_print_config_shows_the_overrides(capsys):
    main(arguments(recipe="micro", set=["stages.1.steps=7", "loop.seed=5"], print_config=True))
    config = from_yaml(TrainConfig, capsys.readouterr().out)
    assert config.stages[1].steps == 7 and config.loop.seed == 5


def test_a_config_file_replays_a_run(finished, tmp_path):
    main(arguments(config=finished.out_dir / "config.yaml", out=tmp_path / "again"))
    again = load_config(TrainConfig, tmp_path / "again" / "config.yaml")
    assert config_hash(replace(again, out_dir=finished.out_dir)) == config_hash(finished)
    assert same(saved_weights(finished), saved_weights(again))
    main(arguments(resume=True, out=tmp_path / "again"))  # finished: nothing to do
    assert same(saved_weights(finished), saved_weights(again))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name a recipe"),
        ({"recipe": "macro"}, "no recipe 'macro'"),
        ({"recipe": "micro", "config": "x.yaml"}, "not both"),
        ({"recipe": "micro", "set": ["stages.0.stepz=3"]}, "stepz"),
        ({"recipe": "micro", "set": ["loop.mixed_precision=fp8"]}, "mixed_precision"),
        ({"recipe": "micro", "set": ["stages.0.sources.0.weight=0"]}, "weight must be positive"),
        ({"recipe": "micro", "set": ["stages.0.tokens_per_row=9"]}, "stages.0: .*packing=true"),
        ({"config": "/nowhere/config.yaml"}, "nowhere"),
    ],
)
def test_wrong_commands_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments(print_config=True, **given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_dir": Path("/nowhere")}, "no training file"),
        ({"model": {"llm": Path("/nowhere")}}, "no model part in /nowhere"),
        ({"loop": {"gradient_accumulation": 3}}, "must be a multiple"),
        ({"stages": []}, "no stages"),
    ],
)
def test_unusable_configs_are_refused(finished, tmp_path, change, message):
    config = replace(finished, out_dir=tmp_path / "run")
    for name, value in change.items():
        nested = isinstance(value, dict)
        config = replace(
            config, **{name: replace(getattr(config, name), **value) if nested else value}
        )
    with pytest.raises(ValueError, match=message):
        train_recipe(config)
    assert not (tmp_path / "run").exists()  # nothing in the way of the next attempt


def test_a_later_stages_mistake_is_found_at_once(finished, tmp_path):
    last = replace(finished.stages[2], learning_rates={"encoder": 1e-3})
    config = replace(finished, stages=[*finished.stages[:2], last], out_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rates names"):
        train_recipe(config)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_config_and_an_empty_folder(finished, tmp_path):
    other = replace(finished, loop=replace(finished.loop, seed=9))
    with pytest.raises(ValueError, match="not the config given"):
        train_recipe(other, resume=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        train_recipe(replace(finished, out_dir=tmp_path), resume=True)
    with pytest.raises(ValueError, match="already holds"):
        train_recipe(finished)
