"""A study of 21 points on frozen encoders: features shared between them, against one by one.

    python benchmarks/lab.py                       # both encoders, some forty minutes on one core
    python benchmarks/lab.py --encoders micro      # those of the shipped micro model alone
    python benchmarks/lab.py --num-videos 6 --steps 2 --points 3 --alone 1    # does it work?

The points are 3 resamplers x 7 numbers of tokens: all see the same videos through the same frozen
encoders. Shared: the points run one after the other with one feature cache, as `apollo study run`
does, training and evaluation. One by one: the same without a cache, so that each step decodes and
encodes its videos; a few points, evenly chosen, stand for all. "small" is an image encoder of the
shape of ViT-S/16 with random weights, with the shipped LLM: the larger the encoders are beside what
learns, the more is shared. Writes benchmarks/results/lab.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging

from apollo.lab import training
from apollo.lab.spec import Point, Study
from apollo.runtime import environment, set_seed
from apollo.train.recipes import PARTS_DIR
from apollo.world.make import make_world

RESULTS = Path(__file__).parent / "results"
VIT_S: dict[str, Any] = {  # config.json of facebook/dinov2-small, at 224 pixels and patches of 16
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 16,
}
RESAMPLERS = ("perceiver", "mlp_pool", "conv_pool")
TOKENS = (2, 4, 6, 8, 12, 16, 24)


def encoders_of(kind: str, folder: Path) -> list[str]:
    """The shipped pair, or a larger one with random weights."""
    if kind == "micro":
        return [str(PARTS_DIR / "siglip"), str(PARTS_DIR / "internvideo2")]
    set_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VIT_S)).save_pretrained(folder / "vit-s")
    return [str(folder / "vit-s")]


def make_study(folder: Path, encoders: Sequence[str], steps: int, max_clips: int) -> Study:
    """21 points that differ in what comes after the encoders."""
    stage = {
        "name": "sft",
        "optimizer": "muon",
        "steps": steps,
        "learning_rates": {"encoders": 0, "connector": 2e-3, "llm": 7e-4},
        "sources": [{"path": "video.jsonl", "type": "video"}],
        "batch_size": 8,
        "max_clips": max_clips,
        "packing": True,
    }
    return Study(
        name="benchmark",
        about="Resamplers and tokens on frozen encoders.",
        settings={
            "model.encoders": list(encoders),
            "model.llm": str(PARTS_DIR / "llm-1m"),
            "stages": [stage],
            "data_dir": str(folder / "world"),
            "loop.gradient_accumulation": 1,
            "loop.num_workers": 0,
        },
        axes={
            "resampler": {name: {"model.connector.resampler": name} for name in RESAMPLERS},
            "tokens": {str(number): {"model.tokens_per_clip": number} for number in TOKENS},
        },
        seeds=(0,),
        questions=str(folder / "held_out"),
    )


def seconds_of(study: Study, points: Sequence[Point], folder: Path, cache: Path | None) -> float:
    """Seconds that points take, one after the other."""
    started = time.monotonic()
    for number, point in enumerate(points):
        settings = {**point.settings, "feature_cache_dir": str(cache) if cache else None}
        training.run(study, Point(point.levels, point.seed, settings), folder / str(number))
    return time.monotonic() - started


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways with one kind of encoders."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder / "world", args.num_videos, seed=0)
        make_world(folder / "held_out", args.num_test_videos, seed=1, split="test")
        study = make_study(folder, encoders_of(kind, folder), args.steps, args.max_clips)
        points = list(study.points())[: args.points]
        # The first training of a process pays for what is loaded once; neither side shall.
        seconds_of(study, points[:1], folder / "warm-up", None)
        chosen = np.linspace(0, len(points) - 1, args.alone).round().astype(int)
        alone = [points[place] for place in chosen]
        alone_s = seconds_of(study, alone, folder / "alone", None) / len(alone) * len(points)
        shared_s = seconds_of(study, points, folder / "shared", folder / "features")
    return {
        "points": len(points),
        "points_measured_one_by_one": len(alone),
        "one_by_one_s": round(alone_s, 1),
        "shared_s": round(shared_s, 1),
        "share": round(shared_s / alone_s, 3),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", choices=("micro", "small", "both"), default="both")
    parser.add_argument("--num-videos", type=int, default=48)
    parser.add_argument("--num-test-videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--max-clips", type=int, default=3)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--alone", type=int, default=3, help="points measured one by one")
    parser.add_argument("--out", type=Path, default=RESULTS / "lab.json")
    args = parser.parse_args()
    logging.disable_progress_bar()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "encoders")}
    whole = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for kind in ("micro", "small") if args.encoders == "both" else (args.encoders,):
        result = measure(kind, args)
        whole[kind] = {**result, "settings": settings, "environment": environment()}
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"{kind}: shared {result['share']:.0%} of one by one ({result})")


if __name__ == "__main__":
    main()
