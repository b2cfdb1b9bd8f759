"""Recipes: a training as one value, from the parts it joins to the rate of every part in every
stage.

A recipe is a function that returns a complete `TrainConfig`; there is nothing else to look up. The
resolved value is written to `config.yaml` of the run, and that file replays it. What the paper
states is quoted with its table; what it leaves open and was chosen here says so. Read next:
`joining.py`, which turns `ModelSettings` into a model, then `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Literal

import apollo
from apollo.data.mixture import Source
from apollo.model.configuration import ConnectorSettings
from apollo.train.lora import LoraSettings
from apollo.train.schedules import SCHEDULES
from apollo.train.trainer import LoopSettings, Schedule

PARTS_DIR = Path(apollo.__file__).parent / "assets" / "parts"
"""The shipped micro parts."""


@dataclass(kw_only=True)
class ModelSettings:
    """What is trained: parts that a new connector joins, or a finished model to go on with.

    Attributes:
        start: Folder or hub id of a finished model, or "micro", the shipped one. It has all the
            settings below already, so that only `note` may stand beside it.
        encoders: Folders or hub ids of the encoders, the image encoder first.
        llm: Folder or hub id of the LLM and its tokenizer.
        connector: Kind and shape of the connector; see `ApolloConfig` for this and what follows.
        tokens_per_clip: LLM tokens that stand for one clip.
        frames_per_clip: Frames in a clip.
        clip_duration_s: Seconds that a clip covers.
        token_integration: How clip tokens stand in the text (paper, Table 2).
        sampling: How videos are sampled, in training and after (`apollo list samplings`).
        note: What the finished model says about itself to its users.
    """

    start: str = ""
    encoders: list[str] = field(default_factory=list)
    llm: str = ""
    connector: ConnectorSettings = field(default_factory=ConnectorSettings)
    tokens_per_clip: int = 128
    frames_per_clip: int = 4
    clip_duration_s: float = 2.0
    token_integration: Literal["none", "start_end", "timestamps", "timestamps_start_end"] = (
        "timestamps"
    )
    sampling: Literal["fps", "uniform"] = "fps"
    note: str = ""

    def __post_init__(self) -> None:
        self.start, self.llm = str(self.start), str(self.llm)  # paths are welcome
        self.encoders = [str(encoder) for encoder in self.encoders]
        if not self.start:
            if not (self.encoders and self.llm):
                raise ValueError("give encoders and llm, or start, a finished model")
            return
        given = [
            setting.name
            for setting in fields(self)
            if setting.name not in ("start", "note")
            and getattr(self, setting.name) != _default(setting)
        ]
        if given:
            raise ValueError(
                f"start is a finished model, which has its own {', '.join(given)}; "
                "remove these, or leave start empty and join parts"
            )


def _default(setting: Field) -> object:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


@dataclass(kw_only=True)
class Stage(Schedule):
    """A schedule and the data it runs on.

    Attributes:
        sources: Files of the mixture, with their shares.
        batch_size: Records per optimiser step, over accumulation and processes (paper: 256).
        max_clips: Largest number of clips of a video; a longer video's clips are spaced out.
        packing: Put the records of a batch into one row without padding, none of which sees
            another; the steps and their losses stay the same.
        tokens_per_row: Most tokens of a packed row: what fits into memory. A step that has more is
            taken in more pieces; null for no bound.
    """

    sources: list[Source]
    batch_size: int
    max_clips: int
    packing: bool = False
    tokens_per_row: int | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_row is not None and not self.packing:
            raise ValueError("tokens_per_row bounds packed rows: set packing=true, too")


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
            decoded and encoded once; without it, that happens every time. Those of encoders that
            the run itself has trained are removed when it ends.
        lora: Train the LLM by low-rank matrices beside its weights; without it, in full.
        video_time_limit_s: Longest that a video may take to load, in seconds: a file that hangs or
            crashes the decoder ends the run with its name instead of stopping it for ever.
    """

    model: ModelSettings
    stages: list[Stage]
    data_dir: Path
    out_dir: Path
    loop: LoopSettings = field(default_factory=LoopSettings)
    feature_cache_dir: Path | None = None
    lora: LoraSettings | None = None
    video_time_limit_s: float = 120.0


def micro() -> TrainConfig:
    """Train a micro Apollo from the shipped parts on a world made by `apollo world make`.

    The three stages and what they train are the paper's (Table 7); steps, batch sizes and rates are
    our own, for parts of a few million parameters. Of the last mixture half is video, not 36 % as
    in Fig. 7: here videos alone are to be answered well.
    """
    align = Stage(
        name="align",
        optimizer="muon",
        steps=1500,
        learning_rates={"encoders": 0.0, "connector": 4e-3, "llm": 0.0},
        sources=[
            Source(path="captions_image.jsonl", type="image", weight=50),
            Source(path="captions_video.jsonl", type="video", weight=50),
        ],
        batch_size=16,
        max_clips=24,
    )
    vision = Stage(
        name="vision",
        optimizer="muon",
        steps=250,
        learning_rates={"encoders": 3e-4, "connector": 4e-3, "llm": 0.0},
        sources=[Source(path="captions_video.jsonl", type="video")],
        batch_size=16,
        max_clips=24,
    )
    sft = Stage(
        name="sft",
        optimizer="muon",
        steps=3000,
        learning_rates={"encoders": 0.0, "connector": 1e-3, "llm": 7e-4},
        sources=[
            Source(path="text.jsonl", type="text", weight=14),
            Source(path="image.jsonl", type="image", weight=24),
            Source(path="multi_image.jsonl", type="multi_image", weight=12),
            Source(path="video.jsonl", type="video", weight=50),
        ],
        batch_size=32,
        max_clips=24,
        packing=True,
    )
    return TrainConfig(
        model=ModelSettings(
            encoders=[str(PARTS_DIR / "siglip"), str(PARTS_DIR / "internvideo2")],
            llm=str(PARTS_DIR / "llm-1m"),
            connector=ConnectorSettings(depth=2, num_heads=4, num_key_value_heads=2, head_dim=48),
            tokens_per_clip=12,
            note="A micro model: it knows only the micro world of `apollo world`.",
        ),
        stages=[align, vision, sft],
        data_dir=Path("runs/world"),
        out_dir=Path("runs/micro"),
        # Four pieces a step: where they are not packed, records of like length share one.
        loop=LoopSettings(mixed_precision="bf16", gradient_accumulation=4, num_workers=1),
    )


# ---- the paper's models

SIGLIP = "google/siglip-so400m-patch14-384"
INTERNVIDEO2 = "OpenGVLab/InternVideo2-Stage2_1B-224p-f4"
MIXTURES_DIR = Path("mixtures")
"""Open stand-ins for the paper's data sets, which it does not name."""
ALIGN, VISION, SFT = "align.yaml", "vision.yaml", "sft.yaml"
NUM_SAMPLES = {"align": 198_000, "vision": 396_000, "sft": 3_200_000}
"""Samples of each stage (paper, Table 7); every stage sees them once."""
BATCH_SIZE = 256
"""Samples per step in all stages (paper, Table 7)."""


def apollo_1p5b() -> TrainConfig:
    """Train Apollo-1.5B in the paper's three stages (Table 7)."""
    return _full_size("1.5B", llm_rate=5e-5, sft_clips=200)


def apollo_3b() -> TrainConfig:
    """Train Apollo-3B in the paper's three stages (Table 7)."""
    return _full_size("3B", llm_rate=2e-5, sft_clips=200)


def apollo_7b() -> TrainConfig:
    """Train Apollo-7B in the paper's three stages (Table 7)."""
    return _full_size("7B", llm_rate=1e-5, sft_clips=150)


def _full_size(size: str, llm_rate: float, sft_clips: int) -> TrainConfig:
    """The stages of Table 7; 128 tokens per clip as in the released models, see docs/released.md.

    The table prints half of that. 200 clips of 128 tokens fit into the 32,768 positions of
    Qwen2.5, not into the 16,384 of the released models.
    """
    stages = [
        _stage("align", ALIGN, "align", (0, 1e-4, 0), max_clips=25),
        _stage("vision", VISION, "vision", (5e-6, 1e-4, 0), max_clips=25),
        _stage("sft", SFT, "sft", (0, 1e-4, llm_rate), max_clips=sft_clips),
    ]
    return _paper_config(size, stages, Path(f"runs/apollo-{size.lower()}"), tokens_per_clip=128)


def _stage(
    name: str,
    source: str,
    kind: str,
    rates: Sequence[float],
    max_clips: int,
    num_samples: int | None = None,
) -> Stage:
    """One stage of the paper; rates of encoders, connector and LLM, as Table 12 prints them."""
    return Stage(
        name=name,
        steps=round((num_samples or NUM_SAMPLES[kind]) / BATCH_SIZE),
        learning_rates=dict(zip(("encoders", "connector", "llm"), map(float, rates), strict=True)),
        sources=[Source(path=source)],
        batch_size=BATCH_SIZE,
        max_clips=max_clips,
    )


def _paper_config(
    size: str, stages: list[Stage], out_dir: Path, tokens_per_clip: int
) -> TrainConfig:
    return TrainConfig(
        model=ModelSettings(
            encoders=[SIGLIP, INTERNVIDEO2],
            llm=f"Qwen/Qwen2.5-{size}-Instruct",  # released llm/config.json, _name_or_path
            tokens_per_clip=tokens_per_clip,
        ),
        stages=stages,
        data_dir=MIXTURES_DIR,
        out_dir=out_dir,
        # The paper used 128 GPUs and ZeRO (App. C): one sample at a time with this. `apollo plan`
        # says what fits other numbers of GPUs.
        loop=LoopSettings(
            mixed_precision="bf16",
            gradient_accumulation=2,
            num_workers=8,
            sharding="fsdp2",
            gradient_checkpointing=True,
        ),
    )


# ---- the paper's study of schedules

BEST_SCHEDULE = 13
ABLATION_SAMPLES = 750_000
"""Samples of a run of the study (paper, App. C)."""


def ablation_3b(schedule: int = BEST_SCHEDULE) -> TrainConfig:
    """Train as the paper's study does: 3B, 750K samples, 64 tokens per clip, schedule 13.

    Chosen here, because the paper does not say it: the samples are divided among the stages as
    Table 7 divides those of the final models. While the LLM is frozen only videos are used (paper,
    Sec. 5.1 and 5.2).

    Args:
        schedule: Row of Table 12.
    """
    kinds = [
        "sft" if llm else "vision" if encoders else "align"
        for encoders, _, llm in SCHEDULES[schedule]
    ]
    total = sum(NUM_SAMPLES[kind] for kind in kinds)
    stages = [
        _stage(
            "all" if kind == "sft" and rates[0] else kind,
            SFT if kind == "sft" else VISION,
            kind,
            rates,
            max_clips=200 if kind == "sft" else 25,
            num_samples=round(ABLATION_SAMPLES * NUM_SAMPLES[kind] / total),
        )
        for kind, rates in zip(kinds, SCHEDULES[schedule], strict=True)
    ]
    out_dir = Path(f"runs/ablation-3b-{schedule}")
    return _paper_config("3B", stages, out_dir, tokens_per_clip=64)


def _schedule_recipe(row: int) -> Callable[[], TrainConfig]:
    """The study's recipe with another schedule, as a function that can say which."""

    def recipe() -> TrainConfig:
        return ablation_3b(row)

    stages = "; ".join(
        ", ".join(
            f"{part} {rate:g}"
            for part, rate in zip(("encoders", "connector", "LLM"), rates, strict=True)
            if rate
        )
        for rates in SCHEDULES[row]
    )
    recipe.__doc__ = f"The study's row {row} of Table 12: {stages}."
    return recipe


# ---- anyone's videos


def finetune() -> TrainConfig:
    """Fine-tune a finished model on your own videos, by LoRA; see docs/finetune.md.

    The rate is ten times that of the LLM in full, as low-rank matrices want it (arXiv 2106.09685,
    App. D, and much practice since); connector and encoders stay as they are.
    """
    stage = Stage(
        name="finetune",
        steps=100,
        learning_rates={"encoders": 0.0, "connector": 0.0, "llm": 2e-4},
        sources=[Source(path="train.jsonl")],
        batch_size=16,
        max_clips=24,
    )
    return TrainConfig(
        model=ModelSettings(start="micro"),
        stages=[stage],
        data_dir=Path("my_videos"),
        out_dir=Path("runs/finetune"),
        loop=LoopSettings(mixed_precision="bf16", num_workers=1),
        lora=LoraSettings(),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "micro": micro,
    "finetune": finetune,
    "1.5b": apollo_1p5b,
    "3b": apollo_3b,
    "7b": apollo_7b,
    "ablation-3b": ablation_3b,
    **{f"schedule-{row}": _schedule_recipe(row) for row in SCHEDULES},
}
"""Name on the command line -> recipe."""
