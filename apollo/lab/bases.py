"""What the studies of a scale have in common: parts, data, stages, and how claims are written.

Here so that `studies.py` holds nothing but what each study varies. Steps, batches and rates of the
micro scale are our own, chosen so that a point takes some five minutes of one core; those of the
paper's scale are the recipe `ablation-3b`. Free of torch. Read next: `studies.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apollo.lab.spec import Claim, Scale, Side, paper_scores
from apollo.train.schedules import Rates

# ---- the micro scale

LAB = "runs/lab"
"""Folder of worlds and features of the micro studies."""
PARTS = "apollo/assets/parts"
"""The shipped micro parts, in a checkout; relative, because it is part of a point's identity."""
BATCH_SIZE, MAX_CLIPS = 16, 24
Steps = tuple[int, int]
STEPS: Steps = (800, 160)
"""Of a training, and of each stage of it in which the LLM is frozen.

A model of 0.3 M then says 49 % of what it is asked; after half of them 43, after 1,200 steps 53.
"""
FEWER_STEPS: Steps = (400, 80)
"""The same for studies of many or slow points: larger LLMs, or encoders that learn."""
SFT_SHARES = {"text": 14.4, "image": 33.0, "multi_image": 16.6, "video": 36.0}
"""Paper, Fig. 7."""
MICRO_RATES = (3e-4, 2e-3, 7e-4)
PAPER_RATES = (5e-6, 1e-4, 3e-5)
"""Best rates of encoders, connector and LLM at each scale (paper, Table 12, row 13)."""
TWO_STAGES: tuple[Rates, ...] = ((0, 1e-4, 0), (0, 1e-4, 3e-5))
"""The schedule of all micro studies that vary something else: row 5 of Table 12."""
LADDER = ("0.3m", "1m", "4m", "9m")

# ---- the paper's scale

SIGLIP = "google/siglip-so400m-patch14-384"
INTERNVIDEO2 = "OpenGVLab/InternVideo2-Stage2_1B-224p-f4"
DINOV2 = "facebook/dinov2-large"
VIDEOMAE = "MCG-NJU/videomae-large"
VJEPA = "facebook/vjepa2-vith-fpc64-256"
LLMS = {
    "0.5B": "Qwen/Qwen2-0.5B-Instruct",
    "1.5B": "Qwen/Qwen2-1.5B-Instruct",
    "4B": "Qwen/Qwen1.5-4B-Chat",
    "7B": "Qwen/Qwen2-7B-Instruct",
}
"""LLMs of the paper's 84 models (Table 14)."""
QUESTIONS = {"micro": f"{LAB}/held_out", "paper": "data/apollobench"}
PAPER_SOURCES = {
    "text": "../data/tulu-3-sft-mixture/data/*.parquet",
    "image": "../data/LLaVA-OneVision-Data/*/*.parquet",
    "multi_image": "../data/M4-Instruct-Data/m4_instruct_annotations.json",
    "video": "../data/LLaVA-Video-178K/*/*_processed.json",
}
"""Open stand-ins for the paper's four types of data (mixtures/sft.yaml), relative to mixtures/."""
PAPER_SHARES = {"align": 198, "vision": 396, "sft": 3200}
"""Samples of the stages in thousands (Table 7): how a study's samples are divided."""
NO_LANGUAGEBIND = "LanguageBind is missing: the model has no such encoder."


CAPTIONS = [{"path": "captions_video.jsonl", "type": "video"}]


def part(name: str) -> str:
    """Where a micro part lies."""
    return f"{PARTS}/{name}"


def micro_sources(shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Files of a made world, mixed by type."""
    return [
        {"path": f"{kind}.jsonl", "type": kind, "weight": share}
        for kind, share in shares.items()
        if share
    ]


def micro_stages(
    schedule: Sequence[Rates] = TWO_STAGES,
    shares: Mapping[str, float] = SFT_SHARES,
    steps: Steps = STEPS,
) -> list[dict[str, Any]]:
    """Stages of a micro training; while the LLM is frozen they see only videos (paper, Sec. 5.1).

    Args:
        schedule: The paper's rates of each stage, which stand for ours in proportion.
        shares: Mixture of the stages that train the LLM.
        steps: See `STEPS`.
    """
    total, early = steps
    stages = []
    for number, rates in enumerate(schedule, start=1):
        encoders, connector, llm = (
            rate / best * ours
            for rate, best, ours in zip(rates, PAPER_RATES, MICRO_RATES, strict=True)
        )
        stages.append(
            {
                "name": f"stage{number}",
                "steps": total - (len(schedule) - 1) * early if llm else early,
                "learning_rates": {"encoders": encoders, "connector": connector, "llm": llm},
                "sources": micro_sources(shares) if llm else CAPTIONS,
                "batch_size": BATCH_SIZE,
                "max_clips": MAX_CLIPS,
                "optimizer": "muon",
                "packing": True,
            }
        )
    return stages


def base(scale: Scale, steps: Steps = STEPS) -> dict[str, Any]:
    """Fields of a `Study` that all studies of a scale share: recipe, settings, questions.

    Args:
        scale: "micro" or "paper".
        steps: Of a micro training; see `STEPS`.
    """
    common = {"scale": scale, "questions": QUESTIONS[scale]}
    if scale == "paper":
        return {**common, "recipe": "ablation-3b"}
    settings = {
        "model.encoders": [part("siglip"), part("internvideo2")],
        "model.llm": part("llm-0.3m"),
        "stages": micro_stages(steps=steps),
        "data_dir": f"{LAB}/world",
        "feature_cache_dir": f"{LAB}/features",
        "loop.gradient_accumulation": 1,
        "loop.num_workers": 0,
    }
    return {**common, "recipe": "micro", "settings": settings}


def printed_scores(table: str, rows: Mapping[str, int]) -> dict[str, dict[tuple[str, ...], float]]:
    """What the paper scored at the levels of a study's one axis, by rows of a table."""
    scores = paper_scores(table)
    return {"video": {(level,): scores[row] for level, row in rows.items()}}


def side(axis: str, levels: str | Sequence[str], metric: str = "") -> Side:
    """One level of an axis or several."""
    return Side(levels={axis: [levels] if isinstance(levels, str) else levels}, metric=metric)


def claims(axis: str, *told: Any) -> list[Claim]:
    """Claims on levels of one axis: finding, words, more, less, and other fields if need be."""
    return [
        Claim(
            finding=finding,
            says=says,
            more=side(axis, more),
            less=side(axis, less),
            **(fields[0] if fields else {}),
        )
        for finding, says, more, less, *fields in told
    ]
