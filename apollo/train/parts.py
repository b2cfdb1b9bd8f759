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

from transformers import PreTrainedTokenizerFast

from apollo.runtime import keep_freed_memory, make_run_dir
from apollo.train.encoder_parts import (
    train_dinov2,
    train_internvideo2,
    train_siglip,
    train_videomae,
)
from apollo.train.llm_part import PartRun, train_language_model, train_tokenizer


@dataclass(frozen=True)
class Part:
    """How a part is trained.

    Args:
        train: Takes a `PartRun` and the shape.
        shape: Its size, in the words of `train`.
        steps: Default of steps: minutes of a core for the small parts, hours for the largest.
    """

    train: Callable[..., None]
    shape: Mapping[str, int]
    steps: int


SMALL, LARGE = {"width": 128, "layers": 4}, {"width": 256, "layers": 5}
"""Shapes of encoders: 0.7 and 3.4 million parameters."""
LADDER = {
    "llm-0.3m": {"width": 64, "layers": 5, "head_dim": 32},
    "llm-1m": {"width": 128, "layers": 5, "head_dim": 32},
    "llm-3m": {"width": 224, "layers": 5, "head_dim": 32},
    "llm-10m": {"width": 384, "layers": 5, "head_dim": 64},
}
"""Shapes of language models, named by their parameters."""

PARTS: dict[str, Part] = {
    **{name: Part(train_language_model, shape, 9600) for name, shape in LADDER.items()},
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
        ValueError: No part has this name, or the run began with another tokenizer.
    """
    if args.name not in PARTS:
        raise ValueError(f"no part {args.name!r}; there are: {', '.join(PARTS)}")
    part = PARTS[args.name]
    out_dir = make_run_dir(args.out, resume=args.resume)
    keep_freed_memory()
    tokenizer = train_tokenizer(args.seed)
    keep_tokenizer(tokenizer, out_dir)
    run = PartRun(tokenizer, out_dir, args.steps or part.steps, args.seed, args.resume)
    part.train(run, **part.shape)
    print(f"trained part: {out_dir / 'model'}")
    return 0


def keep_tokenizer(tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write the tokenizer into the run, or see that the run began with this one.

    It is made of the world's text: a change there would give each token another number, and a run
    that went on with it would read gibberish.

    Args:
        tokenizer: The one that all parts share.
        out_dir: Folder of the run.

    Raises:
        ValueError: The run began with another.
    """
    file, text = out_dir / "tokenizer.json", tokenizer.backend_tokenizer.to_str()
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{out_dir} began with another tokenizer: the text of the world or the seed has "
            "changed since; begin a new run in another folder"
        )
    file.write_text(text, encoding="utf-8")
