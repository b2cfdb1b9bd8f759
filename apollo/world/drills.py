"""Exercises in looking things up, for language models that are to read transcripts.

A transcript answers "What is right after X?" only to a model that finds X in it. A small one hardly
ever learns that from single questions: most of what it is taught there can be had by counting or by
guessing what is there. Here it is asked for *everything at once, in random order, each after its
key* ("Which is each? dog second. yak first."), so that a third of all the tokens it says must be
looked up, and nothing else tells them. Single questions follow with ease; docs/architecture.md has
the figures. Read next: `apollo/train/llm_part.py`, whose lessons these are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from apollo.messages import Message
from apollo.world import language
from apollo.world.corpus import VIDEO_FAMILIES, balanced_scene, turns
from apollo.world.language import clock
from apollo.world.listing import Exchange, each, each_of
from apollo.world.questions import FAMILIES, ORDINALS
from apollo.world.scene import COLOURS, DIGITS, SHAPES, SPLITS, WORDS

DRILLED = (*WORDS, *DIGITS, *COLOURS, *SHAPES)
"""Words that drills are made of."""
COUNTED = (*ORDINALS, "eighth", "ninth")


def _shuffled(exchanges: Sequence[Exchange], rng: np.random.Generator, most: int) -> list[Exchange]:
    return [exchanges[i] for i in rng.permutation(len(exchanges))[:most]]


def drill(
    seed: int,
    index: int,
    split: str = "train",
    most_items: int = 4,
    num_questions: int = 0,
) -> list[Message]:
    """A transcript of single words, and where, when, before and after what each of them stands.

    A pure function of its arguments.

    Args:
        seed: Seed of the world.
        index: Number of the exercise in its split.
        split: "train" or "test".
        most_items: Most words of the transcript, up to nine; there are at least two.
        num_questions: Single questions that are asked besides, and a list of all.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index, 3])
    items = [str(w) for w in rng.choice(DRILLED, int(rng.integers(2, most_items + 1)), False)]
    lines: list[str] = []
    times: list[str] = []
    while len(times) < len(items):
        span = f"{clock(2 * len(lines))}-{clock(2 * len(lines) + 2)}"
        here = items[len(times) :][: int(rng.choice([0, 1, 1, 1, 2]))]
        times += [span] * len(here)
        lines.append(f"clip from {span}: {'. '.join(here or ['nothing'])}.")
    after = list(itertools.pairwise(items))
    before = [(second, first) for first, second in after]
    places = list(zip(items, COUNTED, strict=False))
    whens = list(zip(items, times, strict=True))
    asked = [
        ("Which is each?", each(places, rng)),
        ("When is each?", each(whens, rng)),
        ("What is right after each?", each(after, rng)),
        ("What is right before each?", each(before, rng)),
    ]
    if num_questions:
        single = [("How many?", str(len(items)))]
        single += [(f"What is {place}?", item) for item, place in places]
        single += [(f"When is {item}?", time) for item, time in whens]
        single += [(f"What is right after {item}?", other) for item, other in after]
        single += [(f"What is right before {item}?", other) for item, other in before]
        whole = [("List all.", ". ".join(items) + ".")]
        whole.append(("List all, the last first.", ". ".join(items[::-1]) + "."))
        asked += _shuffled(whole, rng, 1) + _shuffled(single, rng, num_questions)
    return turns("\n".join(lines), _shuffled(asked, rng, len(asked)))


def scene_drill(
    seed: int,
    index: int,
    split: str = "train",
    longest_s: float = 20.0,
    most_each: int = 4,
    most_questions: int = 8,
) -> list[Message]:
    """The brief transcript of a short scene, and the same exercise with what happens in it.

    A pure function of its arguments.

    Args:
        seed: Seed of the world.
        index: Number of the exercise in its split.
        split: "train" or "test", whose scenes are told.
        longest_s: Longest scene that is told, in seconds.
        most_each: Most requests for something of each (`each_of`).
        most_questions: Most single questions, without options.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index, 4])
    scene = balanced_scene(rng, seed, split, longest_s)
    asked = [FAMILIES[name].ask(scene, rng) for name in VIDEO_FAMILIES for _ in range(2)]
    single = {question.question: question.answer for question in asked if question is not None}
    exchanges = _shuffled(each_of(scene, rng), rng, most_each)
    exchanges += _shuffled(list(single.items()), rng, most_questions)
    transcript = language.transcript(scene, language.clip_spans(scene.duration_s), brief=True)
    return turns(transcript, _shuffled(exchanges, rng, len(exchanges)))
