"""Steps of the paper's SFT stage on a GPU: full-size Apollo-1.5B or 3B with random weights.

    python benchmarks/full_size.py --size 3b --gpu h100     # on a GPU
    python benchmarks/full_size.py --size tiny --gpu cpu    # anywhere: shows that it runs

Takes the recipe's own steps by `apollo train`'s own loop on packed rows of made-up videos: first
with the encoders in the step, as on a first epoch, then from cached features. Reported are the
LLM's tokens per second, the peak of memory, and the MFU: the products of matrices of encoders,
connector and LLM, forward and backward, what is computed again not counted, causal attention
counted by half (as `apollo plan` counts them), over the peak that the vendor states. Medians over
the steps after two of warm-up. Writes benchmarks/results/full_size_<size>.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apollo.model import ApolloConfig, ApolloForConditionalGeneration
from apollo.model.encoders import image_size
from apollo.model.segments import use_packed_attention
from apollo.runtime import environment, pick_device, read_jsonl, set_seed
from apollo.train.joining import model_config
from apollo.train.plan import GPUS, clip_flops, llm_flops, trained_parameters
from apollo.train.recipes import TrainConfig, apollo_1p5b, apollo_3b, apollo_7b, micro
from apollo.train.trainer import run_stage

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, Callable[[], TrainConfig]] = {
    "1.5b": apollo_1p5b,
    "3b": apollo_3b,
    "7b": apollo_7b,
    "tiny": micro,
}
NUM_WARM_UP = 2
TEXT_TOKENS, SUPERVISED_TOKENS = 400, 100
"""Of each sample, beside its clips."""


class EnoughStepsError(Exception):
    """Ends the loop before it writes a checkpoint of tens of gigabytes."""


def make_batch(
    config: ApolloConfig, num_samples: int, num_clips: int, features: torch.Size | None
) -> dict[str, Any]:
    """Make a packed row of samples with one video each.

    Args:
        config: Of the model.
        num_samples: Samples in the row.
        num_clips: Clips of each video.
        features: Shape (C, T, H, W, D) of the clip features that replace the pixels.
    """
    clip_tokens = num_clips * config.tokens_per_clip
    length = clip_tokens + TEXT_TOKENS
    input_ids = torch.randint(0, 1000, (1, num_samples * length))
    labels = torch.full_like(input_ids, -100)
    for start in range(0, num_samples * length, length):
        input_ids[0, start : start + clip_tokens] = config.video_token_id
        answer = slice(start + length - SUPERVISED_TOKENS, start + length)
        labels[0, answer] = input_ids[0, answer]
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "segment_ids": torch.arange(1, num_samples + 1).repeat_interleave(length)[None],
        "labels": labels,
    }
    if features is not None:
        return batch | {"clip_features": torch.randn(features, dtype=torch.bfloat16)}
    frames = (num_samples * num_clips, config.frames_per_clip, 3)
    sizes = [image_size(encoder) for encoder in config.encoders]
    pixels = [torch.randint(0, 256, (*frames, s, s), dtype=torch.uint8) for s in sizes]
    return batch | {"pixel_values": pixels}


def useful_flops(config: TrainConfig, args: argparse.Namespace, cached: bool) -> float:
    """Count the products of one step; see the head of this file."""
    with torch.device("meta"):
        model = ApolloForConditionalGeneration(model_config(config.model))
    trained = trained_parameters(model, config.stages[-1].learning_rates)
    clip = clip_flops(model, trained)
    if cached:
        clip.pop("encoders forward")
    tokens = args.clips * model.config.tokens_per_clip + TEXT_TOKENS
    return args.samples * (args.clips * sum(clip.values()) + sum(llm_flops(model, trained, tokens)))


def measure(
    config: TrainConfig,
    model: ApolloForConditionalGeneration,
    args: argparse.Namespace,
    cached: bool,
) -> dict[str, float]:
    """Take steps by the loop; give medians of what its log says."""
    grid = model.model.grid
    width = sum(encoder.hidden_size for encoder in model.config.encoders)
    shape = torch.Size((args.samples * args.clips, *grid, width)) if cached else None
    batch = make_batch(model.config, args.samples, args.clips, shape)

    def batch_at(number: int) -> dict[str, Any]:
        if number == NUM_WARM_UP + args.steps:
            raise EnoughStepsError
        return batch

    stage = replace(config.stages[-1], steps=1000)
    loop = replace(
        config.loop,
        gradient_accumulation=1,
        num_workers=0,
        sharding="no",
        log_every=1,
        gradient_checkpointing=args.checkpointing,
        compile=args.compile,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_stage(model, batch_at, stage, loop, Path(folder))
        except EnoughStepsError:
            log = list(read_jsonl(Path(folder) / "log.jsonl"))[NUM_WARM_UP:]
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in log)
    step_s = batch["input_ids"].numel() / tokens_per_s
    flops = useful_flops(config, args, cached)
    return {
        "tokens_per_s": round(tokens_per_s, 1),
        "step_s": round(step_s, 3),
        "useful_tflop_per_step": round(flops / 1e12, 2),
        "mfu": round(flops / step_s / (GPUS[args.gpu].peak_tflops * 1e12), 4),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in log),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--gpu", choices=GPUS, required=True, help="whose peak the MFU is of")
    parser.add_argument("--samples", type=int, default=4, help="videos in a packed row")
    parser.add_argument("--clips", type=int, default=15, help="clips of each video")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    config = SIZES[args.size]()
    set_seed(0)
    with pick_device():
        model = ApolloForConditionalGeneration(model_config(config.model)).float()
    use_packed_attention(model.model.llm)
    parts = model.parts().items()
    result = {
        "settings": vars(args),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts},
        "encoders in the step": measure(config, model, args, cached=False),
        "cached features": measure(config, model, args, cached=True),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    print(json.dumps(result, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"full_size_{args.size}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
