"""Parts, data and a `shrunken` recipe that are as small as they can be, to train any recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from conftest import write_numbered_video
from PIL import Image
from tiny_models import ENCODERS, PAIR, TOKENIZER, make_config, make_llm_config, make_model
from transformers import Qwen2ForCausalLM

from apollo.data.formats import RECORD_TYPES
from apollo.data.mixture import Source
from apollo.model import ApolloProcessor
from apollo.model.configuration import ENCODER_CONFIGS, ConnectorSettings
from apollo.model.encoders import ENCODERS as KINDS
from apollo.train.recipes import TrainConfig

torch.set_num_threads(1)


def make_parts(folder: Path) -> Path:
    """Random encoders and an LLM with its tokenizer, each in its own folder, and a joined model."""
    torch.manual_seed(0)
    for kind in PAIR:
        encoder = KINDS[kind].model_class(ENCODER_CONFIGS[kind](**ENCODERS[kind]))
        encoder.save_pretrained(folder / kind)
    Qwen2ForCausalLM(make_llm_config()).save_pretrained(folder / "llm")
    TOKENIZER.save_pretrained(folder / "llm")
    config = make_config()
    make_model(config).save_pretrained(folder / "model")
    ApolloProcessor.from_config(config, TOKENIZER, 2).save_pretrained(folder / "model")
    return folder


def write_records(folder: Path, media: dict[str, list[tuple[str, str]]], num_records: int) -> None:
    """Write a file of records of each type, all with the type's media."""
    for type_ in RECORD_TYPES:
        lines = []
        for number in range(num_records):
            parts = [{"type": kind, kind: path} for kind, path in media[type_]]
            parts.append({"type": "text", "text": f"Say {number}."})
            turns = [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": f"It is {number}."},
            ]
            lines.append(json.dumps({"id": f"{number}", "type": type_, "messages": turns}))
        (folder / f"{type_}.jsonl").write_text("\n".join(lines) + "\n")


def make_data(folder: Path) -> Path:
    """Two records of each type."""
    write_numbered_video(folder / "0.mp4", range(60))
    Image.new("RGB", (20, 16), (90, 50, 200)).save(folder / "0.png")
    media = {
        "text": [],
        "image": [("image", "0.png")],
        "multi_image": [("image", "0.png"), ("image", "0.png")],
        "video": [("video", "0.mp4")],
    }
    write_records(folder, media, num_records=2)
    return folder


def shrunken(config: TrainConfig, parts: Path, data: Path, out_dir: Path) -> TrainConfig:
    """The same recipe, rates, stages and kinds of parts, but small enough to train in a second."""
    model = replace(config.model, start=str(parts / "model")) if config.model.start else None
    stages = [
        replace(
            stage,
            steps=2,
            batch_size=4,
            max_clips=1,
            learning_rates={part: rate and 1e-3 for part, rate in stage.learning_rates.items()},
            sources=[Source(path=f"{kind}.jsonl") for kind in ("text", "video")],
        )
        for stage in config.stages
    ]
    return replace(
        config,
        model=model
        or replace(
            config.model,
            encoders=[str(parts / kind) for kind in PAIR],
            llm=str(parts / "llm"),
            connector=ConnectorSettings(num_heads=2, num_key_value_heads=1, head_dim=8),
            tokens_per_clip=2,
        ),
        stages=stages,
        data_dir=data,
        out_dir=out_dir,
        loop=replace(config.loop, gradient_accumulation=2, num_workers=0, sharding="no"),
    )
