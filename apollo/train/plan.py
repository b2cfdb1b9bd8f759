"""What a recipe will cost, before anything is rented: `apollo plan`.

The model is made on the meta device, so that parameters are counted exactly and nothing is
downloaded. Products of encoders and connector are counted by torch itself on one clip, forward and
backward; those of the LLM follow from its shape and the lengths of the samples. Everything that
cannot be known beforehand is an assumption that is printed and can be changed (`--assume`). Read
next: `recipes.py`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apollo.config import apply_overrides, field_help
from apollo.data.formats import RECORD_TYPES
from apollo.data.mixture import Source, read_mixture
from apollo.model import ApolloConfig, ApolloForConditionalGeneration
from apollo.model.encoders import grid, image_size
from apollo.train.joining import empty_model
from apollo.train.lora import add_lora
from apollo.train.recipes import Stage, TrainConfig
from apollo.train.run import resolve_config

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        peak_tflops: Dense bfloat16 products with float32 sums, 10^12 operations a second.
        memory_gb: Memory, 10^9 bytes.
        source: Where the two numbers are from.
    """

    peak_tflops: float
    memory_gb: float
    source: str


GPUS = {
    "b200": Gpu(2250, 180, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    "h200": Gpu(989, 141, "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(989, 80, "NVIDIA H100 data sheet, SXM"),
    "a100": Gpu(312, 80, "NVIDIA A100 80GB data sheet"),
    "a100-40gb": Gpu(312, 40, "NVIDIA A100 40GB data sheet"),
    "l40s": Gpu(362, 48, "NVIDIA L40S data sheet"),
    "4090": Gpu(165, 24, "NVIDIA Ada architecture white paper, GeForce RTX 4090"),
    "3090": Gpu(71, 24, "NVIDIA GA102 white paper, GeForce RTX 3090"),
    "mi300x": Gpu(1307, 192, "AMD Instinct MI300X data sheet"),
    "cpu": Gpu(0.2, 16, "no vendor: a guess for two cores of a server with AVX-512"),
}
"""Name on the command line -> what its vendor says of it."""


@dataclass(kw_only=True)
class Assumptions:
    """What nobody knows before the run; change it by `--assume NAME=VALUE`.

    Attributes:
        mfu: Share of the GPU's peak that is reached while training; communication, waiting and
            everything that is no product of matrices lower it.
        video_s: Mean length of a video in seconds.
        images_per_multi_image: Mean number of images in a sample with several.
        text_tokens: Mean tokens of text in a sample, clips not counted.
        usable_memory: Share of the GPU's memory that is left after the context and fragments.
    """

    mfu: float = 0.35
    video_s: float = 60.0
    images_per_multi_image: float = 3.0
    text_tokens: int = 400
    usable_memory: float = 0.92

    def __post_init__(self) -> None:
        for name in ("mfu", "usable_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if min(self.video_s, self.images_per_multi_image, self.text_tokens) <= 0:
            raise ValueError("video_s, images_per_multi_image and text_tokens must be positive")


@dataclass(kw_only=True)
class StagePlan:
    """What one stage costs.

    Attributes:
        name: Name of the stage.
        parameters: Part -> its parameters.
        trained: Part -> those of them that are trained.
        shares: Type of record -> its share.
        samples: Records in the stage.
        tokens: Tokens that the LLM reads in the stage, text and clips.
        clips_per_sample: Mean clips of a record.
        tokens_per_sample: Mean tokens of a record.
        longest_tokens: Tokens of the longest record, a video with max_clips.
        micro_batch: Records that one GPU holds at once.
        step_flops: Operations of a step by part and direction, without what gradient checkpointing
            computes again.
        memory_gb: Way of training -> memory per GPU by use, in 10^9 bytes, and its `total`.
        step_s: Seconds of a step, with what the recipe computes again.
        hours: Hours of the stage.
        notes: What the reader should know beside the numbers.
    """

    name: str
    parameters: dict[str, int]
    trained: dict[str, int]
    shares: dict[str, float]
    samples: int
    tokens: int
    clips_per_sample: float
    tokens_per_sample: float
    longest_tokens: int
    micro_batch: int
    step_flops: dict[str, float]
    memory_gb: dict[str, dict[str, float]]
    step_s: float
    hours: float
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Plan:
    """What a whole recipe costs.

    Attributes:
        gpu: Name of the GPU.
        num_gpus: How many.
        assumptions: What was assumed.
        stages: The stages in order.
        hours: Hours of all stages.
        gpu_hours: The same times the number of GPUs.
        disk_gb: Use -> 10^9 bytes on disk.
    """

    gpu: str
    num_gpus: int
    assumptions: Assumptions
    stages: list[StagePlan]
    hours: float
    gpu_hours: float
    disk_gb: dict[str, float]


def main(args: argparse.Namespace) -> int:
    """Run `apollo plan`.

    Args:
        args: recipe, config, set as in `apollo train`; gpus, gpu, assume (overrides), json.
    """
    config = resolve_config(args)
    plan = make_plan(config, args.gpu, args.gpus, apply_overrides(Assumptions(), args.assume))
    if args.json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width of its own
            console.width = 140
        _show(plan, console)
    return 0


def make_plan(
    config: TrainConfig, gpu: str, num_gpus: int, assumptions: Assumptions | None = None
) -> Plan:
    """Estimate a recipe's cost.

    Args:
        config: The recipe.
        gpu: One of `GPUS`.
        num_gpus: How many of them.
        assumptions: What is not known.

    Raises:
        ValueError: A setting that cannot work, such as a batch that the GPUs cannot share.
    """
    if gpu not in GPUS:
        raise ValueError(f"no GPU {gpu!r} is known; choose one of {', '.join(GPUS)}")
    assumptions = assumptions or Assumptions()
    model = empty_model(config.model)
    held = 1.0  # bytes on the GPU for each byte of the weights on the meta device
    if config.lora:
        in_4_bits = config.lora.base == "nf4"
        # 4 bits, and a float32 scale for each 64 weights: 0.5625 bytes in the place of 2.
        held = 0.5625 / 2 if in_4_bits else 1.0
        add_lora(model, replace(config.lora, base="bfloat16") if in_4_bits else config.lora)
    stages = [
        _plan_stage(config, stage, model, GPUS[gpu], num_gpus, assumptions, held)
        for stage in config.stages
    ]
    hours = sum(stage.hours for stage in stages)
    return Plan(
        gpu=gpu,
        num_gpus=num_gpus,
        assumptions=assumptions,
        stages=stages,
        hours=hours,
        gpu_hours=hours * num_gpus,
        disk_gb=_disk(config, model, stages),
    )


def _plan_stage(
    config: TrainConfig,
    stage: Stage,
    model: ApolloForConditionalGeneration,
    gpu: Gpu,
    num_gpus: int,
    assumptions: Assumptions,
    held: float,
) -> StagePlan:
    pieces = num_gpus * config.loop.gradient_accumulation
    if stage.batch_size % pieces:
        raise ValueError(
            f"stage {stage.name}: batch_size {stage.batch_size} must be a multiple of "
            f"gradient_accumulation {config.loop.gradient_accumulation} x {num_gpus} GPUs"
        )
    trainable = trained_parameters(model, stage.learning_rates)
    shares, notes = shares_of(stage, config.data_dir)
    lengths = _lengths(model.config, stage, assumptions)
    clips = sum(shares[kind] * lengths[kind][0] for kind in shares)
    tokens = sum(shares[kind] * lengths[kind][1] for kind in shares)
    longest = stage.max_clips * model.config.tokens_per_clip + assumptions.text_tokens
    flops = _step_flops(model, trainable, stage.batch_size, shares, lengths)
    work = sum(flops.values())
    if config.loop.gradient_checkpointing:
        again = ("encoders", "llm") if stage.learning_rates["encoders"] else ("llm",)
        work += sum(flops[f"{part} forward"] for part in again)
    seconds = work / (num_gpus * gpu.peak_tflops * 1e12 * assumptions.mfu)
    micro_batch = stage.batch_size // pieces
    held_at_once = max(1.0, micro_batch * tokens / longest)  # in longest samples
    memory = _memory(
        model,
        trainable,
        stage,
        num_gpus,
        tokens=held_at_once * longest,
        clips=max(stage.max_clips, micro_batch * clips),
        held=held,
    )
    usable = gpu.memory_gb * assumptions.usable_memory
    if not any(way["total"] <= usable for way in memory.values()):
        notes.append(_advice(micro_batch, config.loop.gradient_accumulation))
    return StagePlan(
        name=stage.name,
        parameters=_sizes(model),
        trained=_sizes(model, trainable),
        shares=shares,
        samples=stage.steps * stage.batch_size,
        tokens=round(stage.steps * stage.batch_size * tokens),
        clips_per_sample=clips,
        tokens_per_sample=tokens,
        longest_tokens=longest,
        micro_batch=micro_batch,
        step_flops=flops,
        memory_gb=memory,
        step_s=seconds,
        hours=stage.steps * seconds / 3600,
        notes=notes,
    )


def _advice(micro_batch: int, accumulation: int) -> str:
    if micro_batch > 1:
        return (
            f"does not fit with {micro_batch} records at once on a GPU; "
            f"--set loop.gradient_accumulation={accumulation * micro_batch} makes it one"
        )
    return "does not fit even with one record at once: more GPUs, larger ones or fewer max_clips"


# ---- what is trained, and on what


def trained_parameters(
    model: ApolloForConditionalGeneration, rates: Mapping[str, float]
) -> set[nn.Parameter]:
    """The parameters that a stage with these rates trains."""
    return {
        parameter
        for name, part in model.parts().items()
        for parameter in part.parameters()
        if rates[name] and parameter.requires_grad
    }


def _sizes(
    model: ApolloForConditionalGeneration, among: set[nn.Parameter] | None = None
) -> dict[str, int]:
    return {
        name: sum(p.numel() for p in part.parameters() if among is None or p in among)
        for name, part in model.parts().items()
    }


def shares_of(stage: Stage, data_dir: Path) -> tuple[dict[str, float], list[str]]:
    """Give the share of each type of record in a stage, and notes on what had to be guessed.

    Sources say their type, or are mixture files that say it; all others count as videos.
    """
    weights = dict.fromkeys(RECORD_TYPES, 0.0)
    unknown: list[str] = []
    for source in stage.sources:
        for part, weight in _parts_of_source(source, data_dir):
            if not part.type:
                unknown.append(str(part.path))
            weights[part.type or "video"] += weight
    total = sum(weights.values())
    shares = {kind: weight / total for kind, weight in weights.items() if weight}
    names = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
    return shares, [f"type not known, counted as videos: {names}"] if unknown else []


def _parts_of_source(source: Source, data_dir: Path) -> list[tuple[Source, float]]:
    """A source, or those of a mixture file, which share its weight."""
    whole = source.weight or 1.0
    path = data_dir / source.path
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return [(source, whole)]
    parts = read_mixture(path)
    total = sum(part.weight or 1.0 for part in parts)
    return [(part, whole * (part.weight or 1.0) / total) for part in parts]


def _lengths(
    config: ApolloConfig, stage: Stage, assumptions: Assumptions
) -> dict[str, tuple[float, float]]:
    """Type of record -> its clips and its tokens."""
    clips_of_video = math.ceil(assumptions.video_s / config.clip_duration_s)
    clips = {
        "text": 0.0,
        "image": 1.0,
        "multi_image": assumptions.images_per_multi_image,
        "video": float(min(stage.max_clips, clips_of_video)),
    }
    return {
        kind: (number, number * config.tokens_per_clip + assumptions.text_tokens)
        for kind, number in clips.items()
    }


# ---- operations


def clip_flops(
    model: ApolloForConditionalGeneration, trained: set[nn.Parameter]
) -> dict[str, float]:
    """Count the operations of one clip in encoders and connector, as torch counts them.

    Args:
        model: On the meta device.
        trained: What is trained; decides the backward pass.

    Returns:
        Part and direction -> operations, two for each multiplication with addition.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter in trained)
    try:
        return _count_clip(model, trained)
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def _count_clip(
    model: ApolloForConditionalGeneration, trained: set[nn.Parameter]
) -> dict[str, float]:
    frames = model.config.frames_per_clip
    sizes = [image_size(encoder) for encoder in model.config.encoders]
    pixels = [torch.empty(1, frames, 3, size, size, device="meta") for size in sizes]
    model.train()
    with FlopCounterMode(display=False) as encoding:
        features = model.encode(pixels)
    with FlopCounterMode(display=False) as connecting:
        tokens = model.connect(features)
    forward = {
        "encoders forward": float(encoding.get_total_flops()),
        "connector forward": float(connecting.get_total_flops()),
    }
    if not tokens.requires_grad:
        return forward
    own = [p for p in model.model.connector.parameters() if p in trained]
    into = [features] if features.requires_grad else []
    with FlopCounterMode(display=False) as through_connector:
        gradients = torch.autograd.grad(tokens.sum(), own + into)
    backward = {"connector backward": float(through_connector.get_total_flops())}
    if into:
        own = [p for p in model.model.encoders.parameters() if p in trained]
        with FlopCounterMode(display=False) as through_encoders:
            torch.autograd.grad(features, own, gradients[-1], allow_unused=True)
        backward["encoders backward"] = float(through_encoders.get_total_flops())
    return forward | backward


def llm_flops(
    model: ApolloForConditionalGeneration, trained: set[nn.Parameter], length: float
) -> tuple[float, float]:
    """Count the operations of one sample in the LLM and its head.

    Linear layers cost two operations per weight and token. Attention is causal: a token sees half
    of the sample on average, and only that half is counted.

    Args:
        model: On the meta device.
        trained: What is trained.
        length: Tokens of the sample.

    Returns:
        Operations forward and backward. Backward costs as much again for the gradient of the
        inputs, twice for attention, and once for the weights that are trained.
    """
    llm = model.parts()["llm"]
    linear = [module.weight for module in llm.modules() if isinstance(module, nn.Linear)]
    config = model.config.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    products = 2.0 * sum(weight.numel() for weight in linear) * length
    attention = 4.0 * width * config.num_hidden_layers * length * length / 2
    weights = 2.0 * sum(weight.numel() for weight in linear if weight in trained) * length
    return products + attention, products + 2 * attention + weights


def _step_flops(
    model: ApolloForConditionalGeneration,
    trained: set[nn.Parameter],
    batch_size: int,
    shares: Mapping[str, float],
    lengths: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    clips = batch_size * sum(share * lengths[kind][0] for kind, share in shares.items())
    flops = {name: clips * value for name, value in clip_flops(model, trained).items()}
    for kind, share in shares.items():
        forward, backward = llm_flops(model, trained, lengths[kind][1])
        for name, value in (("llm forward", forward), ("llm backward", backward)):
            flops[name] = flops.get(name, 0.0) + batch_size * share * value
    return flops


# ---- memory and disk

# Bytes that autograd keeps for each token of a layer under bfloat16 autocast with a float32
# residual stream: per unit of width, and of the MLP's width. Measured by saved_tensors_hooks;
# tests/test_plan.py measures again.
LLM_WIDTH, LLM_KEY_VALUE, LLM_MLP = 30, 4, 8
ENCODER_WIDTH = {"internvideo2": 52}  # norms of queries and keys and LayerScale, in float32
ENCODER_WIDTH_OTHERS, ENCODER_MLP = 25, 4
LOGIT = 12  # forward: bfloat16 and float32; backward: again
FEATURE = 2  # a fused feature in bfloat16


def llm_layer_bytes(config: Any) -> float:
    """Bytes that are kept of one token in one layer of the LLM."""
    key_value = config.num_key_value_heads * config.hidden_size / config.num_attention_heads
    return (
        LLM_WIDTH * config.hidden_size
        + LLM_KEY_VALUE * key_value
        + LLM_MLP * config.intermediate_size
    )


def encoder_clip_bytes(config: Any, num_frames: int, checkpointing: bool = False) -> float:
    """Bytes that are kept of one clip in a trained encoder."""
    mlp = getattr(config, "intermediate_size", None) or config.mlp_ratio * config.hidden_size
    per_width = ENCODER_WIDTH.get(config.model_type, ENCODER_WIDTH_OTHERS)
    layer = per_width * config.hidden_size + ENCODER_MLP * mlp
    num_layers = config.num_hidden_layers
    per_token = num_layers * 4 * config.hidden_size + layer if checkpointing else num_layers * layer
    return math.prod(grid(config, num_frames)) * per_token


def connector_clip_bytes(model: ApolloForConditionalGeneration) -> float:
    """Bytes that are kept of one clip in the connector."""
    config, settings = model.config, model.config.connector_settings
    features = sum(encoder.hidden_size for encoder in config.encoders)
    width = config.text_config.hidden_size
    per_token = 2 * features + 8 * width
    if settings.resampler == "perceiver":
        inner = settings.num_heads * settings.head_dim
        per_token = 2 * features + 2 * width + settings.depth * (6.3 * width + 4 * inner)
    return math.prod(model.model.grid) * per_token


def _memory(
    model: ApolloForConditionalGeneration,
    trained: set[nn.Parameter],
    stage: Stage,
    num_gpus: int,
    tokens: float,
    clips: float,
    held: float,
) -> dict[str, dict[str, float]]:
    """Memory per GPU of each way of training, in 10^9 bytes by use.

    Args:
        tokens: Tokens that one GPU holds at once.
        clips: Clips that one GPU holds at once.
        held: Bytes for each byte of the 16-bit weights.
    """
    config = model.config.text_config
    sharded, whole = 0.0, 0.0  # weights of the parts that learn, and of the others
    for name, part in model.parts().items():
        size = sum(
            p.numel() * p.element_size() * (held if p.element_size() == 2 else 1)
            for p in part.parameters()
        )
        sharded, whole = (
            (sharded + size, whole) if stage.learning_rates[name] else (sharded, whole + size)
        )
    num_trained = sum(p.numel() for p in trained)
    state = (4 if stage.optimizer == "muon" else 8) * num_trained
    layer = llm_layer_bytes(config) * tokens
    layers = config.num_hidden_layers
    seeing = clips * connector_clip_bytes(model)
    seeing += clips * math.prod(model.model.grid) * FEATURE * _feature_width(model)
    encoders = model.config.encoders if stage.learning_rates["encoders"] else []
    frames = model.config.frames_per_clip
    logits = LOGIT * tokens * config.vocab_size
    kept = {
        "": layers * layer + clips * sum(encoder_clip_bytes(e, frames) for e in encoders),
        " + checkpointing": 4 * layers * config.hidden_size * tokens
        + layer
        + clips * sum(encoder_clip_bytes(e, frames, checkpointing=True) for e in encoders),
    }
    ways = {}
    for name, parts in (("DDP", 1), ("FSDP2", num_gpus)):
        if name == "FSDP2" and num_gpus == 1:
            continue
        for suffix, activations in kept.items():
            uses = {
                "weights": sharded / parts + whole,
                "gradients": 4 * num_trained / parts,
                "optimiser": state / parts,
                # DDP: buckets of gradients, and 16-bit copies of the trained weights; FSDP2:
                # what is gathered at a time, of which the embedding is the largest.
                "copies": (4 * (num_gpus > 1) + 2) * num_trained
                if name == "DDP"
                else 2 * 2 * config.vocab_size * config.hidden_size,
                "activations": activations + seeing,
                "logits": logits,
            }
            ways[name + suffix] = {
                use: value / GB for use, value in (uses | {"total": sum(uses.values())}).items()
            }
    return ways


def _feature_width(model: ApolloForConditionalGeneration) -> int:
    return sum(encoder.hidden_size for encoder in model.config.encoders)


def _disk(
    config: TrainConfig, model: ApolloForConditionalGeneration, stages: list[StagePlan]
) -> dict[str, float]:
    """10^9 bytes on disk: checkpoints (one more while it is written), the model, the features."""
    total = sum(sum(stage.parameters.values()) for stage in stages[:1])
    trained = max(sum(stage.trained.values()) for stage in stages)
    checkpoint = 4 * total + 8 * trained
    disk = {
        "checkpoints": (config.loop.keep_checkpoints + 1) * checkpoint / GB,
        "model": 4 * total / GB,
    }
    feature = math.prod(model.model.grid) * _feature_width(model) * FEATURE
    frozen = [
        plan.samples * plan.clips_per_sample
        for plan, stage in zip(stages, config.stages, strict=True)
        if not stage.learning_rates["encoders"]
    ]
    disk["feature cache, if used and every sample differs"] = sum(frozen) * feature / GB
    return disk


# ---- the report


def _show(plan: Plan, console: Console) -> None:
    gpu = GPUS[plan.gpu]
    console.print(
        f"[bold]{plan.num_gpus} x {plan.gpu}[/bold]: {gpu.peak_tflops:g} TFLOP/s bfloat16, "
        f"{gpu.memory_gb:g} GB ({gpu.source})"
    )
    _show_stages(plan, console)
    _show_memory(plan, console)
    disk = ", ".join(f"{use} {_number(size)} GB" for use, size in plan.disk_gb.items())
    console.print(f"In all {plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU hours.")
    console.print(f"Disk: {disk}.")
    console.print(
        "FSDP2 is loop.sharding=fsdp2, checkpointing is loop.gradient_checkpointing=true.",
        highlight=False,
    )
    for stage in plan.stages:
        for note in stage.notes:
            console.print(f"[yellow]{stage.name}: {note}[/yellow]")
    console.print("Assumed (change with --assume NAME=VALUE):")
    texts = field_help(Assumptions)
    for name, value in asdict(plan.assumptions).items():
        console.print(f"  {name} = {value:g}  [dim]{texts[name]}[/dim]", highlight=False)
    console.print(
        "  [dim]Counted are products of matrices (two operations each), causal attention by the "
        "half that is not masked, not what checkpointing computes again, which is in the step's "
        "time where the recipe asks for it. Not counted: decoding of videos, communication, "
        "evaluation. Memory is for the longest sample or the whole micro-batch, whichever is "
        "more.[/dim]",
        highlight=False,
    )


def _show_stages(plan: Plan, console: Console) -> None:
    table = Table("stage", "trained", "frozen", "samples", "clips", "tokens", title="Stages")
    for column in ("per step", "encoders", "connector", "LLM", "step", "hours"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        total, trained = sum(stage.parameters.values()), sum(stage.trained.values())
        flops = sum(stage.step_flops.values())
        part = {
            name: sum(v for key, v in stage.step_flops.items() if key.startswith(name)) / flops
            for name in ("encoders", "connector", "llm")
        }
        table.add_row(
            stage.name,
            _number(trained),
            _number(total - trained),
            _number(stage.samples),
            f"{stage.clips_per_sample:.1f}",
            f"{stage.tokens_per_sample:.0f}",
            f"{_number(flops)}FLOP",
            *(f"{share:.0%}" for share in part.values()),
            f"{stage.step_s:.3g} s",
            f"{stage.hours:,.1f}",
        )
    console.print(table)


def _show_memory(plan: Plan, console: Console) -> None:
    usable = GPUS[plan.gpu].memory_gb * plan.assumptions.usable_memory
    ways = list(plan.stages[0].memory_gb)
    table = Table("stage", "records at once", "state", title="Memory per GPU, GB")
    for way in ways:
        table.add_column(way, justify="right")
    for stage in plan.stages:
        first = stage.memory_gb[ways[0]]
        state = sum(first[use] for use in ("weights", "gradients", "optimiser"))
        totals = [stage.memory_gb[way]["total"] for way in ways]
        cells = [f"{t:,.1f}" if t <= usable else f"[red]{t:,.1f} too much[/red]" for t in totals]
        table.add_row(stage.name, str(stage.micro_batch), f"{state:,.1f}", *cells)
    console.print(table)


def _number(value: float) -> str:
    """A number with its order of magnitude: 3.09B, 38.4M."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
