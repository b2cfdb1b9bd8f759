"""Predictions of simulated models whose abilities, and whose questions' shortcuts, are known.

Here because only where the truth is known can be seen whether an audit finds it, how many models
and questions that takes, and how fast a million questions are done. A model has an ability in each
class; a question is harder or easier and tells models apart more or less (two-parameter logistic,
with guessing); some are planted to need one frame or nothing but their text. Who does not see what
a question needs guesses, and all models lean towards the same options, as real ones do. Used by the
tests and by benchmarks/curation.py. Next: `records.py`.
"""

from dataclasses import dataclass

import numpy as np

from apollo.curation.records import COLUMNS, RIGHT, UNANSWERED, WRONG, Labels, Pool

CONDITIONS = ("video", "frame", "text")
NEEDS = ("frames", "frame", "text")
_SEES = {"video": NEEDS, "frame": NEEDS[1:], "text": NEEDS[2:]}  # which needs a condition serves


@dataclass(frozen=True)
class World:
    """What is simulated; the defaults resemble five classes of four-option questions.

    Attributes:
        classes: Names of the classes, equally frequent.
        families: Kinds of question within each class that need the video; one more kind needs one
            frame, and one the text.
        questions_per_video: How many share a video.
        num_options: To choose from.
        shares: Of questions that need frames, one frame, the text.
        ability_sd: Spread of the models' abilities, in logits.
        class_sd: Spread of a model's abilities around its own over the classes.
        discrimination_sd: Spread of the logarithm of the questions' discriminations.
        lean: How strongly blind models share a taste for options: 0 not at all, else the taste is
            drawn for each question from a Dirichlet distribution with 1 / lean in all.
        shortcut_ease: Logits by which a planted question is easier than an average one.
        unanswered: Share of answers that cannot be read.
    """

    classes: tuple[str, ...] = ("temporal_ocr", "egocentric", "spatial", "perception", "reasoning")
    families: int = 4
    questions_per_video: int = 5
    num_options: int = 4
    shares: tuple[float, float, float] = (0.8, 0.12, 0.08)
    ability_sd: float = 1.0
    class_sd: float = 0.3
    discrimination_sd: float = 0.4
    lean: float = 0.1
    shortcut_ease: float = 3.0
    unanswered: float = 0.005


def simulate(
    num_questions: int, num_models: int, seed: int = 0, world: World = World(), name: str = "world"
) -> Pool:
    """Draw a pool; `columns["needs"]` says what is planted.

    Args:
        num_questions: Q.
        num_models: M, named m00, m01, ...
        seed: Same seed, same pool.
        world: What is simulated.
        name: Of the benchmark.
    """
    rng = np.random.default_rng(seed)
    num_classes = len(world.classes)
    class_codes = rng.integers(num_classes, size=num_questions, dtype=np.int32)
    needs = rng.choice(3, num_questions, p=world.shares).astype(np.int32)
    kind = rng.integers(world.families, size=num_questions)
    kind = np.where(needs > 0, world.families + needs - 1, kind)
    families = (class_codes * (world.families + 2) + kind).astype(np.int32)
    videos = (np.arange(num_questions) // world.questions_per_video).astype(np.int32)
    answer = rng.integers(world.num_options, size=num_questions, dtype=np.int8)
    states, chosen = _answers(rng, num_models, class_codes, needs, answer, world)
    nothing = Labels(np.zeros(num_questions, dtype=np.int32), ("",))
    family_names = [f"{c}_{k}" for c in world.classes for k in range(world.families + 2)]
    seconds = rng.choice([30.0, 300.0, 1800.0], size=videos[-1] + 1).astype(np.float32)
    lengths = Labels(
        np.searchsorted([60, 900], seconds).astype(np.int32)[videos], ("short", "medium", "long")
    )
    columns = {
        **dict.fromkeys(COLUMNS, nothing),
        "benchmark": Labels(nothing.codes, (name,)),
        "video": Labels(videos, tuple(f"{v:06d}.mp4" for v in range(videos[-1] + 1))),
        "class": Labels(class_codes, world.classes),
        "family": Labels(families, tuple(family_names)),
        "needs": Labels(needs, NEEDS),
        "duration": lengths,
    }
    return Pool(
        models=tuple(f"m{number:02d}" for number in range(num_models)),
        conditions=CONDITIONS,
        question_ids=np.array([f"q{row:07d}" for row in range(num_questions)], dtype=object),
        columns=columns,
        num_options=np.full(num_questions, world.num_options, dtype=np.int16),
        answer=answer.astype(np.int16),
        duration_s=seconds[videos],
        states=states,
        chosen=chosen,
    )


def _answers(
    rng: np.random.Generator,
    num_models: int,
    class_codes: np.ndarray,
    needs: np.ndarray,
    answer: np.ndarray,
    world: World,
) -> tuple[np.ndarray, np.ndarray]:
    """States and options chosen: (C, M, Q) each."""
    num_questions, options = len(needs), np.arange(world.num_options)
    shape = (len(CONDITIONS), num_models, num_questions)
    states, chosen = np.empty(shape, np.uint8), np.empty(shape, np.int8)
    ability = rng.normal(0, world.ability_sd, (num_models, 1))
    ability = ability + rng.normal(0, world.class_sd, (num_models, len(world.classes)))
    ease = rng.normal(0, 1, num_questions).astype(np.float32)
    ease += np.where(needs > 0, world.shortcut_ease, 0).astype(np.float32)
    slope = rng.lognormal(0, world.discrimination_sd, num_questions).astype(np.float32)
    taste = np.ones((num_questions, world.num_options), dtype=np.float32) / world.num_options
    if world.lean:
        taste = rng.dirichlet(
            np.full(world.num_options, 1 / world.lean / world.num_options), num_questions
        )
    edges = np.cumsum(taste, axis=1).astype(np.float32)
    for place, condition in enumerate(CONDITIONS):
        seen = np.isin(np.array(NEEDS)[needs], _SEES[condition])
        for model in range(num_models):
            logit = slope * (ability[model, class_codes].astype(np.float32) + ease)
            knows = seen & (rng.random(num_questions, dtype=np.float32) < 1 / (1 + np.exp(-logit)))
            draw = rng.random(num_questions, dtype=np.float32)[:, None]
            guess = np.minimum((draw > edges).sum(axis=1), options[-1])
            option = np.where(knows, answer, guess)
            silent = rng.random(num_questions, dtype=np.float32) < world.unanswered
            states[place, model] = np.where(option == answer, RIGHT, WRONG)
            states[place, model, silent] = UNANSWERED
            chosen[place, model] = np.where(silent, -1, option)
    return states, chosen
