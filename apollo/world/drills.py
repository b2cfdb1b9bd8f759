"""Exercises in looking things up, for language models that are to read transcripts.

A transcript answers "What is right after X?" only to a model that finds X in it. A small one hardly
ever learns that from single questions: most of what it is taught there can be had by counting or by
guessing what is there. Here it is asked for *everything at once, in random order, each after its
key* ("Which is each? dog second. yak first."), so that a third of all the tokens it says must be
looked up, and nothing else tells them. Single questions follow with ease; docs/architecture.md has
the figures. Read next: `apollo/train/llm_part.py`, whose lessons these are.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from apollo.messages import Message
from apollo.world import language
from apollo.world.corpus import VIDEO_FAMILIES, balanced_scene, turns
from apollo.world.language import clock, event_text
from apollo.world.questions import (
    FAMILIES,
    ORDINALS,
    STAGE_KINDS,
    VERBS,
    sides_at_end,
    stay_s,
    window,
)
from apollo.world.scene import COLOURS, DIGITS, SHAPES, SPLITS, WORDS, Scene

DRILLED = (*WORDS, *DIGITS, *COLOURS, *SHAPES)
"""Words that drills are made of."""
COUNTED = (*ORDINALS, "eighth", "ninth")

Exchange = tuple[str, str]


def _each(pairs: Sequence[tuple[str, str]], rng: np.random.Generator, join: str = " ") -> str:
    """Keys and their values in random order; a key that comes twice is left out."""
    often = collections.Counter(key for key, _ in pairs)
    told = [f"{key}{join}{value}" for key, value in pairs if often[key] == 1]
    return ". ".join([told[i] for i in rng.permutation(len(told))] or ["none"]) + "."


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
        ("Which is each?", _each(places, rng)),
        ("When is each?", _each(whens, rng)),
        ("What is right after each?", _each(after, rng)),
        ("What is right before each?", _each(before, rng)),
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


def each_of(scene: Scene, rng: np.random.Generator) -> list[Exchange]:
    """Requests for something of everything in a scene, and the answers in random order.

    Args:
        scene: A stage; of tours there are none.
        rng: Decides the order.
    """
    if scene.genre == "tour":
        return []
    events = scene.of_kind(*STAGE_KINDS)
    signs = scene.of_kind("sign")
    said = [event_text(scene, event) for event in events]
    texts = [event.value for event in signs]
    out = []
    # Of sequences in which a thing comes twice, `_each` leaves out what follows it.
    for words, subject, shown in ((said, "What happens", events), (texts, "Which sign is", signs)):
        join = ": " if subject == "What happens" else " "
        ordered = list(itertools.pairwise(words))
        if len(words) > 1:
            again = collections.Counter(words)
            forth = [(a, b) for a, b in ordered if again[a] == 1]
            back = [(b, a) for a, b in ordered if again[b] == 1]
            out.append((f"{subject} right after each?", _each(forth, rng, join)))
            out.append((f"{subject} right before each?", _each(back, rng, join)))
        if words:
            times = [
                (word, window(event.middle_s)) for word, event in zip(words, shown, strict=True)
            ]
            asked = "When does each happen?" if join == ": " else "When is each sign shown?"
            out.append((asked, _each(times, rng, join)))
    if scene.shapes:
        looks = [(thing.name, thing.colour) for thing in scene.shapes]
        out.append(("Which colour is each at first?", _each(looks, rng)))
    done = collections.Counter(
        f"{scene.things[event.thing].name} {event.kind}" for event in scene.of_kind(*VERBS)
    )
    if done:
        counts = [(name, str(count)) for name, count in done.items()]
        out.append(("How many times does each do it?", _each(counts, rng, ": ")))
    sides = [(f"{a.name} from {b.name}", side) for a, b, side in sides_at_end(scene)]
    if sides:
        drawn = [sides[i] for i in rng.permutation(len(sides))[:6]]
        out.append(("At the end, where is each from each?", _each(drawn, rng, ": ")))
    stays = [(thing.name, stay_s(scene, thing.id)) for thing in scene.shapes]
    seconds = [(name, f"{stay}") for name, stay in stays if stay is not None]
    if seconds:
        out.append(("How many seconds is each in view?", _each(seconds, rng)))
    return out


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
