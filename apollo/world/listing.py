"""Requests for all that a scene shows at once, and their answers.

A question asks one thing of what happens; a list or a table asks all of it, so that its answer is
many steps of what questions ask one of: the next after this one, the one before, when it was.
Read next: `corpus.py` and `drills.py`, which ask these of videos and of transcripts.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from apollo.world.language import event_text
from apollo.world.questions import ORDINALS, STAGE_KINDS, VERBS, sides_at_end, stay_s, window
from apollo.world.scene import Scene, place_of

Exchange = tuple[str, str]
"""A request and its answer."""


def everything(scene: Scene, spans: np.ndarray, rng: np.random.Generator) -> list[Exchange]:
    """Both `lists` and `each_of`; of videos whose clips leave gaps, nothing."""
    listed = lists(scene, spans)
    return listed + each_of(scene, rng) if listed else []


def lists(scene: Scene, spans: np.ndarray) -> list[Exchange]:
    """Requests for all signs, events, places, moves of the camera in order, and their answers.

    Of videos whose clips leave gaps nothing is listed.

    Args:
        scene: What the video shows.
        spans: (C, 2) the clips that are seen, in seconds.
    """
    if spans[-1, 1] - spans[0, 0] > (spans[:, 1] - spans[:, 0]).sum() + 0.1:
        return []

    def told(items: Sequence[str]) -> str:
        return ". ".join(items or ["none"]) + "."

    def numbered(items: Sequence[str]) -> str:
        return told([f"{name} {item}" for name, item in zip(ORDINALS, items, strict=False)])

    out = []
    if scene.genre == "tour":
        moves = [leg.value for leg in scene.of_kind("camera")]
        passed = [scene.things[event.thing].label for event in scene.of_kind("pass")]
        for subject, items in (("moves of the camera", moves), ("passed things", passed)):
            out += [(f"List the {subject}.", told(items))]
            out += [(f"Number the {subject}.", numbered(items))]
        return out
    for subject, events in (
        ("signs", scene.of_kind("sign")),
        ("events", scene.of_kind(*STAGE_KINDS)),
    ):
        items = [e.value if subject == "signs" else event_text(scene, e) for e in events]
        times = [f"{item} {window(e.middle_s)}" for item, e in zip(items, events, strict=True)]
        out += [(f"List the {subject}.", told(items))]
        out += [(f"List the {subject}, the last first.", told(items[::-1]))]
        out += [(f"List the {subject} with their times.", told(times))]
        if subject == "signs":
            out += [(f"Number the {subject}.", numbered(items))]
    gone = {event.thing for event in scene.of_kind("leaves")}
    first = [f"{s.name} {place_of(*s.position[0][1:])}" for s in scene.shapes]
    last = [f"{s.name} {place_of(*s.position[-1][1:])}" for s in scene.shapes if s.id not in gone]
    out += [("Where is everything at first?", told(first))]
    out += [("Where is everything at the end?", told(last))]
    return out


def each(pairs: Sequence[Exchange], rng: np.random.Generator, join: str = " ") -> str:
    """Tell keys and their values in random order; a key that comes twice is left out."""
    often = collections.Counter(key for key, _ in pairs)
    told = [f"{key}{join}{value}" for key, value in pairs if often[key] == 1]
    return ". ".join([told[i] for i in rng.permutation(len(told))] or ["none"]) + "."


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
    for words, shown, what, when, join in (
        (said, events, "What happens", "When does each happen?", ": "),
        (texts, signs, "Which sign is", "When is each sign shown?", " "),
    ):
        if len(words) > 1:
            # After which of the two, where a thing comes twice? That is not asked.
            again, ordered = collections.Counter(words), list(itertools.pairwise(words))
            forth = [(a, b) for a, b in ordered if again[a] == 1]
            back = [(b, a) for a, b in ordered if again[b] == 1]
            out.append((f"{what} right after each?", each(forth, rng, join)))
            out.append((f"{what} right before each?", each(back, rng, join)))
        if words:
            times = [window(event.middle_s) for event in shown]
            out.append((when, each(list(zip(words, times, strict=True)), rng, join)))
    if scene.shapes:
        looks = [(thing.name, thing.colour) for thing in scene.shapes]
        out.append(("Which colour is each at first?", each(looks, rng)))
    done = collections.Counter(
        f"{scene.things[event.thing].name} {event.kind}" for event in scene.of_kind(*VERBS)
    )
    if done:
        counts = [(name, str(count)) for name, count in done.items()]
        out.append(("How many times does each do it?", each(counts, rng, ": ")))
    sides = [(f"{a.name} from {b.name}", side) for a, b, side in sides_at_end(scene)]
    if sides:
        drawn = [sides[i] for i in rng.permutation(len(sides))[:6]]
        out.append(("At the end, where is each from each?", each(drawn, rng, ": ")))
    stays = [(thing.name, stay_s(scene, thing.id)) for thing in scene.shapes]
    seconds = [(name, f"{stay}") for name, stay in stays if stay is not None]
    if seconds:
        out.append(("How many seconds is each in view?", each(seconds, rng)))
    return out
