"""The plan's numbers: by hand on a tiny model, against torch's own count, and their direction."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import TOKENS_PER_CLIP, make_config, make_llm_config, make_model
from tiny_recipes import make_data, make_parts, shrunken
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apollo.cli import main as apollo
from apollo.data.mixture import Source
from apollo.train.plan import (
    GPUS,
    Assumptions,
    clip_flops,
    connector_clip_bytes,
    encoder_clip_bytes,
    llm_flops,
    llm_layer_bytes,
    make_plan,
    shares_of,
    trained_parameters,
)
from apollo.train.recipes import RECIPES, TrainConfig

torch.set_num_threads(1)
TRAIN_ALL = {"encoders": 1.0, "connector": 1.0, "llm": 1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TrainConfig:
    """The micro recipe, shrunken: one stage in which connector and LLM learn from videos."""
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    data = make_data(tmp_path_factory.mktemp("data"))
    config = shrunken(RECIPES["micro"](), parts, data, tmp_path_factory.mktemp("run"))
    sources = [Source(path="video.jsonl", type="video"), Source(path="text.jsonl", type="text")]
    stage = replace(config.stages[2], steps=10, batch_size=8, max_clips=3, sources=sources)
    return replace(
        config,
        stages=[replace(stage, optimizer="adamw")],
        loop=replace(config.loop, gradient_accumulation=1),
    )


def test_hand_computed_numbers(tiny):
    plan = make_plan(tiny, "a100", 2, Assumptions(mfu=0.5, video_s=10, text_tokens=100))
    (stage,) = plan.stages
    # Half of the records are videos of 10 s: five clips, of which max_clips leaves three.
    assert stage.shares == {"video": 0.5, "text": 0.5}
    assert stage.clips_per_sample == 1.5
    assert stage.tokens_per_sample == 100 + 1.5 * 2
    assert (stage.samples, stage.tokens, stage.micro_batch) == (80, 8240, 4)
    # A Qwen2 layer of width 16, MLP 32, one key-value head of 8: 256 + 2 * 128 + 256 + 3 * 512;
    # two of them, and the head: 265 tokens of width 16.
    vocabulary = make_llm_config().vocab_size
    weights = 2 * (256 + 2 * 128 + 256 + 3 * 512) + vocabulary * 16
    by_length = [2 * weights * n + 2 * (4 * 16 * n * n / 2) for n in (106, 100)]
    assert stage.step_flops["llm forward"] == pytest.approx(8 * sum(by_length) / 2)
    total = sum(stage.step_flops.values())
    assert stage.step_s == pytest.approx(total / (2 * 312e12 * 0.5))
    assert plan.hours == pytest.approx(10 * stage.step_s / 3600)
    assert plan.gpu_hours == pytest.approx(2 * plan.hours)
    trained, whole = sum(stage.trained.values()), sum(stage.parameters.values())
    assert stage.trained["encoders"] == 0 and trained < whole
    ddp = stage.memory_gb["DDP"]
    assert ddp["weights"] == pytest.approx(4e-9 * whole)
    assert ddp["gradients"] == pytest.approx(4e-9 * trained)
    assert ddp["optimiser"] == pytest.approx(8e-9 * trained)
    assert ddp["total"] == pytest.approx(sum(v for k, v in ddp.items() if k != "total"))
    sharded = stage.memory_gb["FSDP2"]
    assert sharded["optimiser"] == pytest.approx(ddp["optimiser"] / 2)
    frozen = 4e-9 * stage.parameters["encoders"]
    assert sharded["weights"] == pytest.approx((ddp["weights"] - frozen) / 2 + frozen)
    assert plan.disk_gb["checkpoints"] == pytest.approx(3 * (4e-9 * whole + 8e-9 * trained))


@pytest.mark.parametrize(
    "rates",
    [
        TRAIN_ALL,
        {"encoders": 0, "connector": 1, "llm": 0},
        {"encoders": 0, "connector": 0, "llm": 1},
        {"encoders": 1, "connector": 1, "llm": 0},
    ],
)
def test_operations_are_those_that_torch_counts(rates):
    """One clip and some text through the real model, forward and backward."""
    config = make_config(text_config=make_llm_config(tie_word_embeddings=False))
    model = make_model(config).train()
    trained = trained_parameters(model, rates)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    length = 40
    ids = torch.randint(0, 200, (1, length))
    ids[0, :TOKENS_PER_CLIP] = config.video_token_id
    pixels = [torch.rand(1, 4, 3, size, size) for size in (30, 24)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of the CPU is not counted
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    with torch.device("meta"):
        meta = make_model(config)
    learns = trained_parameters(meta, rates)
    clip = clip_flops(meta, learns)
    ours = llm_flops(meta, learns, length)
    masked = 4 * 16 * 2 * length * length / 2  # torch counts this half of attention, too
    seen = sum(v for k, v in clip.items() if k.endswith("forward"))
    assert ours[0] + masked + seen == pytest.approx(forward.get_total_flops(), rel=0.02)
    back = sum(v for k, v in clip.items() if k.endswith("backward"))
    expected = ours[1] + 2 * masked + back
    assert expected == pytest.approx(backward.get_total_flops(), rel=0.1)


def cheap(name: str) -> TrainConfig:
    """A recipe of the paper with the micro encoders: counting the large ones takes seconds."""
    config = RECIPES[name]()
    return replace(config, model=replace(config.model, encoders=RECIPES["micro"]().model.encoders))


def test_six_operations_per_parameter_and_token():
    """The usual 6ND: what a language model costs whose samples are short."""
    plan = make_plan(cheap("3b"), "h100", 8, Assumptions(text_tokens=1, video_s=2))
    sft = plan.stages[2]
    llm = sft.step_flops["llm forward"] + sft.step_flops["llm backward"]
    tokens = sft.tokens_per_sample * 256
    assert llm == pytest.approx(6 * 3.09e9 * tokens, rel=0.02)
    # a frozen LLM saves the gradients of its weights: a third
    align = plan.stages[0]
    llm = align.step_flops["llm forward"] + align.step_flops["llm backward"]
    assert llm == pytest.approx(4 * 3.09e9 * align.tokens_per_sample * 256, rel=0.02)


def test_more_gpus_are_faster_and_hold_less():
    config = cheap("7b")
    plans = [make_plan(config, "h100", number) for number in (2, 4, 8, 16)]
    for few, many in zip(plans, plans[1:], strict=False):
        assert many.hours < few.hours
        assert many.gpu_hours == pytest.approx(few.gpu_hours)
        for stage, other in zip(few.stages, many.stages, strict=True):
            for way in stage.memory_gb:
                assert other.memory_gb[way]["total"] < stage.memory_gb[way]["total"]
    stage = plans[0].stages[2].memory_gb
    assert stage["DDP + checkpointing"]["total"] < stage["DDP"]["total"]
    assert stage["FSDP2"]["total"] < stage["DDP"]["total"]


def test_low_rank_and_low_precision_need_less():
    config = RECIPES["finetune"]()
    full = make_plan(replace(config, lora=None), "4090", 1).stages[0]
    bases = {
        base: make_plan(replace(config, lora=replace(config.lora, base=base)), "4090", 1).stages[0]
        for base in ("float32", "bfloat16", "nf4")
    }
    assert bases["float32"].trained["llm"] < full.trained["llm"] / 5
    weights = [bases[base].memory_gb["DDP"]["weights"] for base in bases]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 3
    optimiser = bases["nf4"].memory_gb["DDP"]["optimiser"]
    assert optimiser < full.memory_gb["DDP"]["optimiser"]


# ---- bytes that autograd keeps


def kept_bytes(model: nn.Module, compute) -> int:
    """Bytes of all that is saved for the backward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    copies = {(*shape,) for shape in weights} | {(*shape[::-1],) for shape in weights}  # 16 bits
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and (*tensor.shape,) not in copies:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        result = compute()
    assert result.requires_grad
    return sum(size for size, _ in kept.values())


def test_memory_of_layers_is_what_autograd_keeps():
    llm = make_llm_config(**llm_shape(2))
    kept = []
    for layers in (2, 4):
        model = make_model(make_config(text_config=make_llm_config(**llm_shape(layers)))).train()
        embeds = torch.randn(1, 200, 64, requires_grad=True)
        kept.append(
            kept_bytes(
                model,
                lambda model=model, embeds=embeds: (
                    model.model.llm(inputs_embeds=embeds, use_cache=False).last_hidden_state
                ),
            )
        )
    assert (kept[1] - kept[0]) / 2 / 200 == pytest.approx(llm_layer_bytes(llm), rel=0.1)


def llm_shape(layers: int) -> dict:
    return dict(
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
    )


@pytest.mark.parametrize("kind", ["siglip_vision_model", "internvideo2"])
def test_memory_of_encoders_and_connector_is_what_autograd_keeps(kind):
    size = dict(image_size=60, hidden_size=64, intermediate_size=256, num_attention_heads=2)
    if kind == "internvideo2":
        size = dict(img_size=60, d_model=64, mlp_ratio=4, num_heads=2, init_values=0.1)
    depth = "depth" if kind == "internvideo2" else "num_hidden_layers"
    config = make_config(
        encoders=[{"model_type": kind, "patch_size": 6, depth: 5, **size}],
        text_config=make_llm_config(**llm_shape(2)),
        connector=dict(num_heads=4, head_dim=16, num_key_value_heads=2),
    )
    model = make_model(config).train()
    (encoder,) = config.encoders
    pixels = [torch.rand(1, 4, 3, 60, 60)]
    kept = kept_bytes(model, lambda: model.encode(pixels))
    # the last of the layers is cut off
    assert kept == pytest.approx(encoder_clip_bytes(encoder, 4) * 4 / 5, rel=0.2)
    features = torch.randn(1, *model.model.grid, 64)
    kept = kept_bytes(model, lambda: model.connect(features))
    assert kept == pytest.approx(connector_clip_bytes(model), rel=0.2)


# ---- shares, settings, the command


def test_shares_come_from_sources_and_mixture_files(tmp_path):
    (tmp_path / "mixed.yaml").write_text(
        "sources:\n"
        "  - {path: a.jsonl, type: image, weight: 3}\n"
        "  - {path: b.jsonl, type: text, weight: 1}\n"
    )
    stage = RECIPES["3b"]().stages[0]
    stage.sources = [Source(path="mixed.yaml", weight=2), Source(path="c.jsonl", weight=2)]
    shares, notes = shares_of(stage, tmp_path)
    assert shares == {"image": 0.375, "text": 0.125, "video": 0.5}
    assert notes == ["type not known, counted as videos: c.jsonl"]


def test_what_cannot_work_is_said(tiny):
    with pytest.raises(ValueError, match="choose one of .*h100"):
        make_plan(tiny, "tpu", 1)
    with pytest.raises(ValueError, match="must be a multiple of"):
        make_plan(tiny, "cpu", 3)
    with pytest.raises(ValueError, match="mfu must be above 0"):
        Assumptions(mfu=0)
    huge = make_plan(cheap("7b"), "4090", 1)
    assert any("does not fit" in note for stage in huge.stages for note in stage.notes)


def test_the_command_prints_a_table_and_json(capsys):
    line = ["plan", "finetune", "--gpu", "4090", "--assume", "video_s=4"]
    assert apollo(line) == 0
    text = capsys.readouterr().out
    assert "GeForce RTX 4090" in text and "mfu = 0.35" in text and "finetune" in text
    assert apollo([*line, "--json", "--set", "stages.0.steps=50"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"][0]["samples"] == 50 * 16
    assert plan["assumptions"]["video_s"] == 4
    assert apollo([*line, "--assume", "mfuu=1"]) == 2
    assert "did you mean mfu" in capsys.readouterr().err


def test_every_gpu_says_where_its_numbers_are_from():
    for gpu in GPUS.values():
        assert gpu.peak_tflops > 0 and gpu.memory_gb > 0 and gpu.source
