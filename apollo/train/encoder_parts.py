"""The micro encoders: of images and of videos, by language or by themselves, in two sizes.

Language-supervised encoders (SigLIP, InternVideo2's architecture) learn by a sigmoid contrastive
loss against short phrases that name one fact each (arXiv 2303.15343); self-supervised ones (DINOv2,
VideoMAE) from the pixels alone, see `self_supervised.py`. All draw from the same pool of frames or
clips of the micro world, and all go through the one loop. What each can name in the end is for
`apollo diagnose` to say. Read next: `parts.py`, the table of all parts.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
)
from transformers.utils import ModelOutput

from apollo.model.configuration import InternVideo2Config
from apollo.model.encoders import preprocessing
from apollo.model.image_processing import Preprocessing, channels_first
from apollo.model.internvideo2 import InternVideo2Model
from apollo.train.llm_part import VOCABULARY, PartRun
from apollo.train.self_supervised import (
    GLOBAL_AREAS,
    LOCAL_AREAS,
    MASKED_PATCHES,
    MASKED_TUBES,
    NUM_LOCAL_VIEWS,
    MaskedAutoencoder,
    SelfDistillation,
    crop,
    hide,
)
from apollo.train.trainer import LoopSettings, Schedule, run_stage
from apollo.world import language
from apollo.world.render import frame
from apollo.world.scene import make_scene

Batches = Callable[[int], dict[str, torch.Tensor]]
"""From its number to a batch; those below 0 are held out."""
IMAGE_SIZE, NUM_FRAMES, HEAD_DIM, MLP_RATIO = 64, 4, 64, 3
"""Pixels and frames that all micro encoders take, the width of their heads, and of their MLPs over
their own."""
PATCH_SIZE, TUBELET_SIZE = 8, 2
"""Pixels and frames of a patch; InternVideo2's has 16 pixels and 1 frame."""
ROWS, DISTILLED_ROWS = 64, 32
"""Frames or clips of a step; fewer where each is seen in six views."""
HELD_OUT_BATCHES = 8
PHRASE_TOKENS = 6
"""Longest phrase that names a fact, in tokens."""
POOL = {"frame": 36_000, "clip": 30_000}
"""Frames or clips that an encoder is trained on; drawn once, kept in memory (0.4 and 1.5 GB), seen
several times. With 12,000 clips it learnt them by heart."""
EVENTS = tuple(
    "camera pass sign moves turns hits blinks grows shrinks spins splits appears leaves".split()
)
"""What may happen in a clip."""


# ---- what all learn from


def drawn_batches(
    kind: str, prepare: Preprocessing, seed: int, rows: int
) -> Callable[[int], tuple[torch.Tensor, list[list[str]]]]:
    """Batches by number of frames or clips of scenes, each with its facts.

    Those of number 0 and more are drawn from a `POOL`, those below 0 are held out. A batch is
    pixels (rows, T, 3, S, S), normalised, and for each row its facts.

    Args:
        kind: "frame" or "clip".
        prepare: The encoder's preprocessing.
        seed: Seed of the world.
        rows: Frames or clips of a batch.
    """

    @functools.cache
    def drawn(number: int) -> tuple[torch.Tensor, list[str]]:
        frames, facts = draw_facts(kind, seed, np.random.default_rng([seed, 13, number]))
        return channels_first(np.stack([prepare.square(frame) for frame in frames])), facts

    def batch_at(i: int) -> tuple[torch.Tensor, list[list[str]]]:
        numbers = np.random.default_rng([seed, 14, max(i, 0)]).integers(POOL[kind], size=rows)
        if i < 0:
            numbers = POOL[kind] + np.arange(rows) - i * rows
        pixels, facts = zip(*(drawn(int(number)) for number in numbers), strict=True)
        return prepare.normalise(torch.stack(pixels)), list(facts)

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


# ---- supervised by language


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
) -> Batches:
    """Batches of frames or clips, with the phrases that are true of any row.

    Each has `pixel_values` (rows, [T,] 3, S, S), `phrases` (K, PHRASE_TOKENS) and `truth`
    (rows, K), as `FactNaming` takes them; see `drawn_batches`.
    """
    drawn = drawn_batches(kind, prepare, seed, rows)

    @functools.cache
    def encode(phrase: str) -> tuple[int, ...]:
        ids = tokenizer.encode(" " + phrase, add_special_tokens=False)[:PHRASE_TOKENS]
        return tuple(ids + [-1] * (PHRASE_TOKENS - len(ids)))

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        pixels, facts_of_rows = drawn(i)
        phrases = sorted({fact for facts in facts_of_rows for fact in facts})
        column = {phrase: k for k, phrase in enumerate(phrases)}
        truth = torch.zeros(rows, len(phrases))
        for row, facts in enumerate(facts_of_rows):
            truth[row, [column[fact] for fact in facts]] = 1
        return {
            "pixel_values": pixels[:, 0] if kind == "frame" else pixels,
            "phrases": torch.tensor([encode(phrase) for phrase in phrases]),
            "truth": truth,
        }

    return batch_at


def naming_accuracy(
    model: FactNaming,
    batches: Batches,
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
        batch = _held_out(batches, i, model)
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


# ---- supervised by pixels


def view_batches(prepare: Preprocessing, seed: int, rows: int) -> Batches:
    """Batches of views of frames and of patches to hide, as `SelfDistillation` takes them.

    See `drawn_batches`.
    """
    drawn = drawn_batches("frame", prepare, seed, rows)
    size, num_patches = prepare.image_size, (prepare.image_size // PATCH_SIZE) ** 2

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        pictures = drawn(i)[0][:, 0]
        rng = np.random.default_rng([seed, 16, abs(i), i < 0])
        hidden = hide(rng, 2 * rows, num_patches, MASKED_PATCHES)
        return {
            "global_views": crop(pictures, rng, 2, size, GLOBAL_AREAS),
            "local_views": crop(pictures, rng, NUM_LOCAL_VIEWS, size // 2, LOCAL_AREAS),
            "hidden_patches": hidden.unflatten(0, (rows, 2)),
        }

    return batch_at


def masked_batches(prepare: Preprocessing, seed: int, rows: int) -> Batches:
    """Batches of clips and of the tubes to hide, as `MaskedAutoencoder` takes them.

    A tube is a patch through all of the clip's time: what stands still cannot be copied from
    another frame. See `drawn_batches`.
    """
    drawn = drawn_batches("clip", prepare, seed, rows)
    num_tubes = (prepare.image_size // PATCH_SIZE) ** 2

    def batch_at(i: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([seed, 17, abs(i), i < 0])
        hidden = hide(rng, rows, num_tubes, MASKED_TUBES)
        steps = NUM_FRAMES // TUBELET_SIZE
        return {"pixel_values": drawn(i)[0], "hidden_patches": hidden.repeat(1, steps)}

    return batch_at


# ---- their shapes


def siglip(width: int, layers: int) -> SiglipVisionModel:
    """SigLIP's vision model: 8 x 8 patches."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=width * MLP_RATIO,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_DIM,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        )
    )


def dinov2(width: int, layers: int) -> Dinov2Model:
    """DINOv2's model: 8 x 8 patches."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=width,
            mlp_ratio=MLP_RATIO,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_DIM,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
    )


def internvideo2(width: int, layers: int) -> InternVideo2Model:
    """InternVideo2's model: 4 x 4 x 4 patches."""
    return InternVideo2Model(
        InternVideo2Config(
            d_model=width,
            mlp_ratio=MLP_RATIO,
            depth=layers,
            num_heads=width // HEAD_DIM,
            img_size=IMAGE_SIZE,
            patch_size=16,
            num_frames=NUM_FRAMES,
            init_values=0.1,
        )
    )


def videomae(width: int, layers: int) -> VideoMAEForPreTraining:
    """VideoMAE's model: 2 x 8 x 8 patches, and a decoder of two layers half as wide.

    Pixels are painted as they are, not normed patch by patch: colours are facts of this world.
    """
    return VideoMAEForPreTraining(
        VideoMAEConfig(
            hidden_size=width,
            intermediate_size=width * MLP_RATIO,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_DIM,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            num_frames=NUM_FRAMES,
            tubelet_size=TUBELET_SIZE,
            use_mean_pooling=False,  # as in the published models: a norm after the last layer
            norm_pix_loss=False,
            decoder_hidden_size=width // 2,
            decoder_intermediate_size=width // 2 * MLP_RATIO,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=width // 2 // HEAD_DIM,
        )
    )


# ---- their training


def train_siglip(run: PartRun, width: int, layers: int) -> None:
    """Train a SigLIP-style image encoder to name the facts of frames."""
    torch.manual_seed(run.seed)
    _train_to_name("frame", run, siglip(width, layers), num_extra_tokens=0)


def train_internvideo2(run: PartRun, width: int, layers: int) -> None:
    """Train a video encoder of InternVideo2's architecture to name the facts of clips."""
    torch.manual_seed(run.seed)
    _train_to_name("clip", run, internvideo2(width, layers), num_extra_tokens=1)


def _train_to_name(
    kind: str, run: PartRun, encoder: PreTrainedModel, num_extra_tokens: int
) -> None:
    model = FactNaming(encoder, encoder.config.hidden_size, VOCABULARY, num_extra_tokens)
    batches = fact_batches(kind, run.tokenizer, preprocessing(encoder.config), run.seed, ROWS)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, FactNaming)
        return naming_accuracy(model, batches, HELD_OUT_BATCHES, run.tokenizer)

    _train(run, model, batches, evaluate, kept=encoder)


def train_dinov2(run: PartRun, width: int, layers: int) -> None:
    """Train a DINOv2-style image encoder by self-distillation, without words."""
    torch.manual_seed(run.seed)
    model = SelfDistillation(dinov2(width, layers))
    kept = model.teacher.encoder  # the average is the better of the two (arXiv 2104.14294, Fig. 6)
    batches = view_batches(preprocessing(kept.config), run.seed, DISTILLED_ROWS)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        outputs = [model(**_held_out(batches, i, model)) for i in range(HELD_OUT_BATCHES)]
        # Whether what is said of one view is most like what is said of another of its picture: of
        # so many pictures one by chance.
        found = [
            (output.targets[:, 0] @ output.targets[:, 1].T).argmax(1).cpu()
            == torch.arange(DISTILLED_ROWS)
            for output in outputs
        ]
        return {
            "held_out_loss": _mean_loss(outputs),
            "finds_other_view": round(torch.cat(found).float().mean().item(), 4),
        }

    _train(run, model, batches, evaluate, kept)


def train_videomae(run: PartRun, width: int, layers: int) -> None:
    """Train a VideoMAE-style video encoder to paint hidden patches, without words."""
    torch.manual_seed(run.seed)
    model = MaskedAutoencoder(videomae(width, layers))
    kept = model.model.videomae
    batches = masked_batches(preprocessing(kept.config), run.seed, ROWS)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        outputs = [model(**_held_out(batches, i, model)) for i in range(HELD_OUT_BATCHES)]
        return {"held_out_loss": _mean_loss(outputs)}

    _train(run, model, batches, evaluate, kept)


def _held_out(batches: Batches, i: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """Held-out batch number i, where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batches(-1 - i).items()}


def _mean_loss(outputs: list[ModelOutput]) -> float:
    return round(float(np.mean([output["loss"].item() for output in outputs])), 5)


def _train(
    run: PartRun,
    model: nn.Module,
    batches: Batches,
    evaluate: Callable[[nn.Module, int], dict[str, float]],
    kept: PreTrainedModel,
) -> None:
    """Train an encoder with all that it needs for that; it alone ends up in out_dir/model."""
    run_stage(
        model,
        batches,
        Schedule(
            name=kept.config.model_type,
            steps=run.steps,
            learning_rates={"model": 1e-3},
            weight_decay=0.02,
            optimizer="muon",
        ),
        LoopSettings(
            seed=run.seed,
            mixed_precision="bf16",
            num_workers=1,
            log_every=20,
            save_every=500,
            eval_every=200,
        ),
        run.out_dir,
        resume=run.resume,
        on_eval=evaluate,
    )
    kept.save_pretrained(run.out_dir / "model")
