"""The micro language models: their tokenizer, what they read, and a ladder of sizes.

A language model is trained on text alone: it reads transcripts of scenes, one timed line per clip,
and answers the questions that are later asked of the video, so that it can reason before it sees.
How many of them it answers is measured on held-out scenes, family by family: that is the ceiling of
what a video model with it can reach. Read next: `encoder_parts.py`, the other parts; `recipes.py`,
which joins them.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from apollo.messages import Message, question_prompt
from apollo.runtime import read_jsonl
from apollo.train.checkpoint import latest_checkpoint
from apollo.train.growing import deepen, widen
from apollo.train.trainer import LoopSettings, Schedule, run_stage
from apollo.world import corpus, drills, language
from apollo.world.questions import FAMILIES, ask_all
from apollo.world.scene import make_scene

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
"""Rows of the embedding: some 870 pieces, and room for the placeholders that the processor adds."""
ROPE_THETA = 10_000.0
FIRST_OF_LESSON = 10**8
"""Each lesson draws its conversations from here on, times its number."""
ROWS = 16
"""Conversations of a step."""
LENGTH_MULTIPLE = 64
"""Lengths are rounded up to this: a CPU prepares its matrix products anew for each new shape."""
RATE = 9e-3
"""Learning rate times the root of the width. Twice that undoes what the heads start with."""
QUESTIONS_PER_FAMILY = 12
LONGEST_ASKED_S = 24.0
"""Longest held-out scene whose transcript is asked about: 12 clips, each told in full."""
MOST_SCENES = 2500
"""Held-out scenes that are looked through for questions of rare families."""
SPLIT = r"\d\d:\d\d| (?=\d\d:\d\d)| ?\d| ?[A-Za-z]+|\n|[^\sA-Za-z0-9]| "
"""Pieces that may become one token: a time MM:SS, one digit, one word. A small model copies a time
in one step."""

SPACE = "\u0120"
"""How byte-level tokenizers write the space that a token begins with."""


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
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a bare tokenizer of `train_tokenizer` as transformers uses it."""
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
        draw: Gives the conversation of a seed and a number.
    """

    name: str
    share: float
    draw: Callable[[int, int], list[Message]]


def reading(seed: int, index: int, longest_s: float, drilled: float) -> list[Message]:
    """One of `corpus.text_sample`, or of `scene_drill` for a share: what is not used is lost."""
    if index % 100 < 100 * drilled:
        return drills.scene_drill(seed, index)
    return corpus.text_sample(seed, index, longest_s=longest_s)


def practice(seed: int, index: int) -> list[Message]:
    """What is still answered worst, in half of the conversations; the others as before."""
    return (corpus.practice if index % 2 else corpus.text_sample)(seed, index)


LESSONS = (
    Lesson("drills", 0.25, functools.partial(drills.drill, most_items=4)),
    Lesson("long drills", 0.20, functools.partial(drills.drill, most_items=9, num_questions=4)),
    Lesson("scene drills", 0.25, drills.scene_drill),
    Lesson("reading", 0.15, functools.partial(reading, longest_s=20.0, drilled=0.5)),
    Lesson("long reading", 0.15, functools.partial(reading, longest_s=120.0, drilled=0.25)),
)
"""First to look things up, in transcripts so short that there is little to look at; then scenes."""
WIDER_LESSONS = (
    replace(LESSONS[-2], share=0.4),
    replace(LESSONS[-1], share=0.4),
    Lesson("practice", 0.2, practice),
)
"""What a model goes on with that is wider than the one that had all lessons."""
DEEPER_LESSONS = (Lesson("practice", 1.0, practice),)
"""And one that is deeper than one that had these, too."""


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
        lesson: Which texts.
        first: Number of the first conversation.
        group: So many batches are drawn together and sorted by length: little of them is padding.
        max_tokens: Longer conversations are cut to this.
    """

    @functools.lru_cache(maxsize=2)
    def drawn(number: int) -> list[list[tuple[list[int], list[int]]]]:
        numbers = range(first + number * rows * group, first + (number + 1) * rows * group)
        samples = [lesson.draw(seed, i) for i in numbers]
        encoded = sorted(
            (encode_text(tokenizer, s) for s in samples), key=lambda pair: len(pair[0])
        )
        parts = [encoded[i * rows : (i + 1) * rows] for i in range(group)]
        return [parts[i] for i in np.random.default_rng([seed, 12, number]).permutation(group)]

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        part = drawn(i // group)[i % group]
        length = min(_rounded_up(max(len(ids) for ids, _ in part)), max_tokens)
        ids = torch.full((rows, length), tokenizer.pad_token_id)
        labels = torch.full((rows, length), -100)
        for row, (tokens, targets) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens[:length])
            labels[row, : len(targets)] = torch.tensor(targets[:length])
        # Padding is on the right and never supervised: the causal mask alone is exact, and faster.
        return {"input_ids": ids, "labels": labels}

    return batch_at


def _rounded_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


# ---- the model


def language_model(
    tokenizer: PreTrainedTokenizerFast, width: int, layers: int, head_dim: int
) -> Qwen2ForCausalLM:
    """A small Qwen2 with tied embeddings, made ready to learn to copy.

    Args:
        tokenizer: The one that all parts share.
        width: Width of the hidden states, a multiple of `head_dim`.
        layers: Number of layers.
        head_dim: Width of a head. Few heads: attention is what costs on a CPU.
    """
    num_heads = width // head_dim
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
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
    give_neighbour_heads(model, reach=min(2, num_heads - 1))
    give_matching_heads(model)
    make_words_alike(model, tokenizer)
    return model


def give_neighbour_heads(model: Qwen2ForCausalLM, reach: int, strength: float = 6.0) -> None:
    """Start the first heads of the first layer as heads that look 1, 2, ... tokens back.

    A transformer copies from its context once one layer tells each token its predecessor and the
    next one looks for it ("induction heads", arXiv 2209.11895). The first half takes thousands of
    steps to be found by chance; rotary positions and Qwen2's biases can write it down: a query
    bias turned by d positions against the key bias scores highest d tokens back.

    Args:
        model: Changed in place.
        reach: Heads to set, head h looking h + 1 tokens back; at least one should stay free.
        strength: Length of each pair of biases; 6 gives the neighbour some 100 times the next
            one's say.
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


def give_matching_heads(model: Qwen2ForCausalLM, strength: float = 0.15) -> None:
    """Start every second head above the first layer as one that looks for its own token.

    Equal weights for queries and keys make a head attend to what resembles the token that asks: a
    word of the question to the same word of the transcript. In the second layer a head is finished
    into one that copies (see `give_neighbour_heads`): its keys read what the first layer's first
    head tells a token of its predecessor, and its output hands on what it found. All that layers
    add to the residual stream starts small, so that none of this drowns. What it did stands in
    docs/architecture.md.

    Args:
        model: Changed in place.
        strength: Size of what the copying heads write.
    """
    layers: list[Any] = [layer.self_attn for layer in model.model.layers]
    first, second = layers[:2]
    num_heads = model.config.num_attention_heads

    def heads(linear: nn.Linear) -> torch.Tensor:  # (H, D, width) of the weights
        return linear.weight.unflatten(0, (num_heads, -1))

    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.1)
            layer.self_attn.o_proj.weight.mul_(0.1)
        for attention in layers[1:]:
            heads(attention.k_proj)[1::2] = heads(attention.q_proj)[1::2]
        told, found = heads(first.v_proj)[0], heads(second.v_proj)[0]  # (D, width)
        width = len(told)
        nn.init.orthogonal_(told)
        write = nn.init.orthogonal_(torch.empty_like(told))
        first.o_proj.weight[:, :width] = strength * write.T
        heads(second.q_proj)[0] = told
        heads(second.k_proj)[0] = write / strength
        second.o_proj.weight[:, :width] = strength * found.T


def make_words_alike(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start a word with a space before it and the same word without as almost the same vector.

    An answer begins without a space what the transcript tells with one; a model that copies should
    not have to learn for each word that the two are one.
    """
    rows = model.model.embed_tokens.weight.detach()
    difference = torch.randn(rows.shape[1]) * rows.std()
    vocabulary = tokenizer.get_vocab()
    for token, row in vocabulary.items():
        if token.startswith(SPACE) and token[1:] in vocabulary:
            rows[vocabulary[token[1:]]] = rows[row] + difference


# ---- what it can answer from a transcript


@dataclass(frozen=True)
class TranscriptQuestion:
    """A question about a transcript, in tokens.

    Args:
        family: Its family.
        prompt: Transcript, question and options, up to where the answer begins.
        options: The texts that are compared, each with its end of turn.
        answer: Index of the right one.
    """

    family: str
    prompt: list[int]
    options: list[list[int]]
    answer: int


def transcript_questions(
    tokenizer: PreTrainedTokenizerFast, seed: int, per_family: int
) -> list[TranscriptQuestion]:
    """Draw questions that need frames, about transcripts of held-out scenes.

    Args:
        tokenizer: The one that all parts share.
        seed: Seed of the world.
        per_family: Most questions of each family; of rare families there are fewer.
    """
    counts = {name: 0 for name, info in FAMILIES.items() if info.needs == "frames"}
    questions = []
    for index in range(MOST_SCENES):
        if min(counts.values()) >= per_family:
            break
        scene = make_scene(seed, index, "test")
        if scene.duration_s > LONGEST_ASKED_S:
            continue
        rng = np.random.default_rng([seed, 15, index])
        transcript = language.transcript(scene, language.clip_spans(scene.duration_s))
        for question in ask_all(scene, rng):
            if counts.get(question.family, per_family) >= per_family:
                continue
            counts[question.family] += 1
            answer = int(rng.integers(4))
            options = question.options(answer)
            asked = f"{transcript}\n{question_prompt(question.question, options)}"
            prompt, _ = encode_text(tokenizer, [{"role": "user", "content": asked}])
            prompt += tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
            ends = [tokenizer.encode(f"{o}<|im_end|>", add_special_tokens=False) for o in options]
            questions.append(TranscriptQuestion(question.family, prompt, ends, answer))
    return questions


def transcript_accuracy(
    model: Qwen2ForCausalLM, questions: list[TranscriptQuestion]
) -> dict[str, float]:
    """Share of the questions whose right option is the likeliest text.

    Returns:
        "macro", the mean over the families, and "transcript FAMILY" of each.
    """
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for question in questions:
        scores = option_scores(model, question.prompt, question.options)
        right[f"transcript {question.family}"].append(int(scores.argmax()) == question.answer)
    of_family = {name: float(np.mean(each)) for name, each in sorted(right.items())}
    accuracies = {"macro": float(np.mean(list(of_family.values()))), **of_family}
    return {name: round(accuracy, 4) for name, accuracy in accuracies.items()}


@torch.no_grad()
def option_scores(
    model: Qwen2ForCausalLM, prompt: list[int], options: list[list[int]]
) -> torch.Tensor:
    """Log-likelihood (options,) of each option's tokens after the prompt."""
    ends = torch.full((len(options), max(map(len, options))), -1)
    for row, option in enumerate(options):
        ends[row, : len(option)] = torch.tensor(option)
    # The causal mask alone is exact: padding is on the right, and nothing of it is read.
    ids = torch.full((len(options), _rounded_up(len(prompt) + ends.shape[1])), 0)
    ids[:, : len(prompt)] = torch.tensor(prompt)
    ids[:, len(prompt) : len(prompt) + ends.shape[1]] = ends.clamp(min=0)
    ids, ends = ids.to(model.device), ends.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state  # (options, L, D)
        # Position i predicts token i + 1.
        logits = model.lm_head(hidden[:, len(prompt) - 1 :][:, : ends.shape[1]])
    log_shares = logits.float().log_softmax(-1).gather(2, ends.clamp(min=0)[..., None])[..., 0]
    return (log_shares * (ends >= 0)).sum(1)


# ---- its training


@dataclass(frozen=True)
class PartRun:
    """What the training of every part is told, language model or encoder.

    Args:
        tokenizer: The one that all parts share.
        out_dir: Folder of the run; the part ends up in its subfolder `model`.
        steps: Optimiser steps, of all lessons together.
        seed: Seed of the world and of the weights.
        resume: Go on where the run in `out_dir` stopped.
    """

    tokenizer: PreTrainedTokenizerFast
    out_dir: Path
    steps: int
    seed: int
    resume: bool


def train_language_model(run: PartRun, width: int, layers: int, head_dim: int) -> None:
    """Train a language model on the world's text, to read before it sees.

    Its log has the accuracy on transcripts, see `transcript_accuracy`.

    Args:
        run: Its tokenizer goes to out_dir/model, too.
        width: See `language_model`, as for the two that follow.
        layers: Number of layers.
        head_dim: Width of a head.
    """
    torch.manual_seed(run.seed)
    _teach(language_model(run.tokenizer, width, layers, head_dim), run, LESSONS)


def train_wider_model(run: PartRun, small: str, copies: int) -> None:
    """Go on with a trained language model as a wider one, see `growing.widen`.

    Args:
        run: Its tokenizer is that of the small model.
        small: Folder of the small model, which has had `LESSONS`.
        copies: How many times as wide it gets.
    """
    torch.manual_seed(run.seed)
    model = widen(Qwen2ForCausalLM.from_pretrained(small), copies)
    _teach(model, run, WIDER_LESSONS, first=len(LESSONS))


def train_deeper_model(run: PartRun, small: str, layers: int) -> None:
    """Go on with a trained language model as a deeper one, see `growing.deepen`.

    Args:
        run: Its tokenizer is that of the small model.
        small: Folder of the small model, which has had `LESSONS` and `WIDER_LESSONS`.
        layers: How many layers it gets.
    """
    model = deepen(Qwen2ForCausalLM.from_pretrained(small), layers)
    _teach(model, run, DEEPER_LESSONS, first=len(LESSONS) + len(WIDER_LESSONS))


def _teach(
    model: Qwen2ForCausalLM, run: PartRun, lessons: tuple[Lesson, ...], first: int = 0
) -> None:
    """Take all lessons; `first` numbers them on, so that no text is seen twice."""
    tokenizer, out_dir, seed = run.tokenizer, run.out_dir, run.seed
    asked = functools.cache(lambda: transcript_questions(tokenizer, seed, QUESTIONS_PER_FAMILY))

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, Qwen2ForCausalLM)
        return transcript_accuracy(model, asked())

    newest = latest_checkpoint(out_dir) if run.resume else None
    for index, lesson in enumerate(lessons):
        if newest and newest.state.stage_index > index:
            continue
        run_stage(
            model,
            text_batches(tokenizer, seed, ROWS, lesson, first=(first + index) * FIRST_OF_LESSON),
            Schedule(
                name=lesson.name,
                steps=max(1, int(run.steps * lesson.share)),
                learning_rates={"model": RATE * model.config.hidden_size**-0.5},
                weight_decay=0.05,
                optimizer="muon",
            ),
            LoopSettings(
                seed=seed,
                mixed_precision="bf16",
                num_workers=1,
                log_every=20,
                save_every=200,
                eval_every=300,
            ),
            out_dir,
            stage_index=index,
            resume=run.resume or index > 0,
            on_eval=evaluate,
        )
    model.save_pretrained(out_dir / "model")
    tokenizer.save_pretrained(out_dir / "model")
    *_, last = read_jsonl(out_dir / "log.jsonl")
    print(f"questions about held-out transcripts, mean over the families: {last['macro']:.1%}")
