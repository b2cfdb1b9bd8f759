"""The micro parts that Apollo is joined from, and `apollo part`, which trains one.

The paper joins *pre-trained* parts. At the micro scale they are trained here, on the micro world,
through the same loop as everything else (`trainer.run_stage`): language models on text alone, in a
ladder of sizes; encoders of images and of videos, supervised by language or by the pixels
themselves, in two sizes. Any of them can be joined with any other. Read next: `llm_part.py`,
`encoder_parts.py`; `recipes.py`, which joins them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from apollo.runtime import keep_freed_memory, make_run_dir
from apollo.train.encoder_parts import (
    train_dinov2,
    train_internvideo2,
    train_siglip,
    train_videomae,
)
from apollo.train.joining import load_tokenizer
from apollo.train.llm_part import (
    PartRun,
    train_deeper_model,
    train_language_model,
    train_tokenizer,
    train_wider_model,
    wrap_tokenizer,
)
from apollo.train.recipes import PARTS_DIR


@dataclass(frozen=True)
class Part:
    """How a part is trained.

    Args:
        train: Takes a `PartRun` and the shape.
        shape: Its size, in the words of `train`.
        steps: Default of steps: minutes of a core for the small parts, hours for the largest.
    """

    train: Callable[..., None]
    shape: Mapping[str, Any]
    steps: int


SMALL, LARGE = {"width": 128, "layers": 4}, {"width": 256, "layers": 5}
"""Shapes of encoders: 0.7 and 3.4 million parameters."""
LADDER = {
    "llm-0.3m": {"width": 64, "layers": 5, "head_dim": 32},
    "llm-1m": {"width": 128, "layers": 5, "head_dim": 32},
}
"""Shapes of language models, named by their parameters."""
GROWN = {
    "llm-4m": Part(train_wider_model, {"small": str(PARTS_DIR / "llm-1m"), "copies": 2}, 2000),
    "llm-9m": Part(train_deeper_model, {"small": str(PARTS_DIR / "llm-4m"), "layers": 12}, 600),
}
"""Language models that start as a smaller one: of twice the width, then of 12 layers."""

PARTS: dict[str, Part] = {
    **{name: Part(train_language_model, shape, 9600) for name, shape in LADDER.items()},
    **GROWN,
    "siglip": Part(train_siglip, SMALL, 1800),
    "siglip-large": Part(train_siglip, LARGE, 1800),
    "dinov2": Part(train_dinov2, SMALL, 3600),
    "dinov2-large": Part(train_dinov2, LARGE, 1800),
    "internvideo2": Part(train_internvideo2, SMALL, 3200),
    "internvideo2-large": Part(train_internvideo2, LARGE, 2600),
    "videomae": Part(train_videomae, SMALL, 6400),
    "videomae-large": Part(train_videomae, LARGE, 2800),
}
"""Name on the command line -> micro part. All share the tokenizer that the seed decides."""


def main(args: argparse.Namespace) -> int:
    """Run `apollo part`.

    Args:
        args: name, out (folder of the run), steps (or None), seed, resume.

    Raises:
        ValueError: No part has this name.
    """
    if args.name not in PARTS:
        raise ValueError(f"no part {args.name!r}; there are: {', '.join(PARTS)}")
    part = PARTS[args.name]
    out_dir = make_run_dir(args.out, resume=args.resume)
    keep_freed_memory()
    small = part.shape.get("small")
    tokenizer = load_tokenizer(small) if small else run_tokenizer(out_dir, args.seed)
    run = PartRun(tokenizer, out_dir, args.steps or part.steps, args.seed, args.resume)
    part.train(run, **part.shape)
    print(f"trained part: {out_dir / 'model'}")
    return 0


def run_tokenizer(out_dir: Path, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer that a run began with, or for a new run the one that the seed decides.

    It is made of the world's text: a change there would give each token another number, and a run
    that went on with it would read gibberish.

    Args:
        out_dir: Folder of the run, which keeps its tokenizer.
        seed: Seed of the text.
    """
    file = out_dir / "tokenizer.json"
    if file.exists():
        return wrap_tokenizer(Tokenizer.from_file(str(file)))
    tokenizer = train_tokenizer(seed)
    tokenizer.backend_tokenizer.save(str(file), pretty=False)
    return tokenizer
