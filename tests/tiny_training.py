"""A model, batches and a run that are as small as they can be, for the tests of the loop.

Also what processes that the tests start import, so it needs nothing of the data or the recipes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ENCODERS, PAIR, TOKENIZER, TOKENS_PER_CLIP, make_config
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from apollo.model import ApolloForConditionalGeneration
from apollo.train.trainer import LoopSettings, Schedule, run_stage

torch.set_num_threads(1)

VOCABULARY = 40


class TwoPartModel(nn.Module):
    """A language model with an embedding part of its own, to be frozen apart from the rest."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16))
        self.llm = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                attention_dropout=dropout,  # random on purpose: resume must reproduce it
                tie_word_embeddings=True,
            )
        )

    def parts(self) -> dict[str, nn.Module]:
        return {"embedding": self.embedding, "llm": self.llm}

    def forward(self, input_ids, attention_mask, labels, num_items_in_batch):
        return self.llm(
            inputs_embeds=self.embedding(input_ids),
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
        )


def without_dropout() -> TwoPartModel:
    """Dropout depends on the shape of the batch; runs with it differ in nothing but that."""
    return TwoPartModel(dropout=0.0)


def rows(first: int, count: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded to one width, with the first third unsupervised."""
    ids = torch.zeros(count, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row in range(count):
        generator = torch.Generator().manual_seed(first + row)
        length = 6 + (first + row) % 7
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, 2:length] = ids[row, 2:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    run_dir: Path, steps: int = 6, batch: int = 4, resume: bool = False, rates=None, **settings
) -> TwoPartModel:
    model = settings.pop("model", None) or TwoPartModel()
    batch_at = settings.pop("batch_at", lambda i: rows(i * batch, batch))
    on_eval = settings.pop("on_eval", None)
    schedule = Schedule(
        name="tiny",
        steps=steps,
        learning_rates=rates or {"embedding": 1e-2, "llm": 3e-3},
        optimizer=settings.pop("optimizer", "adamw"),
    )
    run_stage(
        model,
        batch_at,
        schedule,
        LoopSettings(**{"log_every": 1, **settings}),
        run_dir,
        resume=resume,
        on_eval=on_eval,
    )
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class StopError(Exception):
    pass


def interrupted(run_dir: Path, at_batch: int, batch: int = 4, **settings) -> None:
    """Train and fail at a batch, as a killed machine would."""

    def batch_at(i: int):
        if i >= at_batch:
            raise StopError
        return rows(i * batch, batch)

    with pytest.raises(StopError):
        train(run_dir, batch_at=batch_at, **settings)


# ---- a whole Apollo, fed text and videos in turn


def tiny_apollo() -> ApolloForConditionalGeneration:
    torch.manual_seed(0)
    model = ApolloForConditionalGeneration(make_config(encode_batch_size=2))
    for parameter in model.parameters():  # random where it would be zeros, such as biases
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.02)
    return model


def text_or_video(number: int) -> dict[str, Any]:
    """Even batches are text alone; odd ones are videos of 1 to 5 clips."""
    generator = torch.Generator().manual_seed(number)
    num_clips = number % 5 + 1 if number % 2 else 0
    ids = torch.randint(0, 200, (2, 12 + num_clips * TOKENS_PER_CLIP), generator=generator)
    placeholder = TOKENIZER.convert_tokens_to_ids("<|video_token|>")
    ids[0, 2 : 2 + num_clips * TOKENS_PER_CLIP] = placeholder
    pixels = [
        torch.rand(num_clips, 4, 3, size, size, generator=generator)
        for size in (ENCODERS[kind].get("image_size", 24) for kind in PAIR)
    ]
    labels = ids.masked_fill(ids == placeholder, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        **({"pixel_values": pixels} if num_clips else {}),
    }


def train_apollo(run_dir: Path, steps: int = 50, **settings: Any) -> ApolloForConditionalGeneration:
    """Train all parts, then all but the encoders, which then run two clips at a time."""
    model = tiny_apollo()
    rates = {"encoders": 1e-4, "connector": 1e-3, "llm": 1e-3}
    for index, frozen in enumerate(({}, {"encoders": 0.0})):
        schedule = Schedule(
            name=f"stage{index}", steps=steps if index == 0 else 5, learning_rates=rates | frozen
        )
        loop = LoopSettings(log_every=1, **settings)
        run_stage(
            model, text_or_video, schedule, loop, run_dir, stage_index=index, resume=index > 0
        )
    return model
