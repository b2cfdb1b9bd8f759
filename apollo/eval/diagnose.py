"""`apollo diagnose MODEL`: at which link of encoders, connector and LLM is information lost?

Here because "56 % right" does not say what to repair. Two chains of numbers are compared. Facts of
each kind: can a probe read them off the encoders' features, off the connector's tokens, and does
the LLM, asked to describe the clip, hold the true sentence likelier on this clip than on a rival
(`probes.py` says what a rival is)? Questions of each family: does the LLM answer them from the
scene's transcript in words, and from the video? The first link that lets too little through is
named (`verdict.py` has the rules). The model must have been taught the micro world's words; of a
bare encoder only the first number is taken. docs/diagnose.md explains the table. Read next:
`probes.py`, `verdict.py`.

Shapes: C clips, N tokens of a clip, B rows, L tokens of a row, D width of the LLM.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from apollo.chat import find_model, load_model
from apollo.eval.answerers import choose
from apollo.eval.local import num_shared
from apollo.eval.probes import (
    Eyes,
    Facts,
    fight,
    fold,
    fresh_clips,
    meets_own_video,
    places,
    probe_scores,
    read_scenes,
    train_probe,
)
from apollo.eval.questions import Question, read_questions
from apollo.eval.verdict import Answered, Diagnosis, Duels, judge, page_of, print_diagnosis
from apollo.media import sampling_of
from apollo.messages import Message, Part, question_prompt
from apollo.model import encoders
from apollo.model.likelihood import Row as Options
from apollo.model.likelihood import log_probabilities, read_prefix
from apollo.model.processing import END_OF_TURN
from apollo.runtime import environment, pick_device, progress
from apollo.video import VideoClips, load_clips
from apollo.world import corpus, language
from apollo.world.scene import Scene

if TYPE_CHECKING:
    from apollo.model import ApolloForConditionalGeneration, ApolloProcessor

NUM_VIDEOS, NUM_SCENES, NUM_STEPS = 150, 900, 400
"""Videos measured; scenes and steps that train a probe. More of either moves the micro model's
numbers by less than their intervals."""
SAID_CLIPS = 400
"""Most clips that the LLM is asked to describe; those in which something happens."""
RIVALS = 3
"""Rivals that a sentence of what happens meets; one of looks, and there are many, meets one."""
ROWS = 16
"""Rows that the LLM reads at once."""
SELECTED_LAYER = -2
"""The hidden state of a bare encoder that is probed: the one that Apollo models use."""

# ---- what is shown


@dataclass(frozen=True)
class Clip:
    """A clip of the measured videos.

    Attributes:
        video: Number of its video.
        span_s: Start and end in seconds.
        facts: Phrases true of it.
        line: The sentences that describe it.
    """

    video: int
    span_s: np.ndarray
    facts: set[str]
    line: list[str]


@dataclass
class Gathered:
    """Clips and what each link makes of them: name of the link -> tokens (C, M, D)."""

    facts: list[set[str]] = field(default_factory=list)
    videos: list[int] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, video: int, facts: Sequence[set[str]], tokens: Mapping[str, Tensor]) -> None:
        """Add clips of a video."""
        self.facts += facts
        self.videos += [video] * len(facts)
        for name, values in tokens.items():
            self.parts.setdefault(name, []).append(values)

    def tokens(self, name: str) -> Tensor:
        """All tokens of a link."""
        return torch.cat(self.parts[name])


def eyes_of(model: ApolloForConditionalGeneration, processor: ApolloProcessor) -> Eyes:
    """The encoders of a model, together."""
    return Eyes(
        processor.squares,
        sampling_of(processor),
        lambda pixels: model.encode([part.to(model.device) for part in pixels]),
    )


def eyes_of_encoder(name: str) -> Eyes | None:
    """An encoder by itself, at the hidden state that Apollo uses; None if it is none.

    Args:
        name: Folder or hub id of a model.

    Raises:
        ValueError: There is no such model.
    """
    from transformers import AutoConfig

    from apollo.model import register

    register()
    path = find_model(name)
    try:
        config = AutoConfig.from_pretrained(path)
        config = getattr(config, "vision_config", config)
        if config.model_type not in encoders.ENCODERS:
            return None
        kind = encoders.ENCODERS[config.model_type]
        loaded = kind.model_class.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"cannot load {name}: {' '.join(str(error).split())}") from error
    sampling = language.SAMPLING
    num_frames = 1 if kind.per_frame else sampling.frames_per_clip
    model: Any = encoders.cut(loaded, SELECTED_LAYER, num_frames).eval()
    model.to(pick_device())
    return Eyes(
        [encoders.preprocessing(config)],
        sampling,
        lambda pixels: encoders.encode(model, pixels[0].to(model.device)),
        kind.per_frame,
    )


def connect(model: ApolloForConditionalGeneration | None, features: Tensor) -> Tensor | None:
    """What the connector makes of features (C, T, H, W, D): (C, N, D_llm); None without a model."""
    if model is None:
        return None
    with torch.inference_mode():
        return model.connect(features)


def probed(features: Tensor, pixels: Tensor, connected: Tensor | None) -> dict[str, Tensor]:
    """What a probe is shown of each link, and of the pixels before them."""
    found = {"pixels": places(pixels), "encoders": places(features)}
    return found if connected is None else found | {"connector": fold(connected)}


# ---- the LLM


def answers(
    model: ApolloForConditionalGeneration,
    processor: ApolloProcessor,
    header: Sequence[Part],
    questions: Sequence[Question],
    clip_features: Tensor | None = None,
) -> list[bool]:
    """Whether the likeliest option, by its text, is right; what is shown is read once.

    Args:
        model: Who answers.
        processor: Its processor.
        header: What stands before the question: the video, or a text.
        questions: Asked one by one.
        clip_features: Features of the header's clips (C, T, H, W, V).

    Raises:
        ValueError: A prompt is longer than the LLM's context.
    """
    if not questions:
        return []
    prompts = _prompts(
        processor,
        [
            [*header, {"type": "text", "text": question_prompt(q.question, q.options)}]
            for q in questions
        ],
    )
    longest, most = max(map(len, prompts)), model.config.text_config.max_position_embeddings
    if longest > most:
        raise ValueError(
            f"{questions[0].video_id}: a prompt has {longest} tokens, and the LLM's context {most};"
            " use a world of shorter videos, or a processor with fewer max_clips"
        )
    shared = min(min(map(len, prompts)) - 1, *(num_shared(prompts[0], p) for p in prompts))
    prefix = read_prefix(model, prompts[0][:shared], clip_features)
    rows = []
    for question, prompt in zip(questions, prompts, strict=True):
        texts = [option + END_OF_TURN for option in question.options]
        ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows.append(Options(prompt[shared:], ids))
    scores = log_probabilities(model, prefix, rows, ROWS)
    return [choose(of) == q.answer for of, q in zip(scores, questions, strict=True)]


def _prompts(processor: ApolloProcessor, contents: Sequence[list[Part]]) -> list[list[int]]:
    """Tokens of users' turns up to where the assistant's begins, with placeholders of clips."""
    conversations: list[list[Message]] = [[{"role": "user", "content": c}] for c in contents]
    batch = processor(
        conversations, add_generation_prompt=True, with_pixels=False, padding_side="right"
    )
    lengths = batch["attention_mask"].sum(1).tolist()
    return [ids[:n] for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]


def said(
    model: ApolloForConditionalGeneration,
    processor: ApolloProcessor,
    clips: Sequence[Clip],
    tokens: Tensor,
    seed: int = 0,
) -> dict[str, Duels]:
    """Let the sentences that describe a clip meet rivals, by the LLM's likelihood.

    The LLM is asked to describe a video of this one clip, and each true sentence is scored after
    those before it; then the same words are scored with a rival's tokens in the clip's place. What
    the words alone give away is the same on both sides, and an LLM that does not look draws.

    Args:
        model: Whose LLM reads.
        processor: Its processor.
        clips: All clips measured.
        tokens: (C, N, D), what the connector makes of them.
        seed: Of the choice of clips and rivals.
    """
    rng = np.random.default_rng([seed, 33])
    facts = Facts.of([clip.line for clip in clips], [clip.video for clip in clips])
    column = {phrase: i for i, phrase in enumerate(facts.phrases)}
    rivals = facts.rivals()
    happens = [i for i, clip in enumerate(clips) if any(map(_happens, clip.line))]
    duels: list[tuple[int, int, int]] = []  # clip, its sentence, the rival
    for clip in sorted(rng.permutation(happens)[:SAID_CLIPS].tolist()):
        for number, sentence in enumerate(clips[clip].line):
            against = rivals[:, column[sentence]]
            own = meets_own_video(language.kind_of_fact(sentence))
            if own:
                against = against & (facts.videos == facts.videos[clip])
            some = rng.permutation(np.flatnonzero(against))[: RIVALS if own else 1]
            duels += [(clip, number, int(rival)) for rival in some]
    pairs = sorted({(clip, seen) for clip, _, rival in duels for seen in (clip, rival)})
    scores = dict(zip(pairs, _sentence_scores(model, processor, clips, tokens, pairs), strict=True))
    found: dict[str, tuple[list[int], list[float]]] = {}
    for clip, number, rival in duels:
        kind = language.kind_of_fact(clips[clip].line[number])
        ahead = scores[clip, clip][number] - scores[clip, rival][number]
        videos, values = found.setdefault(kind, ([], []))
        videos.append(clips[clip].video)
        values.append(float(np.sign(ahead)) if abs(ahead) > 1e-4 else 0.0)  # rounding is no win
    return {kind: Duels(np.array(v), np.array(x)) for kind, (v, x) in found.items()}


def _happens(sentence: str) -> bool:
    return language.kind_of_fact(sentence) not in ("looks", "ground")


@torch.inference_mode()
def _sentence_scores(
    model: ApolloForConditionalGeneration,
    processor: ApolloProcessor,
    clips: Sequence[Clip],
    tokens: Tensor,
    pairs: Sequence[tuple[int, int]],
) -> Iterator[list[float]]:
    """Log-likelihood of each sentence of a clip's line, the tokens being those of another clip.

    Args:
        model: Whose LLM reads.
        processor: Its processor.
        clips: All clips.
        tokens: (C, N, D).
        pairs: The clip whose line it is, the clip that is shown.
    """
    described = sorted({clip for clip, _ in pairs})
    prompts = _prompts(
        processor, [_describe(clips[clip], model.config.frames_per_clip) for clip in described]
    )
    prompt_of = dict(zip(described, prompts, strict=True))
    lines = {clip: _line_ids(processor, clips[clip].line) for clip in described}
    for start in range(0, len(pairs), ROWS):
        batch = pairs[start : start + ROWS]
        rows = [prompt_of[clip] + sum(lines[clip], []) for clip, _ in batch]
        # Padding comes last and attention looks back only: no mask is needed.
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
        shown = tokens[[seen for _, seen in batch]].flatten(0, 1).to(model.device)
        is_placeholder = model.model.placeholders(ids)
        embeds = model.get_input_embeddings()(ids.masked_fill(is_placeholder, 0))
        embeds = embeds.masked_scatter(is_placeholder[..., None], shown.to(embeds))
        hidden = model.model(inputs_embeds=embeds).last_hidden_state  # (B, L, D)
        for (clip, _), row, states in zip(batch, rows, hidden, strict=True):
            begin = len(prompt_of[clip])
            logits = model.lm_head(states[begin - 1 : len(row) - 1]).float()
            each = logits.log_softmax(-1).gather(1, ids.new_tensor(row[begin:])[:, None])[:, 0]
            sizes = [len(sentence) for sentence in lines[clip]]
            yield [float(part.sum()) for part in each.split(sizes)]


def _describe(clip: Clip, num_frames: int) -> list[Part]:
    """Ask to describe a video of this one clip; it has no pixels, its tokens are put in later."""
    start_s, end_s = clip.span_s
    video = VideoClips(
        frames=np.zeros((1, num_frames, 1, 1, 3), dtype=np.uint8),
        times_s=np.linspace(start_s, end_s, num_frames)[None],
        spans_s=clip.span_s[None],
        duration_s=float(end_s),
        source_fps=0.0,
        sampled_fps=0.0,
    )
    asked = corpus.DESCRIBE.format(f"{language.clock(start_s)}-{language.clock(end_s)}")
    return [{"type": "video", "video": video}, {"type": "text", "text": asked}]


def _line_ids(processor: ApolloProcessor, line: Sequence[str]) -> list[list[int]]:
    """Tokens of each sentence of a line, as they stand in it."""
    texts = [f"{' ' * (i > 0)}{sentence}." for i, sentence in enumerate(line)]
    return processor.tokenizer(texts, add_special_tokens=False)["input_ids"]


# ---- the whole


def diagnose(
    eyes: Eyes,
    world_dir: str | Path,
    model: ApolloForConditionalGeneration | None = None,
    processor: ApolloProcessor | None = None,
    num_videos: int = NUM_VIDEOS,
    num_scenes: int = NUM_SCENES,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
) -> Diagnosis:
    """Measure every link.

    Args:
        eyes: The encoders, see `eyes_of` and `eyes_of_encoder`.
        world_dir: A made world, best of the split "test".
        model: The model they belong to; without it only the encoders are measured.
        processor: The model's processor.
        num_videos: How many of the world's videos are measured.
        num_scenes: Fresh scenes whose clips train the probes.
        num_steps: Steps of that training.
        seed: Of scenes, probes and choices.

    Raises:
        ValueError: `world_dir` is no world.
        VideoError: A video cannot be read.
    """
    scenes = read_scenes(world_dir, num_videos)
    learnt = Gathered()
    drawn = fresh_clips(eyes, num_scenes, seed)
    for number, facts, features, pixels in progress(drawn, "clips for the probes", num_scenes):
        learnt.add(number, facts, probed(features, pixels, connect(model, features)))
    seen, clips, tokens, answered = _watch(eyes, world_dir, scenes, model, processor)
    known = Facts.of(learnt.facts, learnt.videos)
    truth = Facts.of(seen.facts, seen.videos)
    duels: dict[str, dict[str, Duels]] = {}
    for link in progress(list(seen.parts), "probes"):
        probe = train_probe(learnt.tokens(link), known, num_steps, seed)
        scores = probe_scores(probe, seen.tokens(link), truth.phrases)
        duels[link] = fight(scores, truth)
    if model is not None and processor is not None:
        duels["reading"] = said(model, processor, clips, tokens, seed)
    return judge(duels, answered, len(scenes))


def _watch(
    eyes: Eyes,
    world_dir: str | Path,
    scenes: Sequence[tuple[Path, Scene]],
    model: ApolloForConditionalGeneration | None,
    processor: ApolloProcessor | None,
) -> tuple[Gathered, list[Clip], Tensor, list[Answered]]:
    """Go through the videos once: their clips at each link, and the answers to their questions."""
    asked: dict[Path, list[Question]] = {}
    if model is not None:
        for question in read_questions(Path(world_dir) / "questions.jsonl"):
            asked.setdefault(question.video, []).append(question)
    seen, clips, tokens, answered = Gathered(), [], [], []
    for video, (path, scene) in enumerate(progress(scenes, "videos")):
        loaded = load_clips(path, eyes.sampling, squares=eyes.squares)
        features, pixels = eyes.look(loaded.squares)
        full = eyes.full_clips(loaded.spans_s)
        lines = language.lines(scene, loaded.spans_s)
        for clip in full:
            line = [] if lines[clip] == "nothing." else lines[clip].rstrip(".").split(". ")
            true = eyes.facts(scene, loaded.times_s, loaded.spans_s, clip)
            clips.append(Clip(video, loaded.spans_s[clip], true, line))
        connected = connect(model, features[full])
        facts = [clip.facts for clip in clips[len(seen.facts) :]]
        seen.add(video, facts, probed(features[full], pixels[full], connected))
        if model is None or processor is None or connected is None:
            continue
        tokens.append(connected.half().cpu())
        questions = asked.get(path, [])
        words: Part = {"type": "text", "text": language.transcript(scene, loaded.spans_s) + "\n"}
        results = zip(
            questions,
            answers(model, processor, [words], questions),
            answers(model, processor, [{"type": "video", "video": loaded}], questions, features),
            strict=True,
        )
        answered += [Answered(question, video, *right) for question, *right in results]
    return seen, clips, torch.cat(tokens) if tokens else torch.empty(0), answered


def main(args: argparse.Namespace) -> int:
    """Run `apollo diagnose MODEL`.

    Args:
        args: model, data, num_videos, out (or None).
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    read_scenes(args.data, 1)  # before the slow parts: it may be refused
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    eyes = eyes_of_encoder(args.model)
    model, processor = None, None
    if eyes is None:
        model, processor = load_model(args.model)
        eyes = eyes_of(model, processor)
    diagnosis = diagnose(eyes, args.data, model, processor, args.num_videos)
    print_diagnosis(diagnosis, Console())
    if args.out:
        found = {"model": args.model, "data": args.data, "environment": environment()}
        text = json.dumps(found | diagnosis.to_json(), indent=1)
        (Path(args.out) / "diagnosis.json").write_text(text + "\n", encoding="utf-8")
        page = page_of(diagnosis, f"Diagnosis of {args.model}")
        (Path(args.out) / "diagnosis.html").write_text(page, encoding="utf-8")
        print(f"diagnosis.json and diagnosis.html are in {args.out}")
    return 0
