"""Probes: can facts about a clip be read off the vectors that a part of a model hands on?

Here because accuracy on questions does not say which part of a model fails. A fact is a phrase of
one kind ("circle moves left", "sign owl is shown"; apollo/world/language.py). A small probe is
trained on clips of fresh scenes, drawn so that rare facts are frequent, and measured on clips of a
made world. Both show the model's own view: its sampling, its encoders' squares.

What is measured is *duels*. For each clip and each fact true of it, the fact is scored on this clip
and on its rivals, clips of which it is false though it could be true: for what happens, other
clips of the same video, where the same things are in view; for looks, clips that show the same
thing otherwise. 1 is to win every duel, 0 is what anything gets that does not look at the clip,
whatever it knows of the world and of this scene. Read next: `diagnose.py`.

Shapes: C clips, T frames, H x W grid, D channels, M tokens of a clip, P phrases, V videos.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo.eval.verdict import Duels
from apollo.model.image_processing import Preprocessing, channels_first
from apollo.runtime import read_jsonl
from apollo.video import ClipSampling
from apollo.video.sampling import sample
from apollo.world import language
from apollo.world.check import scene_from_dict
from apollo.world.render import frame
from apollo.world.scene import LANDMARKS, SHAPES, Scene, make_scene

THINGS = frozenset((*SHAPES, *LANDMARKS))
EVENTS = tuple(
    "camera pass sign moves turns hits blinks grows shrinks spins splits appears leaves".split()
)
"""What must happen in a scene that is drawn to train probes."""
SIGN_DRAWS = 4
"""Signs are drawn this many times as often as another event: there are forty of them to tell."""
CLIPS_PER_SCENE = 3
"""Of a scene drawn, the clip with the event and others, which are its rivals."""
FULL_CLIP = 0.8
"""Clips at a video's end that last less than this share of a clip are left out."""
MAX_SIDE = 4
"""Features are pooled to so many places a side: on 4 x 4 the micro encoders' facts are read as
well as on 8 x 8, at a quarter of the cost."""
PATCH_SIDE = 8
"""Pixels a side of a place, where the probe is shown pixels: at 32 x 32 a sign can be read."""
MAX_CHANNELS = 1024
"""Wider tokens are folded by a fixed random projection, which keeps the angles between them."""
WIDTH = 128
LONGEST_PHRASE = 6
SCENES_PER_STEP = 20
OTHER_PHRASES = 64
"""In a step, beside the phrases true of its clips, so many others are asked for."""
LEARNING_RATE = 5e-3
EASY_WEIGHT = 0.3
"""Weight of the clips that are no rivals against that of the rivals."""


# ---- facts and their rivals


@dataclass(frozen=True)
class Facts:
    """Which phrases are true of which clips.

    Attributes:
        phrases: P phrases.
        truth: bool (C, P).
        videos: int (C,), the number of each clip's video.
    """

    phrases: tuple[str, ...]
    truth: np.ndarray
    videos: np.ndarray

    @classmethod
    def of(cls, told: Sequence[Iterable[str]], videos: Sequence[int]) -> Facts:
        """Tabulate what is true of each clip."""
        phrases = tuple(sorted({phrase for facts in told for phrase in facts}))
        column = {phrase: i for i, phrase in enumerate(phrases)}
        truth = np.zeros((len(told), len(phrases)), dtype=bool)
        for row, facts in enumerate(told):
            truth[row, [column[phrase] for phrase in facts]] = True
        return cls(phrases, truth, np.asarray(videos, dtype=np.int64))

    @property
    def kinds(self) -> list[str]:
        """The kind of each phrase."""
        return [language.kind_of_fact(phrase) for phrase in self.phrases]

    def rivals(self) -> np.ndarray:
        """Which clips each fact is to be told from, bool (C, P); it is false of all of them.

        A fact of what happens has rivals in the videos in which it is true, looks where the same
        thing is seen, and the ground everywhere.
        """
        in_video = np.zeros((self.videos.max(initial=-1) + 1, len(self.phrases)), dtype=bool)
        np.logical_or.at(in_video, self.videos, self.truth)
        could = in_video[self.videos]
        things = [thing_of(phrase) for phrase in self.phrases]
        kinds = np.array(self.kinds)
        for thing in set(things):
            looks = np.array([t == thing for t in things], dtype=bool) & (kinds == "looks")
            could[:, looks] = self.truth[:, looks].any(1, keepdims=True)
        could[:, kinds == "ground"] = True
        return could & ~self.truth


def thing_of(phrase: str) -> str:
    """The shape or landmark that a phrase is about; "" if it names none."""
    return next((word for word in phrase.split() if word in THINGS), "")


def meets_own_video(kind: str) -> bool:
    """Whether facts of this kind are told from clips of their own video, or of any."""
    return kind not in ("looks", "ground")


def fight(scores: np.ndarray, facts: Facts) -> dict[str, Duels]:
    """Let each true fact meet its rivals.

    Args:
        scores: (C, P), how well each phrase fits each clip.
        facts: What is true.

    Returns:
        The duels of each kind. A fact without rivals is in none.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    rivals = facts.rivals()
    for column, kind in enumerate(facts.kinds):
        for clip in np.flatnonzero(facts.truth[:, column]):
            against = rivals[:, column]
            if meets_own_video(kind):
                against = against & (facts.videos == facts.videos[clip])
            if against.any():
                ahead = scores[clip, column] - scores[against, column]
                videos, values = found.setdefault(kind, ([], []))
                videos.append(int(facts.videos[clip]))
                values.append(float(np.sign(ahead).mean()))
    return {kind: Duels(np.array(v), np.array(x)) for kind, (v, x) in found.items()}


# ---- clips


@dataclass(frozen=True)
class Eyes:
    """What sees: how it wants its frames, and what it makes of them.

    Attributes:
        squares: How each encoder wants its frames.
        sampling: Which frames of a video it sees.
        encode: For each encoder uint8 (C, T, 3, S, S) -> features (C, T, H, W, D).
        single_frames: Whether it is an image encoder alone, which is shown one frame of each clip.
    """

    squares: Sequence[Preprocessing]
    sampling: ClipSampling
    encode: Callable[[list[Tensor]], Tensor]
    single_frames: bool = False

    def look(self, squares: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """See clips, for each encoder uint8 (C, T, S, S, 3).

        Returns:
            Features (C, T, H, W, D), and the pixels that the first encoder saw, in the same form.
        """
        if self.single_frames:
            squares = [array[:, [array.shape[1] // 2]] for array in squares]
        with torch.inference_mode():
            pixels = [channels_first(array) for array in squares]
            return self.encode(pixels), patches(pixels[0])

    def facts(self, scene: Scene, times_s: np.ndarray, spans_s: np.ndarray, clip: int) -> set[str]:
        """What is true of one clip of a video, or of the frame of it that is shown.

        Args:
            scene: What the video shows.
            times_s: (C, T) times of the frames.
            spans_s: (C, 2) start and end of the clips.
            clip: Which one.
        """
        if self.single_frames:
            return set(language.frame_facts(scene, float(times_s[clip, times_s.shape[1] // 2])))
        return {*language.clip_facts(scene, spans_s, clip), f"{scene.ground} ground"}

    def full_clips(self, spans_s: np.ndarray) -> np.ndarray:
        """Which clips (C, 2) are no remainders at the end of a video."""
        return np.flatnonzero(np.ptp(spans_s, axis=1) >= FULL_CLIP * self.sampling.clip_duration_s)


def read_scenes(world_dir: str | Path, num_videos: int | None = None) -> list[tuple[Path, Scene]]:
    """The first videos of a made world, each with its scene.

    Raises:
        ValueError: It is no world, or not of this version.
    """
    path = Path(world_dir) / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{world_dir} is no world: it has no scenes.jsonl; make one by `apollo world make`"
        )
    scenes = []
    for number, row in enumerate(itertools.islice(read_jsonl(path), num_videos), start=1):
        try:
            scenes.append((Path(world_dir) / row["video"], scene_from_dict(row)))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no scene of this version ({error}); make the world again"
            ) from error
    if not scenes:
        raise ValueError(f"{path} has no scenes")
    return scenes


def fresh_clips(
    eyes: Eyes, num_scenes: int, seed: int
) -> Iterator[tuple[int, list[set[str]], Tensor, Tensor]]:
    """Clips of scenes that are in no made world, drawn by kind of event.

    Yields:
        A scene's number, what is true of each of its clips, and what `Eyes.look` returns of them.
    """
    rng = np.random.default_rng([seed, 31])
    kinds = (*EVENTS, *["sign"] * (SIGN_DRAWS - 1))
    for number in range(num_scenes):
        scene, times_s, spans_s, clips = _draw(eyes, rng, kinds[int(rng.integers(len(kinds)))])
        frames = [[frame(scene, float(t)) for t in times_s[clip]] for clip in clips]
        squares = [
            np.stack([[prepare.square(picture) for picture in clip] for clip in frames])
            for prepare in eyes.squares
        ]
        facts = [eyes.facts(scene, times_s, spans_s, clip) for clip in clips]
        yield number, facts, *eyes.look(squares)


def _draw(
    eyes: Eyes, rng: np.random.Generator, kind: str
) -> tuple[Scene, np.ndarray, np.ndarray, list[int]]:
    """A scene with an event of the kind, its clips, and which of them to use, the event's first."""
    while True:
        scene = make_scene(0, int(rng.integers(2**40)))
        if not scene.of_kind(kind):
            continue
        times_s, spans_s = sample(scene.duration_s, eyes.sampling, scene.source_fps)
        full = eyes.full_clips(spans_s)
        told = language.assign(scene, spans_s)
        having = [int(clip) for clip in full if kind in {event.kind for event in told[clip]}]
        if having and len(full) > 1:
            first = having[int(rng.integers(len(having)))]
            rest = [int(clip) for clip in rng.permutation(full) if clip != first]
            return scene, times_s, spans_s, [first, *rest[: CLIPS_PER_SCENE - 1]]


def patches(pixels: Tensor) -> Tensor:
    """Pixels (C, T, 3, S, S), made coarse, as features (C, T, H, W, D) of places."""
    clips, frames = pixels.shape[:2]
    coarse = F.adaptive_avg_pool2d(pixels.flatten(0, 1).float() / 255, MAX_SIDE * PATCH_SIDE)
    split = coarse.view(clips, frames, 3, MAX_SIDE, PATCH_SIDE, MAX_SIDE, PATCH_SIDE)
    return split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


def places(features: Tensor) -> Tensor:
    """Features (C, T, H, W, D) as tokens of places (C, M, T x D), pooled where the grid is fine.

    All moments of a place are one token, so that change can be read off it.
    """
    clips, frames, height, width, channels = features.shape
    grid = (min(height, MAX_SIDE), min(width, MAX_SIDE))
    flat = features.flatten(0, 1).permute(0, 3, 1, 2).float()
    pooled = F.adaptive_avg_pool2d(flat, grid).view(clips, frames, channels, -1)
    return fold(pooled.permute(0, 3, 1, 2).flatten(2))


def fold(tokens: Tensor) -> Tensor:
    """Tokens (C, M, D) in half precision on the CPU, of at most `MAX_CHANNELS` channels."""
    if tokens.shape[-1] > MAX_CHANNELS:
        generator = torch.Generator().manual_seed(tokens.shape[-1])
        matrix = torch.randn(tokens.shape[-1], MAX_CHANNELS, generator=generator)
        tokens = tokens.float() @ matrix.to(tokens.device) * MAX_CHANNELS**-0.5
    return tokens.half().cpu()


# ---- the probe


class FactProbe(nn.Module):
    """Scores phrases on the tokens of a clip.

    Each token, after one small layer, is compared with the phrase; a soft maximum over the tokens
    decides (logsumexp: attention whose query is the phrase). A phrase is the sum of learned vectors
    of its words, so that rare phrases share what they have in common.

    Args:
        phrases: All that can be asked for.
        tokens: (C, M, D), to take mean and spread of.
    """

    def __init__(self, phrases: Sequence[str], tokens: Tensor) -> None:
        super().__init__()
        # A word at another place of a phrase is another word: "circle hits ring".
        words = sorted({pair for phrase in phrases for pair in enumerate(phrase.split())})
        self.columns = {word: i + 1 for i, word in enumerate(words)}
        self.words = nn.Embedding(len(words) + 1, WIDTH + 1, padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.7)
        with torch.no_grad():
            self.words.weight[:, -1] = 0  # the bias
            self.words.weight[0] = 0
        sample_of = tokens[:: max(1, len(tokens) // 300)].float()
        mean = sample_of.mean((0, 1))
        self.mean, self.spread = mean, (sample_of - mean).square().mean((0, 1)).sqrt() + 1e-6
        self.read = nn.Linear(tokens.shape[-1], WIDTH)
        self.position = nn.Parameter(torch.randn(tokens.shape[1], WIDTH) * 0.3)
        self.layer = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.value = nn.Linear(WIDTH, WIDTH)

    def ids(self, phrases: Sequence[str]) -> Tensor:
        """Numbers (P, LONGEST_PHRASE) of the phrases' words; 0 for none, or one never learnt."""
        ids = torch.zeros(len(phrases), LONGEST_PHRASE, dtype=torch.long)
        for row, phrase in enumerate(phrases):
            for pair in enumerate(phrase.split()[:LONGEST_PHRASE]):
                ids[row, pair[0]] = self.columns.get(pair, 0)
        return ids

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Logits (C, P) of phrases `ids` (P, LONGEST_PHRASE) on tokens (C, M, D)."""
        hidden = self.read((tokens.float() - self.mean) / self.spread) + self.position
        values = self.value(hidden + self.layer(hidden))  # (C, M, WIDTH)
        vectors = self.words(ids).sum(1)  # (P, WIDTH + 1)
        fits = torch.einsum("cmw,pw->cpm", values, vectors[:, :-1]) * 2 * WIDTH**-0.5
        return fits.logsumexp(-1) + vectors[:, -1] - 4.0  # -4: at the start, almost all is false


def train_probe(tokens: Tensor, facts: Facts, num_steps: int, seed: int = 0) -> FactProbe:
    """Train a probe with AdamW, one-cycle.

    Args:
        tokens: (C, M, D).
        facts: What is true of the clips. Those of one video make up a step together.
        num_steps: How long.
        seed: Of weights and draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = FactProbe(facts.phrases, tokens)
    rng = np.random.default_rng([seed, 32])
    ids, truth, weights = probe.ids(facts.phrases), torch.tensor(facts.truth), _weights(facts)
    members = [np.flatnonzero(facts.videos == video) for video in np.unique(facts.videos)]
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.1
    )
    for _ in range(num_steps):
        drawn = rng.choice(len(members), size=min(SCENES_PER_STEP, len(members)), replace=False)
        clips = np.concatenate([members[i] for i in drawn])
        others = rng.integers(len(facts.phrases), size=OTHER_PHRASES)
        asked = np.union1d(np.flatnonzero(facts.truth[clips].any(0)), others)
        logits = probe(tokens[clips], ids[asked])
        answers = truth[clips][:, asked].float()
        losses = F.binary_cross_entropy_with_logits(logits, answers, reduction="none")
        loss = (losses * weights[clips][:, asked]).sum() * len(tokens) / len(clips)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return probe.eval()


def _weights(facts: Facts) -> Tensor:
    """Weights (C, P) of the pairs in the loss.

    Kinds weigh the same, and of each phrase the clips where it is true as much as its rivals.
    """
    rivals = facts.rivals()
    easy = ~facts.truth & ~rivals
    number = facts.truth.sum(0)
    kinds = np.array(facts.kinds)
    weight = np.zeros(len(kinds))
    for kind in set(kinds):
        weight[kinds == kind] = 1 / number[kinds == kind].sum()
    share = number * weight / len(set(kinds))
    found = facts.truth * weight / len(set(kinds))
    found += rivals * share / np.maximum(rivals.sum(0), 1)
    found += EASY_WEIGHT * easy * share / np.maximum(easy.sum(0), 1)
    return torch.tensor(found, dtype=torch.float32)


@torch.inference_mode()
def probe_scores(probe: FactProbe, tokens: Tensor, phrases: Sequence[str]) -> np.ndarray:
    """Logits (C, P) of phrases on all clips (C, M, D)."""
    ids = probe.ids(phrases)
    return torch.cat([probe(part, ids) for part in tokens.split(32)]).numpy()
