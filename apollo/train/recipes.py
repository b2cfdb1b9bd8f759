"""Recipes: a training as one value, from the parts it joins to the rate of every part in every
stage.

A recipe is a function that returns a complete `TrainConfig`; there is nothing else to look up. The
resolved value is written to `config.yaml` of the run, and that file replays it. Read next:
`run.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import apollo
from apollo.data.mixture import Source
from apollo.model.configuration import ConnectorSettings
from apollo.train.trainer import LoopSettings, Schedule

PARTS_DIR = Path(apollo.__file__).parent / "assets" / "parts"
"""The shipped micro parts."""


@dataclass(kw_only=True)
class ModelSettings:
    """Which trained parts are joined, and by what connector; see `ApolloConfig` for the meanings.

    Attributes:
        encoders: Folders of the encoders, the image encoder first.
        llm: Folder of the LLM and its tokenizer.
        connector: Kind and shape of the connector.
        tokens_per_clip: LLM tokens that stand for one clip.
        frames_per_clip: Frames in a clip.
        clip_duration_s: Seconds that a clip covers.
        token_integration: How clip tokens stand in the text (paper, Table 2).
        note: What the finished model says about itself to its users.
    """

    encoders: list[Path]
    llm: Path
    connector: ConnectorSettings = field(default_factory=ConnectorSettings)
    tokens_per_clip: int = 128
    frames_per_clip: int = 4
    clip_duration_s: float = 2.0
    token_integration: Literal["none", "start_end", "timestamps", "timestamps_start_end"] = (
        "timestamps"
    )
    note: str = ""


@dataclass(kw_only=True)
class Stage(Schedule):
    """A schedule and the data it runs on.

    Attributes:
        sources: Files of the mixture, with their shares.
        batch_size: Records per optimiser step, over accumulation and processes (paper: 256).
        max_clips: Largest number of clips of a video; a longer video's clips are spaced out.
    """

    sources: list[Source]
    batch_size: int
    max_clips: int


@dataclass(kw_only=True)
class TrainConfig:
    """A whole training run.

    Attributes:
        model: The parts and how they are joined.
        stages: What is done with them, in order.
        data_dir: Folder that the paths of the sources are relative to.
        out_dir: Folder of the run.
        loop: How the loop runs.
        feature_cache_dir: Where the features of frozen encoders are kept, so that each video is
            decoded and encoded once; without it, that happens every time.
    """

    model: ModelSettings
    stages: list[Stage]
    data_dir: Path
    out_dir: Path
    loop: LoopSettings = field(default_factory=LoopSettings)
    feature_cache_dir: Path | None = None


def micro() -> TrainConfig:
    """Train a micro Apollo from the shipped parts on a world made by `apollo world make`.

    The three stages and what they train are the paper's (Table 7, Fig. 7); steps, batch sizes and
    rates are our own, for parts of a few million parameters.
    """
    align = Stage(
        name="align",
        optimizer="muon",
        steps=400,
        learning_rates={"encoders": 0.0, "connector": 4e-3, "llm": 0.0},
        sources=[
            Source(path=Path("captions_image.jsonl"), weight=50),
            Source(path=Path("captions_video.jsonl"), weight=50),
        ],
        batch_size=16,
        max_clips=24,
    )
    vision = Stage(
        name="vision",
        optimizer="muon",
        steps=350,
        learning_rates={"encoders": 3e-4, "connector": 2e-3, "llm": 0.0},
        sources=[Source(path=Path("captions_video.jsonl"))],
        batch_size=16,
        max_clips=24,
    )
    sft = Stage(
        name="sft",
        optimizer="muon",
        steps=1300,
        learning_rates={"encoders": 0.0, "connector": 1e-3, "llm": 7e-4},
        sources=[
            Source(path=Path("text.jsonl"), weight=14.4),
            Source(path=Path("image.jsonl"), weight=33.0),
            Source(path=Path("multi_image.jsonl"), weight=16.6),
            Source(path=Path("video.jsonl"), weight=36.0),
        ],
        batch_size=32,
        max_clips=24,
    )
    return TrainConfig(
        model=ModelSettings(
            encoders=[PARTS_DIR / "siglip", PARTS_DIR / "internvideo2"],
            llm=PARTS_DIR / "llm",
            connector=ConnectorSettings(depth=2, num_heads=4, num_key_value_heads=2, head_dim=48),
            tokens_per_clip=12,
            note="A micro model: it knows only the micro world of `apollo world`.",
        ),
        stages=[align, vision, sft],
        data_dir=Path("runs/world"),
        out_dir=Path("runs/micro"),
        # Four pieces a step: sorted by length, half as much of them is padding.
        loop=LoopSettings(mixed_precision="bf16", gradient_accumulation=4, num_workers=1),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"micro": micro}
"""Name on the command line -> recipe."""
