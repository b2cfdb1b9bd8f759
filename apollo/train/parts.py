"""The micro parts that Apollo is joined from: tokenizer, language model, image and video encoder.

The paper joins *pre-trained* parts. At the micro scale they are trained here, on the micro world,
through the same loop as everything else (`trainer.run_stage`): the language model on text alone (it
reads transcripts and answers questions about them before it sees), the encoders by a sigmoid
contrastive loss (SigLIP, arXiv 2303.15343) against short phrases that name one fact each.
Read next: `recipes.py`, which joins them.
"""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import ModelOutput

from apollo.messages import Message
from apollo.model.configuration import InternVideo2Config
from apollo.model.encoders import preprocessing
from apollo.model.image_processing import Preprocessing
from apollo.model.internvideo2 import InternVideo2Model
from apollo.runtime import keep_freed_memory, make_run_dir, set_threads
from apollo.train.checkpoint import latest_checkpoint
from apollo.train.trainer import LoopSettings, Schedule, run_stage
from apollo.world import corpus, language
from apollo.world.render import frame
from apollo.world.scene import make_scene

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
"""Rows of the embedding: some 870 pieces, and room for the placeholders that the processor adds."""
ROPE_THETA = 10_000.0
FIRST_OF_LESSON = 10**8
"""Each lesson draws its conversations from here on, times its number."""
WIDTH = 128
"""Width of both encoders."""
PHRASE_TOKENS = 6
"""Longest phrase that names a fact, in tokens."""
POOL = {"frame": 36_000, "clip": 30_000}
"""Frames or clips that an encoder is trained on; drawn once, kept in memory (0.9 and 2.9 GB), seen
several times. With 12,000 clips it learnt them by heart."""
EVENTS = tuple(
    "camera pass sign moves turns hits blinks grows shrinks spins splits appears leaves".split()
)
"""What may happen in a clip."""
SPLIT = r"\d\d:\d\d| (?=\d\d:\d\d)| ?\d| ?[A-Za-z]+|\n|[^\sA-Za-z0-9]| "
"""Pieces that may become one token: a time MM:SS, one digit, one word. A small model copies a time
in one step."""


# ---- text


def train_tokenizer(seed: int, num_texts: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the world's text, with Qwen2.5's control tokens and ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 64,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    times = [language.clock(s) for s in range(0, 122)] * 5
    texts = (m["content"] for i in range(num_texts) for m in corpus.text_sample(seed, i))
    tokenizer.train_from_iterator([*texts, " ".join(times)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def encode_text(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """ChatML ids and labels; only what the assistant says, and its end of turn, is supervised."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(f"{message['content']}<|im_end|>", add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        ids += head + body + tail
        labels += [-100] * len(head)
        labels += body if message["role"] == "assistant" else [-100] * len(body)
        labels += [-100] * len(tail)
    return ids, labels


@dataclass(frozen=True)
class Lesson:
    """A stage of the language model's training.

    Args:
        name: Its name in the log.
        share: Its share of all steps.
        longest_s: Longest scene that is told, in seconds.
        everything: Predict every token, or only what the assistant says.
    """

    name: str
    share: float
    longest_s: float
    everything: bool


LESSONS = (
    Lesson("language", 0.10, 8.0, everything=True),
    Lesson("reading", 0.55, 12.0, everything=False),
    Lesson("long reading", 0.35, 120.0, everything=False),
)
"""First every token of short transcripts, which are full of repetition: the language, and to copy
from the context. Then only the answers, where what is to be learnt is a few tokens in a hundred."""


def text_batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    rows: int,
    lesson: Lesson,
    first: int = 0,
    group: int = 8,
    max_tokens: int = 1024,
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Batches of text by number: `input_ids` and `labels`, each (rows, L).

    Args:
        tokenizer: The one that all parts share.
        seed: Seed of the world.
        rows: Conversations of a batch.
        lesson: Which texts, and what of them is supervised.
        first: Number of the first conversation.
        group: So many batches are drawn together and sorted by length: little of them is padding.
        max_tokens: Longer conversations are cut to this.
    """

    @functools.lru_cache(maxsize=2)
    def drawn(number: int) -> list[list[tuple[list[int], list[int]]]]:
        numbers = range(first + number * rows * group, first + (number + 1) * rows * group)
        samples = [corpus.text_sample(seed, i, longest_s=lesson.longest_s) for i in numbers]
        encoded = sorted(
            (encode_text(tokenizer, s) for s in samples), key=lambda pair: len(pair[0])
        )
        parts = [encoded[i * rows : (i + 1) * rows] for i in range(group)]
        return [parts[i] for i in np.random.default_rng([seed, 12, number]).permutation(group)]

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        part = drawn(i // group)[i % group]
        # Lengths are rounded up: a CPU prepares its matrix products anew for each new shape.
        length = min(-(-max(len(ids) for ids, _ in part) // 64) * 64, max_tokens)
        ids = torch.full((rows, length), tokenizer.pad_token_id)
        labels = torch.full((rows, length), -100)
        for row, (tokens, targets) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens[:length])
            targets = tokens if lesson.everything else targets
            labels[row, : len(targets)] = torch.tensor(targets[:length])
        # Padding is on the right and never supervised: the causal mask alone is exact, and faster.
        return {"input_ids": ids, "labels": labels}

    return batch_at


def language_model(
    tokenizer: PreTrainedTokenizerFast, width: int = 192, layers: int = 4
) -> Qwen2ForCausalLM:
    """A small Qwen2 with heads of 64 and tied embeddings, made ready to learn to copy."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,  # few heads: attention is what costs on a CPU
            num_key_value_heads=width // 64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            # About 1 / sqrt(width): at the usual 0.02 so narrow a model hands on next to nothing.
            initializer_range=width**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    give_neighbour_heads(model)
    return model


def give_neighbour_heads(model: Qwen2ForCausalLM, reach: int = 2, strength: float = 6.0) -> None:
    """Start all but one head of the first layer as heads that look 1, 2, ... tokens back.

    A transformer copies from its context once one layer tells each token its predecessor and the
    next one looks for it ("induction heads", arXiv 2209.11895). The first half takes thousands of
    steps to be found by chance; rotary positions and Qwen2's biases can write it down: a query
    bias turned by d positions against the key bias scores highest d tokens back.

    Args:
        model: Changed in place.
        reach: Heads to set, head h looking h + 1 tokens back.
        strength: Length of each pair of biases; 6 gives the neighbour 100 times the next one's say.
    """
    attention = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    frequencies = ROPE_THETA ** (-torch.arange(half) / half)
    used = (frequencies > 0.05).float() * strength  # slower ones cannot tell neighbours apart
    with torch.no_grad():
        queries = attention.q_proj.bias.view(-1, 2 * half)
        keys = attention.k_proj.bias.view(-1, 2 * half)
        for head in range(reach):
            turn = (head + 1) * frequencies
            keys[head] = torch.cat([used, torch.zeros(half)])
            queries[head] = torch.cat([used * turn.cos(), -used * turn.sin()])


def train_language_model(
    tokenizer: PreTrainedTokenizerFast, out_dir: Path, steps: int, seed: int, resume: bool
) -> None:
    """Train the language model on the world's text; it and the tokenizer go to out_dir/model."""
    torch.manual_seed(seed)
    model = language_model(tokenizer)
    newest = latest_checkpoint(out_dir) if resume else None
    for index, lesson in enumerate(LESSONS):
        if newest and newest.state.stage_index > index:
            continue
        run_stage(
            model,
            text_batches(tokenizer, seed, 16, lesson, first=index * FIRST_OF_LESSON),
            Schedule(
                name=lesson.name,
                steps=max(1, int(steps * lesson.share)),
                learning_rates={"model": 2e-3 if index == 0 else 1.5e-3},
                weight_decay=0.05,
                optimizer="muon",
            ),
            LoopSettings(
                seed=seed, mixed_precision="bf16", num_workers=1, log_every=20, save_every=200
            ),
            out_dir,
            stage_index=index,
            resume=resume or index > 0,
        )
    model.save_pretrained(out_dir / "model")
    tokenizer.save_pretrained(out_dir / "model")


# ---- encoders


class FactNaming(nn.Module):
    """An encoder that learns to name facts by a sigmoid contrastive loss against short phrases.

    As in SigLIP (arXiv 2303.15343) every pair of picture and phrase is its own yes-or-no question.
    Two differences, both because the micro world knows its truth: a phrase is compared with the
    best fitting of the encoder's tokens, as in FILIP (arXiv 2111.07783), and a phrase of another
    row that happens to be true here counts as true.

    Args:
        encoder: Gives `last_hidden_state` (B, P, D) for `pixel_values`.
        width: D.
        vocabulary: Size of the tokenizer.
        num_extra_tokens: Leading tokens that are no patches.
    """

    def __init__(
        self, encoder: nn.Module, width: int, vocabulary: int, num_extra_tokens: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.num_extra_tokens = encoder, num_extra_tokens
        self.words = nn.Embedding(vocabulary, width)
        self.order = nn.Parameter(torch.randn(PHRASE_TOKENS, width))
        self.phrase = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        # SigLIP's start: scale 10 and a bias that answers "no" to almost every pair.
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def scores(self, pixel_values: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """How well each phrase fits each input.

        Args:
            pixel_values: B inputs of the encoder.
            phrases: (K, PHRASE_TOKENS) ids, padded with -1.

        Returns:
            (B, K) logits.
        """
        hidden = self.encoder(pixel_values=pixel_values).last_hidden_state
        tokens = F.normalize(self.project(hidden[:, self.num_extra_tokens :]), dim=-1)
        words = self.words(phrases.clamp(min=0)) * self.order * (phrases >= 0)[..., None]
        meaning = F.normalize(self.phrase(words.sum(1)), dim=-1)
        similarity = torch.einsum("bpd,kd->bkp", tokens, meaning) * self.log_scale.exp()
        return similarity.float().logsumexp(-1) + self.bias

    def forward(
        self,
        pixel_values: torch.Tensor,
        phrases: torch.Tensor,
        truth: torch.Tensor,
        num_items_in_batch: int | None = None,
    ) -> ModelOutput:
        """Loss of the pairs, averaged over the inputs of the global step.

        Args:
            pixel_values: B inputs of the encoder.
            phrases: (K, PHRASE_TOKENS) ids, padded with -1.
            truth: (B, K), 1 where the phrase holds of the input, else 0.
            num_items_in_batch: Inputs of the global step; B by default.
        """
        logits = self.scores(pixel_values, phrases)
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        # Few of the pairs are true; each answer is averaged on its own, so that "no" to everything
        # is no way out.
        positive, negative = truth.sum().clamp(min=1), (1 - truth).sum().clamp(min=1)
        rows = num_items_in_batch or len(truth)
        loss = (loss * truth).sum() / positive + (loss * (1 - truth)).sum() / negative * 4
        return ModelOutput(loss=loss * len(truth) / rows, logits=logits)


def fact_batches(
    kind: str, tokenizer: PreTrainedTokenizerFast, prepare: Preprocessing, seed: int, rows: int
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Batches by number of frames or clips of scenes, with the phrases that are true of any row.

    Batches of number 0 and more are drawn from a `POOL`, those below 0 are held out. Each has
    `pixel_values` (rows, [T,] 3, H, W), `phrases` (K, PHRASE_TOKENS) and `truth` (rows, K), as
    `FactNaming` takes them.

    Args:
        kind: "frame" or "clip".
        tokenizer: The one that all parts share.
        prepare: The encoder's preprocessing.
        seed: Seed of the world.
        rows: Frames or clips of a batch.
    """

    @functools.cache
    def encode(phrase: str) -> tuple[int, ...]:
        ids = tokenizer.encode(" " + phrase, add_special_tokens=False)[:PHRASE_TOKENS]
        return tuple(ids + [-1] * (PHRASE_TOKENS - len(ids)))

    @functools.cache
    def drawn(number: int) -> tuple[torch.Tensor, list[str]]:
        rng = np.random.default_rng([seed, 13, number])
        frames, facts = draw_facts(kind, seed, rng)
        return prepare(frames).half(), facts

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        numbers = np.random.default_rng([seed, 14, max(i, 0)]).integers(POOL[kind], size=rows)
        if i < 0:  # held out
            numbers = POOL[kind] + np.arange(rows) - i * rows
        samples = [drawn(int(number)) for number in numbers]
        phrases = sorted({fact for _, facts in samples for fact in facts})
        column = {phrase: k for k, phrase in enumerate(phrases)}
        truth = torch.zeros(rows, len(phrases))
        for row, (_, facts) in enumerate(samples):
            truth[row, [column[fact] for fact in facts]] = 1
        pixels = torch.stack([frames for frames, _ in samples]).float()
        return {
            "pixel_values": pixels[:, 0] if kind == "frame" else pixels,
            "phrases": torch.tensor([encode(phrase) for phrase in phrases]),
            "truth": truth,
        }

    return batch_at


def draw_facts(kind: str, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """One frame or one clip of a random scene, uint8 (T, H, W, 3), and its facts.

    What is seldom seen is drawn more often: half of the frames show one of the forty signs, and
    most clips an event whose kind is drawn first.
    """
    if kind == "frame":
        scene = make_scene(seed, int(rng.integers(2**40)))
        t = float(rng.uniform(0, scene.duration_s))
        if rng.random() < 0.5:
            while not scene.of_kind("sign"):
                scene = make_scene(seed, int(rng.integers(2**40)))
            signs = scene.of_kind("sign")
            t = signs[int(rng.integers(len(signs)))].middle_s
        return frame(scene, t)[None], language.frame_facts(scene, t)
    wanted = EVENTS[int(rng.integers(len(EVENTS)))] if rng.random() < 0.8 else None
    while True:
        scene = make_scene(seed, int(rng.integers(2**40)))
        spans = language.clip_spans(scene.duration_s)
        if spans[-1][1] - spans[-1][0] < 1.6:
            spans = spans[:-1]
        told = language.assign(scene, spans)
        clips = [
            i
            for i, events in enumerate(told)
            if wanted is None or wanted in {event.kind for event in events}
        ]
        if clips:
            clip = clips[int(rng.integers(len(clips)))]
            frames = np.stack([frame(scene, float(spans[clip][0] + 0.5 * k)) for k in range(4)])
            return frames, language.clip_facts(scene, spans, clip)


def naming_accuracy(
    model: FactNaming,
    batches: Callable[[int], dict[str, torch.Tensor]],
    num_batches: int,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, float]:
    """Share of true pairs that score above 0, less that of false ones: 1 is perfect, 0 blind.

    Returns:
        "naming", of all pairs, and "naming KIND" of each kind of fact.
    """
    # Of each kind: true pairs, those of them said, false pairs, those of them said.
    counts: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    for i in range(num_batches):
        batch = batches(-1 - i)
        said = model.scores(batch["pixel_values"], batch["phrases"]) > 0
        truth = batch["truth"].bool()
        for phrase, t, s in zip(batch["phrases"], truth.T, said.T, strict=True):
            kind = language.kind_of_fact(str(tokenizer.decode(phrase[phrase >= 0])))
            counts[f"naming {kind}"] += [float(x.sum()) for x in (t, t & s, ~t, s & ~t)]
    counts["naming"] = sum(counts.values(), np.zeros(4))
    return {
        kind: round(hits / true - false_hits / false, 4)
        for kind, (true, hits, false, false_hits) in sorted(counts.items())
    }


def image_encoder() -> SiglipVisionModel:
    """SigLIP's vision model for 64 pixels: 8 x 8 patches, 128 wide, 4 layers."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            vision_use_head=False,
        )
    )


def video_encoder() -> InternVideo2Model:
    """InternVideo2 for clips of 4 frames of 64 pixels: 4 x 4 x 4 patches, 128 wide, 4 layers."""
    return InternVideo2Model(
        InternVideo2Config(
            d_model=WIDTH,
            num_heads=2,
            depth=4,
            img_size=64,
            patch_size=16,
            num_frames=4,
            mlp_ratio=3,
            init_values=0.1,
        )
    )


def train_encoder(
    kind: str,
    encoder: PreTrainedModel,
    num_extra_tokens: int,
    tokenizer: PreTrainedTokenizerFast,
    out_dir: Path,
    steps: int,
    seed: int,
    resume: bool,
) -> None:
    """Train an encoder to name facts of frames or clips; it alone ends up in `out_dir/model`."""
    model = FactNaming(encoder, WIDTH, VOCABULARY, num_extra_tokens)
    batches = fact_batches(kind, tokenizer, preprocessing(encoder.config), seed, rows=64)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, FactNaming)
        return naming_accuracy(model, batches, 8, tokenizer)

    run_stage(
        model,
        batches,
        Schedule(
            name=encoder.config.model_type,
            steps=steps,
            learning_rates={"model": 1e-3},
            weight_decay=0.02,
            optimizer="muon",
        ),
        LoopSettings(
            seed=seed,
            mixed_precision="bf16",
            num_workers=1,
            log_every=20,
            save_every=500,
            eval_every=200,
        ),
        out_dir,
        resume=resume,
        on_eval=evaluate,
    )
    encoder.save_pretrained(out_dir / "model")


def train_image_encoder(
    tokenizer: PreTrainedTokenizerFast, out_dir: Path, steps: int, seed: int, resume: bool
) -> None:
    """Train the SigLIP-style image encoder on single frames."""
    torch.manual_seed(seed)
    train_encoder("frame", image_encoder(), 0, tokenizer, out_dir, steps, seed, resume)


def train_video_encoder(
    tokenizer: PreTrainedTokenizerFast, out_dir: Path, steps: int, seed: int, resume: bool
) -> None:
    """Train the video encoder of InternVideo2's architecture on clips of four frames."""
    torch.manual_seed(seed)
    train_encoder("clip", video_encoder(), 1, tokenizer, out_dir, steps, seed, resume)


@dataclass(frozen=True)
class Part:
    """How a part is trained (tokenizer, out_dir, steps, seed, resume), and its default of steps."""

    train: Callable[[PreTrainedTokenizerFast, Path, int, int, bool], None]
    steps: int


PARTS: dict[str, Part] = {
    "llm": Part(train_language_model, 6400),
    "siglip": Part(train_image_encoder, 1800),
    "internvideo2": Part(train_video_encoder, 3200),
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
    set_threads()
    keep_freed_memory()
    part.train(
        train_tokenizer(args.seed), out_dir, args.steps or part.steps, args.seed, args.resume
    )
    print(f"trained part: {out_dir / 'model'}")
    return 0
